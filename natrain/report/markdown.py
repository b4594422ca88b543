"""A page as Markdown, its charts as SVG files and all data as CSV files beside it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from natrain.report.blocks import Chart, Page, Table, column_is_numeric, shown

# Longer tables are a link to their CSV.
_MOST_ROWS = 60


def write_markdown(page: Page, path: Path) -> None:
    """Write ``path``, and the charts and CSVs into the folder of the same name without its ending."""
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"# {page.title}", "", *(f"- {line}" for line in page.summary)]
    for section in page.sections:
        lines += ["", f"## {section.title}", ""]
        lines += [section.text, ""] if section.text else []
        for block in section.blocks:
            table = block.data if isinstance(block, Chart) else block
            data = folder / f"{_file_name(table.name)}.csv"
            data.write_text(table.csv(), encoding="utf-8")
            link = _link(data)
            if isinstance(block, Chart):
                picture = folder / f"{_file_name(block.name)}.svg"
                picture.write_text(block.svg, encoding="utf-8")
                lines += [f"![{block.title}]({_link(picture)})", ""]
                lines += [f"{block.title}. {block.note} ([data]({link}))".replace("  ", " "), ""]
            else:
                lines += [f"### {block.title} ([data]({link}))", ""]
                lines += [*_rows(block), ""] if len(block.rows) <= _MOST_ROWS else []
                lines += [block.note, ""] if block.note else []
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _file_name(name: str) -> str:
    """A contender may have any name: what is no part of a file's is written as in an address."""
    return quote(name, safe="@")


def _link(file: Path) -> str:
    return f"{quote(file.parent.name)}/{quote(file.name, safe='@')}"


def _cell(cell: str | float | int | None) -> str:
    """Neither the end of a cell nor the begin of a tag, which a page would not show."""
    return shown(cell).replace("|", "\\|").replace("<", "&lt;")


def _rows(table: Table) -> list[str]:
    numeric = [column_is_numeric(table.rows, column) for column in range(len(table.columns))]
    rows = [[_cell(column) for column in table.columns], ["---:" if is_numeric else "---" for is_numeric in numeric]]
    rows += [[_cell(cell) for cell in row] for row in table.rows]
    return [f"| {' | '.join(row)} |" for row in rows]
