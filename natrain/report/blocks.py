"""What a page is made of, whatever it is written as: text, tables, and charts with the table behind them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """``name`` is its file's; cells are text or numbers, numbers shown by ``shown``."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]
    note: str = ""

    def csv(self) -> str:
        """All of it, numbers in full."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(["" if cell is None else cell for cell in row] for row in self.rows)
        return text.getvalue()


@dataclass(frozen=True)
class Chart:
    """``svg`` draws ``data``; ``note`` says how to read it."""

    name: str
    title: str
    svg: str
    data: Table
    note: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Table | Chart, ...]
    text: str = ""


@dataclass(frozen=True)
class Page:
    title: str
    summary: tuple[str, ...]
    sections: tuple[Section, ...] = field(default_factory=tuple)

    @property
    def tables(self) -> list[Table]:
        """Every table, those behind charts included."""
        blocks = [block for section in self.sections for block in section.blocks]
        return [block.data if isinstance(block, Chart) else block for block in blocks]


def shown(cell: str | float | int | None) -> str:
    """A cell for people: four significant digits, no exponent where one can do without."""
    if cell is None:
        return ""
    if isinstance(cell, float):
        if cell == 0:
            return "0"
        return f"{cell:.4g}" if 1e-3 <= abs(cell) < 1e4 else f"{cell:,.0f}" if abs(cell) >= 1e4 else f"{cell:.1e}"
    return str(cell)


def is_number(cell: object) -> bool:
    return isinstance(cell, (int, float)) and not isinstance(cell, bool)


def column_is_numeric(rows: Sequence[Sequence[object]], column: int) -> bool:
    """Whether every filled cell of the column is a number."""
    cells = [row[column] for row in rows if row[column] is not None]
    return bool(cells) and all(map(is_number, cells))
