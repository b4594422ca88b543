"""What tiles of a problem reach, and what they take in shared memory. Pure functions.

The words (row, column, box, line, halo) are explained in csrc/fused/geometry.cuh.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch

from natrain.ops.geometry import three_axes
from natrain.ops.problem import Window
from natrain.ops.window import window_bounds

# What the rows of a kernel are (enum Side of csrc/fused/geometry.cuh).
Rows = Literal["queries", "keys", "both"]


def row_pitch(dim: int, itemsize: int) -> int:
    """Bytes from row to row in shared memory (``RowFormat`` of csrc/fused/halo.cuh)."""
    pieces = dim * itemsize // 16
    return 16 * (pieces if _is_permuted(pieces, itemsize) else pieces | 1)


def _is_permuted(pieces: int, itemsize: int) -> bool:
    return itemsize == 2 and pieces & (pieces - 1) == 0


def line_multiple(dims: tuple[int, ...], itemsize: int) -> int:
    """What the tokens of a line in shared memory must be a multiple of, so that every line begins in the same bank."""
    pieces = [dim * itemsize // 16 for dim in dims]
    return max(8 // p if _is_permuted(p, itemsize) and p < 8 else 1 for p in pieces)


@dataclass(frozen=True)
class Axis:
    """One axis of a problem; ``length`` in tokens."""

    length: int
    kernel_size: int
    dilation: int
    stride: int
    is_causal: bool

    @property
    def group_lengths(self) -> tuple[int, ...]:
        """Distinct lengths of dilation groups, the longest first."""
        longest, shortest = -(-self.length // self.dilation), self.length // self.dilation
        return (longest,) if longest == shortest else (longest, shortest)


@dataclass(frozen=True)
class Space:
    """Where rows and columns lie: three axes always (z, y, x), images, heads."""

    axes: tuple[Axis, Axis, Axis]
    batch: int
    heads: int
    kv_heads: int
    itemsize: int
    has_rpb: bool

    @staticmethod
    def of(
        spatial: tuple[int, ...],
        window: Window,
        batch: int,
        heads: int,
        kv_heads: int,
        dtype: torch.dtype,
        has_rpb: bool,
    ) -> Space:
        columns = (spatial, window.kernel_size, window.dilation, window.stride, window.is_causal)
        padded = [three_axes(values, missing) for values, missing in zip(columns, (1, 1, 1, 1, False), strict=True)]
        axes = tuple(Axis(*values) for values in zip(*padded, strict=True))
        return Space(axes, batch, heads, kv_heads, dtype.itemsize, has_rpb)


@functools.lru_cache(maxsize=1024)
def columns_of_rows(axis: Axis, n: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """First column and one past the last of every row of a group of n positions."""
    row = torch.arange(n)
    first, end = window_bounds(row, torch.tensor(n), axis.kernel_size, axis.stride, axis.is_causal)
    if rows == "queries":
        return first, end
    # Starts and ends never decrease, so that the queries of a key are an interval.
    of_key = torch.searchsorted(end, row, right=True), torch.searchsorted(first.contiguous(), row, right=True)
    if rows == "keys":
        return of_key
    return torch.minimum(first, of_key[0]).minimum(row), torch.maximum(end, of_key[1]).maximum(row + 1)


@functools.lru_cache(maxsize=65536)
def box_extent(axis: Axis, rows: Rows, tile: int) -> int:
    """Columns that the rows of a tile reach together, at most."""
    most = 0
    for n in axis.group_lengths:
        first, end = columns_of_rows(axis, n, rows)
        starts = torch.arange(0, n, tile)
        most = max(most, int((end[(starts + tile - 1).clamp(max=n - 1)] - first[starts]).max()))
    return most


@functools.lru_cache(maxsize=65536)
def box_offsets(axis: Axis, rows: Rows, tile: int, most_warps: int) -> tuple[int, ...]:
    """How far a warp's box may begin behind its block's halo, for blocks of 1 to ``most_warps`` warps."""
    most = torch.zeros(most_warps, dtype=torch.int64)
    for n in axis.group_lengths:
        first, _ = columns_of_rows(axis, n, rows)
        starts = first[::tile]
        warps = torch.arange(1, most_warps + 1)[:, None]
        blocks = torch.arange(len(starts)) // warps * warps
        most = torch.maximum(most, (starts - starts[blocks]).amax(1))
    return tuple(most.tolist())


@dataclass(frozen=True)
class Classes:
    """Kinds of rows in a block, by where they stand in their windows (table 2 of csrc/fused/start.cuh)."""

    y: int
    x: int
    lines: int
    margin: int

    @staticmethod
    def of(space: Space, rows: Rows, row_tile, warps, box) -> Classes:
        """The most that any block has."""
        _, axis_y, axis_x = space.axes
        lines, before = _lines_of_classes(axis_y, rows, row_tile[1])
        return Classes(
            _most_classes(axis_y, rows, 1, row_tile[1] * warps[1], space.has_rpb),
            _most_classes(axis_x, rows, row_tile[2], warps[2], space.has_rpb),
            lines,
            max(before, box[1] - lines),
        )

    def bytes(self, row_tile, warps, box) -> int:
        """Of ``StartTable``."""
        line = box[2] // 8 * self.x * row_tile[2] * 32
        if row_tile[2] < 4:
            line += (row_tile[2] * 32 + 128 - line % 128) % 128
        entries = row_tile[1] * warps[1] + warps[2] + 2 * self.y + self.x
        return (self.y * (self.lines + self.margin) + self.margin) * line + round_up(4 * entries, 16)


@functools.lru_cache(maxsize=65536)
def _lines_of_classes(axis: Axis, rows: Rows, tile: int) -> tuple[int, int]:
    """Most columns of a row, and how many lines a box begins before them at most."""
    most = before = 0
    for n in axis.group_lengths:
        first, end = columns_of_rows(axis, n, rows)
        most = max(most, int((end - first).max()))
        before = max(before, int((first - first[torch.arange(n) // tile * tile]).max()))
    return most, before


@functools.lru_cache(maxsize=65536)
def _most_classes(axis: Axis, rows: Rows, size: int, count: int, has_rpb: bool) -> int:
    """Runs of equal units in a block of ``count`` units of ``size`` rows, as seen from a unit's first column."""
    most = 1
    for n in axis.group_lengths:
        changes = _changes(axis, n, rows, size, has_rpb)
        blocks = -(-n // (size * count))
        of_block = changes[count - 1 :: count][:blocks] - changes[::count][:blocks]
        most = max(most, 1 + int(of_block.max()))
    return most


_MOST_UNITS = 64  # of a block


@functools.lru_cache(maxsize=4096)
def _changes(axis: Axis, n: int, rows: Rows, size: int, has_rpb: bool) -> torch.Tensor:
    """How many units up to each one of a group of n positions differ from the one before; a last block may lack some
    of its units, which then repeat the last row."""
    first, end = columns_of_rows(axis, n, rows)
    unit = (torch.arange(-(-n // size) + _MOST_UNITS) * size)[:, None]
    rows = (unit + torch.arange(size)).clamp(max=n - 1)
    origin = first[unit.clamp(max=n - 1)]
    kinds = torch.stack([first[rows] - origin, end[rows] - origin, (rows - origin) * has_rpb], -1)
    changes = (kinds[1:] != kinds[:-1]).flatten(1).any(1)
    return torch.cat([torch.zeros(1, dtype=torch.int64), changes.cumsum(0)])


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def table_bytes(space: Space, row_tile: tuple[int, int, int], warps: tuple[int, int, int], box_x: int) -> int:
    """Of ``StartTable`` in csrc/fused/start.cuh."""
    lines = math.prod(2 * axis.kernel_size - 1 for axis in space.axes[:2]) if space.has_rpb else 1
    line = box_x // 8 * row_tile[2] * warps[2] * 32
    if row_tile[2] < 4:
        line += (row_tile[2] * 32 + 128 - line % 128) % 128
    return (lines + 1) * line
