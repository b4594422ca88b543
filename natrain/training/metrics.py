"""metrics.csv, which outlives a killed run, and the picture of its curves."""

from __future__ import annotations

import csv
import os
from pathlib import Path

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "lr",
    "grad_norm",
    "images_per_s",
    "memory_gib",
    "top1",
    "top5",
    "val_loss",
    "ema_top1",
    "ema_top5",
    "ema_val_loss",
)


class MetricsFile:
    """Rows of training (loss, lr, ...) and of evaluation (top1, ...) in one CSV; a cell that does not apply is empty.

    ``step`` counts finished optimiser steps, ``epoch`` finished epochs (with a fraction), ``top*`` is in percent.

    Args:
        path: the file; continued where it exists.
        done_steps: steps that the run has done; later rows, of work that was lost, are dropped, and so is a last
            line that was cut off.
    """

    def __init__(self, path: Path, done_steps: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= done_steps] if done_steps and path.exists() else []
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows({key: _shown(value) for key, value in row.items()} for row in kept)
        os.replace(temporary, path)
        self.path = path

    def append(self, row: dict[str, float]) -> None:
        """Add one row in one write, so that a kill leaves whole lines before it."""
        unknown = set(row) - set(COLUMNS)
        assert not unknown, f"no such columns: {unknown}"
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow({key: _shown(value) for key, value in row.items()})


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The whole rows of a metrics file, empty cells left out."""
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                rows.append({key: float(value) for key, value in row.items() if key in COLUMNS and value != ""})
            except (TypeError, ValueError):
                continue  # a line that a kill cut off
    return [row for row in rows if "step" in row]


def draw_curves(rows: list[dict[str, float]], path: Path, title: str) -> None:
    """Loss, accuracy and learning rate over epochs as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses = {"loss": "training, augmented", "val_loss": "validation", "ema_val_loss": "validation, EMA"}
    panels = (
        ("loss (cross-entropy)", losses),
        ("accuracy (%)", {"top1": "top-1", "ema_top1": "top-1, EMA", "top5": "top-5", "ema_top5": "top-5, EMA"}),
        ("learning rate", {"lr": "learning rate"}),
    )
    for axes, (label, names) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, legend in names.items():
            points = [(row["epoch"], row[name]) for row in rows if name in row]
            if points:
                # A marker shows a curve that is a single point.
                axes.plot(*zip(*points, strict=True), label=legend, marker="." if len(points) < 30 else None)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.suptitle(title)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.png")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)


def _shown(value: float) -> str:
    return f"{value:.8g}"
