"""Tables and charts of whole models and of trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from natrain.bench.models import SETTING
from natrain.bench.training import comparison
from natrain.report import svg
from natrain.report.blocks import Chart, Section, Table
from natrain.training.metrics import read_metrics


def _number(text: str) -> float | None:
    return float(text) if text else None


def model_sections(rows: Sequence[Mapping[str, str]], baseline: str) -> list[Section]:
    """images/s, memory, the share of attention and drift, a section a mode."""
    rows = _latest(rows, (*SETTING, "kernel", "mode"))
    sections = []
    for mode in ("training", "inference"):
        own = [row for row in rows if row["mode"] == mode]
        timed = [row for row in own if row["status"] == "ok"]
        speeds = {(_setting(row), row["kernel"]): float(row["images_per_s"]) for row in timed}
        table = Table(
            f"models-{mode}",
            f"Models, {mode}",
            (
                "model",
                "kernel",
                "images/s",
                "low",
                "high",
                f"x {baseline}",
                "attention %",
                "peak MiB",
                "drift",
            ),
            tuple(
                (
                    _setting(row),
                    row["kernel"],
                    float(row["images_per_s"]),
                    float(row["low"]),
                    float(row["high"]),
                    round(speeds[_setting(row), row["kernel"]] / speeds[_setting(row), baseline], 3)
                    if (_setting(row), baseline) in speeds
                    else None,
                    round(100 * float(row["attention_share"]), 1),
                    _number(row["peak_mib"]),
                    _number(row["drift"]),
                )
                for row in timed
            ),
            "Attention: all attention layers alone, as a share of the step. Drift: relative difference from the "
            "reference kernel with the same weights and data; in inference of the logits, in training the largest of "
            "ten losses.",
        )
        blocks: list[Table | Chart] = [table] if table.rows else []
        if timed:
            series: dict[str, dict[str, tuple[float, float, float]]] = {}
            for row in timed:
                values = tuple(float(row[name]) for name in ("images_per_s", "low", "high"))
                series.setdefault(row["kernel"], {})[_setting(row)] = values
            title = f"Images a second, {mode}"
            blocks.insert(0, Chart(f"models-{mode}-chart", title, svg.bars(title, series, "images/s"), table))
        failed = tuple((_setting(row), row["kernel"], row["reason"]) for row in own if row["status"] != "ok")
        if failed:
            blocks.append(Table(f"models-{mode}-failures", "Without a time", ("model", "kernel", "reason"), failed))
        if blocks:
            sections.append(Section(f"Models, {mode}", tuple(blocks)))
    return sections


def _latest(rows: Sequence[Mapping[str, str]], names: Sequence[str]) -> list[Mapping[str, str]]:
    """The last row of each run: one that failed may have been run again."""
    return list({tuple(row[name] for name in names): row for row in rows}.values())


def _setting(row: Mapping[str, str]) -> str:
    compiled = " compiled" if row["compile"] == "1" else ""
    size = f" {row['img_size']} px" if row["img_size"] else ""
    return f"{row['model']} {row['precision']}{compiled} b{row['batch']}{size}"


def training_sections(rows: Sequence[Mapping[str, str]], folder: Path, baseline: str) -> list[Section]:
    """Loss curves, accuracies, and the paired comparison."""
    rows = _latest(rows, ("run",))
    table = Table(
        "trainings",
        "Trainings",
        ("kernel", "seed", "trial", "top-1 %", "validation loss", "images/s", "seconds", "status", "settings"),
        tuple(
            (
                row["kernel"],
                int(row["seed"]),
                row["trial"] or None,
                _number(row["top1"]),
                _number(row["val_loss"]),
                _number(row["images_per_s"]),
                _number(row["seconds"]),
                row["status"] if row["status"] == "ok" else row["reason"],
                row["settings"],
            )
            for row in rows
        ),
    )
    blocks: list[Table | Chart] = []
    curves: dict[str, list[svg.Point]] = {}
    for row in rows:
        metrics = folder / "runs" / row["run"] / "metrics.csv"
        if metrics.is_file():
            points = [
                (m["step"], m["loss"], f"{row['run']}: step {m['step']:.0f}")
                for m in read_metrics(metrics)
                if "loss" in m
            ]
            if points:
                curves[row["run"]] = points
    if curves:
        title = "Training loss"
        picture = svg.scatter(title, curves, "step", "loss", joined=True, is_log=False)
        data = tuple((run, step, loss) for run, points in curves.items() for step, loss, _ in points)
        blocks.append(Chart("losses", title, picture, Table("losses", title, ("run", "step", "loss"), data)))
    text = " ".join(f"{line}." for line in comparison(rows, baseline))
    return [Section("Trainings", (*blocks, table), text)]
