"""The page as a file, and what a real browser shows of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from natrain.report import svg
from natrain.report.blocks import Chart
from natrain.report.build import build_page
from natrain.report.html import html


def test_the_page_is_one_file_without_a_network(folder):
    text = html(build_page([folder]))
    assert not re.search(r'(src|href)="(?!#|data:)', text)
    assert not re.search(r"@import|url\(|<script src|<link rel=.stylesheet", text)


# What a colour looks like to those who lack a kind of cone, from and to linear RGB: Machado, Oliveira and Fernandes
# 2009, severity 1.


def test_the_picture_of_the_readme_is_that_of_the_committed_rows(repository):
    """Every number in it, so that neither rows nor charts change without it."""
    folder = repository / "docs" / "h100"
    page = build_page([folder / f"paper_{rank}d" for rank in (1, 2, 3)])
    made = next(
        block.svg
        for section in page.sections
        for block in section.blocks
        if isinstance(block, Chart) and block.name == "distribution-forward"
    )
    assert (folder / "paper.svg").read_text() == made
    assert 'src="docs/h100/paper.svg"' in (repository / "README.md").read_text()


PROBE = """
<script>
window.addEventListener("load", () => {
  const table = document.getElementById("runs"), column = 3;
  const values = () => [...table.tBodies[0].rows].map(row => Number(row.cells[column].dataset.value));
  const button = table.tHead.rows[0].cells[column].querySelector("button");
  button.click(); const up = values(); button.click(); const down = values();
  const charts = [...document.querySelectorAll("figure svg")].map(chart => chart.getBoundingClientRect());
  document.body.dataset.probe = JSON.stringify({
    up, down, errors: window.errors, width: document.documentElement.scrollWidth, view: window.innerWidth,
    charts: charts.map(box => [box.width, box.height]), requests: performance.getEntriesByType("resource").length,
  });
});
</script>
"""


@pytest.fixture
def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on PATH (apt install chromium)")
    return found


def browse(chromium: str, page: Path, *words: str, width: int = 1200) -> str:
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    done = subprocess.run(
        [*command, f"--user-data-dir={page.parent}/browser", *words, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_and_sorts_it(folder, chromium, width):
    """On a desk and on a phone (500 pixels is the narrowest window that Chromium opens)."""
    page = folder / "page.html"
    catch = "<script>window.errors = []; addEventListener('error', e => errors.push(String(e.message)));</script>"
    text = html(build_page([folder]))
    page.write_text(text.replace("<title>", catch + "<title>", 1).replace("</body>", PROBE + "</body>"))
    dom = browse(chromium, page, "--dump-dom", width=width)
    found = json.loads(re.search(r'data-probe="([^"]*)"', dom)[1].replace("&quot;", '"'))
    assert found["errors"] == [] and found["requests"] == 0
    assert found["up"] == sorted(found["up"]) and found["down"] == found["up"][::-1] and len(found["up"]) == 22
    assert len(found["charts"]) == text.count("<figure>") >= 8
    assert all(200 < chart_width <= found["view"] and height > 60 for chart_width, height in found["charts"])
    assert found["width"] <= found["view"], "nothing but a table's own box scrolls sideways"


@pytest.mark.slow
def test_it_prints_with_its_colours(folder, chromium):
    page = folder / "page.html"
    page.write_text(html(build_page([folder])))
    browse(chromium, page, f"--print-to-pdf={folder}/page.pdf")
    assert (folder / "page.pdf").read_bytes().startswith(b"%PDF")
    browse(chromium, page, f"--screenshot={folder}/page.png", "--hide-scrollbars")
    with Image.open(folder / "page.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**24)}
    assert {tuple(bytes.fromhex(name[1:])) for name in svg.COLOURS[1:3]} & colours or len(colours) > 50
