"""docs/compat.md lists every name of every interface, and its snippets run."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from natrain.compat.importing import INTERFACES, interface_of

PAGE = (Path(__file__).parents[2] / "docs" / "compat.md").read_text(encoding="utf-8")


def expand(word: str) -> list[str]:
    """``a{1,2}b`` to ``a1b a2b``, every pair of braces."""
    parts = [part.split(",") if index % 2 else [part] for index, part in enumerate(re.split(r"[{}]", word))]
    return ["".join(choice) for choice in itertools.product(*parts)]


LISTED = {
    name
    for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.S))
    for word in re.findall(r"[\w{},]*\w[\w{},]*", code.split("(")[0])
    for name in expand(word)
}


@pytest.mark.parametrize("first", [".".join(map(str, first)) for first, _ in INTERFACES])
def test_every_name_is_listed(first):
    names = {name for members in interface_of(first).LAYOUT.values() for name in members}
    assert not names - LISTED


def test_the_snippets_run():
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(snippets) == 2
    for snippet in snippets:
        code = snippet + "\nimport torch\nprint(hasattr(natrain.compat, 'install'))"
        code += "\nimport natten" if "install(" in snippet else "\nnatten.functional.na2d_qk"
        done = subprocess.run([sys.executable, "-c", "import natrain\n" + code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
