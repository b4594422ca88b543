"""How the gemm kernels cover a problem: what a warp and a block own, what they fetch, and what that costs. Pure functions.

The words are those of csrc/gemm/tile.cuh: a warp's 16 rows, the box of columns that they reach, a block's halo.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch

from natrain.ops.geometry import ACCESS_BYTES, three_axes, weights_pitch
from natrain.ops.problem import Window
from natrain.ops.window import window_bounds

ROWS = COLUMNS = 16  # of one product
MAX_SHARED_BYTES = 227 * 1024  # of a block, sm_90; sm_80 has 163 KiB
_ROW_TILES = (1, 2, 4, 8, 16)
_WARPS = (1, 2, 4, 8)


@functools.lru_cache(maxsize=256)
def _reach(n: int, k: int, s: int, is_causal: bool, by_key: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last column of every row of a dilation group of ``n`` tokens."""
    position = torch.arange(n)
    start, end = window_bounds(position, torch.tensor(n), k, s, is_causal)
    if not by_key:
        return start, end - 1
    # Starts and ends never decrease: the queries of a key lie between the first that ends after it and the last that
    # begins at or before it.
    return torch.searchsorted(end, position, right=True), torch.searchsorted(start, position, right=True) - 1


@functools.lru_cache(maxsize=4096)
def _extents(
    length: int, dilation: int, k: int, s: int, is_causal: bool, by_key: bool, row: int, warps: int, multiple: int
) -> tuple[int, int]:
    """Largest halo of a block and largest box of a warp along an axis; boxes in multiples of ``multiple``."""
    halo = box = 0
    for n in {-(-length // dilation), length // dilation}:
        first, last = _reach(n, k, s, is_causal, by_key)
        warp_first = torch.arange(-(-n // (row * warps)) * warps) * row
        halo_first = first[warp_first // (row * warps) * (row * warps)]
        is_active = warp_first < n
        warp_first, halo_first = warp_first[is_active], halo_first[is_active]
        box_first = first[warp_first]
        size = last[(warp_first + row).clamp(max=n) - 1] + 1 - box_first
        size = (size + multiple - 1) // multiple * multiple
        box = max(box, int(size.max()))
        halo = max(halo, int((box_first - halo_first + size).max()))
    return halo, box


@dataclass(frozen=True)
class GemmTiling:
    """One way to cover a problem; ``cost`` compares ways, in instructions of a warp per head and image."""

    row: tuple[int, int, int]
    warps: tuple[int, int, int]
    halo: tuple[int, int, int]
    tiles: tuple[int, int, int]
    is_staged: bool
    shared_bytes: int
    cost: float

    @property
    def threads(self) -> int:
        return 32 * math.prod(self.warps)


def _row_bytes(head_dim: int, itemsize: int, is_read_by_floats: bool) -> int:
    """``row_pitch`` of csrc/gemm/products.cuh."""
    depths = -(-head_dim * itemsize // 32)
    return (depths | 1) * 32 if is_read_by_floats else (2 * depths | 1) * 16


def _shared_bytes(primitive: str, head_dim: int, itemsize: int, pitch: int, halo: int, rows: int, staged: bool) -> int:
    row = _row_bytes(head_dim, itemsize, False)
    if primitive == "qk":
        return halo * row + rows * (row + pitch * itemsize)
    weight_rows = 0 if not staged else halo if primitive == "inverse" else rows
    return max(halo * _row_bytes(head_dim, itemsize, itemsize == 4) + weight_rows * pitch * itemsize, rows * row)


@functools.lru_cache(maxsize=4096)
def choose_gemm_tiling(
    primitive: str,
    spatial: tuple[int, ...],
    window: Window,
    head_dim: int,
    dtype: torch.dtype,
    max_shared_bytes: int = MAX_SHARED_BYTES,
) -> GemmTiling | None:
    """The cheapest tiling of qk, av or inverse, or None where none fits shared memory."""
    lengths, dilation = three_axes(spatial, 1), three_axes(window.dilation, 1)
    axes = list(
        zip(
            lengths,
            dilation,
            three_axes(window.kernel_size, 1),
            three_axes(window.stride, 1),
            three_axes(window.is_causal, False),
            strict=True,
        )
    )
    by_key, itemsize = primitive == "inverse", dtype.itemsize
    pitch = weights_pitch(window.num_neighbors, dtype)
    groups = [-(-length // d) for length, d in zip(lengths, dilation, strict=True)]
    best = None
    for row in itertools.product(_ROW_TILES, repeat=3):
        if math.prod(row) != ROWS or any(r > 1 and r >= 2 * n for r, n in zip(row, groups, strict=True)):
            continue
        for warps in itertools.product(_WARPS, repeat=3):
            if math.prod(warps) > 8 or any(
                w > 1 and r * w >= 2 * n for r, w, n in zip(row, warps, groups, strict=True)
            ):
                continue
            sizes = [
                _extents(*axis, by_key, r, w, COLUMNS if index == 2 else 1)
                for index, (axis, r, w) in enumerate(zip(axes, row, warps, strict=True))
            ]
            halo, box = tuple(size[0] for size in sizes), math.prod(size[1] for size in sizes)
            tiles = tuple(-(-n // (r * w)) for n, r, w in zip(groups, row, warps, strict=True))
            for staged in (True, False)[: 1 if primitive == "qk" else 2]:
                shared = _shared_bytes(
                    primitive, head_dim, itemsize, pitch, math.prod(halo), ROWS * math.prod(warps), staged
                )
                if shared > max_shared_bytes:
                    continue
                cost = _cost(
                    primitive, head_dim, itemsize, pitch, box, math.prod(halo), math.prod(warps), staged, shared
                )
                cost *= math.prod(t * d for t, d in zip(tiles, dilation, strict=True))
                if best is None or cost < best.cost:
                    best = GemmTiling(row, warps, halo, tiles, staged, shared, cost)
    return best


def _cost(
    primitive: str, head_dim: int, itemsize: int, pitch: int, box: int, halo: int, warps: int, staged: bool, shared: int
) -> float:
    """Of one block: products, pieces fetched and stored, and what a multiprocessor with few warps waits for."""
    products = warps * box / COLUMNS
    depth = head_dim * itemsize / 32
    pairs = 60 if primitive == "qk" else 45 if staged else 150
    weights = warps * ROWS * pitch * itemsize / ACCESS_BYTES
    if primitive == "inverse" and staged:
        weights = halo * pitch * itemsize / ACCESS_BYTES
    elif primitive != "qk" and not staged:
        weights = 0
    pieces = weights + (halo + warps * ROWS) * head_dim * itemsize / ACCESS_BYTES
    resident = min(48, MAX_SHARED_BYTES // (shared + 1024) * warps)
    return (products * (pairs + 4 * depth) + 0.5 * pieces + 150 * warps) * max(1.0, 20 / resident) ** 0.7
