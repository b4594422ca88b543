"""scripts/compare_sweeps.py: gains, shares and changes of results made by hand."""

from __future__ import annotations

import runpy
import sys

import pytest

from natrain.bench import rows
from natrain.bench.case import Case


@pytest.fixture
def script(repository):
    return runpy.run_path(str(repository / "scripts/compare_sweeps.py"))


def write(folder, problems: dict[str, tuple[float, float, float]], spread: dict[str, float] | None = None) -> None:
    """naive, gemm and fused forward, in ms, of 1-D problems by length; ``spread``: intervals in medians, else none."""
    folder.mkdir()
    rows.start(folder / "results.csv")
    for shape, times in problems.items():
        case = Case.of({"shape": shape, "heads": 1, "head_dim": 32, "kernel_size": 3, "dtype": "fp16"})
        for arm, ms in zip(("naive", "gemm", "fused"), times, strict=True):
            row = {**case.words, "plan": "p", "arm": arm, "direction": "forward", "status": "ok", "utc": "now"}
            high = ms * (1 + (spread or {}).get(shape, 0))
            rows.append(folder / "results.csv", {**row, "median_ms": ms, "low_ms": ms, "high_ms": high})


def test_a_disturbed_problem_counts_once_it_was_measured_again(script, tmp_path):
    write(tmp_path / "new", {"100": (2.0, 1.0, 0.5)}, {"100": 1.5})
    assert script["times_of"](tmp_path / "new") == ({}, 1)
    write(tmp_path / "again", {"100": (2.0, 1.0, 0.5)})
    again = (tmp_path / "again/results.csv").read_text().partition("\n")[2]
    with open(tmp_path / "new/results.csv", "a") as file:
        file.write(again)
    kept, left_out = script["times_of"](tmp_path / "new")
    assert list(kept.values()) == [{"naive": 2.0, "gemm": 1.0, "fused": 0.5}] and left_out == 0


def test_gains_shares_and_what_changed(script, tmp_path, monkeypatch, capsys):
    write(tmp_path / "new", {"100": (2.0, 1.0, 0.5), "200": (2.0, 2.5, 4.0), "300": (9.0, 1.0, 1.0)}, {"300": 1.5})
    write(tmp_path / "old", {"100": (2.0, 1.0, 1.0), "200": (2.0, 2.5, 2.0), "300": (9.0, 9.0, 9.0)})
    monkeypatch.setattr(sys, "argv", ["compare_sweeps.py", str(tmp_path / "new"), str(tmp_path / "old")])
    script["main"]()
    printed = capsys.readouterr().out
    assert printed.startswith("2 problems and directions, 1 left out")
    # Ratios 2 and 0.8 of gemm, 4 and 0.5 of fused.
    expected = "| fp16 1-D | forward | 2 | +40 % (-20, +100) | 1.26 | 50 % | +125 % (-50, +300) | 1.41 | 50 %, 50 % |"
    assert expected in printed
    assert "fp16: gemm not slower than naive 50.0 %, fused 50.0 %, than gemm 50.0 %" in printed
    assert "fp16 1-D forward: naive 1.00 (1.00, 1.00), gemm 1.00 (1.00, 1.00), fused 1.00 (0.50, 2.00)" in printed
    assert printed.endswith("not here: 1 fp16\n")


def test_a_folder_without_results(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare_sweeps.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no results.csv"):
        script["main"]()
