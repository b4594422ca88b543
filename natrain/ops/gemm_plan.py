"""How the gemm kernels cover a problem: what a warp and a block own and fetch, and what that costs. Pure functions.

The words are those of csrc/gemm/tile.cuh: a warp's 16 rows, the box of columns that they reach, a block's halo.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch

from natrain.ops.geometry import ACCESS_BYTES, three_axes, under_no_mode, weights_pitch
from natrain.ops.problem import Window
from natrain.ops.window import window_bounds

ROWS = COLUMNS = 16  # of one product
SHARED_BYTES = 227 * 1024  # the most of a block, sm_90
_ROW_TILES = (1, 2, 4, 8, 16)
_WARPS = (1, 2, 4, 8)
_MOST_BIAS_BYTES = 8 * 1024
_REGISTERS = 65536  # of a multiprocessor


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
    """One way to cover a problem; ``cost`` compares ways, in instructions of a warp per head and image.

    Attributes:
        row, warps: tokens of a warp's rows, warps of a block, along z, y, x.
        halo: columns that a block reaches.
        chunk: of them, in shared memory at once (and as many again on their way, where that is not all).
        held: scores of a row that qk holds in shared memory.
        is_staged: av and inverse read weights from shared memory.
        bias_bytes: of a head's bias that qk holds there.
        min_blocks: that a multiprocessor is to hold, where shared memory and not registers limits them; else 0.
        tiles: blocks that cover the longest dilation group.
    """

    row: tuple[int, int, int]
    warps: tuple[int, int, int]
    halo: tuple[int, int, int]
    chunk: int
    held: int
    is_staged: bool
    tiles: tuple[int, int, int]
    bias_bytes: int
    min_blocks: int
    shared_bytes: int
    cost: float

    @property
    def threads(self) -> int:
        return 32 * math.prod(self.warps)


@dataclass(frozen=True)
class _Primitive:
    """What the size of shared memory and the cost depend on besides the tiling."""

    name: str
    head_dim: int
    itemsize: int
    pitch: int  # of a row of weights, elements
    line_slots: int  # of a line of a window: its extent along x
    bias_bytes: int  # of a head's bias in shared memory

    @property
    def registers(self) -> int:
        """That a thread does with: those of D sums or of D's factors, and the rest."""
        return 80 + self.head_dim // 2

    @property
    def row_bytes(self) -> int:
        return self.head_dim * self.itemsize

    def shared_row(self, is_read_by_floats: bool) -> int:
        """``row_pitch`` of csrc/gemm/products.cuh, bytes."""
        depths = -(-self.row_bytes // 32)
        return (depths | 1) * 32 if is_read_by_floats else (2 * depths | 1) * 16

    def held(self, halo: tuple[int, int, int], chunk: int) -> int:
        """Scores of a row that come out of one chunk, and of the piece the one before left incomplete."""
        if chunk == math.prod(halo):
            return self.pitch
        slots = chunk if halo[0] * halo[1] == 1 else chunk // halo[2] * self.line_slots
        piece = ACCESS_BYTES // self.itemsize
        return min(self.pitch, -(-(slots + piece - 1) // piece) * piece)

    def shared_bytes(self, halo: tuple[int, int, int], chunk: int, held: int, rows: int, is_staged: bool) -> int:
        columns = math.prod(halo)
        stages = 1 if chunk == columns else 2
        if self.name == "qk":
            row = self.shared_row(False)
            return stages * chunk * row + rows * (row + held * self.itemsize) + self.bias_bytes
        fetched = stages * chunk * self.shared_row(self.itemsize == 4)
        if is_staged:
            # Reads go past the last row by a line at most.
            slack = -(-(halo[2] + COLUMNS) * self.itemsize // 16) * 16
            fetched += (columns if self.name == "inverse" else rows) * self.pitch * self.itemsize + slack
        return max(fetched, rows * self.shared_row(False))

    def cost(
        self, box: int, halo: int, chunk: int, warps: int, is_staged: bool, shared: int, most_shared: int
    ) -> float:
        """Of one block: products, pieces fetched and stored, and what a multiprocessor with few warps waits for."""
        products = warps * box / COLUMNS
        pairs = 60 if self.name == "qk" else 45 if is_staged else 110
        weights = warps * ROWS * self.pitch * self.itemsize / ACCESS_BYTES
        if self.name == "inverse" and is_staged:
            weights *= halo / (warps * ROWS)
        elif self.name != "qk" and not is_staged:
            weights = 0
        pieces = weights + (halo + warps * ROWS) * self.row_bytes / ACCESS_BYTES
        resident = min(48, max(1, most_shared // (shared + 1024)) * warps)
        work = (
            products * (pairs + self.row_bytes / 8) + 0.5 * pieces + 150 * warps + 100 * warps * (-(-halo // chunk) - 1)
        )
        return work * max(1.0, 20 / resident) ** 0.7


def _chunks(halo: tuple[int, int, int]) -> list[int]:
    """All of the halo, or 1, 2, 4 .. lines; of a single line parts."""
    lines, columns = halo[0] * halo[1], halo[2]
    if lines == 1:
        return [columns, *(size for size in (64, 128, 256) if size < columns)]
    return [lines * columns, *(columns << i for i in range(7) if 1 << i < lines)]


@functools.lru_cache(maxsize=4096)
@under_no_mode
def choose_gemm_tiling(
    primitive: str,
    spatial: tuple[int, ...],
    window: Window,
    head_dim: int,
    dtype: torch.dtype,
    has_rpb: bool = False,
    max_shared_bytes: int = SHARED_BYTES,
) -> GemmTiling | None:
    """The cheapest tiling of qk, av or inverse, or None where none fits shared memory."""
    lengths, dilation, sizes = three_axes(spatial, 1), three_axes(window.dilation, 1), three_axes(window.kernel_size, 1)
    strides, causal = three_axes(window.stride, 1), three_axes(window.is_causal, False)
    axes = list(zip(lengths, dilation, sizes, strides, causal, strict=True))
    pitch = weights_pitch(window.num_neighbors, dtype)
    bias_bytes = -(-4 * math.prod(window.rpb_shape) // ACCESS_BYTES) * ACCESS_BYTES
    if not has_rpb or bias_bytes > _MOST_BIAS_BYTES:
        bias_bytes = 0
    need = _Primitive(primitive, head_dim, dtype.itemsize, pitch, sizes[2], bias_bytes)
    groups = [-(-length // d) for length, d in zip(lengths, dilation, strict=True)]
    best = None
    for row in itertools.product(_ROW_TILES, repeat=3):
        if math.prod(row) != ROWS or math.prod(row[: 3 - len(spatial)]) > 1:
            continue
        for warps in itertools.product(_WARPS, repeat=3):
            covered = [r * w for r, w in zip(row, warps, strict=True)]
            if math.prod(warps) > 8 or any(
                w > 1 and c >= 2 * n for c, w, n in zip(covered, warps, groups, strict=True)
            ):
                continue
            extents = [
                _extents(*axis, primitive == "inverse", r, w, COLUMNS if index == 2 else 1)
                for index, (axis, r, w) in enumerate(zip(axes, row, warps, strict=True))
            ]
            halo, box = tuple(extent[0] for extent in extents), math.prod(extent[1] for extent in extents)
            tiles = tuple(-(-n // c) for n, c in zip(groups, covered, strict=True))
            blocks, size, count = math.prod(tiles) * math.prod(dilation), math.prod(halo), math.prod(warps)
            for chunk, is_staged in itertools.product(_chunks(halo), (True, False)):
                # Of inverse the weights belong to the halo; qk writes them.
                if is_staged and (primitive == "qk" or (primitive == "inverse" and chunk < size)):
                    continue
                held = need.held(halo, chunk)
                shared = need.shared_bytes(halo, chunk, held, ROWS * count, is_staged)
                if shared > max_shared_bytes:
                    continue
                cost = need.cost(box, size, chunk, count, is_staged, shared, max_shared_bytes) * blocks
                if best is None or cost < best.cost:
                    fit = max(1, max_shared_bytes // (shared + 1024))
                    min_blocks = fit if fit * 32 * count * need.registers <= _REGISTERS else 0
                    best = GemmTiling(
                        row, warps, halo, chunk, held, is_staged, tiles, bias_bytes, min_blocks, shared, cost
                    )
    return best
