"""What a CUDA launch needs to know about its tensors and its problem: layouts, access widths, tiles. Pure functions.

Kernels see three spatial axes always (z, y, x); a problem of lower rank has leading axes of length 1.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from natrain.ops.problem import Window

ACCESS_BYTES = 16  # the widest access of one thread
MAX_THREADS = 128  # a block; small, so that many share a multiprocessor whatever their registers
_LINE_BYTES = 128


_Function = TypeVar("_Function", bound=Callable)


def under_no_mode(plan: _Function) -> _Function:
    """Decorates functions that reckon with small tensors: torch.compile traces under a mode of tensors without values,
    which nobody could read a plan from, and which must not stay in a cache; nor must those of a default device."""

    @functools.wraps(plan)
    def wrapped(*args, **kwargs):
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return plan(*args, **kwargs)

    return wrapped


def three_axes(values: Sequence, missing) -> tuple:
    """``values`` of a problem's axes, with ``missing`` for the leading axes that it lacks."""
    return (missing,) * (3 - len(values)) + tuple(values)


@dataclass(frozen=True)
class Layout:
    """Where [B, *S, N, last] lies: strides in elements, the last axis contiguous; ``span``: elements of one image."""

    batch: int
    token: tuple[int, int, int]
    head: int
    span: int

    @staticmethod
    def of(x: Tensor) -> Layout:
        # The stride of an axis of length 1 is arbitrary in torch; 0 keeps it out of alignment and of spans.
        strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
        span = 1 + sum((size - 1) * abs(stride) for size, stride in zip(x.shape[1:], strides[1:], strict=True))
        return Layout(strides[0], three_axes(strides[1:-2], 0), strides[-2], span)

    @property
    def packed(self) -> tuple[int, ...]:
        """In the order of ``struct Layout`` in csrc/naive/problem.cuh."""
        return self.batch, *self.token, self.head


def contiguous_rows(x: Tensor) -> Tensor:
    """``x`` itself unless its last axis has gaps (an expanded gradient): kernels read rows of adjacent elements."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def access_width(row: int, *tensors: Tensor) -> int:
    """Elements that one access may move: a power of two that divides ``row`` elements, all strides and addresses."""
    width = ACCESS_BYTES // tensors[0].element_size()
    for x in tensors:
        layout = Layout.of(x)
        for quantity in (row, layout.batch, *layout.token, layout.head, x.data_ptr() // x.element_size()):
            while quantity % width:
                width //= 2
    return width


def weights_pitch(num_neighbors: int, dtype: torch.dtype) -> int:
    """Elements from one row of attention weights to the next: K padded so that rows start at aligned addresses."""
    width = ACCESS_BYTES // dtype.itemsize
    return -(-num_neighbors // width) * width


def offset_type(*layouts: Layout) -> str:
    """The C type that holds every offset inside an image of these layouts."""
    return "int" if all(layout.span < 2**31 for layout in layouts) else "long long"


def lanes_of_row(head_dim: int, width: int, vectors: int = 1, most: int = 8) -> int:
    """Threads that share one row of ``head_dim``: a power of two, at most so that each has ``vectors`` accesses."""
    return min(most, 1 << max(0, math.ceil(math.log2(head_dim / (width * vectors)))))


@dataclass(frozen=True)
class Tiling:
    """How a launch covers a problem: ``tile`` units of one dilation group times ``head_tile`` heads a block."""

    tile: tuple[int, int, int]
    tiles: tuple[int, int, int]
    head_tile: int
    head_tiles: int
    threads: int
    blocks_per_image: int


@functools.lru_cache(maxsize=4096)
def choose_tiling(
    spatial: tuple[int, int, int],
    dilation: tuple[int, int, int],
    kernel_size: tuple[int, int, int],
    heads: int,
    row_bytes: int,
    lanes: int,
    positions: int,
) -> Tiling:
    """The tiling that reads the fewest bytes for the work it does.

    The units of a block (``positions`` queries or keys along x of one head, ``lanes`` threads) share the keys of the
    tile's halo through the first-level cache. Candidates are all tiles that divide a group into equal parts; the score
    is the share of idle threads times the halo's size over the tile's, which the second-level cache must deliver.
    """
    units = MAX_THREADS // lanes
    head_tile = min(heads, max(1, _LINE_BYTES // row_bytes), units)
    most = max(1, units // head_tile)
    wide = (1, 1, positions)
    groups = [-(-length // (d * w)) for length, d, w in zip(spatial, dilation, wide, strict=True)]
    candidates = [sorted({-(-n // parts) for parts in range(1, n + 1)}) for n in groups]
    best = None
    for tile in itertools.product(*candidates):
        size = math.prod(tile)
        if size > most:
            continue
        tiles = tuple(-(-n // t) for n, t in zip(groups, tile, strict=True))
        threads = -(-size * head_tile * lanes // 32) * 32
        covered = threads * math.prod(tiles) / (math.prod(groups) * head_tile * lanes)
        halo = math.prod(t * w + k - 1 for t, k, w in zip(tile, kernel_size, wide, strict=True)) / (size * positions)
        # A block's fixed cost is about that of 64 threads; a halo element costs a tenth of a unit's own work.
        score = covered * (1 + 64 / threads) * (1 + 0.1 * halo)
        if best is None or score < best[0]:
            best = score, tile, tiles, threads
    assert best is not None, "a tile of one position always fits"
    _, tile, tiles, threads = best
    head_tiles = -(-heads // head_tile)
    blocks = head_tiles * math.prod(count * d for count, d in zip(tiles, dilation, strict=True))
    return Tiling(tile, tiles, head_tile, head_tiles, threads, blocks)


@functools.lru_cache(maxsize=4096)
def choose_chunks(rows: int, columns: int, blocks_per_chunk: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many token rows and columns a block of the bias gradient takes, and how many such chunks there are.

    Chunks that fill a large GPU a few times; columns are cut last, since a row of tokens lies together in memory.
    """
    wanted = max(1, 2048 // blocks_per_chunk)
    row_size = -(-rows // min(rows, wanted))
    row_count = -(-rows // row_size)
    column_size = -(-columns // min(columns, -(-wanted // row_count)))
    return (row_size, column_size), (row_count, -(-columns // column_size))


def window_defines(window: Window) -> dict[str, object]:
    """The window's constants of a specialisation (dilation stays a run-time argument)."""
    defines: dict[str, object] = {}
    for name, values, missing in (
        ("KERNEL_SIZE", window.kernel_size, 1),
        ("STRIDE", window.stride, 1),
        ("IS_CAUSAL", window.is_causal, False),
    ):
        for axis, value in zip("ZYX", three_axes(values, missing), strict=True):
            defines[f"NATRAIN_{name}_{axis}"] = int(value)
    return defines
