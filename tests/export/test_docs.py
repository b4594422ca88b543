"""docs/export.md: every command has options that exist, every form is in its table."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from natrain.cli import main
from natrain.export import TARGETS
from natrain.models.weights import EXPORTS

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^natrain export .*$", PAGE, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, tmp_path, monkeypatch, capsys):
    """All that is wrong with them is that this folder has no such checkpoint."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    assert main(words) == 2
    assert words[words.index("--checkpoint") + 1] in capsys.readouterr().err


def test_every_form_is_listed():
    table = set(re.findall(r"`([\w-]+)(?: --decompose)?`", PAGE))
    assert len(COMMANDS) >= 4 and {*TARGETS, *EXPORTS} <= table
