"""Tables of a page as Weights & Biases'."""

from __future__ import annotations

import pytest

from natrain.cli import main


@pytest.mark.slow
def test_tables_go_to_wandb(folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(["report", str(folder), "--wandb", "natrain"]) == 0
    (run,) = (folder / "wandb").glob("offline-run-*")
    logged = {path.name.split("_")[0] for path in (run / "files" / "media" / "table").glob("*.json")}
    assert {"gains", "errors", "environment"} <= logged


MINE = """\
kernels: [cpu]
runs: 3
problems: [{shape: 4x4, heads: 1, head_dim: 8, kernel_size: 3}]
"""


@pytest.mark.slow
def test_an_ablation_logs_its_tables_when_a_project_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "mine.yaml").write_text(MINE)
    words = ["ablate", f"ablation={tmp_path}/mine.yaml", "device=cpu"]
    assert main([*words, f"out={tmp_path}/without"]) == 0 and not (tmp_path / "without" / "wandb").exists()
    assert main([*words, f"out={tmp_path}/out", "wandb=natrain"]) == 0
    (run,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    assert {"errors", "environment", "runs"} <= {
        path.name.split("_")[0] for path in (run / "files" / "media" / "table").glob("*.json")
    }


@pytest.mark.parametrize(
    "words", [["ablate", "ablation=dtypes", "wandb=mine"], ["report", "FOLDER", "--wandb", "mine"]]
)
def test_a_missing_key_of_wandb_is_said_before_anything_is_measured(words, folder, monkeypatch, capsys):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(folder / "none"))
    monkeypatch.setenv("HOME", str(folder))
    assert main([str(folder) if word == "FOLDER" else word for word in words]) == 2
    said = capsys.readouterr()
    assert "wandb='mine' is not allowed" in said.err and "WANDB_MODE=offline" in said.err and not said.out
