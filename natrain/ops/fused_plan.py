"""How a tensor-core kernel of csrc/fused covers a problem: row tile, block, stages of shared memory. Pure functions.

The words (row, column, box, line, halo, chunk, step) and every constant are explained in csrc/fused/geometry.cuh. One
plan serves kernels whose rows are queries (forward, the gradient of q), keys (gradients of k and v) or one after the
other (all gradients in one pass): ``Demands`` says what a kernel keeps in shared memory and registers. How the best
plan is found: fused_search.py, by the costs of fused_forward_plan.py and fused_gradient_plan.py.

Shared memory of a block, from its start: ``stages`` times the columns of a chunk (one matrix of rows a dim of
``Demands.columns``, one after the other, then ``column_bytes`` a token, each padded to 128 bytes), ``stages`` times a
buffer of ``Demands.row_buffer`` bytes a warp, the table of start values (csrc/fused/start.cuh).

The launch: ``plan.grid`` blocks of ``plan.threads`` threads with ``plan.shared_bytes``; every argument struct begins
with ``struct Geometry``, which ``plan.geometry`` packs.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch

from natrain.ops.fused_tiles import Classes, Rows, Space, row_pitch

# Shared memory of a multiprocessor, and the most a block may have, in KiB by compute capability (CUDA C++ Programming
# Guide, technical specifications).
_LARGE, _SMALL = (164, 163), (100, 99)
_SHARED = {(8, 0): _LARGE, (8, 6): _SMALL, (8, 7): _LARGE, (8, 9): _SMALL, (12, 0): _SMALL, (12, 1): _SMALL}
_SHARED_NEWER = (228, 227)
STAGED_BIAS_BYTES = 16 * 1024  # the most of a bias that is held in shared memory


def shared_capacity(capability: tuple[int, int]) -> tuple[int, int]:
    """Bytes of shared memory: of a multiprocessor, and the most of one block."""
    return tuple(1024 * kib for kib in _SHARED.get(capability, _SHARED_NEWER))


@dataclass(frozen=True)
class Device:
    """What a plan depends on of a GPU: an H100's, where nothing else is said.

    ``memory_bytes``: that a multiprocessor's share of the memory moves in a cycle, by its clocks and width.
    ``tuned_as``: what plans that were measured on the GPU at hand are kept under (fused_tuned.py); "": none are.
    """

    capability: tuple[int, int] = (9, 0)
    multiprocessors: int = 132
    memory_bytes: float = 12.8
    tuned_as: str = ""


@dataclass(frozen=True)
class Demands:
    """What a kernel holds.

    Attributes:
        columns: head dims of the matrices of columns that are staged.
        rows: head dims that share the buffer of a warp's 16 rows (its size is that of the largest).
        row_buffers: such buffers a warp and stage.
        column_bytes: further bytes a column that are staged.
        rows_are: what the kernel's rows are.
        fewest_stages: 1 where a kernel can wait for what it fetches.
        registers: of a thread, besides those of scores.
        per_group: registers of 16 columns of scores.
        most_groups: groups of 16 columns that fit the registers at once.
        may_walk: a block may go from a tile to others like it (key masks, dropout and shared keys ask where a tile is).
    """

    columns: tuple[int, ...]
    rows: tuple[int, ...]
    registers: int
    per_group: int = 8
    most_groups: int = 8
    row_buffers: int = 1
    column_bytes: int = 0
    rows_are: Rows = "queries"
    fewest_stages: int = 2
    may_walk: bool = True

    @staticmethod
    def of_forward(head_dim: int, value_dim: int, dtype: torch.dtype) -> Demands:
        """Of csrc/fused/forward.cu, which holds the scores of one group at a time."""
        held = head_dim * dtype.itemsize // 8
        registers = (held if held <= 48 else 4) + value_dim // 2 + (56 if dtype.itemsize == 2 else 80)
        dims = (head_dim, value_dim)
        return Demands(dims, dims, registers, per_group=0, most_groups=16, fewest_stages=1)

    def row_buffer(self, itemsize: int) -> int:
        return self.row_buffers * 16 * max(row_pitch(dim, itemsize) for dim in self.rows)


@dataclass(frozen=True)
class Walk:
    """Along ``axis`` so many ``runs`` share ``count`` tiles that are alike: a block walks over one of them.

    Of each dilation group those from ``first`` on; or over groups, the same tile of those of one length: ``count`` are
    longer, and ``first`` runs share the others.
    """

    axis: int
    is_over_groups: bool
    first: int
    count: int
    runs: int


@dataclass(frozen=True)
class Plan:
    """One way to cover a problem.

    ``tiles``: blocks along each axis of a dilation group, for one image and head. ``cycles``: of a multiprocessor for
    one image of all its blocks; ``cost``: for all there is; both by the model.
    """

    row_tile: tuple[int, int, int]
    warps: tuple[int, int, int]
    box: tuple[int, int, int]
    chunk: tuple[int, int, int]
    step: tuple[int, int, int]
    resident: bool
    chunked_x: bool
    start_table: int
    classes: Classes | None
    stages: int
    min_blocks: int
    shared_bytes: int
    tiles: tuple[int, int, int]
    splits: int
    grid: int
    rows_are: Rows
    cycles: float
    cost: float
    walk: Walk | None = None

    @property
    def threads(self) -> int:
        return 32 * math.prod(self.warps)

    def defines(self) -> dict[str, object]:
        """The constants of csrc/fused/geometry.cuh that are the plan's."""
        defines: dict[str, object] = {}
        for name in ("row_tile", "warps", "box", "chunk", "step"):
            for axis, value in zip("ZYX", getattr(self, name), strict=True):
                defines[f"NATRAIN_{name.upper()}_{axis}"] = value
        defines |= {
            "NATRAIN_RESIDENT": int(self.resident),
            "NATRAIN_CHUNKED_X": int(self.chunked_x),
            "NATRAIN_START_TABLE": self.start_table,
            "NATRAIN_STAGES": self.stages,
            "NATRAIN_MIN_BLOCKS": self.min_blocks,
            "NATRAIN_SHARED_BYTES": self.shared_bytes,
            "NATRAIN_ROWS": ("queries", "keys", "both").index(self.rows_are),
            "NATRAIN_MOST_STAGED_BIAS": STAGED_BIAS_BYTES,
            "NATRAIN_WALK": 3 if self.walk is None else self.walk.axis,
            "NATRAIN_WALK_OVER": int(self.walk is not None and self.walk.is_over_groups),
        }
        if self.classes is not None:
            defines |= {
                "NATRAIN_CLASSES_Y": self.classes.y,
                "NATRAIN_CLASSES_X": self.classes.x,
                "NATRAIN_CLASS_LINES": self.classes.lines,
                "NATRAIN_CLASS_MARGIN": self.classes.margin,
            }
        return defines

    def geometry(self, problem: Space) -> bytes:
        """``struct Geometry`` of csrc/fused/geometry.cuh."""
        walk = self.walk or Walk(3, False, 0, 0, 1)
        return struct.pack(
            "16i",
            *(axis.length for axis in problem.axes), *(axis.dilation for axis in problem.axes), *self.tiles,
            problem.heads, problem.heads // problem.kv_heads, problem.batch, self.splits,
            walk.first, walk.count, walk.runs,
        )  # fmt: skip
