"""What a page holds, as tests look at it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from natrain.report.blocks import Chart


def chart(page, name: str) -> ElementTree.Element:
    found = [block for section in page.sections for block in section.blocks if isinstance(block, Chart)]
    return ElementTree.fromstring(next(block.svg for block in found if block.name == name))


def named(picture: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    return list(picture.iter(f"{{http://www.w3.org/2000/svg}}{tag}"))


def table(page, name: str) -> list[dict]:
    found = next(table for table in page.tables if table.name == name)
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]
