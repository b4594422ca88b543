"""The metrics file survives kills; the picture is one."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from natrain.training.metrics import COLUMNS, MetricsFile, draw_curves, read_metrics


def test_rows_come_back(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.csv", 0)
    file.append({"step": 10, "epoch": 0.5, "loss": 1.25, "lr": 1e-3})
    file.append({"step": 20, "epoch": 1, "top1": 33.3})
    assert read_metrics(file.path) == [
        {"step": 10, "epoch": 0.5, "loss": 1.25, "lr": 1e-3},
        {"step": 20, "epoch": 1, "top1": 33.3},
    ]
    assert file.path.read_text().splitlines()[0] == ",".join(COLUMNS)


def test_resuming_drops_lost_work_and_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    file = MetricsFile(path, 0)
    for step in (10, 20, 30, 40):
        file.append({"step": step, "epoch": step / 20, "loss": 1 / step})
    with open(path, "a") as end:
        end.write("50,2.5,0.0")
    again = MetricsFile(path, 20)
    again.append({"step": 30, "epoch": 1.5, "loss": 9.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(10, 0.1), (20, 0.05), (30, 9.0)]


def test_a_new_start_empties_the_file(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "m.csv", 0).append({"step": 10, "epoch": 1, "loss": 1.0})
    MetricsFile(tmp_path / "m.csv", 0)
    assert read_metrics(tmp_path / "m.csv") == []


def test_curves_are_drawn_and_differ_with_the_data(tmp_path: Path) -> None:
    rows = [{"step": n, "epoch": n / 4, "loss": 5 / n, "lr": 1e-3 / n} for n in range(1, 40)]
    draw_curves(rows, tmp_path / "a.png", "a run")
    scored = [*rows, {"step": 40, "epoch": 10, "top1": 50.0, "top5": 90.0, "val_loss": 1.0}]
    draw_curves(scored, tmp_path / "b.png", "a run")
    first, second = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png")
    assert first.size == second.size and min(first.size) >= 300
    assert first.tobytes() != second.tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_curves_of_a_run_without_rows(tmp_path: Path) -> None:
    draw_curves([], tmp_path / "empty.png", "nothing yet")
    assert (tmp_path / "empty.png").is_file()
