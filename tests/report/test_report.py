"""The page of a sweep: its numbers from times made by hand, and what a real browser shows of it."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from PIL import Image

from natrain.bench import environment, models, rows, training
from natrain.bench.case import Case
from natrain.cli import main
from natrain.report import svg
from natrain.report.blocks import Chart
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
                    row |= {"error": 1e-3, "peak_mib": 8.0, "clock_mhz": 1980 - 15 * index}
                rows.append(path, row)
    session = {
        "device": "a device",
        "driver_version": "570.1",
        "clocks.max.sm": "1981 MHz",
        "clocks.mem": "2619 MHz",
        "power.limit": "700 W",
        "commit": "abc",
        "commits": {"naive": "abc", "fused@def": "def"},
        "plan": "mine",
        "baseline": "naive",
        "torch": "2.0",
        "copy_bytes_per_s": 1e12,
        "product_flops_per_s": {"fp16": 1e14},
    }
    (tmp_path / "environment.jsonl").write_text(json.dumps(session) + "\n")
    return tmp_path


def chart(page, name: str) -> ElementTree.Element:
    found = [block for section in page.sections for block in section.blocks if isinstance(block, Chart)]
    return ElementTree.fromstring(next(block.svg for block in found if block.name == name))


def named(picture: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    return list(picture.iter(f"{{http://www.w3.org/2000/svg}}{tag}"))


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


def test_the_page_is_one_file_without_a_network(folder):
    text = html(build_page([folder]))
    assert not re.search(r'(src|href)="(?!#|data:)', text)
    assert not re.search(r"@import|url\(|<script src|<link rel=.stylesheet", text)


# What a colour looks like to those who lack a kind of cone, from and to linear RGB: Machado, Oliveira and Fernandes
# 2009, severity 1.
SIGHT = {
    "full": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881),
    ),
}  # fmt: skip
TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))


def lab(colour: str, sight: str) -> torch.Tensor:
    """CIELAB (D65) of a colour as it is seen."""
    channels = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], dtype=torch.float64)
    linear = torch.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    seen = (torch.tensor(SIGHT[sight], dtype=torch.float64) @ linear).clamp(0, 1)
    xyz = torch.tensor(TO_XYZ, dtype=torch.float64) @ seen / torch.tensor([0.95047, 1, 1.08883], dtype=torch.float64)
    x, y, z = torch.where(xyz > 216 / 24389, xyz ** (1 / 3), (24389 / 27 * xyz + 16) / 116).tolist()
    return torch.tensor([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(one: str, other: str, sight: str) -> float:
    return (lab(one, sight) - lab(other, sight)).norm().item()


def test_distance_and_contrast_themselves():
    """Lab of pure red is (53.2, 80.1, 67.2); red and olive of equal lightness look alike to who lacks green cones."""
    assert lab("#FF0000", "full").tolist() == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    assert distance("#FFFFFF", "#000000", "full") == pytest.approx(100, abs=0.1)
    assert distance("#C4514B", "#7F7A16", "full") > 3 * distance("#C4514B", "#7F7A16", "deuteranopia")
    assert svg.contrast("#FFFFFF", "#000000") == pytest.approx(21) and svg.contrast("#777777", "#FFFFFF") > 4.4
    assert svg.contrast("#767676", "#FFFFFF") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("sight", SIGHT)
def test_every_reader_tells_the_colours_apart(sight):
    """A distance of 2.3 is just noticed side by side; the first three, natrain's kernels, are far apart."""
    pairs = list(itertools.combinations(svg.COLOURS, 2))
    assert min(distance(*pair, sight) for pair in pairs) > 15
    assert min(distance(*pair, sight) for pair in itertools.combinations(svg.COLOURS[:3], 2)) > 35
    fast, slow = svg.diverging(2.0)[0], svg.diverging(0.5)[0]
    assert distance(fast, slow, sight) > 25


def test_colours_and_numbers_stand_out():
    """WCAG: 3 for graphics, 4.5 for text, of any speed-up's cell."""
    assert min(svg.contrast(colour, "#FFFFFF") for colour in svg.COLOURS) > 3
    assert min(svg.contrast(*svg.diverging(2 ** (step / 20))) for step in range(-80, 81)) > 4.5
    assert svg.diverging(1.0)[0] == "#FFFFFF" and svg.diverging(100.0) == svg.diverging(8.0)


def shape(text: str) -> str:
    """A mark without its place and colour."""
    mark = ElementTree.fromstring(text)
    path = re.sub(r"M[\d.-]+ [\d.-]+", "M", mark.get("d", ""))
    return f"{mark.tag} {path} {mark.get('width', '')}"


def test_contenders_differ_in_their_marks():
    marks = [svg.mark(index, 10.0, 20.0, "a") for index in range(35)]
    assert len({shape(mark) for mark in marks[:5]}) == 5
    assert len({(shape(mark), ElementTree.fromstring(mark).get("fill")) for mark in marks}) == 35


def test_charts_use_the_marks_of_their_contenders(folder):
    """naive, gemm and fused: circles, squares, triangles, as many as they have problems; as the legend says."""
    picture = chart(build_page([folder]), "roofline-fp16-backward")
    found = {}
    for tag in ("circle", "rect", "path"):
        for mark in named(picture, tag):
            if len(mark):
                found.setdefault(mark[0].text.partition(":")[0], set()).add((tag, mark.get("fill")))
    tags = ("circle", "rect", "path")
    assert found == {
        name: {(tag, colour)} for name, tag, colour in zip(("naive", "gemm", "fused"), tags, svg.COLOURS, strict=False)
    }


def test_print_shows_everything_in_its_colours(folder):
    """Tables whole, no buttons for a screen, no chart over two pages."""
    style = re.search(r"<style>(.*?)</style>", html(build_page([folder])), re.S)[1]
    printed = style[style.index("@media print {") :].partition("{")[2]
    rules = {
        name.strip(): dict(map(str.strip, line.split(":", 1)) for line in body.split(";") if ":" in line)
        for names, body in re.findall(r"([^{}]+)\{([^{}]*)\}", printed)
        for name in names.split(",")
    }
    assert rules[".scroll"] == {"max-height": "none", "overflow": "visible"}
    assert rules["nav"] == rules[".data"] == {"display": "none"}
    assert rules["th"]["position"] == "static"
    assert rules["*"]["print-color-adjust"] == rules["*"]["-webkit-print-color-adjust"] == "exact"
    assert re.search(r"figure \{[^}]*break-inside: avoid", style)


def models_and_trainings(tmp_path: Path) -> None:
    """Rows of two kernels; fused failed before it was timed."""
    rows.start(tmp_path / "models.csv", models.COLUMNS)
    setting = {"plan": "p", "model": "nat_tiny", "precision": "bf16", "compile": 1, "batch": 8, "img_size": ""}
    failed = {**setting, "kernel": "fused", "mode": "training", "status": "failed", "reason": "no", "utc": "now"}
    rows.append(tmp_path / "models.csv", failed, models.COLUMNS)
    for kernel, speed in (("naive", 100.0), ("fused", 250.0)):
        row = dict(setting)
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


def test_models_and_trainings_have_pages(tmp_path):
    models_and_trainings(tmp_path)
    page = build_page([tmp_path])
    assert "models-training-failures" not in {table.name for table in page.tables}
    found = {row["kernel"]: row for row in table(page, "models-training")}
    assert found["fused"]["x naive"] == 2.5 and found["fused"]["attention %"] == 25.0
    assert found["fused"]["model"] == "nat_tiny bf16 compiled b8"
    assert len(table(page, "losses")) == 4 and [row["top-1 %"] for row in table(page, "trainings")] == [50.0, 51.0]
    assert page.summary[0].startswith("fused against naive, 1 seeds: top-1 +1.00 points")
    assert html(page).count("<figure>") == 2


def test_every_folder_has_its_own_baseline_and_files(tmp_path, folder, capsys):
    for name in ("naive", "fused"):
        (tmp_path / name).mkdir()
        models_and_trainings(tmp_path / name)
    session = '{"device": "a device", "plan": "mine", "baseline": "fused"}\n'
    (tmp_path / "fused" / "environment.jsonl").write_text(session)
    page = build_page([tmp_path / "fused", tmp_path / "naive", folder])
    assert {row["kernel"]: row["x fused"] for row in table(page, "models-training-1")} == {"naive": 0.4, "fused": 1.0}
    assert {row["kernel"]: row["x naive"] for row in table(page, "models-training-2")} == {"naive": 1.0, "fused": 2.5}
    assert {row["kernel"] for row in table(page, "gains")} == {"gemm", "fused"}
    names = [each.name for each in page.tables]
    # A chart and the table beside it are of one file.
    assert {name for name in names if names.count(name) > 1} == {"models-training-1", "models-training-2"}
    assert f"Trainings: {tmp_path}/naive" in [section.title for section in page.sections]
    assert any(line.startswith(f"{tmp_path}/fused: naive against fused, 1 seeds") for line in page.summary)


@pytest.mark.parametrize("name", ["../tile 4", "a/b", "<b>|"])
def test_a_contender_of_any_name_has_its_files(tmp_path, name):
    rows.start(tmp_path / "results.csv")
    case = Case.of({"shape": "28", "heads": 2, "head_dim": 32, "kernel_size": 3})
    for arm, status in (("naive", "ok"), (name, "ok"), (f"{name}2", "failed")):
        row = {**case.words, "plan": "p", "arm": arm, "direction": "forward", "status": status, "utc": "now"}
        times = {"median_ms": 1, "low_ms": 1, "high_ms": 1, "error": 0}
        rows.append(tmp_path / "results.csv", {**row, **(times if status == "ok" else {"reason": "<class 'int'>"})})
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "my page")]) == 0
    text = (tmp_path / "my page/report.md").read_text()
    links = re.findall(r"\]\(([^) ]*)\)", text)
    assert len(links) == text.count("](") and any("heat-" in link for link in links)
    assert all((tmp_path / "my page" / unquote(link)).is_file() for link in links)
    assert "&lt;class 'int'>" in text and "| <" not in text


def test_a_baseline_where_nothing_has_a_time(tmp_path, capsys):
    rows.start(tmp_path / "results.csv")
    assert main(["report", str(tmp_path), "--baseline", "naive"]) == 2
    assert "no contender has a time or an accuracy. Try: no --baseline" in capsys.readouterr().err


def test_a_baseline_without_a_time_is_refused_for_models_and_trainings(tmp_path, capsys):
    models_and_trainings(tmp_path)
    assert main(["report", str(tmp_path), "--baseline", "fusd"]) == 2
    assert "--baseline='fusd' is not allowed: expected one of naive, fused. Try: --baseline fused" in (
        capsys.readouterr().err
    )
    page = build_page([tmp_path], baseline="fused")
    assert {row["kernel"]: row["x fused"] for row in table(page, "models-training")} == {"naive": 0.4, "fused": 1.0}


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


@pytest.mark.slow
def test_tables_go_to_wandb(folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(["report", str(folder), "--wandb", "natrain"]) == 0
    (run,) = (folder / "wandb").glob("offline-run-*")
    logged = {path.name.split("_")[0] for path in (run / "files" / "media" / "table").glob("*.json")}
    assert {"gains", "errors", "environment"} <= logged


MINE = """\
kernels: [cpu]
runs: 3
problems: [{shape: 4x4, heads: 1, head_dim: 8, kernel_size: 3}]
"""


@pytest.mark.slow
def test_an_ablation_logs_its_tables_when_a_project_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "mine.yaml").write_text(MINE)
    words = ["ablate", f"ablation={tmp_path}/mine.yaml", "device=cpu"]
    assert main([*words, f"out={tmp_path}/without"]) == 0 and not (tmp_path / "without" / "wandb").exists()
    assert main([*words, f"out={tmp_path}/out", "wandb=natrain"]) == 0
    (run,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    assert {"errors", "environment", "runs"} <= {
        path.name.split("_")[0] for path in (run / "files" / "media" / "table").glob("*.json")
    }


@pytest.mark.parametrize(
    "words", [["ablate", "ablation=dtypes", "wandb=mine"], ["report", "FOLDER", "--wandb", "mine"]]
)
def test_a_missing_key_of_wandb_is_said_before_anything_is_measured(words, folder, monkeypatch, capsys):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(folder / "none"))
    monkeypatch.setenv("HOME", str(folder))
    assert main([str(folder) if word == "FOLDER" else word for word in words]) == 2
    said = capsys.readouterr()
    assert "wandb='mine' is not allowed" in said.err and "WANDB_MODE=offline" in said.err and not said.out
