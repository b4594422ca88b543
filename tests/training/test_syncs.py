"""Between log lines a training step never asks the device for a value: on a GPU each question stops the pipeline."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from natrain.training.ema import WeightAverage
from natrain.training.report import Reporter
from natrain.training.task import ClassificationTask, Window, make_mixup

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


class CountReads(TorchDispatchMode):
    """Counts the operators that copy a value to the host (on a GPU they wait for it), and ``tolist``, which is none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in READS
        return func(*args, **(kwargs or {}))

    def count_tolist(self, tensor: torch.Tensor) -> list:
        self.count += 1
        return TOLIST(tensor)


TOLIST = torch.Tensor.tolist


def test_the_counter_counts() -> None:
    with CountReads() as reads:
        float(torch.ones(()))
        assert bool(torch.ones(()) > 0)
        torch.ones(3).sum()
    assert reads.count == 2


@pytest.mark.parametrize("mixup", [0.0, 0.8])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_reads_nothing_until_a_log_line_is_due(
    make_config, monkeypatch: pytest.MonkeyPatch, mixup: float, clip: float | None
) -> None:
    cfg = make_config({"augment.mixup": mixup, "optim.clip_grad_norm": clip})
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.BatchNorm1d(10))
    plan = SimpleNamespace(steps_per_epoch=100, epochs=1, accumulation=1)
    task = ClassificationTask(model, cfg, plan, 10, {})
    task.window = Window(torch.device("cpu"))
    trainer = SimpleNamespace(
        global_step=0, is_last_batch=False, world_size=1, is_global_zero=False, max_steps=-1, loggers=[]
    )
    trainer.optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]
    rows = []
    reporter = Reporter(SimpleNamespace(append=rows.append), every=4, show_bar=False)
    average = WeightAverage(0.99, warmup=True)
    task.mixup = make_mixup(cfg.augment, 10)
    average.on_fit_start(trainer, task)
    average.on_train_start(trainer, task)
    monkeypatch.setattr("natrain.training.report.signal.signal", lambda *_: None)
    reporter.on_train_start(trainer, task)
    reads = CountReads()
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.count_tolist(tensor))
    counts = []
    for step in range(8):
        batch = (torch.randn(6, 3, 2, 2), torch.randint(10, (6,)))
        with reads:
            task.training_step(batch, step).backward()
            task.configure_gradient_clipping(trainer.optimizers[0])
            trainer.optimizers[0].step()
            trainer.global_step += 1
            average.on_train_batch_end(trainer, task)
            reporter.on_train_batch_end(trainer, task)
        counts.append(reads.count)
    assert counts[2] == 0 and counts[6] == counts[3]
    assert counts[3] == 1 and counts[7] == 2 and [row["step"] for row in rows] == [4, 8]
