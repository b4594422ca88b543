"""Arguments that may differ by stage, and the check that a model's windows fit into an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    entries = [dilations] * len(depths) if isinstance(dilations, int) else list(dilations)
    patterns = [(entry,) if isinstance(entry, int) else tuple(entry) for entry in entries]
    fits = len(patterns) == len(depths) and all(
        0 < len(pattern) <= depth and all(isinstance(d, int) and d >= 1 for d in pattern)
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
