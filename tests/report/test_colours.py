"""Colours and marks of charts, for every reader, on a screen and on paper."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from natrain.report import svg
from natrain.report.build import build_page
from natrain.report.html import html
from tests.report.reading import chart, named

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
