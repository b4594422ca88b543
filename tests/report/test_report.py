"""The page of a sweep: its numbers from times made by hand, and what it says of them."""

from __future__ import annotations

import csv
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from natrain.bench import environment, rows
from natrain.bench.case import Case
from natrain.cli import main
from natrain.report.build import build_page
from natrain.report.html import html
from tests.report.reading import chart, named, table


def test_gains_in_the_papers_form(folder):
    """gemm forward: 2, 4, 0.5 and 2 times as fast: +100, +300, -50, +100 %."""
    found = {(row["kernel"], row["pass"]): row for row in table(build_page([folder]), "gains")}
    row = found["gemm", "forward"]
    assert (row["problems"], row["mean gain %"], row["min %"], row["max %"]) == (4, 112.5, -50.0, 300.0)
    assert row["geo. mean x"] == pytest.approx(8 ** (1 / 4), abs=1e-3) and row["within 2 % or faster, %"] == 75.0
    assert found["fused", "backward"]["problems"] == 3


def test_the_most_that_memory_lets_gain(folder):
    """At 1 TB/s, forward: q, k, v, out of 28x28 are 4 * 28 * 28 * 2 * 32 * 2 bytes, 0.4 us, and weights are written and
    read once; naive takes 2 and 4 ms."""
    found = {row["pass"]: row for row in table(build_page([folder]), "room")}
    feature, pairs = 2 * 32 * 2, 2 * 2  # bytes a token: of q; of a weight for each neighbour
    floors_s = [(4 * feature + 2 * pairs * k * k) * side * side / 1e12 for side in (28, 56) for k in (3, 7)]
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


def test_every_heat_map_cell_says_its_number(folder):
    """In the middle of its colour: blue cells are faster ones, orange slower."""
    picture = chart(build_page([folder]), "heat-gemm-na2d-fp16-forward")
    cells = named(picture, "rect")
    assert len(cells) == 4
    said = []
    for cell in cells:
        x, y, width, height = (float(cell.get(name)) for name in ("x", "y", "width", "height"))
        (text,) = [
            text.text
            for text in named(picture, "text")
            if x < float(text.get("x")) < x + width and y < float(text.get("y")) < y + height
        ]
        said.append(text)
        red, blue = int(cell.get("fill")[1:3], 16), int(cell.get("fill")[5:], 16)
        assert (blue > red) == (float(text.rstrip("x")) > 1)
    assert sorted(said) == ["0.5x", "2x", "2x", "4x"]


def test_rooflines_are_under_the_ceilings_of_their_session(folder):
    """Copy 1 TB/s and product 100 TFLOP/s meet at 100 FLOPs a byte; all points lie below that, under the slope."""
    page = build_page([folder])
    found = table(page, "roofline-fp16-forward")
    picture = chart(page, "roofline-fp16-forward")
    assert "copy 1,000 GB/s, product 100 TFLOP/s" in [text.text for text in named(picture, "text")]
    (ceiling,) = [path for path in named(picture, "path") if path.get("stroke-dasharray")]
    (x1, y1), (x2, y2) = (map(float, corner.split()) for corner in ceiling.get("d")[1:].split("L"))
    # naive's marks, in the order of its rows; axes are logarithmic.
    marks = [(float(mark.get("cx")), float(mark.get("cy"))) for mark in named(picture, "circle") if ":" in mark[0].text]
    own = [(row["FLOPs a byte"], row["TFLOP/s"]) for row in found if row["kernel"] == "naive"]
    assert len(marks) == len(own) == 4 and max(intensity for intensity, _ in own) < 100
    by_rate = sorted(zip(own, marks, strict=True), key=lambda pair: pair[0][1])
    ((_, least), (_, low)), *_, ((_, most), (_, high)) = by_rate
    pixels = (low - high) / math.log(most / least)
    for (intensity, rate), (x, y) in by_rate:
        above = y - (y1 + (x - x1) / (x2 - x1) * (y2 - y1))
        assert above == pytest.approx(pixels * math.log(intensity * 1.0 / rate), abs=1)


def test_the_environment_says_device_driver_and_clocks(folder):
    found = {row["what"]: row["value"] for row in table(build_page([folder]), "environment")}
    assert found == {
        "device": "a device",
        "driver_version": "570.1",
        "clocks.max.sm": "1981 MHz",
        "clocks.mem": "2619 MHz",
        "power.limit": "700 W",
        "commit": "abc",
        "commits": "naive: abc, fused@def: def",
        "torch": "2.0",
        "clock of the GPU after a run": "1965 to 1980 MHz",
    }


def test_the_environment_asks_the_driver(monkeypatch):
    """What nvidia-smi says, in its order."""
    asked = []

    def said(*command: str) -> str:
        asked.append(command)
        return "570.1, 1981 MHz, 2619 MHz, 700.00 W, 31" if command[0] == "nvidia-smi" else ""

    monkeypatch.setattr(environment, "_said", said)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = environment.environment("cuda")
    assert (found["driver_version"], found["clocks.mem"]) == ("570.1", "2619 MHz")
    assert (found["clocks.max.sm"], found["power.limit"], found["temperature.gpu"]) == ("1981 MHz", "700.00 W", "31")
    (query,) = [command[1] for command in asked if command[0] == "nvidia-smi"]
    assert query == "--query-gpu=driver_version,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def test_failures_and_errors_are_listed(folder):
    page = build_page([folder])
    assert table(page, "failures") == [
        {"kernel": "fused", "status": "failed", "reason": "RuntimeError: <no>", "runs": 2}
    ]
    assert {row["largest error"] for row in table(page, "errors")} == {1e-3}
    assert "RuntimeError: &lt;no&gt;" in html(page)


def test_disturbed_times_are_counted_and_marked(folder, capsys):
    assert main(["report", str(folder)]) == 0
    assert "wider than their median" not in capsys.readouterr().out
    lines = (folder / "results.csv").read_text().replace("4.0,3.6,4.4", "4.0,3.6,7.7").splitlines()
    # Where a disturbed problem was measured again, the last time counts.
    again = next(line for line in lines if "7.7" in line)
    (folder / "results.csv").write_text("\n".join([*lines, again.replace("7.7", "4.4")]) + "\n")
    assert main(["report", str(folder)]) == 0
    assert "5 of 22 times have an interval wider than their median: something else had" in capsys.readouterr().out
    marked = [row for row in table(build_page([folder]), "runs") if row["disturbed"] == "yes"]
    assert len(marked) == 5 and all(row["high"] == 7.7 for row in marked)


def test_a_page_that_cannot_be_written(folder, capsys):
    assert main(["report", str(folder), "--out", str(folder / "results.csv")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"natrain: error: --out='{folder}/results.csv' is not allowed") and said.count("\n") == 1


def test_times_that_were_taken_in_several_ways_are_said_to_be(folder, tmp_path):
    assert "ways" not in build_page([folder]).summary[0]
    other = tmp_path / "other"
    other.mkdir()
    case = Case.of({"shape": "28x28", "heads": 2, "head_dim": 32, "kernel_size": 3, "dtype": "fp16"})
    row = {**case.words, "plan": "p", "arm": "cpu", "direction": "forward", "utc": "now", "device": "a CPU", "error": 0}
    rows.start(other / "results.csv")
    failed = {**row, "device": "another", "status": "failed", "reason": "no"}
    for line in ({**row, "status": "ok", "median_ms": 9, "low_ms": 9, "high_ms": 9, "threads": 2}, failed):
        rows.append(other / "results.csv", line)
    said = build_page([folder, other]).summary[0]
    assert said == (
        "times that were taken in 2 ways are compared, which differ in: device none, a CPU; threads none, 2"
    )


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
