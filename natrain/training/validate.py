"""What every setting of a run may be, declared once; ``validate`` checks a configuration against it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from omegaconf import DictConfig, ListConfig, OmegaConf

from natrain.errors import invalid, nearest
from natrain.training.plan import device_count, device_kind, split_batch

INF = math.inf


@dataclass(frozen=True)
class Number:
    """A range of numbers, ends included unless ``open_low``, ``open_high``; ``example`` is shown as what to type.

    ``may_be_list``: several of them are allowed too.
    """

    low: float
    high: float
    example: object
    is_integer: bool = False
    open_low: bool = False
    open_high: bool = False
    may_be_null: bool = False
    may_be_list: bool = False
    or_word: str | None = None

    def __str__(self) -> str:
        kind = "a whole number" if self.is_integer else "a finite number"
        low = f" {'>' if self.open_low else '>='} {self.low:g}" if self.low > -INF else ""
        high = f"{' and' if low else ''} {'<' if self.open_high else '<='} {self.high:g}" if self.high < INF else ""
        also = f", or {self.or_word}" if self.or_word else ""
        return f"{kind}{low}{high}{also}{', or null' if self.may_be_null else ''}"

    def admits(self, value: object) -> bool:
        if value is None:
            return self.may_be_null
        if isinstance(value, str):
            return value == self.or_word
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if not math.isfinite(value) or (self.is_integer and not isinstance(value, int)):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)


def _count(low: int, example: int, **more: object) -> Number:
    return Number(low, INF, example, is_integer=True, **more)


def _share(example: float, **more: object) -> Number:
    return Number(0, 1, example, **more)


# One line a numeric setting.
NUMBERS: dict[str, Number] = {
    "seed": Number(0, 2**32 - 1, 0, is_integer=True),
    "global_batch": _count(1, 1024),
    "micro_batch": _count(1, 128, may_be_null=True),
    "data.img_size": _count(1, 224, may_be_null=True, may_be_list=True),
    "data.in_chans": _count(1, 3, may_be_null=True),
    "data.val_share": Number(0, 1, 0.1, open_low=True, open_high=True),
    "data.split_seed": Number(0, 2**63 - 1, 0, is_integer=True),
    "data.num_classes": _count(1, 1000, may_be_null=True),
    "data.workers": _count(0, 4, may_be_null=True),
    "data.val_batch": _count(1, 256, may_be_null=True),
    "data.bad_image_limit": _share(0.001),
    "data.mean": Number(-INF, INF, 0.5, may_be_null=True, may_be_list=True),
    "data.std": Number(0, INF, 0.5, open_low=True, may_be_null=True, may_be_list=True),
    "data.crop_pct": Number(0, 2, 0.875, open_low=True, may_be_null=True),
    "optim.lr": Number(0, INF, 1e-3),
    "optim.weight_decay": Number(0, INF, 0.05),
    "optim.betas": Number(0, 1, "[0.9,0.999]", open_high=True, may_be_list=True),
    "optim.eps": Number(0, 1, 1e-8, open_low=True),
    "optim.clip_grad_norm": Number(0, INF, 5.0, open_low=True, may_be_null=True),
    "optim.lr_base_batch": _count(1, 1024),
    "optim.layer_decay": Number(0, 1, 0.75, open_low=True, may_be_null=True),
    "finetune.head_init_scale": Number(0, INF, 0.001),
    "finetune.freeze_stages": _count(0, 0),
    "schedule.epochs": _count(1, 300),
    "schedule.warmup_epochs": _count(0, 20),
    "schedule.warmup_lr": Number(0, INF, 1e-6),
    "schedule.min_lr": Number(0, INF, 5e-6),
    "schedule.cooldown_epochs": _count(0, 10),
    "augment.color_jitter": Number(0, INF, 0.4, may_be_null=True),
    "augment.hflip": _share(0.5, may_be_null=True),
    "augment.scale": Number(0, 1, "[0.08,1]", open_low=True, may_be_null=True, may_be_list=True),
    "augment.ratio": Number(0, INF, "[0.75,1.33]", open_low=True, may_be_list=True),
    "augment.random_erasing": _share(0.25),
    "augment.mixup": Number(0, INF, 0.8),
    "augment.cutmix": Number(0, INF, 1.0),
    "augment.mixup_prob": _share(1.0),
    "augment.mixup_switch_prob": _share(0.5),
    "augment.mixup_off_epoch": _count(0, 0),
    "augment.label_smoothing": Number(0, 1, 0.1, open_high=True),
    "ema.decay": Number(0, 1, 0.9998, open_high=True),
    "trainer.devices": _count(1, 1, or_word="auto"),
    "trainer.num_nodes": _count(1, 1),
    "trainer.max_steps": _count(1, 1000, may_be_null=True),
    "trainer.limit_val_batches": _count(1, 10, may_be_null=True),
    "trainer.log_every_steps": _count(1, 50),
}

PAIRS = ("optim.betas", "augment.scale", "augment.ratio")

CHOICES: dict[str, tuple[str, ...]] = {
    "precision": ("fp32", "bf16", "fp16"),
    "optim.lr_scaling": ("none", "linear", "sqrt"),
    "schedule.name": ("cosine", "linear", "constant"),
    "finetune.head": ("auto", "new", "keep"),
    "trainer.accelerator": ("auto", "cpu", "gpu"),
}


def validate(cfg: DictConfig) -> None:
    """Check every number, choice and combination of a composed configuration, before any work.

    Raises:
        ValueError: the first setting that is wrong: its name, its value, what is allowed, what to type.
    """
    check_values(cfg)
    _combinations(cfg)


def check_values(cfg: DictConfig) -> None:
    """Check every number and choice by itself.

    Raises:
        ValueError: as ``validate``.
    """
    for key, number in NUMBERS.items():
        value = OmegaConf.select(cfg, key)
        is_list = isinstance(value, ListConfig)
        items = value if is_list and number.may_be_list else [value]
        if not all(map(number.admits, items)):
            raise invalid(
                key, OmegaConf.to_container(value) if is_list else value, str(number), f"{key}={number.example}"
            )
    for key, allowed in CHOICES.items():
        value = OmegaConf.select(cfg, key)
        if value not in allowed:
            raise invalid(key, value, " | ".join(allowed), f"{key}={nearest(str(value), allowed) or allowed[0]}")
    _finite_arguments(OmegaConf.to_container(cfg.model.args), "model.args")


def _finite_arguments(arguments: Mapping, prefix: str) -> None:
    """``model.args`` is open, so only what no model can use is refused."""
    for key, value in arguments.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise invalid(f"{prefix}.{key}", value, "finite numbers", f"~{prefix}.{key}")
        if isinstance(value, dict):
            _finite_arguments(value, f"{prefix}.{key}")


def _combinations(cfg: DictConfig) -> None:
    """Settings that are each allowed but not together."""
    schedule, augment = cfg.schedule, cfg.augment
    for name in PAIRS:
        values = OmegaConf.select(cfg, name)
        if isinstance(values, ListConfig):
            values = OmegaConf.to_container(values)
        if values is not None and not (isinstance(values, list) and len(values) == 2):
            raise invalid(name, values, "2 numbers", f"{name}={NUMBERS[name].example}")
    if schedule.warmup_epochs > schedule.epochs:
        raise invalid(
            "schedule.warmup_epochs",
            schedule.warmup_epochs,
            f"at most schedule.epochs ({schedule.epochs}); the warm-up lies inside them",
            f"schedule.warmup_epochs={schedule.epochs // 10}",
        )
    if schedule.name == "constant" and schedule.cooldown_epochs:
        raise invalid(
            "schedule.cooldown_epochs",
            schedule.cooldown_epochs,
            "0 with schedule.name=constant, which never falls to min_lr",
            "schedule.cooldown_epochs=0",
        )
    devices, nodes = device_count(cfg.trainer)
    micro, _ = split_batch(cfg.global_batch, cfg.micro_batch, devices * nodes)
    if micro % 2 and (augment.mixup or augment.cutmix):
        raise invalid(
            "micro_batch",
            micro,
            "an even number with mixup or cutmix, which mix images in pairs",
            f"global_batch={cfg.global_batch * 2}, or augment.mixup=0 augment.cutmix=0",
        )
    if cfg.precision == "fp16" and device_kind(cfg.trainer.accelerator) == "cpu":
        raise invalid("precision", "fp16", "fp32 or bf16 on a CPU", "precision=bf16")
