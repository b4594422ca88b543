"""Real images through the whole of training, to an accuracy stated here, in a number of steps stated here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from natrain.training import evaluate, train

MakeConfig = Callable[..., DictConfig]


@pytest.mark.slow
def test_cifar10_passes_32_percent_in_400_steps(make_config: MakeConfig, shared_data: Path) -> None:
    """``nat_cifar``, narrowed for a CPU, sees 12,800 images (a quarter of an epoch): measured 38 %, chance is 10 %."""
    cfg = make_config(
        {
            "model.name": "nat_cifar",
            "model.args": {"dim": 32, "heads": 1, "depths": [1, 1, 1], "drop_path_rate": 0.0},
            "data.name": "cifar10",
            "data.root": str(shared_data / "cifar10"),
            "data.val_batch": 100,
            "kernel": "auto",
            "global_batch": 32,
            "optim.lr": 1.5e-3,
            "optim.betas": [0.9, 0.98],
            "optim.clip_grad_norm": 1.0,
            "schedule.epochs": 1,
            "schedule.warmup_epochs": 0,
            "augment.scale": [0.9, 1.0],
            "augment.label_smoothing": 0.0,
            "trainer.max_steps": 400,
            "trainer.limit_val_batches": 10,
            "trainer.log_every_steps": 50,
        }
    )
    assert train(cfg).top1 >= 32.0


@pytest.mark.slow
def test_digits_pass_90_percent_in_220_steps(make_config: MakeConfig) -> None:
    """``nat_digits``, ten epochs of 22 steps, scored on the 360 test images; averaged weights are within two points."""
    changes = {
        "global_batch": 64,
        "optim.lr": 3e-3,
        "schedule.epochs": 10,
        "schedule.warmup_epochs": 1,
        "augment.scale": [0.7, 1.0],
        "ema.enabled": True,
        "ema.decay": 0.98,
        "trainer.log_every_steps": 22,
    }
    cfg = make_config(changes)
    result = train(cfg)
    assert result.top1 >= 90.0
    assert abs(result.ema_top1 - result.top1) < 2.0
    # Another process reading the file gets the score of the best epoch.
    cfg.checkpoint = result.checkpoint
    scores = evaluate(cfg)
    assert scores["images"] == scores["ema_images"] == 360
    assert max(scores["top1"], scores["ema_top1"]) >= max(result.top1, result.ema_top1)
