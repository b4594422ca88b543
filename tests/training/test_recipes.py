"""The published recipes, number by number; the tables here are typed from the papers, not read from the files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from natrain.training import train, validate
from natrain.training.plan import make_plan

IN1K = {
    "global_batch": 1024,
    "optim.name": "adamw",
    "optim.lr": 1e-3,
    "optim.weight_decay": 0.05,
    "optim.betas": [0.9, 0.999],
    "optim.clip_grad_norm": 5.0,
    "schedule.name": "cosine",
    "schedule.epochs": 300,
    "schedule.cooldown_epochs": 10,
    "schedule.warmup_epochs": 20,
    "schedule.warmup_lr": 1e-6,
    "schedule.min_lr": 5e-6,
    "augment.rand_augment": "rand-m9-mstd0.5-inc1",
    "augment.color_jitter": 0.4,
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "augment.mixup_switch_prob": 0.5,
    "augment.random_erasing": 0.25,
    "augment.label_smoothing": 0.1,
    "augment.train_interpolation": "random",
    "ema.enabled": False,
    "precision": "bf16",
}
FINETUNE = {
    "schedule.epochs": 30,
    "schedule.cooldown_epochs": 0,
    "schedule.warmup_epochs": 0,
    "schedule.name": "linear",
    "global_batch": 512,
    "optim.lr": 5e-5,
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
    "precision": "fp32",
}
PUBLISHED = {
    "in1k": IN1K,
    "in1k_isotropic_base": {**IN1K, "schedule.warmup_epochs": 50, "ema.enabled": True, "ema.decay": 0.9998},
    "in22k": {
        "schedule.epochs": 90,
        "schedule.warmup_epochs": 5,
        "schedule.name": "linear",
        "schedule.cooldown_epochs": 0,
        "global_batch": 4096,
        "optim.lr": 1e-3,
        "optim.weight_decay": 0.01,
        "model.args.drop_path_rate": 0.2,
    },
    "finetune_in22k_in1k_224": {**FINETUNE, "optim.weight_decay": 1e-4, "model.args.drop_path_rate": 0.35},
    "finetune_in22k_in1k_384": {
        **FINETUNE,
        "optim.weight_decay": 1e-10,
        "data.img_size": 384,
        "data.crop_pct": 1.0,
        "model.args.dilations": [[1, 13, 1], [1, 6, 1, 6], [1, 3], 1],
    },
    "finetune_in22k_in1k_384_dinats": {
        **FINETUNE,
        "optim.weight_decay": 1e-5,
        "model.args.dilations": [[1, 13], [1, 6], [1, 3], 1],
    },
}


def composed(repository: Path, recipe: str, *settings: str) -> DictConfig:
    with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
        return compose("train", overrides=[f"recipe={recipe}", *settings])


def all_recipes() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "recipe").glob("*.yaml"))


@pytest.mark.parametrize("recipe", sorted(PUBLISHED))
def test_published_numbers(repository: Path, recipe: str) -> None:
    cfg = composed(repository, recipe)
    for key, value in PUBLISHED[recipe].items():
        found = OmegaConf.select(cfg, key)
        assert (OmegaConf.to_object(found) if OmegaConf.is_config(found) else found) == value, key


def test_epochs_of_imagenet(repository: Path) -> None:
    """1,281,167 images in batches of 1,024: 1,251 whole steps an epoch, 310 epochs."""
    cfg = composed(repository, "in1k", "model.name=nat_tiny", "data.name=imagefolder", "trainer.accelerator=cpu")
    plan = make_plan(cfg, 1_281_167)
    assert (plan.steps_per_epoch, plan.epochs, plan.lr) == (1251, 310, 1e-3)


def test_lr_of_the_default_recipe_follows_the_batch(repository: Path) -> None:
    cfg = composed(repository, "default", "trainer.accelerator=cpu")
    assert make_plan(cfg, 10_000).lr == pytest.approx(1e-3 * math.sqrt(256 / 1024))


@pytest.mark.parametrize("recipe", all_recipes())
def test_two_steps_with_every_recipe(
    repository: Path, tmp_path: Path, recipe: str, make_config: Callable[..., DictConfig]
) -> None:
    """Every recipe as it stands, with the model, data and sizes of a small run."""
    changes = {
        "name": recipe,
        "run_dir": str(tmp_path / recipe),
        "model.name": "nat_digits",
        "model.args": {},
        "kernel": "reference",
        "data.name": "digits",
        "data.img_size": None,
        "data.workers": 0,
        "global_batch": 8,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.limit_val_batches": 1,
    }
    cfg = composed(repository, recipe)
    OmegaConf.set_struct(cfg, False)
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, merge=False)
    validate(cfg)
    assert Path(train(cfg).checkpoint).is_file()
