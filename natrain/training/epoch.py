"""What happens around an epoch: randomness before it; evaluation and checkpoints after it."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch

from natrain.training.checkpoint import read_checkpoint
from natrain.training.ema import WeightAverage
from natrain.training.report import NonFiniteLoss, Reporter
from natrain.training.score import Score, cut, score
from natrain.training.task import ClassificationTask

logger = logging.getLogger("natrain.training")
BEST = "best.ckpt"


class EpochSeed(lightning.Callback):
    """Seeds each epoch by (seed, epoch, rank), so that a resumed run draws what an uninterrupted one drew."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # At the first batch, not at the start of the epoch: making loaders draws numbers only where a run (re)starts.
        if batch_idx == 0:
            words = np.random.SeedSequence([self.seed, trainer.current_epoch, trainer.global_rank]).generate_state(3)
            random.seed(int(words[0]))
            np.random.seed(words[1])
            torch.manual_seed(int(words[2]))


class EpochEnd(lightning.Callback):
    """Evaluates raw and averaged weights after each epoch, then writes ``last.ckpt`` and, if better, ``best.ckpt``.

    Args:
        folder: of the checkpoints.
        loader: this rank's validation batches; iterated once per epoch.
        num_val: validation images over all ranks.
        limit: batches per rank to evaluate; None for all.
        average: the averaged weights, if any.
        reporter: takes the rows.
        resumed: the checkpoint that the run continues; None for one that starts anew.
    """

    def __init__(
        self,
        folder: Path,
        loader: Iterable,
        num_val: int,
        limit: int | None,
        average: WeightAverage | None,
        reporter: Reporter,
        resumed: Path | None = None,
    ) -> None:
        self.folder = folder
        self.loader = loader
        self.num_val = num_val
        self.limit = limit
        self.average = average
        self.reporter = reporter
        self.resumed = resumed
        self.last: dict[str, Any] = {}
        self.best: dict[str, Any] = {"top1": -1.0}

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: ClassificationTask) -> None:
        _check_weights(pl_module)
        models = {"raw": pl_module.model}
        if self.average is not None:
            models["ema"] = self.average.module
        scores = score(
            models,
            cut(self.loader, self.limit),
            device=pl_module.device,
            autocast=trainer.precision_plugin.forward_context,
            expected=self.num_val if self.limit is None else None,
        )
        row = _row(scores)
        weights = max(scores, key=lambda name: scores[name].top1)
        self.last = {**row, "weights": weights, "epoch": trainer.current_epoch + 1, "images": scores["raw"].images}
        self._report(trainer, pl_module, row)
        is_best = scores[weights].top1 > self.best["top1"]
        if is_best:
            self.best = {"top1": scores[weights].top1, "weights": weights, "epoch": self.last["epoch"]}
        # The best score goes into the file before it is written, so that resuming knows it.
        trainer.save_checkpoint(self.folder / "last.ckpt")
        if is_best and trainer.is_global_zero:
            _copy(self.folder / "last.ckpt", self.folder / BEST)

    def _report(self, trainer: lightning.Trainer, task: ClassificationTask, row: dict[str, float]) -> None:
        step = trainer.global_step
        self.reporter.record(trainer, {"step": step, "epoch": step / task.plan.steps_per_epoch, **row})
        average = f"  top-1 of EMA {row['ema_top1']:.2f} %" if "ema_top1" in row else ""
        logger.info(
            "epoch %d/%d done  top-1 %.2f %%  top-5 %.2f %%%s  validation loss %.4f (%d images)",
            *(self.last["epoch"], task.plan.epochs, row["top1"], row["top5"], average, row["val_loss"]),
            self.last["images"],
        )

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["evaluation"] = self.last
        checkpoint["best"] = self.best

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.last = dict(checkpoint["evaluation"])
        self.best = dict(checkpoint["best"])
        if trainer.is_global_zero:
            self._place_best()

    def _place_best(self) -> None:
        """Have ``best.ckpt`` hold the best epoch so far.

        It does not where the run comes from another folder, or was killed after ``last.ckpt`` was written and before
        its copy. Where no file holds that epoch any more, the best one starts over from the resumed checkpoint.
        """
        target = self.folder / BEST
        found = next(filter(self._holds_best, (target, self.resumed, self.resumed.with_name(BEST))), None)
        if found is None:
            top1 = self.last["ema_top1" if self.last["weights"] == "ema" else "top1"]
            self.best = {"top1": top1, "weights": self.last["weights"], "epoch": self.last["epoch"]}
        if found != target:
            _copy(found or self.resumed, target)

    def _holds_best(self, file: Path) -> bool:
        if not file.is_file():
            return False
        checkpoint = read_checkpoint(file, "resume")
        epoch = checkpoint.get("evaluation", {}).get("epoch")
        return checkpoint.get("best") == self.best and epoch == self.best["epoch"]


def _row(scores: dict[str, Score]) -> dict[str, float]:
    raw = scores["raw"]
    row = {"top1": raw.top1, "top5": raw.top5, "val_loss": raw.loss}
    if "ema" in scores:
        ema = scores["ema"]
        row |= {"ema_top1": ema.top1, "ema_top5": ema.top5, "ema_val_loss": ema.loss}
    return row


def _check_weights(task: ClassificationTask) -> None:
    """Refuse to evaluate and save weights that are not numbers: the checkpoint before them is worth keeping."""
    norms = torch.stack(torch._foreach_norm([parameter.detach() for parameter in task.model.parameters()]))
    if not torch.isfinite(norms).all():
        names = [name for name, parameter in task.model.named_parameters() if not parameter.isfinite().all()]
        raise NonFiniteLoss(
            f"{len(names)} weights (first {names[0] if names else 'none: a norm overflows'}) are not finite at the end "
            f"of epoch {task.current_epoch + 1}; nothing was saved over the checkpoint before. Try: "
            f"optim.lr={task.cfg.optim.lr / 2:g}, more schedule.warmup_epochs, optim.clip_grad_norm=1"
        )


def _copy(source: Path, target: Path) -> None:
    """Give the bytes of ``source`` a second name in one step; the writer replaces ``source``, never changes it."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
