"""A configuration made of the shipped yaml files, without the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

# Small and quick: three optimiser steps an epoch on handwritten digits, nothing random but data order and weights.
SMALL = {
    "model.name": "nat_digits",
    "data.name": "digits",
    "data.workers": 0,
    "data.crop_pct": 1.0,
    "kernel": "reference",
    "global_batch": 360,
    "optim.lr": 1e-3,
    "schedule.epochs": 2,
    "schedule.warmup_epochs": 1,
    "schedule.cooldown_epochs": 0,
    "augment.rand_augment": None,
    "augment.color_jitter": None,
    "augment.random_erasing": 0.0,
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
    "trainer.accelerator": "cpu",
    "trainer.log_every_steps": 2,
    "trainer.progress_bar": False,
}


@pytest.fixture
def make_config(repository: Path, tmp_path: Path) -> Callable[..., DictConfig]:
    """``make_config({"optim.lr": 1e-3, ...})``: the shipped defaults, the small run above, then the argument."""

    def make(changes: dict[str, object] | None = None, name: str = "run") -> DictConfig:
        cfg = OmegaConf.load(repository / "configs" / "train.yaml")
        del cfg["defaults"]
        settings = {"name": name, "run_dir": str(tmp_path / name), **SMALL, **(changes or {})}
        for key, value in settings.items():
            OmegaConf.update(cfg, key, value, force_add=True)
        return cfg

    return make
