"""Blocks that walk: which tiles are alike, so that one block may take several, and whether that spares time.

Of most problems every block has many images, for which it finds its start values once; of few, a block that walks over
tiles (or dilation groups) finds them once for all of these. The words are those of csrc/fused/geometry.cuh.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from natrain.ops.fused_plan import Device, Plan, Walk
from natrain.ops.fused_tiles import Axis, Rows, Space, columns_of_rows

# Blocks walk where that is estimated to spare this part of the time. Of 90 problems and directions (an H200) the 11 of
# which more was estimated became 1.19 times as fast in the mean (0.93 to 1.60), those of which less was 0.96 (0.59 to
# 1.15): walking itself costs registers, which the model does not know.
_LEAST_GAIN = 0.25


def walking(plan: Plan, space: Space, device: Device, setup_cycles: float) -> Plan:
    """``plan``, or where that would spare time, the same with blocks that walk.

    Args:
        setup_cycles: of a multiprocessor, for a block before its first image.
    """
    setup = setup_cycles / plan.cycles
    images = -(-space.batch // plan.splits) + setup
    if setup < _LEAST_GAIN * images:
        return plan
    slots = device.multiprocessors * plan.min_blocks
    least = (1 - _LEAST_GAIN) * _makespan(slots, plan.grid, images)
    for time, other in walks(plan, space, setup, slots):
        if time < least:
            least, plan = time, other
    return plan


def walks(plan: Plan, space: Space, setup: float, slots: int) -> Iterator[tuple[float, Plan]]:
    """(estimated time, plan) of the ways to walk; ``setup`` of a block and times in images of the plan's ``cycles``.

    Args:
        slots: blocks that the GPU holds at once.
    """
    for splits in sorted({1, plan.splits}):
        images = -(-space.batch // splits)
        for number, axis in enumerate(space.axes):
            tiles = plan.tiles[number]
            # Blocks of every tile along the axis, and of every group.
            beside = plan.grid // plan.splits // tiles // axis.dilation * splits
            stretch = stretch_of(axis, plan.rows_are, plan.row_tile[number] * plan.warps[number])
            others = tiles - stretch.count
            for runs in _fewer(stretch.count):
                along = list(plan.tiles)
                along[number] = others + runs
                lines = beside * axis.dilation
                run = -(-stretch.count // runs) * images + setup
                time = _makespan(slots, lines * runs, run, lines * others, images + setup)
                walk = Walk(number, False, stretch.first, stretch.count, runs)
                grid = lines * (others + runs)
                cost = time * plan.cycles
                yield time, replace(plan, tiles=tuple(along), splits=splits, grid=grid, cost=cost, walk=walk)
            longer = axis.length % axis.dilation or axis.dilation
            shorter = axis.dilation - longer
            longest_run = max(longer, shorter) if axis.dilation > 1 else 0
            for first, runs in sorted({(-(-shorter // n), -(-longer // n)) for n in range(2, longest_run + 1)}):
                walk = Walk(number, True, first, longer, runs)
                blocks = beside * tiles * (first + runs)
                longest = max(-(-longer // runs), -(-shorter // max(1, first)))
                time = _makespan(slots, blocks, longest * images + setup)
                yield time, replace(plan, splits=splits, grid=blocks, cost=time * plan.cycles, walk=walk)


def _fewer(count: int) -> list[int]:
    """Numbers of runs that share ``count`` tiles, some of them two at the least."""
    return sorted({-(-count // longest) for longest in range(2, count + 1)})


def _makespan(slots: int, blocks: int, time: float, short_blocks: int = 0, short: float = 1) -> float:
    """Until the last of ``blocks`` that take ``time`` each, and of ``short_blocks`` that start after them, ends."""
    if blocks >= 4 * slots:
        return (blocks * time + short_blocks * short) / slots + time / 2
    rounds = -(-blocks // slots)
    fitting = (rounds * slots - blocks) * int(time / short)
    return rounds * time + -(-max(0, short_blocks - fitting) // slots) * short


@dataclass(frozen=True)
class Stretch:
    """``count`` tiles of every dilation group, from ``first`` on, whose rows stand alike in their windows."""

    first: int
    count: int


@functools.lru_cache(maxsize=65536)
def stretch_of(axis: Axis, rows: Rows, tile: int) -> Stretch:
    """The longest stretch of whole tiles of so many rows."""
    first, end = 0, -(-axis.group_lengths[0] // tile)
    for n in axis.group_lengths:
        begin, count = _longest_run(_kinds_of_tiles(axis, n, rows, tile))
        first, end = max(first, begin), min(end, begin + count)
    return Stretch(first, max(0, end - first))


def _kinds_of_tiles(axis: Axis, n: int, rows: Rows, tile: int) -> torch.Tensor:
    """[whole tiles of a group of n positions, ...]: first and last columns of rows, from the tile's first row.

    Of rows that are both, of either side: what both have together can repeat where the sides do not.
    """
    sides = ("queries", "keys") if rows == "both" else (rows,)
    columns = torch.stack([x for side in sides for x in columns_of_rows(axis, n, side)])
    columns = columns[:, : n // tile * tile].unflatten(1, (-1, tile))
    return (columns - torch.arange(0, n // tile * tile, tile)[:, None]).transpose(0, 1).flatten(1)


def _longest_run(kinds: torch.Tensor) -> tuple[int, int]:
    """Where the most equal entries follow each other, and how many."""
    if not len(kinds):
        return 0, 0
    changes = (kinds[1:] != kinds[:-1]).any(1).nonzero().flatten() + 1
    starts = [0, *changes.tolist(), len(kinds)]
    count, start = max((end - start, -start) for start, end in itertools.pairwise(starts))
    return -start, count
