"""The Lightning module: one classification model, its loss, its optimiser and the sums that log lines are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from timm.data import Mixup
from torch import Tensor, nn

from natrain.training.finetune import frozen_modules
from natrain.training.optim import create_optimizer
from natrain.training.plan import Plan
from natrain.training.schedule import create_schedule


class Window:
    """Sums over the forward passes since the last log line, kept on the device so that a step waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.passes = 0
        self.non_finite_streak = torch.zeros((), device=device)
        self.grad_norm = torch.zeros((), device=device)

    def add(self, loss: Tensor) -> None:
        self.loss += loss
        self.passes += 1
        self.non_finite_streak = (self.non_finite_streak + 1) * ~loss.isfinite()

    def clear(self) -> None:
        """Start the next window; a streak of losses that are not finite goes on."""
        self.loss.zero_()
        self.passes = 0


class ClassificationTask(lightning.LightningModule):
    """Trains ``model`` as one configuration says.

    Args:
        model: the bare model; compiled in place where asked, so that names in checkpoints stay its own.
        cfg: the whole configuration.
        plan: sizes of the run.
        num_classes: of the data.
        describe: what a checkpoint has to say about its model (``hyper_parameters``).
    """

    def __init__(
        self, model: nn.Module, cfg: DictConfig, plan: Plan, num_classes: int, describe: dict[str, Any]
    ) -> None:
        super().__init__()
        self.model = model
        self.cfg = cfg
        self.plan = plan
        self.describe = describe
        self.mixup = make_mixup(cfg.augment, num_classes)
        self.window: Window | None = None
        self.frozen = list(frozen_modules(model))

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        images, targets = batch[:2]
        smoothing = self.cfg.augment.label_smoothing
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
            smoothing = 0.0  # already in the mixed targets
        loss = F.cross_entropy(self.model(images).float(), targets, label_smoothing=smoothing)
        self.window.add(loss.detach())
        return loss

    def on_fit_start(self) -> None:
        self.window = Window(self.device)

    def on_train_epoch_start(self) -> None:
        for module in self.frozen:
            module.eval()  # no drop path and no running statistics; evaluation puts everything back to training
        if self.mixup is not None:
            off = self.cfg.augment.mixup_off_epoch
            self.mixup.mixup_enabled = not off or self.current_epoch < off

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Fused AdamW does its own unscaling under fp16, after which gradients could not be clipped.
        is_fused = self.device.type == "cuda" and self.cfg.precision != "fp16"
        optimizer = create_optimizer(self.model, self.cfg.optim, self.plan.lr, fused=is_fused)
        self.schedule = create_schedule(optimizer, self.cfg.schedule, self.plan.steps_per_epoch)
        self._group_settings = [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]
        return optimizer

    def on_train_start(self) -> None:
        # A restored optimiser brings the settings of its old run along; the configuration is what counts.
        for group, settings in zip(self.optimizers().param_groups, self._group_settings, strict=True):
            group.update(settings)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer, optimizer_closure: Callable | None = None
    ) -> None:
        self.schedule.step_update(self.global_step)
        optimizer.step(closure=optimizer_closure)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, **_: Any) -> None:
        """Measure the norm of all gradients (after fp16's unscaling) and clip it where asked."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters], foreach=True)
        if self.cfg.optim.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.cfg.optim.clip_grad_norm, norm, foreach=True)
        self.window.grad_norm = norm.detach()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hyper_parameters"] = self.describe


def make_mixup(augment: DictConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix of whole batches; None where both are off. Targets become ``[B, classes]``, sum 1."""
    if not augment.mixup and not augment.cutmix:
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        label_smoothing=augment.label_smoothing,
        num_classes=num_classes,
    )
