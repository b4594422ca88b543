"""Arguments that may differ by stage, and the check that a model's windows fit into an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TypeVar

from natrain.errors import invalid
from natrain.models.plans import Dilations, Plans, named_plan

T = TypeVar("T", int, str)


@dataclass(frozen=True)
class StageWindows:
    """What decides whether the windows of a stage fit: pixels per token, tokens per window, largest dilation."""

    reduction: int
    kernel_size: int
    dilation: int

    def tokens(self, pixels: int) -> int:
        return -(-pixels // self.reduction)

    @property
    def min_pixels(self) -> int:
        """The shortest side on which kernel_size * dilation tokens fit; tokenizers and downsamplers round up."""
        return (self.kernel_size * self.dilation - 1) * self.reduction + 1


def per_stage(argument: str, value: T | Sequence[T], stages: int, kind: type[T]) -> tuple[T, ...]:
    """``value`` once per stage.

    Raises:
        ValueError: neither one ``kind`` nor a sequence of ``stages`` of them.
    """
    values = (value,) * stages if isinstance(value, kind) else tuple(value) if isinstance(value, Sequence) else ()
    if len(values) != stages or not all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in values):
        example = {int: 7, str: "auto"}[kind]
        raise invalid(
            argument,
            value,
            f"one {kind.__name__}, or one for each of the {stages} stages",
            f"{argument}={example!r} or {argument}={[example] * stages}",
        )
    return values


def check_depths(depths: Sequence[int]) -> None:
    """Raise ValueError unless every stage has a whole number of blocks >= 1."""
    is_list = isinstance(depths, Sequence) and len(depths) > 0
    if not is_list or not all(_is_whole(blocks, 1) for blocks in depths):
        raise invalid("depths", depths, "for each stage a whole number of blocks >= 1", "depths=[3,4,6,5]")


def check_num_classes(num_classes: int) -> None:
    """Raise ValueError unless it is a whole number >= 0; 0 is a model without classifier."""
    if not _is_whole(num_classes, 0):
        raise invalid("num_classes", num_classes, "a whole number >= 0 (0: no classifier)", "num_classes=10")


def image_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    """``img_size`` as (height, width) in pixels; one number is both.

    Raises:
        ValueError: neither one whole number >= 1 nor two.
    """
    sides = (img_size, img_size) if isinstance(img_size, Integral) else img_size
    is_pair = isinstance(sides, Sequence) and len(sides) == 2
    if not is_pair or not all(_is_whole(side, 1) for side in sides):
        allowed = "a whole number of pixels >= 1, or [height, width]"
        raise invalid("img_size", img_size, allowed, "img_size=224 or img_size=[224,256]")
    return int(sides[0]), int(sides[1])


def _is_whole(value: object, least: int) -> bool:
    """True for whole numbers from ``least``, numpy's among them."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def dilation_plan(dilations: Dilations | str, depths: Sequence[int], plans: Plans) -> list[tuple[int, ...]]:
    """The dilation of every block: an entry per stage, whose pattern repeats until the stage is full.

    Args:
        dilations: numbers, or a name in ``plans``.
        depths: blocks per stage.
        plans: the family's published plans.

    Raises:
        ValueError: not one entry per stage; an empty pattern or one longer than its stage; a dilation below 1; a name
            that ``plans`` lacks.
    """
    dilations = named_plan(dilations, plans, depths)
    entries = dilations if isinstance(dilations, Sequence) else [dilations] * len(depths)
    patterns = [tuple(entry) if isinstance(entry, Sequence) else (entry,) for entry in entries]
    fits = len(patterns) == len(depths) and all(
        0 < len(pattern) <= depth and all(isinstance(d, int) and not isinstance(d, bool) and d >= 1 for d in pattern)
        for pattern, depth in zip(patterns, depths, strict=False)
    )
    if not fits:
        raise invalid(
            "dilations",
            dilations,
            f"an int >= 1, or for each of the {len(depths)} stages an int or a pattern of ints >= 1 that repeats over "
            f"its blocks (depths {tuple(depths)})",
            f"dilations={[[1, 2][: min(2, depth)] for depth in depths]}",
        )
    return [
        tuple(pattern[block % len(pattern)] for block in range(depth))
        for pattern, depth in zip(patterns, depths, strict=True)
    ]


def check_windows(height: int, width: int, windows: Sequence[StageWindows]) -> None:
    """Raise ValueError unless kernel_size * dilation tokens fit on both sides of every stage's map.

    The message names the smallest image and, for this image, the largest dilation or kernel size of each stage.
    """
    side = min(height, width)
    if all(side >= stage.min_pixels for stage in windows):
        return
    lacks = ", ".join(
        f"stage {number} has {stage.tokens(side)} and needs {stage.kernel_size} * {stage.dilation}"
        for number, stage in enumerate(windows, 1)
        if side < stage.min_pixels
    )
    largest = [stage.tokens(side) // stage.kernel_size for stage in windows]
    smaller = (
        f"dilations={largest} at most"
        if min(largest) > 0
        else f"kernel_size={[min(stage.kernel_size, stage.tokens(side)) for stage in windows]} with dilations=1"
    )
    least = max(stage.min_pixels for stage in windows)
    raise invalid(
        "image size (H, W)",
        (int(height), int(width)),
        f"at least {least} pixels a side, for kernel_size * dilation tokens on each side of every map ({lacks})",
        f"img_size={-(-least // 32) * 32}, {smaller}, or na_padding='shrink' (docs/models.md)",
    )
