"""The examples of detection and segmentation train: losses are finite and fall."""

from __future__ import annotations

import re

import pytest

from tests.test_readme import bash


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("segmentation.py", "--steps 6 --size 64"),
        ("segmentation.py", "--steps 2 --size 64 --model dinat_mini --dilations ade512"),
        ("detection.py", "--steps 3 --size 96"),
    ],
)
def test_some_steps(script, words, repository):
    said = bash(f"python scripts/examples/{script} {words}", repository)
    losses = [float(value) for value in re.findall(r"^step \d+  loss ([\d.]+) ", said, re.M)]
    assert len(losses) == int(words.split()[1])
    assert losses[-1] < losses[0]
