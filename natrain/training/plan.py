"""How one optimiser step is spread over devices, micro-batches and epochs."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from omegaconf import DictConfig

from natrain.errors import invalid
from natrain.training.optim import scaled_lr


@dataclass(frozen=True)
class Plan:
    """Sizes of a run; images are counted over all devices unless a name says otherwise.

    Attributes:
        devices: devices (and processes) per node.
        micro_batch: images per device and forward pass.
        accumulation: forward passes per optimiser step.
        steps_per_epoch: optimiser steps per epoch; images that do not fill a global batch are left out of the epoch.
        epochs: epochs with cool-down.
        lr: peak learning rate, scaled.
    """

    devices: int
    num_nodes: int
    micro_batch: int
    accumulation: int
    steps_per_epoch: int
    epochs: int
    lr: float

    @property
    def world(self) -> int:
        return self.devices * self.num_nodes


def device_kind(accelerator: str) -> str:
    """``"cpu"`` or ``"cuda"`` for ``trainer.accelerator``.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise invalid(
            "trainer.accelerator", "gpu", "cpu or auto where no CUDA device is visible", "trainer.accelerator=auto"
        )
    return "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def launched_world() -> tuple[int, int] | None:
    """(devices per node, nodes) as torchrun or srun started this process; None for a process on its own."""
    if "LOCAL_WORLD_SIZE" in os.environ and "WORLD_SIZE" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if "SLURM_PROCID" in os.environ and tasks > 1:
        nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
        return tasks // nodes, nodes
    return None


def global_rank() -> int:
    """This process's rank as torchrun or srun set it; 0 for a process on its own."""
    if launched_world() is None:
        return 0
    return int(os.environ.get("RANK") or os.environ["SLURM_PROCID"])


def device_count(trainer: DictConfig) -> tuple[int, int]:
    """(devices per node, nodes) of the run.

    Under torchrun or srun their numbers count; ``trainer.devices`` may then stay as it is (1), be ``auto`` or agree.

    Raises:
        ValueError: ``trainer.devices`` or ``trainer.num_nodes`` contradicts the launcher or the machine.
    """
    kind = device_kind(trainer.accelerator)
    launched = launched_world()
    if launched is not None:
        for key, number in zip(("devices", "num_nodes"), launched, strict=True):
            if trainer[key] not in (1, "auto", number):
                raise invalid(
                    f"trainer.{key}", trainer[key], f"{number}, as the launcher started", f"trainer.{key}={number}"
                )
        return launched
    if trainer.num_nodes > 1:
        raise invalid(
            "trainer.num_nodes",
            trainer.num_nodes,
            "1 for a process on its own",
            "torchrun --nnodes=N --nproc-per-node=M -m natrain train ... on every node",
        )
    if trainer.devices == "auto":
        return (torch.cuda.device_count() if kind == "cuda" else 1), 1
    if kind == "cuda" and trainer.devices > torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise invalid(
            "trainer.devices", trainer.devices, f"1 to {seen} (visible CUDA devices)", f"trainer.devices={seen}"
        )
    return trainer.devices, 1


def split_batch(global_batch: int, micro_batch: int | None, world: int) -> tuple[int, int]:
    """(images per device and forward pass, forward passes per optimiser step).

    Raises:
        ValueError: ``global_batch`` does not divide into ``world`` devices times whole micro-batches.
    """
    if global_batch % world:
        near = max(1, round(global_batch / world)) * world
        raise invalid("global_batch", global_batch, f"a multiple of the {world} devices", f"global_batch={near}")
    per_device = global_batch // world
    micro = per_device if micro_batch is None else micro_batch
    if micro > per_device or per_device % micro:
        raise invalid(
            "micro_batch",
            micro,
            f"a divisor of global_batch / devices = {global_batch} / {world} = {per_device}",
            f"micro_batch={largest_divisor(per_device, micro)}",
        )
    return micro, per_device // micro


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is at most ``limit`` (at least 1)."""
    return next(candidate for candidate in range(max(1, min(limit, number)), 0, -1) if number % candidate == 0)


def make_plan(cfg: DictConfig, num_train: int) -> Plan:
    """Lay out a run over ``num_train`` training images.

    Raises:
        ValueError: sizes that do not divide, or a global batch larger than the training set.
    """
    devices, num_nodes = device_count(cfg.trainer)
    micro, accumulation = split_batch(cfg.global_batch, cfg.micro_batch, devices * num_nodes)
    if num_train < cfg.global_batch:
        world = devices * num_nodes
        raise invalid(
            "global_batch",
            cfg.global_batch,
            f"at most the {num_train} training images",
            f"global_batch={max(1, min(num_train, 64) // (2 * world)) * 2 * world}",
        )
    return Plan(
        devices=devices,
        num_nodes=num_nodes,
        micro_batch=micro,
        accumulation=accumulation,
        steps_per_epoch=num_train // cfg.global_batch,
        epochs=cfg.schedule.epochs + cfg.schedule.cooldown_epochs,
        lr=scaled_lr(cfg.optim.lr, cfg.global_batch, cfg.optim.lr_scaling, cfg.optim.lr_base_batch),
    )
