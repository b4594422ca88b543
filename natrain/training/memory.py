"""What to change when the memory is too small."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from omegaconf import DictConfig

from natrain.errors import Stopped
from natrain.training.plan import largest_divisor

# How the CPU allocator says it, in torch 2.7 to 2.14; it has no class of its own.
_CPU_PHRASES = ("can't allocate memory", "not enough memory", "Unable to allocate")


class OutOfMemory(Stopped):
    """The device ran out of memory; the message proposes settings."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA's and the CPU allocator's errors."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _CPU_PHRASES)


@contextmanager
def explain_out_of_memory(cfg: DictConfig, micro_batch: int, accumulation: int) -> Iterator[None]:
    """Turn an out-of-memory error of the body into one that says which setting to change, to which value."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(_advice(cfg, micro_batch, accumulation, str(error).split("\n")[0])) from error


def _advice(cfg: DictConfig, micro_batch: int, accumulation: int, reason: str) -> str:
    per_device = micro_batch * accumulation
    group = 2 if cfg.augment.mixup or cfg.augment.cutmix else 1  # mixing takes images in pairs
    smaller = group * largest_divisor(per_device // group, micro_batch // (2 * group))
    proposals = []
    if smaller < micro_batch:
        proposals.append(
            f"micro_batch={smaller} (accumulates {per_device // smaller} passes instead of {accumulation}; same result)"
        )
    if cfg.precision == "fp32":
        proposals.append("precision=bf16 (about half the activations)")
    if not cfg.grad_checkpointing:
        proposals.append("grad_checkpointing=true (recomputes activations: about a third slower)")
    if not proposals:
        proposals.append("a smaller data.img_size or model, or more trainer.devices")
    return (
        f"out of memory with micro_batch={micro_batch}, precision={cfg.precision}, "
        f"grad_checkpointing={str(cfg.grad_checkpointing).lower()} ({reason[:160]}). Try: " + ", or ".join(proposals)
    )
