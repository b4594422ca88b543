"""A page as one HTML file: no network, sortable tables, charts inline with their data behind a link."""

from __future__ import annotations

import base64
from html import escape

from natrain.report.blocks import Chart, Page, Section, Table, column_is_numeric, is_number, shown

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; padding: 1rem;
  max-width: 75rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
h3 { font-size: 1rem; margin: .6rem 0; } nav a { margin-right: 1rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 29rem), 1fr)); gap: 1.2rem; }
.small { display: flex; flex-wrap: wrap; gap: 0 2.5rem; } .small > div { max-width: 100%; }
figure { margin: 0; break-inside: avoid; } figure svg { width: 100%; height: auto; max-width: 46rem; }
figcaption, .note { color: #444; font-size: .9rem; }
.scroll { overflow: auto; max-height: 34rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number, th.number { text-align: right; }
th { position: sticky; top: 0; background: #f3f3f3; white-space: nowrap; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid #0072B2; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
@media print {
  .scroll { max-height: none; overflow: visible; } nav, .data { display: none; } th { position: static; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } body { max-width: none; font-size: 11px; }
}
"""
_SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const header = button.parentElement, table = header.closest("table"), column = header.cellIndex;
  const down = header.getAttribute("aria-sort") === "ascending", body = table.tBodies[0];
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  const numeric = header.classList.contains("number"), sign = down ? -1 : 1;
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const rows = [...body.rows].sort((a, b) => {
    const x = value(a), y = value(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign * (numeric ? x - y : x.localeCompare(y, "en", {numeric: true}));
  });
  body.append(...rows);
});
"""


def html(page: Page) -> str:
    """The whole file."""
    links = "".join(f'<a href="#s{index}">{escape(s.title)}</a>' for index, s in enumerate(page.sections))
    summary = "".join(f"<li>{escape(line)}</li>" for line in page.summary)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(page.title)}</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><h1>{escape(page.title)}</h1>'
        f"<ul>{summary}</ul><nav>{links}</nav>"
        + "".join(_section(index, section) for index, section in enumerate(page.sections))
        + f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _section(index: int, section: Section) -> str:
    charts = "".join(_chart(block) for block in section.blocks if isinstance(block, Chart))
    tables = [block for block in section.blocks if isinstance(block, Table)]
    small = "".join(f"<div>{_table(table)}</div>" for table in tables if _is_small(table))
    parts = [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.text)}</p>" if section.text else ""]
    parts += [_table(table) for table in tables if not _is_small(table)]
    parts += [f'<div class="small">{small}</div>'] if small else []
    parts += [f'<div class="charts">{charts}</div>'] if charts else []
    return f'<section id="s{index}">{"".join(parts)}</section>'


def _is_small(table: Table) -> bool:
    """Whether several fit side by side."""
    return len(table.columns) <= 6 and len(table.rows) <= 6


def _data_link(table: Table) -> str:
    encoded = base64.b64encode(table.csv().encode()).decode()
    return f'<a class="data" download="{escape(table.name)}.csv" href="data:text/csv;base64,{encoded}">CSV</a>'


def _chart(chart: Chart) -> str:
    note = f"{escape(chart.note)} " if chart.note else ""
    caption = f"<figcaption>{note}{_data_link(chart.data)}</figcaption>"
    return f"<figure><h3>{escape(chart.title)}</h3>{chart.svg}{caption}</figure>"


def _table(table: Table) -> str:
    numeric = [column_is_numeric(table.rows, column) for column in range(len(table.columns))]
    head = "".join(
        f'<th scope="col"{_number_class(is_numeric)}><button>{escape(column)}</button></th>'
        for column, is_numeric in zip(table.columns, numeric, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{_number_class(is_numeric)}{_value(cell)}>{escape(shown(cell))}</td>"
            for cell, is_numeric in zip(row, numeric, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<h3>{escape(table.title)} {_data_link(table)}</h3><div class="scroll"><table id="{escape(table.name)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}"
    )


def _number_class(is_numeric: bool) -> str:
    return ' class="number"' if is_numeric else ""


def _value(cell: object) -> str:
    return f' data-value="{cell!r}"' if is_number(cell) else ""
