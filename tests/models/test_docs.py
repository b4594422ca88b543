"""docs/models.md says what the code does: its tables are recomputed, its commands and snippets are run."""

from __future__ import annotations

import ast
import re
import shlex

import pytest
import timm
import torch

from natrain.models import list_models
from natrain.models.spec import check_windows
from tests.models.test_zoo import measured, on_meta


@pytest.fixture(scope="module")
def text(repository) -> str:
    return (repository / "docs" / "models.md").read_text(encoding="utf-8")


def rows(text: str, first_header: str) -> list[list[str]]:
    """Cells of the table whose first column has that header."""
    table = text.split(f"| {first_header} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_table_of_models(text: str) -> None:
    table = {row[0].strip("`"): row[1:] for row in rows(text, "model")}
    assert sorted(table) == list_models()
    for name, (size, parameters, macs, dilations) in table.items():
        model, got_parameters, got_macs = measured(name)
        assert model.pretrained_cfg["input_size"] == tuple(map(int, size.split("x"))), name
        assert f"{got_parameters:,}" == parameters, name
        assert f"{got_macs / {'G': 1e9, 'M': 1e6}[macs[-1]]:.1f} {macs[-1]}" == macs, name
        if dilations == "global attention":
            assert name.startswith("vitrpb")
            continue
        stages = [stage.blocks for stage in model.trunk] if hasattr(model.trunk[0], "blocks") else [model.trunk]
        written = ast.literal_eval(f"[{dilations}]")
        patterns = [(p,) if isinstance(p, int) else p for p in written * (len(stages) // len(written))]
        for blocks, pattern in zip(stages, patterns, strict=True):
            used = [block.attn.window.dilation[0] for block in blocks]
            assert used == [pattern[i % len(pattern)] for i in range(len(used))], name


def test_the_published_plans_fit_their_resolution(text: str) -> None:
    for use, models, plan in rows(text, "use"):
        name = "dinat_s_tiny" if models == "DiNATs" else "dinat_tiny"
        kernel_size = 11 if "11" in use else 7
        model = on_meta(name, dilations=ast.literal_eval(plan.strip("`")), kernel_size=kernel_size)
        pixels = int(re.search(r" (\d{3})", use)[1])
        check_windows(pixels, pixels, model.windows)


def test_the_snippets_run(text: str, capsys) -> None:
    names: dict = {}
    with torch.no_grad():
        for snippet in re.findall(r"```python\n(.*?)```", text, re.S):
            exec(snippet, names)
    out = capsys.readouterr().out
    assert "'nat_tiny'" in out and "[64, 256] [2, 8]" in out and "torch.Size([1, 10])" in out
    assert isinstance(names["timm"], type(timm))


def test_the_commands_run(text: str, capsys) -> None:
    from natrain.cli import main

    for line in "".join(re.findall(r"```bash\n(.*?)```", text, re.S)).splitlines():
        program, *arguments = shlex.split(line)
        assert program == "natrain" and not main(arguments)
    assert "dinat_s_large" in capsys.readouterr().out
