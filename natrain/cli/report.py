"""Make a page of results: tables and charts as one HTML file, and the same as Markdown.

  natrain report runs/ablations/nat_layers-1a2b3c [MORE...] [--out FOLDER] [--baseline naive]
report.html needs no network; report.md has its charts and all data as CSV in the folder report/ beside it."""

from __future__ import annotations

import argparse
from pathlib import Path

from natrain.errors import invalid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of `natrain ablate`")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: into the first RUN)")
    parser.add_argument("--title", help="the page's title")
    parser.add_argument("--baseline", metavar="KERNEL", help="what the others are compared with (default: the plan's)")
    parser.add_argument("--wandb", metavar="PROJECT", help="also log the tables to Weights & Biases")


def run(arguments: argparse.Namespace) -> int:
    from natrain.report.build import build_page
    from natrain.report.html import html
    from natrain.report.markdown import write_markdown
    from natrain.report.tables import check_wandb, log_tables

    if arguments.wandb is not None:
        check_wandb("--wandb", arguments.wandb)
    page = build_page(arguments.runs, arguments.title, arguments.baseline)
    out = arguments.out or arguments.runs[0]
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.html").write_text(html(page), encoding="utf-8")
        write_markdown(page, out / "report.md")
    except OSError as error:
        raise invalid("--out", str(out), f"a folder that can be written to ({error})", "--out ANOTHER") from None
    for line in page.summary:
        print(line)
    print(f"written: {out / 'report.html'}, {out / 'report.md'}")
    if arguments.wandb is not None:
        log_tables(page, arguments.wandb, out)
    return 0
