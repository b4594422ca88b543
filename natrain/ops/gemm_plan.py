"""How the gemm kernels cover a problem: what a warp and a block own and fetch, and what that costs. Pure functions.

The words are those of csrc/gemm/tile.cuh: a warp's 16 rows, the box of columns that they reach, a block's halo.
"""

from __future__ import annotations

import enum
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from natrain.ops.geometry import ACCESS_BYTES, three_axes, under_no_mode, weights_pitch
from natrain.ops.problem import Window
from natrain.ops.window import window_bounds

ROWS = 16  # of one product, and its most columns
SHARED_BYTES = 227 * 1024  # the most of a block, sm_90
_ROW_TILES = (1, 2, 4, 8, 16)
_WARPS = (1, 2, 4, 8)
_MOST_BIAS_BYTES = 8 * 1024
_LINE_BYTES = 128
_REGISTERS, _MOST_WARPS = 65536, 48  # of a multiprocessor
_MOST_SUMS = 64  # registers that qk gives to scores


class RowStep(enum.IntEnum):
    """What qk makes of its rows of scores before they leave the block; NATRAIN_ROW_STEP of csrc/gemm/qk.cu."""

    NONE = 0
    SOFTMAX = 1
    SOFTMAX_GRAD = 2  # scores are d_out . v; rows of probs are read besides


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
        halo, box: columns that a block and a warp reach.
        slices: parts of head_dim: blocks of their own in av and inverse, one after another in qk.
        columns: of one product, 8 or 16.
        chunk: columns of the halo in shared memory at once; as many again are on their way, of the next chunk or slice.
        held: scores of a row that qk holds in shared memory.
        is_staged: av and inverse read weights from shared memory.
        bias_bytes: of a head's bias that qk holds there.
        min_blocks: that a multiprocessor is to hold, where shared memory and not registers limits them; else 0.
        tiles: blocks that cover the longest dilation group.
    """

    row: tuple[int, int, int]
    warps: tuple[int, int, int]
    halo: tuple[int, int, int]
    box: tuple[int, int, int]
    slices: int
    columns: int
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
    head_dim: int  # of a slice
    slices: int
    columns: int
    itemsize: int
    pitch: int  # of a row of weights, elements
    line_slots: int  # of a line of a window: its extent along x
    bias_bytes: int  # of a head's bias in shared memory
    row_step: RowStep

    def registers(self, sums: int) -> int:
        """That a thread does with: those of D sums or of D's factors, of scores that are kept, and the rest."""
        return 80 + self.head_dim // 2 + sums

    @property
    def is_summed(self) -> bool:
        """A warp keeps its scores of a chunk in registers until the last slice has come."""
        return self.name == "qk" and self.slices > 1

    def sums(self, halo: tuple[int, int, int], box: tuple[int, int, int], chunk: int) -> int:
        """Registers of a thread that hold its scores of a chunk, where they are kept until the last slice has come."""
        if not self.is_summed:
            return 0
        if chunk == math.prod(halo):
            columns = math.prod(box)
        else:
            columns = chunk if halo[0] * halo[1] == 1 else chunk // halo[2] * box[2]
        return columns // 8 * 4

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
        stages = 1 if chunk == columns and not self.is_summed else 2
        if self.name == "qk":
            row = self.shared_row(False)
            queries = rows * row * self.slices
            matrices = 2 if self.row_step == RowStep.SOFTMAX_GRAD else 1  # of rows of weights
            return stages * chunk * row + queries + matrices * rows * held * self.itemsize + self.bias_bytes
        fetched = stages * chunk * self.shared_row(self.itemsize == 4)
        if is_staged:
            # Reads go past the last row by a line at most.
            slack = -(-(halo[2] + self.columns) * self.itemsize // 16) * 16
            fetched += (columns if self.name == "inverse" else rows) * self.pitch * self.itemsize + slack
        return max(fetched, rows * self.shared_row(False))

    def cost(
        self, box: int, halo: int, chunk: int, held: int, warps: int, is_line: bool, is_staged: bool, blocks: int
    ) -> float:
        """Of one block where a multiprocessor holds so many: instructions of its warps, the more the fewer there are to
        hide each other's latencies. Fitted to what scripts/bench_gemm_plans.py measured on an H100 and an H200."""
        is_qk, passes, chunks = self.name == "qk", self.slices if self.is_summed else 1, -(-halo // chunk)
        products = warps * box / self.columns
        share = self.columns / 16
        if is_qk:
            pairs, per_byte = _SCORES_COST[self.is_summed], 0.11 if self.itemsize == 4 else 0.2
        else:
            pairs, per_byte = _WEIGHTS_COST[is_staged] * (0.4 + 0.6 * share), 0.2
        weights = warps * ROWS * self.pitch * self.itemsize / ACCESS_BYTES
        if self.name == "inverse" and is_staged:
            weights *= halo / (warps * ROWS)
        elif not is_qk and not is_staged:
            weights = 0
        pieces = weights + (halo + warps * ROWS) * passes * self.row_bytes / ACCESS_BYTES
        product = pairs + passes * per_byte * share * self.row_bytes
        work = products * product + 0.5 * pieces + 120 * warps
        # Of a single line slots and columns go together, so that a chunk of qk asks for little.
        work += (60 if is_qk and is_line else 210) * warps * (chunks * passes - 1)
        if is_qk and chunks > 1:
            # What a chunk leaves of 16 rows, 32 pieces at a time.
            work += (9 if is_line else 32) * warps * chunks * held * self.itemsize / 32
        few_warps = max(1.0, 21 / (blocks * warps)) ** (0.52 if is_qk else 0.64)
        return work * few_warps * (1 + 0.12 / blocks) + _MOVED_COST * pieces


# Instructions of a warp besides the products: for 8 columns of scores (are they kept until the last slice), for 16
# columns of weights (are they staged).
_SCORES_COST = {False: 33, True: 27}
_WEIGHTS_COST = {True: 46, False: 97}
_MOVED_COST = 0.56  # of 16 bytes through memory
_MOST_ROW_BYTES = 208  # of weights whose softmax qk takes: 104 slots of 16 bits, 52 of 32


def _chunks(halo: tuple[int, int, int]) -> list[int]:
    """All of the halo, or 1, 2, 4 .. lines; of a single line parts."""
    lines, columns = halo[0] * halo[1], halo[2]
    if lines == 1:
        return [columns, *(size for size in (64, 128, 256) if size < columns)]
    return [lines * columns, *(columns << i for i in range(7) if 1 << i < lines)]


def _products(primitive: str, head_dim: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """(slices, columns): in how many parts a head may go through shared memory, of a whole line of memory each, and
    columns of a product."""
    for slices in (1, 2, 4, 8):
        if slices > 1 and (head_dim % (8 * slices) or head_dim // slices * itemsize < _LINE_BYTES):
            continue
        if primitive == "qk":
            # Scores are products of 8 columns in every dtype.
            yield slices, 8
        else:
            # The tensor core sums float32 over 8 columns at a time, 16 bits over 16.
            yield from ((slices, columns) for columns in ((8, 16) if itemsize == 4 else (16,)))


def gemm_tilings(
    primitive: str,
    spatial: tuple[int, ...],
    window: Window,
    head_dim: int,
    dtype: torch.dtype,
    has_rpb: bool = False,
    max_shared_bytes: int = SHARED_BYTES,
    row_step: RowStep = RowStep.NONE,
) -> Iterator[GemmTiling]:
    """Every tiling of qk, av or inverse that fits shared memory. With a ``row_step``, which needs whole rows, of qk
    alone; their ``cost`` is without it."""
    lengths, dilation, sizes = three_axes(spatial, 1), three_axes(window.dilation, 1), three_axes(window.kernel_size, 1)
    strides, causal = three_axes(window.stride, 1), three_axes(window.is_causal, False)
    axes = list(zip(lengths, dilation, sizes, strides, causal, strict=True))
    pitch = weights_pitch(window.num_neighbors, dtype)
    bias_bytes = -(-4 * math.prod(window.rpb_shape) // ACCESS_BYTES) * ACCESS_BYTES
    if not has_rpb or bias_bytes > _MOST_BIAS_BYTES:
        bias_bytes = 0
    groups = [-(-length // d) for length, d in zip(lengths, dilation, strict=True)]
    for slices, columns in _products(primitive, head_dim, dtype.itemsize):
        need = _Primitive(
            primitive, head_dim // slices, slices, columns, dtype.itemsize, pitch, sizes[2], bias_bytes, row_step
        )  # fmt: skip
        for row, warps in _blocks(groups, len(spatial)):
            extents = [
                _extents(*axis, primitive == "inverse", r, w, columns if index == 2 else 1)
                for index, (axis, r, w) in enumerate(zip(axes, row, warps, strict=True))
            ]
            halo, box = (tuple(extent[which] for extent in extents) for which in (0, 1))
            tiles = tuple(-(-n // (r * w)) for n, r, w in zip(groups, row, warps, strict=True))
            blocks, size, count = math.prod(tiles) * math.prod(dilation), math.prod(halo), math.prod(warps)
            for chunk, is_staged in itertools.product(_chunks(halo), (True, False)):
                # Of inverse the weights belong to the halo; qk writes them.
                if is_staged and (primitive == "qk" or (primitive == "inverse" and chunk < size)):
                    continue
                if row_step and chunk < size:
                    continue
                sums = need.sums(halo, box, chunk)
                if sums > _MOST_SUMS:
                    continue
                held = need.held(halo, chunk)
                shared = need.shared_bytes(halo, chunk, held, ROWS * count, is_staged)
                if shared > max_shared_bytes:
                    continue
                fit = max(1, max_shared_bytes // (shared + 1024))
                by_registers = max(1, _REGISTERS // (32 * count * need.registers(sums)))
                resident = min(fit, by_registers, _MOST_WARPS // count)
                is_line = halo[0] * halo[1] == 1
                cost = need.cost(math.prod(box), size, chunk, held, count, is_line, is_staged, resident) * blocks
                yield GemmTiling(
                    row, warps, halo, box, slices, columns, chunk, held, is_staged, tiles, bias_bytes,
                    fit if fit <= by_registers else 0, shared,
                    cost if primitive == "qk" else cost * slices,
                )  # fmt: skip


def _blocks(groups: list[int], rank: int) -> Iterator[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """Rows of a warp and warps of a block that dilation groups of that size have use for."""
    for row in itertools.product(_ROW_TILES, repeat=3):
        if math.prod(row) != ROWS or math.prod(row[: 3 - rank]) > 1:
            continue
        for warps in itertools.product(_WARPS, repeat=3):
            if math.prod(warps) <= 8 and not any(
                w > 1 and r * w >= 2 * n for r, w, n in zip(row, warps, groups, strict=True)
            ):
                yield row, warps


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
    row_step: RowStep = RowStep.NONE,
) -> GemmTiling | None:
    """The cheapest tiling of qk, av or inverse, or None where none fits shared memory.

    With a ``row_step`` also None where qk alone and then a kernel that reads and writes all weights cost less: where
    rows are long (measured on an H200, 54 problems of the frozen sweep), or where halos come in chunks.
    """
    problem = (primitive, spatial, window, head_dim, dtype, has_rpb, max_shared_bytes)
    row_bytes = weights_pitch(window.num_neighbors, dtype) * dtype.itemsize
    if row_step and row_bytes > _MOST_ROW_BYTES:
        return None
    best = min(gemm_tilings(*problem, row_step), key=lambda tiling: tiling.cost, default=None)
    if not row_step or best is None:
        return best
    # One without chunks is there, hence one at all.
    alone = min(gemm_tilings(*problem), key=lambda tiling: tiling.cost)
    pieces = math.prod(spatial) * row_bytes / ACCESS_BYTES
    return best if best.cost <= alone.cost + 2 * _MOVED_COST * pieces else None
