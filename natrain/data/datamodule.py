"""From the ``data`` and ``augment`` sections of a config to the loaders of one run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import lightning
import torch

from natrain.data.cifar10 import read_cifar10
from natrain.data.digits import read_digits
from natrain.data.imagefolder import read_imagefolder
from natrain.data.images import Splits
from natrain.data.loader import EvalImages, EvalLoader, TrainImages, TrainLoader, UnreadableImages
from natrain.data.sampler import EvalSampler, TrainSampler
from natrain.data.transforms import ModelInput, build_eval_transform, build_train_transform
from natrain.errors import invalid, nearest

DATASETS: dict[str, Callable[..., Splits]] = {
    "digits": read_digits,
    "cifar10": read_cifar10,
    "imagefolder": read_imagefolder,
}
_MAX_WORKERS = 16  # beyond it the training process, which takes every batch over, is the limit


def build_datamodule(
    cfg_data: Mapping[str, Any],
    cfg_augment: Mapping[str, Any],
    *,
    input: Mapping[str, Any],
    micro_batch: int,
    seed: int,
    global_batch: int | None = None,
) -> ImageDataModule:
    """Find the data set and check everything that can be checked without decoding it.

    Args:
        cfg_data: ``name``, ``root``, ``labels``, ``val_share``, ``split_seed``, ``num_classes`` (None: from the data),
            ``workers`` per rank (None: from the cores), ``val_batch`` per rank (None: twice ``micro_batch``),
            ``bad_image_limit``.
        cfg_augment: see :func:`natrain.data.transforms.build_train_transform`.
        input: ``dict(img_size, in_chans, mean, std, crop_pct, interpolation)`` of the model.
        micro_batch: images per rank and forward pass.
        seed: of data order and augmentation.
        global_batch: images per optimiser step; None: ``micro_batch`` times the number of ranks. An epoch has
            ``num_train // global_batch`` optimiser steps.

    Raises:
        ValueError: an unknown data set, a value out of range, or files that are not as they should be.
        ModuleNotFoundError: the data set needs a package that is not installed; the message says what to type.
    """
    name = cfg_data["name"]
    if name not in DATASETS:
        raise invalid("data", name, " | ".join(DATASETS), f"data={nearest(str(name), DATASETS) or 'imagefolder'}")
    limit = cfg_data["bad_image_limit"]
    if not 0 <= limit <= 1:
        raise invalid("data.bad_image_limit", limit, "a share from 0 to 1", "data.bad_image_limit=0.001")
    workers, val_batch = cfg_data.get("workers"), cfg_data.get("val_batch")
    if workers is not None and workers < 0:
        raise invalid("data.workers", workers, "processes >= 0, or null", "data.workers=null")
    if val_batch is not None and val_batch < 1:
        raise invalid("data.val_batch", val_batch, "images >= 1, or null", "data.val_batch=null")
    splits = _read(name, cfg_data)
    num_classes = cfg_data.get("num_classes")
    if num_classes is not None and num_classes != len(splits.class_names):
        raise invalid(
            "data.num_classes", num_classes, f"{len(splits.class_names)}, as in the data", "data.num_classes=null"
        )
    return ImageDataModule(
        splits,
        train_transform=build_train_transform(input, cfg_augment, small_side=splits.small_side, hflip=splits.hflip),
        eval_transform=build_eval_transform(input),
        mode=ModelInput.from_dict(input).mode,
        micro_batch=micro_batch,
        global_batch=global_batch,
        val_batch=val_batch or 2 * micro_batch,
        workers=workers,
        bad_image_limit=limit,
        seed=seed,
    )


def _read(name: str, cfg_data: Mapping[str, Any]) -> Splits:
    """The data set; how labels and a missing split are found concerns image folders only."""
    root = cfg_data.get("root")
    if name == "imagefolder":
        given = {key: cfg_data[key] for key in ("labels", "val_share", "split_seed") if key in cfg_data}
        return read_imagefolder(root, **given)
    if cfg_data.get("labels") is not None:
        raise invalid(
            "data.labels", cfg_data["labels"], f"null: data={name} brings its labels", "data=imagefolder, or no labels"
        )
    return DATASETS[name](root)


class ImageDataModule(lightning.LightningDataModule):
    """Loaders for any trainer: Lightning calls ``train_dataloader`` and ``val_dataloader``, others the ``*_loader``.

    Attributes:
        num_classes, class_names: of the data set; ``class_names[target]`` names a target.
        num_train, num_val: images.
        unreadable: what training could not read on this rank so far; None before ``train_loader``.
    """

    def __init__(
        self,
        splits: Splits,
        *,
        train_transform: Callable,
        eval_transform: Callable,
        mode: str,
        micro_batch: int,
        global_batch: int | None,
        val_batch: int,
        workers: int | None,
        bad_image_limit: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.splits = splits
        self.class_names = splits.class_names
        self.num_classes = len(splits.class_names)
        self.num_train = len(splits.train.targets)
        self.num_val = len(splits.val.targets)
        self.unreadable: UnreadableImages | None = None
        self.micro_batch, self.global_batch, self.val_batch = micro_batch, global_batch, val_batch
        self.workers = workers
        self.bad_image_limit = bad_image_limit
        self._train = TrainImages(splits.train, train_transform, mode, seed)
        self._val = EvalImages(splits.val, eval_transform, mode)
        self._seed = seed

    def train_dataloader(self) -> TrainLoader:
        return self.train_loader(self.trainer.global_rank, self.trainer.world_size, self.trainer.num_devices)

    def val_dataloader(self) -> EvalLoader:
        return self.val_loader(self.trainer.global_rank, self.trainer.world_size, self.trainer.num_devices)

    def train_loader(self, rank: int = 0, world_size: int = 1, ranks_per_node: int = 1) -> TrainLoader:
        """Batches ``(images float32 [B, C, H, W], targets int64 [B])`` of one rank; see :class:`TrainSampler`."""
        sampler = TrainSampler(
            self._train,
            micro_batch=self.micro_batch,
            global_batch=self.global_batch or self.micro_batch * world_size,
            seed=self._seed,
            rank=rank,
            world_size=world_size,
        )
        self.splits.train.prepare()
        self.unreadable = UnreadableImages(self.bad_image_limit, epoch_reads=len(sampler))
        return TrainLoader(
            self._train,
            sampler=sampler,
            batch_size=self.micro_batch,
            unreadable=self.unreadable,
            **self._settings(ranks_per_node),
        )

    def val_loader(self, rank: int = 0, world_size: int = 1, ranks_per_node: int = 1) -> EvalLoader:
        """Batches ``(images, targets, indices)`` of one rank; over all ranks every image exactly once."""
        self.splits.val.prepare()
        return EvalLoader(
            self._val,
            sampler=EvalSampler(self._val, rank=rank, world_size=world_size),
            batch_size=self.val_batch,
            **self._settings(ranks_per_node),
        )

    def _settings(self, ranks_per_node: int) -> dict[str, Any]:
        workers = default_workers(ranks_per_node) if self.workers is None else self.workers
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # A DataLoader draws a seed each epoch: from its own generator, or dropout would depend on it.
            "generator": torch.Generator(),
        }


def default_workers(ranks_per_node: int) -> int:
    """The cores this process may use, shared among the ranks, less one for the training process itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(0, min(_MAX_WORKERS, cores // ranks_per_node - 1))
