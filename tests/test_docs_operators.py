"""What docs/operators.md shows runs as it stands, its blocks in order."""

from __future__ import annotations

import re

import torch


def test_the_blocks_run_in_order(repository, capsys):
    text = (repository / "docs" / "operators.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict = {}
    try:
        for block in blocks:
            exec(compile(block, "docs/operators.md", "exec"), names)
    finally:
        torch.use_deterministic_algorithms(False)
    assert "deterministic" in capsys.readouterr().out
    assert {"key_mask", "registers_k", "text_k", "scores"} <= set(names)
