"""How a tensor-core kernel of csrc/fused covers a problem: row tile, block, stages of shared memory. Pure functions.

The words (row, column, box, line, halo, chunk, step) and every constant are explained in csrc/fused/geometry.cuh. The
same plan serves kernels whose rows are queries (forward, the gradient of q) and whose rows are keys (gradients of k and
v): ``Demands`` says what a kernel keeps in shared memory and registers. A plan is made in three steps: candidates, what
is legal, and a model of cost.

Shared memory of a block, from its start: ``stages`` times the columns of a chunk (one matrix of rows a dim of
``Demands.columns``, one after the other, then ``column_bytes`` a token, each padded to 128 bytes), ``stages`` times a
buffer of ``Demands.row_buffer`` bytes a warp, the table of start values (csrc/fused/start.cuh).

The launch: ``plan.grid`` blocks of ``plan.threads`` threads with ``plan.shared_bytes``; every argument struct begins
with ``struct Geometry``, which ``plan.geometry`` packs.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from natrain.ops.fused_measured import measured
from natrain.ops.fused_tiles import (
    Classes,
    Space,
    box_extent,
    box_offset,
    line_multiple,
    round_up,
    row_pitch,
    table_bytes,
)
from natrain.ops.geometry import under_no_mode

# Shared memory of a multiprocessor, and the most a block may have, by compute capability.
_SHARED = {(8, 0): (164, 163), (8, 6): (100, 99), (8, 7): (164, 163), (8, 9): (100, 99), (12, 0): (100, 99)}
_SHARED_NEWER = (228, 227)
_RESERVED_BYTES = 1024  # of every block, by the driver
_REGISTERS = 65536
_TABLE_BYTES = 40 * 1024
_CHUNK_BYTES = 36 * 1024
_STAGED_BIAS_BYTES = 16 * 1024
_MOST_WARPS = 16
# Of a block before its first image, by kind of table. Measured: 17,000, and 24,000 for the last; tables were then built
# from global memory entry by entry, which took most of it.
_SETUP_CYCLES = (10_000, 12_000, 15_000)


def shared_capacity(capability: tuple[int, int]) -> tuple[int, int]:
    """Bytes of shared memory: of a multiprocessor, and the most of one block."""
    return tuple(1024 * kib for kib in _SHARED.get(capability, _SHARED_NEWER))


@dataclass(frozen=True)
class Device:
    """What a plan depends on of a GPU."""

    capability: tuple[int, int] = (9, 0)
    multiprocessors: int = 132


@dataclass(frozen=True)
class Demands:
    """What a kernel holds.

    Attributes:
        columns: head dims of the matrices of columns that are staged.
        rows: head dims that share the buffer of a warp's 16 rows (its size is that of the largest).
        row_buffers: such buffers a warp and stage.
        column_bytes: further bytes a column that are staged.
        fewest_stages: 1 where a kernel can wait for what it fetches.
        registers: of a thread, besides those of scores.
        per_group: registers of 16 columns of scores.
        most_groups: groups of 16 columns that fit the registers at once.
    """

    columns: tuple[int, ...]
    rows: tuple[int, ...]
    registers: int
    per_group: int = 8
    most_groups: int = 8
    row_buffers: int = 1
    column_bytes: int = 0
    rows_are_keys: bool = False
    fewest_stages: int = 2

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
class Plan:
    """One way to cover a problem; ``cost`` is the model's estimate in cycles of a multiprocessor."""

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
    rows_are_keys: bool
    cost: float

    @property
    def threads(self) -> int:
        return 32 * math.prod(self.warps)

    @property
    def groups(self) -> int:
        """16 columns each, of a step."""
        return math.prod(self.step) // 16

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
            "NATRAIN_ROWS_ARE_KEYS": int(self.rows_are_keys),
            "NATRAIN_MOST_STAGED_BIAS": _STAGED_BIAS_BYTES,
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
        return struct.pack(
            "13i",
            *(axis.length for axis in problem.axes), *(axis.dilation for axis in problem.axes), *self.tiles,
            problem.heads, problem.heads // problem.kv_heads, problem.batch, self.splits,
        )  # fmt: skip


def _row_tiles(space: Space) -> Iterator[tuple[int, int, int]]:
    """Extents that are powers of two with product 16, none beyond twice the axis it lies on."""
    longest = [axis.group_lengths[0] for axis in space.axes]
    powers = (1, 2, 4, 8, 16)
    for tile in itertools.product(powers, repeat=3):
        fits = all(t == 1 or t < 2 * n for t, n in zip(tile, longest, strict=True))
        if math.prod(tile) == 16 and (fits or tile == (1, 1, 16)):
            yield tile


def _warp_boxes(space: Space, row_tile: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    most = [-(-axis.group_lengths[0] // tile) for axis, tile in zip(space.axes, row_tile, strict=True)]
    for warps in itertools.product(*(range(1, min(m, _MOST_WARPS) + 1) for m in most)):
        if math.prod(warps) <= _MOST_WARPS:
            yield warps
    # Long rows of D take more than one warp to fetch, even if it has no tile of its own.
    if max(most) == 1:
        yield 1, 1, 2
        yield 1, 1, 4


def _boxes(space: Space, demands: Demands, row_tile: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    z, y, x = (box_extent(axis, demands.rows_are_keys, tile) for axis, tile in zip(space.axes, row_tile, strict=True))
    if x <= 8:
        yield z, round_up(y, 2), 8
    yield z, y, round_up(x, 16)


def candidates(space: Space, demands: Demands, device: Device) -> Iterator[Plan]:
    """Every legal plan."""
    for row_tile in _row_tiles(space):
        for box in _boxes(space, demands, row_tile):
            for warps in _warp_boxes(space, row_tile):
                yield from _staged(space, demands, device, row_tile, box, warps)


def _staged(space, demands, device, row_tile, box, warps) -> Iterator[Plan]:
    """Plans of one tile and block: the halo resident, or in chunks."""
    offsets = [
        box_offset(axis, demands.rows_are_keys, tile, count)
        for axis, tile, count in zip(space.axes, row_tile, warps, strict=True)
    ]
    halo = [offset + extent for offset, extent in zip(offsets, box, strict=True)]
    halo[2] = round_up(halo[2], line_multiple(demands.columns, space.itemsize))
    table = table_bytes(space, row_tile, warps, box[2])
    lines = box[0] * box[1]
    has_table = int(table <= _TABLE_BYTES)
    groups = math.prod(box) // 16
    if groups <= demands.most_groups and box[0] == space.axes[0].kernel_size == 1 and row_tile[1] * warps[1] <= 32:
        classes = Classes.of(space, demands.rows_are_keys, row_tile, warps, box)
        if classes.bytes(row_tile, warps, box) <= _TABLE_BYTES:
            yield from _finished(
                space, demands, device, row_tile, warps, box, tuple(halo), box, True, False, 2, offsets, classes
            )
    if groups <= demands.most_groups and lines <= 32 and has_table:
        yield from _finished(space, demands, device, row_tile, warps, box, tuple(halo), box, True, False, 1, offsets)
    # In chunks, with an online softmax from step to step; fewer columns a step where shared memory holds no more.
    for step_groups in (4, 2, 1):
        if step_groups > demands.most_groups:
            continue
        in_lines = list(_in_lines(space, demands, device, row_tile, warps, box, halo, step_groups, has_table, offsets))
        yield from in_lines
        if in_lines:
            return
        if box[2] % 16 == 0:
            chunk = (1, 1, 16 * step_groups)
            in_columns = list(
                _finished(space, demands, device, row_tile, warps, box, chunk, chunk, False, True, 0, offsets)
            )
            yield from in_columns
            if in_columns:
                return


def _in_lines(space, demands, device, row_tile, warps, box, halo, step_groups, has_table, offsets) -> Iterator[Plan]:
    """Chunks of whole lines of the halo."""
    columns = 16 * step_groups
    if box[2] > columns or (box[2] == 8 and not has_table):
        return
    per_token = sum(row_pitch(dim, space.itemsize) for dim in demands.columns) + demands.column_bytes
    lines = min(columns // box[2], round_up(box[1], 2 if box[2] == 8 else 1))
    step = (1, lines, box[2])
    for steps in range(1, 9):
        chunk = (1, lines * steps, halo[2])
        if steps > 1 and (math.prod(chunk) * per_token > _CHUNK_BYTES or chunk[1] >= halo[1] + lines):
            break
        yield from _finished(
            space, demands, device, row_tile, warps, box, chunk, step, False, False, has_table, offsets
        )


def _finished(
    space, demands, device, row_tile, warps, box, chunk, step, resident, chunked_x, start_table, offsets, classes=None
) -> Iterator[Plan]:
    per_sm, per_block = shared_capacity(device.capability)
    warp_count = math.prod(warps)
    if 32 * warp_count < max(demands.columns) * space.itemsize // 16:
        return
    matrices = [row_pitch(dim, space.itemsize) for dim in demands.columns] + [demands.column_bytes]
    stage = sum(round_up(math.prod(chunk) * pitch, 128) for pitch in matrices)
    stage += warp_count * demands.row_buffer(space.itemsize)
    table = 0
    if start_table:
        table = classes.bytes(row_tile, warps, box) if classes else table_bytes(space, row_tile, warps, box[2])
    elif space.has_rpb:
        bias = 4 * math.prod(2 * axis.kernel_size - 1 for axis in space.axes)
        table = round_up(bias, 16) if bias <= _STAGED_BIAS_BYTES else 0
    groups = math.prod(step) // 16
    # Pointers into the table, one a line and half, that the compiler keeps from image to image.
    pointers = 2 * math.prod(step[:2]) if start_table == 1 and resident else 0
    registers = min(255, demands.registers + demands.per_group * groups + min(pointers, 16))
    tiles = tuple(
        -(-axis.group_lengths[0] // (tile * count))
        for axis, tile, count in zip(space.axes, row_tile, warps, strict=True)
    )
    combinations = space.heads * math.prod(count * axis.dilation for count, axis in zip(tiles, space.axes, strict=True))
    for stages in range(demands.fewest_stages, 4):
        shared = stages * stage + table
        if shared > per_block:
            break
        by_registers = _REGISTERS // (32 * warp_count * round_up(registers, 8))
        by_shared = per_sm // (shared + _RESERVED_BYTES)
        min_blocks = min(by_registers, by_shared, 48 // warp_count, 16)
        if min_blocks < 1:
            break
        halo = [offset + extent for offset, extent in zip(offsets, box, strict=True)]
        chunks = 1
        if resident:
            computed = groups
            fetched = math.prod(chunk)
        else:
            chunks = math.prod(-(-extent // c) for extent, c in zip(halo, chunk, strict=True))
            computed = groups * math.prod(
                -(-extent // s) if not (axis == 2 and not chunked_x) else 1
                for axis, (extent, s) in enumerate(zip(box, step, strict=True))
            )
            if chunked_x:
                # Groups outside the box are skipped.
                computed = math.prod(box[:2]) * (-(-box[2] // 16) + 1)
            fetched = math.prod(round_up(extent, c) for extent, c in zip(halo, chunk, strict=True))
        # Cycles of a multiprocessor for one image of all its blocks. Fitted to 131 measured plans (an H200, 9 layers,
        # 9 % off in the mean) is what a tile, a group of 16 columns and a chunk cost a warp, which four schedulers
        # share; that one block computes in step, that one stage waits for what it fetches and that a third does not
        # pay. The rest was hardly seen there and keeps plans near those measured: registers for pointers into a table,
        # bytes of the second-level cache, spills of the loops over chunks, few warps.
        start = ((70 if space.has_rpb else 2), 8, 0)[start_table]
        words = sum(demands.columns) * space.itemsize / 128
        work = warp_count * (157 + computed * (46 + start + 49 * words) + 403 * chunks) / 4
        moved = (fetched + 16 * warp_count) * sum(demands.columns) * space.itemsize / 24
        cycles = min_blocks * (work + 0.15 * moved)
        cycles *= (1.06 if min_blocks == 1 else 1) * (1.24, 1, 1.02)[stages - 1]
        cycles *= (1 if resident else 1.15) * (1.1 if warp_count < 4 else 1)
        cycles *= max(1, 16 / (min_blocks * warp_count)) ** 0.4
        slots = device.multiprocessors * min_blocks
        setup = _SETUP_CYCLES[start_table] / cycles
        splits, images = _splits(space.batch, combinations, slots, round(setup, 2))
        cost = images * cycles
        yield Plan(
            row_tile, warps, box, chunk, step, resident, chunked_x, start_table, classes, stages, min_blocks, shared,
            tiles, splits, combinations * splits, demands.rows_are_keys, cost,
        )  # fmt: skip


@functools.lru_cache(maxsize=65536)
def _splits(batch: int, combinations: int, slots: int, setup: float) -> tuple[int, float]:
    """Over how many blocks the images of a tile are spread, and the time until the last block ends, in images.

    ``setup``: of a block, in images.
    """
    best = None
    for splits in range(1, max(1, min(batch, -(-8 * slots // combinations))) + 1):
        waves = combinations * splits / slots
        # Beyond a few waves blocks no longer end together.
        time = (math.ceil(waves) if waves < 4 else waves + 0.5) * (-(-batch // splits) + setup)
        if best is None or time < best[1]:
            best = splits, time
    return best


@functools.lru_cache(maxsize=4096)
@under_no_mode
def choose_plan(space: Space, demands: Demands, device: Device) -> Plan:
    """The forward plan that was measured to be best, where one was, else the legal plan of least cost.

    Raises:
        ValueError: none is legal (a device with little shared memory, a large head dim).
    """
    plans = list(candidates(space, demands, device))
    if not plans:
        _, most = shared_capacity(device.capability)
        dims = demands.columns
        raise ValueError(f"a block has {most} bytes of shared memory, too few for rows of {dims} elements")
    best = measured("forward", space, max(demands.columns), plans)
    return min(best or plans, key=lambda plan: (plan.cost, plan.stages, plan.shared_bytes))
