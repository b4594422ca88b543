"""Pages of models and trainings, and of several folders."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from natrain.bench import models, rows, training
from natrain.bench.case import Case
from natrain.cli import main
from natrain.report.build import build_page
from natrain.report.html import html
from tests.report.reading import table


def models_and_trainings(tmp_path: Path) -> None:
    """Rows of two kernels; fused failed before it was timed."""
    rows.start(tmp_path / "models.csv", models.COLUMNS)
    setting = {"plan": "p", "model": "nat_tiny", "precision": "bf16", "compile": 1, "batch": 8, "img_size": ""}
    failed = {**setting, "kernel": "fused", "mode": "training", "status": "failed", "reason": "no", "utc": "now"}
    rows.append(tmp_path / "models.csv", failed, models.COLUMNS)
    for kernel, speed in (("naive", 100.0), ("fused", 250.0)):
        row = dict(setting)
        row |= {
            "kernel": kernel,
            "mode": "training",
            "status": "ok",
            "images_per_s": speed,
            "low": speed,
            "high": speed,
        }
        rows.append(
            tmp_path / "models.csv", {**row, "attention_share": 0.25, "drift": 1e-3, "utc": "now"}, models.COLUMNS
        )
    rows.start(tmp_path / "training.csv", training.COLUMNS)
    for kernel, top1 in (("naive", 50.0), ("fused", 51.0)):
        run = tmp_path / "runs" / f"{kernel}-0"
        run.mkdir(parents=True)
        (run / "metrics.csv").write_text("step,loss,top1\n1,2.0,\n2,1.5,\n")
        row = {
            "plan": "p",
            "kernel": kernel,
            "seed": 0,
            "status": "ok",
            "top1": top1,
            "images_per_s": 10,
            "run": run.name,
        }
        rows.append(tmp_path / "training.csv", {**row, "settings": "", "utc": "now"}, training.COLUMNS)
    (tmp_path / "environment.jsonl").write_text('{"device": "a device", "plan": "mine", "baseline": "naive"}\n')


def test_models_and_trainings_have_pages(tmp_path):
    models_and_trainings(tmp_path)
    page = build_page([tmp_path])
    assert "models-training-failures" not in {table.name for table in page.tables}
    found = {row["kernel"]: row for row in table(page, "models-training")}
    assert found["fused"]["x naive"] == 2.5 and found["fused"]["attention %"] == 25.0
    assert found["fused"]["model"] == "nat_tiny bf16 compiled b8"
    assert len(table(page, "losses")) == 4 and [row["top-1 %"] for row in table(page, "trainings")] == [50.0, 51.0]
    assert page.summary[0].startswith("fused against naive, 1 seeds: top-1 +1.00 points")
    assert html(page).count("<figure>") == 2


def test_every_folder_has_its_own_baseline_and_files(tmp_path, folder, capsys):
    for name in ("naive", "fused"):
        (tmp_path / name).mkdir()
        models_and_trainings(tmp_path / name)
    session = '{"device": "a device", "plan": "mine", "baseline": "fused"}\n'
    (tmp_path / "fused" / "environment.jsonl").write_text(session)
    page = build_page([tmp_path / "fused", tmp_path / "naive", folder])
    assert {row["kernel"]: row["x fused"] for row in table(page, "models-training-1")} == {"naive": 0.4, "fused": 1.0}
    assert {row["kernel"]: row["x naive"] for row in table(page, "models-training-2")} == {"naive": 1.0, "fused": 2.5}
    assert {row["kernel"] for row in table(page, "gains")} == {"gemm", "fused"}
    names = [each.name for each in page.tables]
    # A chart and the table beside it are of one file.
    assert {name for name in names if names.count(name) > 1} == {"models-training-1", "models-training-2"}
    assert f"Trainings: {tmp_path}/naive" in [section.title for section in page.sections]
    assert any(line.startswith(f"{tmp_path}/fused: naive against fused, 1 seeds") for line in page.summary)


@pytest.mark.parametrize("name", ["../tile 4", "a/b", "<b>|"])
def test_a_contender_of_any_name_has_its_files(tmp_path, name):
    rows.start(tmp_path / "results.csv")
    case = Case.of({"shape": "28", "heads": 2, "head_dim": 32, "kernel_size": 3})
    for arm, status in (("naive", "ok"), (name, "ok"), (f"{name}2", "failed")):
        row = {**case.words, "plan": "p", "arm": arm, "direction": "forward", "status": status, "utc": "now"}
        times = {"median_ms": 1, "low_ms": 1, "high_ms": 1, "error": 0}
        rows.append(tmp_path / "results.csv", {**row, **(times if status == "ok" else {"reason": "<class 'int'>"})})
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "my page")]) == 0
    text = (tmp_path / "my page/report.md").read_text()
    links = re.findall(r"\]\(([^) ]*)\)", text)
    assert len(links) == text.count("](") and any("heat-" in link for link in links)
    assert all((tmp_path / "my page" / unquote(link)).is_file() for link in links)
    assert "&lt;class 'int'>" in text and "| <" not in text


def test_a_baseline_where_nothing_has_a_time(tmp_path, capsys):
    rows.start(tmp_path / "results.csv")
    assert main(["report", str(tmp_path), "--baseline", "naive"]) == 2
    assert "no contender has a time or an accuracy. Try: no --baseline" in capsys.readouterr().err


def test_a_baseline_without_a_time_is_refused_for_models_and_trainings(tmp_path, capsys):
    models_and_trainings(tmp_path)
    assert main(["report", str(tmp_path), "--baseline", "fusd"]) == 2
    assert "--baseline='fusd' is not allowed: expected one of naive, fused. Try: --baseline fused" in (
        capsys.readouterr().err
    )
    page = build_page([tmp_path], baseline="fused")
    assert {row["kernel"]: row["x fused"] for row in table(page, "models-training")} == {"naive": 0.4, "fused": 1.0}
