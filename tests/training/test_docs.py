"""docs/training.md states what the recipes hold, and names files and settings that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from natrain.training.validate import CHOICES, NUMBERS


@pytest.fixture(scope="module")
def text(repository: Path) -> str:
    return (repository / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_table_of_recipes_is_theirs(repository: Path, text: str) -> None:
    section = text.split("## Recipes")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    assert {row[0].strip("`") for row in rows} == {path.stem for path in (repository / "configs/recipe").glob("*.yaml")}
    for name, _, epochs, batch, lr_decay, schedule, precision in rows:
        with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
            cfg = compose("train", overrides=[f"recipe={name.strip('`')}"])
        count = re.match(r"(\d+)(?: \((\d+)\))?(?: \+ (\d+))?", epochs)
        assert [int(number or 0) for number in count.groups()] == [
            cfg.schedule.epochs,
            cfg.schedule.warmup_epochs,
            cfg.schedule.cooldown_epochs,
        ], name
        assert ("EMA" in epochs) == cfg.ema.enabled, name
        assert int(batch) == cfg.global_batch, name
        lr, decay = (float(re.match(r"[\d.e-]+", part.strip())[0]) for part in lr_decay.split(","))
        assert (lr, decay) == (cfg.optim.lr, cfg.optim.weight_decay), name
        assert (schedule, precision) == (cfg.schedule.name, cfg.precision), name


def test_settings_in_the_text_exist(repository: Path, text: str) -> None:
    cfg = OmegaConf.load(repository / "configs" / "train.yaml")
    named = set(re.findall(r"`((?:optim|schedule|augment|ema|trainer|data)\.\w+)", text))
    assert len(named) >= 10
    for key in named:
        assert key in NUMBERS or key in CHOICES or OmegaConf.select(cfg, key, default="none") != "none", key


def test_the_python_is_python_and_what_it_imports_exists(text: str) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    tree = ast.parse(snippet)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            exec(compile(ast.Module([node], []), "docs", "exec"), {})
