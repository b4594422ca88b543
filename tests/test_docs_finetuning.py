"""What docs/finetuning.md and docs/looking.md show runs; their tables agree with the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from natrain.cli.compose import compose_config
from natrain.cli.finetune import SHORT
from natrain.models.plans import DINAT, DINATS
from natrain.models.published import SHIPPED
from natrain.training.validate import check_values
from tests.data.helpers import write_folder
from tests.test_readme import bash

DOCS = Path(__file__).parents[1] / "docs"
TEXTS = {name: (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in ("finetuning", "looking")}
QUICK = "trainer.max_steps=1 global_batch=4 data.workers=0 trainer.accelerator=cpu"
# Sizes of the handwritten digits' model, which stands for every FILE.
SMALLER = {"img_size=384": "img_size=16", "kernel_size=11": "kernel_size=7"}


def commands(name: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", TEXTS[name], re.S)
    return [line for block in blocks for line in block.splitlines() if line]


def is_large(line: str) -> bool:
    return "model=dinat" in line and "viz" not in line


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_the_commands_run(name, tmp_path):
    images = write_folder(tmp_path / "images", train=8, val=2)
    values = {"FILE": SHIPPED / "nat_digits.safetensors", "DIR": images, "IMAGE": images / "val" / "cat" / "000.jpg"}
    for line in filter(lambda line: not is_large(line), commands(name)):
        for word, value in values.items():
            line = re.sub(rf"\b{word}\b", str(value), line)
        if "viz windows" not in line:
            for large, small in SMALLER.items():
                line = line.replace(large, small)
        if re.match(r"natrain (train|finetune)", line):
            line += f" {QUICK} overwrite=true"
        bash(line, tmp_path)
    made = {path.name for path in tmp_path.iterdir()}
    expected = {"finetuning": {"runs", "OUT.safetensors"}}
    expected["looking"] = {"predictions.csv", "attention.png", "rpb.png", "windows.png", "coco.png"}
    assert made == expected[name] | {"images"}


@pytest.mark.parametrize("line", [line for line in commands("finetuning") if is_large(line)])
def test_the_published_recipes_compose(line):
    program, command, *words = shlex.split(line)
    assert (program, command) == ("natrain", "finetune")
    check_values(compose_config(words))


def test_the_python_block_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", TEXTS["looking"], re.S)
    exec(compile(block, "looking.md", "exec"), {})
    assert (
        "[128, 256, 512] [8, 16, 32] [(1, 128, 64, 68), (1, 256, 32, 34), (1, 512, 16, 17)]" in capsys.readouterr().out
    )


def test_every_plan_is_in_the_table():
    rows = re.findall(r"^\| `(\w+)`[^|]*\| ([^|]+) \| ([^|]*) ?\|$", TEXTS["looking"], re.M)
    assert {name for name, *_ in rows} == set(DINAT)
    assert {name for name, _, dinats in rows if dinats.strip()} == set(DINATS)


def test_settings_that_are_named_exist():
    config = compose_config(["model=nat_digits", "data=digits", "recipe=finetune"])
    for key in re.findall(r"`((?:finetune|optim|schedule|data)\.\w+)=", TEXTS["finetuning"]):
        section, leaf = key.split(".")
        assert leaf in config[section], key
    assert {f"`{short}=" in TEXTS["finetuning"] for short in SHORT} == {True}
    assert config.finetune.head_init_scale == 0.001 and config.optim.layer_decay == 0.85
