"""Learning rates against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch

from natrain.training.schedule import create_schedule

PEAK, LOW, START = 1e-3, 5e-6, 1e-6
STEPS, EPOCHS, WARMUP, COOLDOWN = 7, 20, 3, 2


def rates(name: str, **changes: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    settings = {"name": name, "epochs": EPOCHS, "warmup_epochs": WARMUP, "warmup_lr": START, "min_lr": LOW, **changes}
    schedule = create_schedule(optimizer, settings, STEPS)
    values = []
    for step in range((EPOCHS + COOLDOWN) * STEPS):
        schedule.step_update(step)
        values.append(optimizer.param_groups[0]["lr"])
    return values


def expected(name: str, step: int) -> float:
    total, warmup = EPOCHS * STEPS, WARMUP * STEPS
    if step < warmup:
        return START + step * (PEAK - START) / warmup
    if name == "constant":
        return PEAK
    if step >= total:
        return LOW
    share = step / total
    return LOW + (PEAK - LOW) * ((1 + math.cos(math.pi * share)) / 2 if name == "cosine" else 1 - share)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_every_step_follows_the_formula(name: str) -> None:
    for step, rate in enumerate(rates(name)):
        assert rate == pytest.approx(expected(name, step), rel=1e-9), step


def test_published_recipe_at_known_steps() -> None:
    """300 epochs, 20 of warm-up from 1e-6, min 5e-6: half of cosine at 150, min from 300 on, through cool-down."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    settings = {"name": "cosine", "epochs": 300, "warmup_epochs": 20, "warmup_lr": 1e-6, "min_lr": 5e-6}
    schedule = create_schedule(optimizer, settings, 1251)

    def at(epoch: float) -> float:
        schedule.step_update(round(epoch * 1251))
        return optimizer.param_groups[0]["lr"]

    assert at(0) == 1e-6
    assert at(10) == pytest.approx(1e-6 + 0.5 * (1e-3 - 1e-6))
    assert at(150) == pytest.approx((1e-3 + 5e-6) / 2)
    assert at(300) == at(309) == 5e-6


def test_without_warmup_starts_at_the_peak() -> None:
    assert rates("cosine", warmup_epochs=0)[0] == PEAK


def test_is_a_function_of_the_step_alone() -> None:
    forward = rates("cosine")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    settings = {"name": "cosine", "epochs": EPOCHS, "warmup_epochs": WARMUP, "warmup_lr": START, "min_lr": LOW}
    schedule = create_schedule(optimizer, settings, STEPS)
    for step in (100, 3, 57):
        schedule.step_update(step)
        assert optimizer.param_groups[0]["lr"] == forward[step]
