"""A page as Markdown, its charts as SVG files and all data as CSV files beside it."""

from __future__ import annotations

from pathlib import Path

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
            data = folder / f"{table.name}.csv"
            data.write_text(table.csv(), encoding="utf-8")
            link = f"{folder.name}/{data.name}"
            if isinstance(block, Chart):
                (folder / f"{block.name}.svg").write_text(block.svg, encoding="utf-8")
                lines += [f"![{block.title}]({folder.name}/{block.name}.svg)", ""]
                lines += [f"{block.title}. {block.note} ([data]({link}))".replace("  ", " "), ""]
            else:
                lines += [f"### {block.title} ([data]({link}))", ""]
                lines += [*_rows(block), ""] if len(block.rows) <= _MOST_ROWS else []
                lines += [block.note, ""] if block.note else []
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _rows(table: Table) -> list[str]:
    numeric = [column_is_numeric(table.rows, column) for column in range(len(table.columns))]
    rows = [table.columns, ["---:" if is_numeric else "---" for is_numeric in numeric]]
    rows += [[shown(cell).replace("|", "\\|") for cell in row] for row in table.rows]
    return [f"| {' | '.join(row)} |" for row in rows]
