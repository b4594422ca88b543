"""scripts/compare_layers.py: ratios and floors of results made by hand."""

from __future__ import annotations

import json
import runpy
import sys

import pytest
import torch

from natrain.bench import rows


@pytest.fixture
def script(repository):
    return runpy.run_path(str(repository / "scripts/compare_layers.py"))


def test_floors_and_ratios(script, tmp_path, monkeypatch, capsys):
    """56/1 in bf16: 51.38 MB a feature tensor; forward four of them at 1 TB/s, 0.2055 ms, backward eight."""
    layer = script["layers"].LAYERS[0]
    case = layer.case(torch.bfloat16, False)
    rows.start(tmp_path / "results.csv")
    for arm, times in {"fused": (0.411, 0.822), "dense": (0.822, 0.411)}.items():
        for which, ms in zip(("forward", "backward"), times, strict=True):
            row = {**case.words, "plan": "p", "arm": arm, "direction": which, "status": "ok", "utc": "now"}
            rows.append(tmp_path / "results.csv", {**row, "median_ms": ms, "low_ms": ms, "high_ms": ms})
    (tmp_path / "environment.jsonl").write_text(json.dumps({"device": "a device", "copy_bytes_per_s": 1e12}) + "\n")
    monkeypatch.setattr(sys, "argv", ["compare_layers.py", str(tmp_path)])
    script["main"]()
    printed = capsys.readouterr().out
    forward, backward = (peer / ms for peer, ms in zip((0.53, 2.50), (0.411, 0.822), strict=True))
    assert f"| 56/1 | 0.4110 / 0.8220 | 2.00 / 2.00 | {forward:.2f} / {backward:.2f} | 2.00 / 0.50 |" in printed
    assert f"backward, geometric means over ours: peer {backward:.2f}, dense 0.50" in printed
    assert "28/1" not in printed


def test_a_folder_without_results(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare_layers.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no results.csv"):
        script["main"]()
    rows.start(tmp_path / "results.csv")
    with pytest.raises(SystemExit, match="holds no environment.jsonl"):
        script["main"]()


def test_every_row_has_its_peers(script):
    layers = script["layers"]
    names = {layer.name for layer in layers.LAYERS}
    assert set(layers.BEST_PEER_MS) == names
    assert set(layers.NATTEN_NAIVE_MS) == set(layers.NATTEN_GEMM_MS) <= names
