"""Log lines, metrics.csv, progress, and what is checked whenever the host looks at the device anyway."""

from __future__ import annotations

import logging
import resource
import signal
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from natrain.errors import Stopped
from natrain.training.metrics import MetricsFile
from natrain.training.task import ClassificationTask

logger = logging.getLogger("natrain.training")
NON_FINITE_LIMIT = 10  # optimiser steps in a row whose loss may be infinite or NaN before the run stops


class NonFiniteLoss(Stopped):
    """Training diverged: its loss is no longer a number."""


class Terminated(Exception):
    """SIGTERM arrived; every rank leaves at the same step."""


class Reporter(ProgressBar):
    """Reads the device once every ``every`` steps and at the end of each epoch, never in between.

    Args:
        metrics: the CSV; None on ranks that do not write.
        every: optimiser steps between log lines.
        show_bar: draw a progress bar where stderr is a terminal.
    """

    def __init__(self, metrics: MetricsFile | None, every: int, show_bar: bool) -> None:
        super().__init__()
        self.metrics = metrics
        self.every = every
        self.show_bar = show_bar
        self._bar: tqdm | None = None
        self._step = 0
        self._logged_step = 0
        self._since = 0.0
        self._is_terminated = False

    def disable(self) -> None:
        self.show_bar = False

    def on_train_start(self, trainer: Any, pl_module: ClassificationTask) -> None:
        self._step = self._logged_step = trainer.global_step
        total = pl_module.plan.steps_per_epoch * pl_module.plan.epochs
        self._total = min(total, trainer.max_steps) if trainer.max_steps > 0 else total
        if trainer.is_global_zero:
            is_silent = not self.show_bar or not sys.stderr.isatty()
            self._bar = tqdm(total=self._total, initial=self._step, unit="step", disable=is_silent, dynamic_ncols=True)
        # Lightning's handler, registered before, broadcasts inside the handler, where no other rank may be listening.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_: object) -> None:
        self._is_terminated = True

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: ClassificationTask, *_: Any) -> None:
        if trainer.global_step == self._step:
            return  # gradients accumulate
        self._step = trainer.global_step
        is_due = self._step % self.every == 0 or trainer.is_last_batch or self._step == self._total
        if self._is_terminated and trainer.world_size == 1:
            raise Terminated
        if is_due:
            self._report(trainer, pl_module)

    def _report(self, trainer: Any, task: ClassificationTask) -> None:
        window = task.window
        ours = torch.stack(
            [
                window.loss / window.passes,
                window.grad_norm.to(window.loss.dtype),
                window.non_finite_streak,
                torch.full_like(window.loss, float(self._is_terminated)),
            ]
        )
        ranks = _gather(ours).tolist()  # the one place where the host waits for the device
        window.clear()
        now, steps = time.perf_counter(), self._step - self._logged_step
        row = {
            "step": self._step,
            "epoch": self._step / task.plan.steps_per_epoch,
            "loss": sum(rank[0] for rank in ranks) / len(ranks),
            "lr": max(group["lr"] for group in trainer.optimizers[0].param_groups),  # of the head, with layer_decay
            "grad_norm": ranks[0][1],
            "images_per_s": steps * task.cfg.global_batch / (now - self._since),
            "memory_gib": memory_gib(task.device),
        }
        self._since, self._logged_step = now, self._step
        if self._bar is not None:
            self._bar.update(self._step - self._bar.n)
        self.record(trainer, row)
        logger.info(
            "step %d/%d  epoch %.2f  loss %.4f  lr %.3g  grad norm %.3g  %.4g images/s  %.2f GiB",
            *(self._step, self._total, row["epoch"], row["loss"], row["lr"], row["grad_norm"]),
            *(row["images_per_s"], row["memory_gib"]),
        )
        streak = max(rank[2] for rank in ranks) / task.plan.accumulation
        if streak >= NON_FINITE_LIMIT:
            raise NonFiniteLoss(
                f"the loss has not been a finite number for {streak:.0f} optimiser steps, up to step {self._step} "
                f"(lr {row['lr']:.3g}, precision {task.cfg.precision}); at most {NON_FINITE_LIMIT - 1} in a row are "
                "tolerated. Checkpoints of earlier epochs are whole. Try: "
                f"optim.lr={task.cfg.optim.lr / 2:g}, more schedule.warmup_epochs, optim.clip_grad_norm=1"
                + (", precision=bf16" if task.cfg.precision == "fp16" else "")
            )
        if any(rank[3] for rank in ranks):
            raise Terminated

    def record(self, trainer: Any, row: dict[str, float]) -> None:
        """Write one row to the CSV and to the configured loggers."""
        if self.metrics is not None:
            self.metrics.append(row)
        for sink in trainer.loggers:
            sink.log_metrics({key: value for key, value in row.items() if key != "step"}, step=int(row["step"]))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def memory_gib(device: torch.device) -> float:
    """The most memory this process has used so far: of the GPU where it trains on one, else its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes on macOS, KiB elsewhere


def _gather(values: torch.Tensor) -> torch.Tensor:
    """``[n]`` of each rank stacked to ``[ranks, n]``."""
    if not (dist.is_available() and dist.is_initialized()):
        return values[None]
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values)
    return torch.stack(gathered)
