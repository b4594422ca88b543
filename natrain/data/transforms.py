"""Augmentation and evaluation transforms, put together from timm's and torchvision's.

Published NAT and DiNAT recipes augment as timm does (A. Hassani et al., "Neighborhood Attention Transformer", CVPR
2023, section 4.1): random resized crop, flip, RandAugment, random erasing. Small images are padded by an eighth of
their side and cropped back instead (K. He et al., "Deep Residual Learning for Image Recognition", 2015, section 4.2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms import str_to_interp_mode
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train
from torchvision import transforms

from natrain.data.images import convert_mode
from natrain.errors import invalid

Transform = Callable[[Image.Image], torch.Tensor]

MODES = {1: "L", 3: "RGB"}
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class ModelInput:
    """What the model wants to see. ``size`` = (height, width) in pixels; ``mean``, ``std`` per channel, for 0..1."""

    size: tuple[int, int]
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelInput:
        """Check ``dict(img_size, in_chans, mean, std, crop_pct, interpolation)``.

        Mean and std of three channels are averaged for one channel, as timm adapts the weights of the stem.

        Raises:
            ValueError: a value out of range.
        """
        size = values["img_size"]
        size = tuple(size) if isinstance(size, Sequence) else (size, size)
        if len(size) != 2 or not all(isinstance(side, int) and side >= 1 for side in size):
            raise invalid("data.img_size", values["img_size"], "pixels >= 1, or [height, width]", "data.img_size=224")
        in_chans = values["in_chans"]
        if in_chans not in MODES:
            raise invalid("data.in_chans", in_chans, "3 (colour) or 1 (grey)", "data.in_chans=3")
        crop_pct = values["crop_pct"]
        if not 0 < crop_pct <= 1:
            raise invalid("data.crop_pct", crop_pct, "0 < crop_pct <= 1", "data.crop_pct=0.875")
        if values["interpolation"] not in INTERPOLATIONS:
            allowed = f"one of {', '.join(INTERPOLATIONS)}"
            raise invalid("data.interpolation", values["interpolation"], allowed, "data.interpolation=bicubic")
        mean = _per_channel("data.mean", values["mean"], in_chans, minimum=0.0)
        std = _per_channel("data.std", values["std"], in_chans, minimum=1e-6)
        return cls(size, MODES[in_chans], mean, std, float(crop_pct), values["interpolation"])


def _per_channel(argument: str, values: Sequence[float], channels: int, minimum: float) -> tuple[float, ...]:
    values = tuple(values)
    if len(values) not in (1, channels, 3) or not all(minimum <= value <= 1 for value in values):
        example = f"{argument}=[{','.join(['0.5'] * channels)}]"
        raise invalid(argument, list(values), f"{channels} numbers from {minimum:g} to 1", example)
    if len(values) == channels:
        return values
    return (sum(values) / len(values),) * channels


def build_eval_transform(input: Mapping[str, Any]) -> Transform:
    """What evaluation and prediction do to a PIL image of any mode and size: tensor [C, H, W], normalised.

    The shorter side is resized to ``img_size / crop_pct``, then the centre is cropped.

    Args:
        input: ``dict(img_size, in_chans, mean, std, crop_pct, interpolation)``.
    """
    target = ModelInput.from_dict(input)
    return transforms.Compose(
        [
            functools.partial(convert_mode, mode=target.mode),
            transforms_imagenet_eval(
                img_size=target.size,
                crop_pct=target.crop_pct,
                interpolation=target.interpolation,
                mean=target.mean,
                std=target.std,
            ),
        ]
    )


def build_train_transform(
    input: Mapping[str, Any], augment: Mapping[str, Any], *, small_side: int | None, hflip: float
) -> Transform:
    """The random part of training, driven by the generators that ``rng.seed_augmentation`` seeds.

    Args:
        input: as of :func:`build_eval_transform`.
        augment: keys ``rand_augment`` (timm's description or None), ``color_jitter`` (a strength or None; used where
            RandAugment is off, as in timm), ``hflip`` (probability; None: the data set's), ``scale`` and ``ratio`` of
            the random resized crop (``scale`` None: [0.08, 1], or pad and crop for small images),
            ``train_interpolation`` ("random" draws bilinear or bicubic), ``random_erasing`` (probability). Others,
            which belong to training, are passed over.
        small_side, hflip: of the data set, see :class:`natrain.data.images.Splits`.

    Raises:
        ValueError: a value out of range or a description that timm cannot read.
    """
    target = ModelInput.from_dict(input)
    hflip = hflip if augment.get("hflip") is None else augment["hflip"]
    erasing = augment.get("random_erasing") or 0.0
    for name, value in (("hflip", hflip), ("random_erasing", erasing)):
        if not 0 <= value <= 1:
            raise invalid(f"augment.{name}", value, "a probability from 0 to 1", f"augment.{name}=0.5")
    jitter = augment.get("color_jitter")
    if jitter is not None and not 0 <= jitter <= 1:
        raise invalid("augment.color_jitter", jitter, "a strength from 0 to 1, or null", "augment.color_jitter=0.4")
    interpolation = augment.get("train_interpolation") or "random"
    if interpolation not in ("random", *INTERPOLATIONS):
        allowed = f"random or one of {', '.join(INTERPOLATIONS)}"
        raise invalid("augment.train_interpolation", interpolation, allowed, "augment.train_interpolation=random")
    description = augment.get("rand_augment")
    try:
        crop, colour, normalise = transforms_imagenet_train(
            img_size=target.size,
            scale=_interval("augment.scale", augment.get("scale"), maximum=1.0),
            ratio=_interval("augment.ratio", augment.get("ratio"), maximum=float("inf")),
            hflip=hflip,
            color_jitter=jitter,
            auto_augment=description,
            interpolation=interpolation,
            mean=target.mean,
            std=target.std,
            re_prob=erasing,
            re_mode="pixel",
            separate=True,
        )
    except (AssertionError, KeyError, AttributeError) as error:
        raise invalid(
            "augment.rand_augment",
            description,
            "timm's description, such as rand-m9-mstd0.5-inc1, or null",
            "augment.rand_augment=rand-m9-mstd0.5-inc1",
        ) from error
    for operation in (op for transform in colour.transforms for op in getattr(transform, "ops", ())):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    if small_side is not None and augment.get("scale") is None:
        crop = _pad_and_crop(target, small_side, hflip, interpolation)
    return transforms.Compose([crop, colour, normalise])


def _pad_and_crop(target: ModelInput, side: int, hflip: float, interpolation: str) -> transforms.Compose:
    steps: list[Callable] = [transforms.RandomCrop(side, padding=side // 8)]
    if target.size != (side, side):
        fixed = target.interpolation if interpolation == "random" else interpolation
        steps.append(transforms.Resize(target.size, str_to_interp_mode(fixed)))
    if hflip > 0:
        steps.append(transforms.RandomHorizontalFlip(hflip))
    return transforms.Compose(steps)


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's posterize, also where it keeps no bit: the image turns black, as it did before Pillow 13 raised there."""
    if bits_to_keep == 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep)


def _interval(argument: str, values: Sequence[float] | None, maximum: float) -> tuple[float, float] | None:
    if values is None:
        return None
    values = tuple(values)
    if len(values) != 2 or not 0 < values[0] <= values[1] <= maximum:
        raise invalid(
            argument, list(values), f"[low, high] with 0 < low <= high <= {maximum:g}", f"{argument}=[0.75,1]"
        )
    return values
