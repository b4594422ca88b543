"""Exponential moving average of the weights, beside the model on its device."""

from __future__ import annotations

from typing import Any

import lightning
from timm.utils import ModelEmaV3
from torch import nn


class WeightAverage(lightning.Callback):
    """Averages the weights after every optimiser step and carries the average through checkpoints.

    timm's ``ModelEmaV3``: one fused update over all tensors, buffers copied, and with ``warmup`` the decay
    ``min(decay, 1 - (1 + t) ** (-2/3))`` at step ``t + 1``, so that short runs average too.
    Lightning's own average stays on the CPU and copies each tensor there at each step.
    """

    def __init__(self, decay: float, warmup: bool) -> None:
        self.decay = decay
        self.warmup = warmup
        self._ema: ModelEmaV3 | None = None
        self._restored: dict[str, Any] | None = None
        self._step = 0

    @property
    def module(self) -> nn.Module:
        """The averaged model, in evaluation mode."""
        assert self._ema is not None, "the average exists from the start of fit"
        return self._ema.module

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # Only here has the strategy put the model on its device.
        self._ema = ModelEmaV3(pl_module.model, decay=self.decay, use_warmup=self.warmup, exclude_buffers=True)
        self.module.requires_grad_(False)
        if self._restored is not None:
            self.module.load_state_dict(self._restored)
            self._restored = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        if trainer.global_step > self._step:  # not while gradients accumulate
            self._step = trainer.global_step
            self._ema.update(pl_module.model, step=self._step)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["ema_state_dict"] = self.module.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # A run that had no average starts one from its weights.
        self._restored = checkpoint.get("ema_state_dict")
