"""Learning-rate schedules, a pure function of the number of optimiser steps done (timm's schedulers)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler


def create_schedule(optimizer: torch.optim.Optimizer, schedule: Mapping, steps_per_epoch: int) -> Scheduler:
    """A scheduler whose ``step_update(t)`` sets the learning rate of the step after ``t`` finished ones.

    With peak ``p``, ``T = epochs * steps_per_epoch``, ``W = warmup_epochs * steps_per_epoch``:

    - ``t < W``: ``warmup_lr + t * (p - warmup_lr) / W``
    - cosine: ``min_lr + (p - min_lr) * (1 + cos(pi * t / T)) / 2``; linear: ``min_lr + (p - min_lr) * (1 - t / T)``;
      constant: ``p``
    - ``t >= T`` (cool-down): ``min_lr``

    The warm-up lies inside the ``epochs``, so decay starts from its value at ``W``, as in the published recipes.
    It keeps no state: a resumed run continues by the number of steps alone.
    """
    total = schedule["epochs"] * steps_per_epoch
    warmup = dict(
        warmup_t=schedule["warmup_epochs"] * steps_per_epoch,
        warmup_lr_init=schedule["warmup_lr"],
        t_in_epochs=False,
    )
    if schedule["name"] == "cosine":
        return CosineLRScheduler(optimizer, t_initial=total, lr_min=schedule["min_lr"], **warmup)
    if schedule["name"] == "linear":
        return PolyLRScheduler(optimizer, t_initial=total, power=1.0, lr_min=schedule["min_lr"], **warmup)
    return StepLRScheduler(optimizer, decay_t=total, decay_rate=1.0, **warmup)
