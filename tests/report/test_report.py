"""The page of a sweep: its numbers from times made by hand, and what a real browser shows of it."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import wandb
from PIL import Image

from natrain.bench import models, rows, training
from natrain.bench.case import Case
from natrain.cli import main
from natrain.report import svg
from natrain.report.build import build_page
from natrain.report.html import html

# Times in ms of three contenders on four problems: forward, backward.
TIMES = {
    ("28x28", 3): {"naive": (2.0, 4.0), "gemm": (1.0, 4.0), "fused": (0.5, 1.0)},
    ("28x28", 7): {"naive": (4.0, 8.0), "gemm": (1.0, 4.0), "fused": (0.5, 2.0)},
    ("56x56", 3): {"naive": (1.0, 2.0), "gemm": (2.0, 4.0), "fused": (0.5, 2.0)},
    ("56x56", 7): {"naive": (8.0, 8.0), "gemm": (4.0, 2.0), "fused": None},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "results.csv"
    rows.start(path)
    for (shape, kernel_size), arms in TIMES.items():
        case = Case.of({"shape": shape, "heads": 2, "head_dim": 32, "kernel_size": kernel_size, "dtype": "fp16"})
        for arm, times in arms.items():
            for index, direction in enumerate(("forward", "backward")):
                row = {**case.words, "plan": "p", "arm": arm, "direction": direction, "utc": "now"}
                if times is None:
                    row |= {"status": "failed", "reason": "RuntimeError: <no>"}
                else:
                    ms = times[index]
                    row |= {"status": "ok", "median_ms": ms, "low_ms": 0.9 * ms, "high_ms": 1.1 * ms}
                    row |= {"error": 1e-3, "peak_mib": 8.0}
                rows.append(path, row)
    session = {
        "device": "a device",
        "plan": "mine",
        "baseline": "naive",
        "torch": "2.0",
        "copy_bytes_per_s": 1e12,
        "product_flops_per_s": {"fp16": 1e14},
    }
    (tmp_path / "environment.jsonl").write_text(json.dumps(session) + "\n")
    return tmp_path


def table(page, name: str) -> list[dict]:
    found = next(table for table in page.tables if table.name == name)
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


def test_gains_in_the_papers_form(folder):
    """gemm forward: 2, 4, 0.5 and 2 times as fast: +100, +300, -50, +100 %."""
    found = {(row["kernel"], row["pass"]): row for row in table(build_page([folder]), "gains")}
    row = found["gemm", "forward"]
    assert (row["problems"], row["mean gain %"], row["min %"], row["max %"]) == (4, 112.5, -50.0, 300.0)
    assert row["geo. mean x"] == pytest.approx(8 ** (1 / 4), abs=1e-3) and row["within 2 % or faster, %"] == 75.0
    assert found["fused", "backward"]["problems"] == 3


def test_the_most_that_memory_lets_gain(folder):
    """At 1 TB/s, forward: q, k, v, out of 28x28 are 4 * 28 * 28 * 2 * 32 * 2 bytes, 0.4 us; naive takes 2 and 4 ms."""
    found = {row["pass"]: row for row in table(build_page([folder]), "room")}
    feature, pairs = 2 * 32 * 2, 2 * 2  # bytes a token: of q; of a weight for each neighbour
    floors_s = [(4 * feature + 4 * pairs * k * k) * side * side / 1e12 for side in (28, 56) for k in (3, 7)]
    gains = [100 * (ms / 1e3 / floor - 1) for ms, floor in zip((2, 4, 1, 8), floors_s, strict=True)]
    row = found["forward"]
    assert row["problems"] == 4
    assert row["with weights in memory, mean gain %"] == pytest.approx(sum(gains) / 4, rel=1e-4)
    assert row["fused, mean gain %"] > row["with weights in memory, mean gain %"]


def test_who_beats_whom(folder):
    """Ties are no win; a problem counts where both have a time."""
    found = {row["faster than"]: row for row in table(build_page([folder]), "wins-na2d-fp16-backward")}
    # gemm ties once, wins twice and loses once against naive.
    assert found["gemm"]["naive"] == 50.0 and found["naive"]["gemm"] == 25.0
    assert found["fused"]["naive"] == pytest.approx(66.7) and found["naive"]["fused"] == 0.0
    assert found["naive"]["naive"] is None


def test_heat_map_cells_are_geometric_means(folder):
    found = {
        (row["tokens"], row["keys"]): row["speed-up"]
        for row in table(build_page([folder]), "heat-gemm-na2d-fp16-forward")
    }
    assert found == {("784", "9"): 2.0, ("784", "49"): 4.0, ("3.14k", "9"): 0.5, ("3.14k", "49"): 2.0}


def test_the_roofline_and_memory(folder):
    """28x28 tokens of 64 channels with 49 keys: 98 FLOPs a token, channel and product; 8 bytes."""
    page = build_page([folder])
    found = [
        row for row in table(page, "roofline-fp16-forward") if row["kernel"] == "naive" and "28x28" in row["problem"]
    ]
    widest = max(found, key=lambda row: row["FLOPs a byte"])
    assert widest["FLOPs a byte"] == pytest.approx(2 * 98 / 8)
    assert widest["TFLOP/s"] == pytest.approx(2 * 98 * 784 * 64 / 4e-3 / 1e12, rel=1e-4)
    memory = table(page, "memory-forward")
    assert next(row for row in memory if "28x28" in row["problem"])["multiples of q"] == pytest.approx(
        8 * 2**20 / 100352, abs=1e-3
    )


def test_failures_and_errors_are_listed(folder):
    page = build_page([folder])
    assert table(page, "failures") == [
        {"kernel": "fused", "status": "failed", "reason": "RuntimeError: <no>", "runs": 2}
    ]
    assert {row["largest error"] for row in table(page, "errors")} == {1e-3}
    assert "RuntimeError: &lt;no&gt;" in html(page)


def test_another_baseline(folder):
    page = build_page([folder], baseline="fused")
    assert {row["kernel"] for row in table(page, "gains")} == {"naive", "gemm"}
    with pytest.raises(ValueError, match="--baseline naive"):
        build_page([folder], baseline="cutlass")
    with pytest.raises(ValueError, match="natrain report"):
        build_page([folder / "none"])


def test_markdown_has_every_chart_and_its_data(folder, capsys):
    assert main(["report", str(folder), "--out", str(folder / "page")]) == 0
    assert "gemm, forward: 1.68 times as fast as naive" in capsys.readouterr().out
    text = (folder / "page" / "report.md").read_text()
    linked = set(re.findall(r"\]\((report/[^)]+)\)", text))
    assert {path.relative_to(folder / "page").as_posix() for path in (folder / "page" / "report").iterdir()} == linked
    for path in (folder / "page" / "report").glob("*.svg"):
        ElementTree.fromstring(path.read_text())
    with open(folder / "page" / "report" / "runs.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 22
    assert "| na2d | fp16 | forward | gemm | 4 | 112.5 | -50 | 300 |" in text


def test_the_page_is_one_file_without_a_network(folder):
    text = html(build_page([folder]))
    assert not re.search(r'(src|href)="(?!#|data:)', text)
    assert not re.search(r"@import|url\(|<script src|<link rel=.stylesheet", text)


def test_colours_differ_in_lightness_where_they_mean_opposites():
    """A reader without colour tells them by the number; with any colour vision blue and orange differ."""
    fast, slow, even = (svg.diverging(ratio)[0] for ratio in (8.0, 1 / 8, 1.0))
    assert even == "#FFFFFF" and int(fast[5:], 16) - int(fast[1:3], 16) > 100 > int(slow[5:], 16)
    assert svg.diverging(100.0) == svg.diverging(8.0)


def test_models_and_trainings_have_pages(tmp_path):
    rows.start(tmp_path / "models.csv", models.COLUMNS)
    for kernel, speed in (("naive", 100.0), ("fused", 250.0)):
        row = {"plan": "p", "model": "nat_tiny", "precision": "bf16", "compile": 1, "batch": 8, "img_size": ""}
        row |= {
            "kernel": kernel,
            "mode": "training",
            "status": "ok",
            "images_per_s": speed,
            "low": speed,
            "high": speed,
        }
        rows.append(
            tmp_path / "models.csv", {**row, "attention_share": 0.25, "drift": 1e-3, "utc": "now"}, models.COLUMNS
        )
    rows.start(tmp_path / "training.csv", training.COLUMNS)
    for kernel, top1 in (("naive", 50.0), ("fused", 51.0)):
        run = tmp_path / "runs" / f"{kernel}-0"
        run.mkdir(parents=True)
        (run / "metrics.csv").write_text("step,loss,top1\n1,2.0,\n2,1.5,\n")
        row = {
            "plan": "p",
            "kernel": kernel,
            "seed": 0,
            "status": "ok",
            "top1": top1,
            "images_per_s": 10,
            "run": run.name,
        }
        rows.append(tmp_path / "training.csv", {**row, "settings": "", "utc": "now"}, training.COLUMNS)
    (tmp_path / "environment.jsonl").write_text('{"device": "a device", "plan": "mine", "baseline": "naive"}\n')
    page = build_page([tmp_path])
    found = {row["kernel"]: row for row in table(page, "models-training")}
    assert found["fused"]["x naive"] == 2.5 and found["fused"]["attention %"] == 25.0
    assert found["fused"]["model"] == "nat_tiny bf16 compiled b8"
    assert len(table(page, "losses")) == 4 and [row["top-1 %"] for row in table(page, "trainings")] == [50.0, 51.0]
    assert page.summary[0].startswith("fused against naive, 1 seeds: top-1 +1.00 points")
    assert html(page).count("<figure>") == 2


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


@pytest.mark.slow
def test_tables_go_to_wandb(folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(["report", str(folder), "--wandb", "natrain"]) == 0
    (run,) = (folder / "wandb").glob("offline-run-*")
    logged = {path.name.split("_")[0] for path in (run / "files" / "media" / "table").glob("*.json")}
    assert {"gains", "errors", "environment"} <= logged


def test_wandb_without_a_key_is_one_error(folder, monkeypatch, capsys):
    def init(**_):
        raise wandb.errors.UsageError("api_key not configured (no-tty).\ncall wandb.login")

    monkeypatch.setattr(wandb, "init", init)
    assert main(["report", str(folder), "--wandb", "mine"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("natrain: error: --wandb='mine' is not allowed") and "wandb login, or" in said
    assert said.count("\n") == 1
