"""The averaged weights against a plain loop."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from natrain.training.ema import WeightAverage


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)  # float and integer buffers


def run(decay: float, warmup: bool, steps: int, accumulation: int = 1) -> tuple[Net, dict[str, torch.Tensor]]:
    """The callback over random walks of the weights, and the same by the definition, in float64."""
    torch.manual_seed(0)
    task = SimpleNamespace(model=Net())
    trainer = SimpleNamespace(global_step=0)
    average = WeightAverage(decay, warmup)
    average.on_fit_start(trainer, task)
    average.on_train_start(trainer, task)
    expected = {name: tensor.double().clone() for name, tensor in task.model.state_dict().items()}
    for batch in range(steps * accumulation):
        if (batch + 1) % accumulation == 0:
            with torch.no_grad():
                for parameter in task.model.parameters():
                    parameter += torch.randn_like(parameter)
                task.model.norm.running_mean += 1
                task.model.norm.num_batches_tracked += 1
            trainer.global_step += 1
            done = trainer.global_step - 1  # averaging starts at the second step
            factor = min(decay, 1 - (1 + done) ** (-2 / 3)) if warmup else (decay if done else 0.0)
            buffers = {name for name, _ in task.model.named_buffers()}
            for name, tensor in task.model.state_dict().items():
                kept = 0.0 if name in buffers else factor
                expected[name] = kept * expected[name] + (1 - kept) * tensor.double()
        average.on_train_batch_end(trainer, task)
    return average.module, expected


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("decay", [0.5, 0.9998])
def test_follows_the_definition(decay: float, warmup: bool) -> None:
    module, expected = run(decay, warmup, steps=30)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_counts_optimiser_steps_not_forward_passes() -> None:
    once, _ = run(0.9, True, steps=6)
    accumulated, _ = run(0.9, True, steps=6, accumulation=3)
    for left, right in zip(once.parameters(), accumulated.parameters(), strict=True):
        assert torch.equal(left, right)


def test_is_frozen_and_in_evaluation_mode() -> None:
    module, _ = run(0.9, True, steps=1)
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_goes_through_a_checkpoint() -> None:
    task = SimpleNamespace(model=Net())
    trainer = SimpleNamespace(global_step=0)
    first = WeightAverage(0.9, True)
    first.on_fit_start(trainer, task)
    with torch.no_grad():
        first.module.layer.weight.fill_(7.0)
    saved: dict = {}
    first.on_save_checkpoint(trainer, task, saved)
    second = WeightAverage(0.9, True)
    second.on_load_checkpoint(trainer, task, saved)
    second.on_fit_start(trainer, task)
    assert torch.equal(second.module.layer.weight, torch.full((5, 3), 7.0))
    # and not the same memory: the model goes on training
    assert second.module.layer.weight.data_ptr() != task.model.layer.weight.data_ptr()
