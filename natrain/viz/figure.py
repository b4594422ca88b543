"""Figures without a display, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 2.6  # inches


def panels(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    """A figure of ``rows`` times ``columns`` square panels, all of them blank."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL * columns, PANEL * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).tolist()
    for axes in (axes for row in grid for axes in row):
        axes.set_axis_off()
    return figure, grid


def save_figure(figure: Figure, path: Path) -> None:
    """Write the picture whole or not at all; the suffix says the format."""
    import io

    from natrain.models.weights.files import write_atomically

    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.lstrip(".") or "png", dpi=120)
    write_atomically(path, lambda file: file.write(content.getvalue()), "--out")
