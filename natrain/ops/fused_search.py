"""How the best plan of a fused kernel is found: blocks, drafts of what is legal, a model of cost.

Blocks are a row tile, its box and its warps; for each there are drafts of how it may go over its columns. A problem
has up to 30,000 drafts, so that the search takes the blocks by a bound of their cost and ends where no other can be
better. What a plan is: fused_plan.py. What a kernel costs, as ``Costs``: fused_forward_plan.py, fused_gradient_plan.py.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from natrain.ops import fused_tuned
from natrain.ops.fused_measured import measured, measured_choice
from natrain.ops.fused_plan import STAGED_BIAS_BYTES, Demands, Device, Plan, shared_capacity
from natrain.ops.fused_tiles import (
    Classes,
    Space,
    box_extent,
    box_offsets,
    line_multiple,
    round_up,
    row_pitch,
    table_bytes,
)
from natrain.ops.fused_walk import walking

_RESERVED_BYTES = 1024  # of every block, by the driver
_REGISTERS = 65536
_TABLE_BYTES = 40 * 1024
_CHUNK_BYTES = 36 * 1024
_MOST_WARPS = 16  # of a block
_MOST_RESIDENT_WARPS = 48  # of a multiprocessor, over all of its blocks
_CACHE_BYTES = 38  # a cycle and multiprocessor, of an H100
_MEMORY_SHARE = 0.81  # of what a GPU's memory moves by its clocks
# Of a block before its first image, by kind of table. Measured: 17,000, and 24,000 for the last; tables were then built
# from global memory entry by entry, which took most of it.
_SETUP_CYCLES = (10_000, 12_000, 15_000)
# Of 16 columns, by kind of table; the first with a bias, which is then added score by score.
_START_CYCLES = (70, 8, 0)
# In float32: times what grows with the columns' rows where factors are rounded for every product (IS_ROUNDED of
# csrc/fused/halo.cuh), times all for the warp of a block that has no other to hide what it rounds.
_UNROUNDED, _LONE_WARP = 1.6, 1.2
# Exponent of what warps idle with chunks: the others have the multiprocessor for themselves. Of 225 plans each of
# forward, dQ and dK, dV it leaves the choice 1.8, 2.3 and 0.5 % nearer to the best.
_IDLE = 0.3


def _row_tiles(space: Space) -> Iterator[tuple[int, int, int]]:
    """Extents that are powers of two with product 16, none beyond twice the axis it lies on."""
    longest = [axis.group_lengths[0] for axis in space.axes]
    powers = (1, 2, 4, 8, 16)
    for tile in itertools.product(powers, repeat=3):
        fits = all(t == 1 or t < 2 * n for t, n in zip(tile, longest, strict=True))
        if math.prod(tile) == 16 and (fits or tile == (1, 1, 16)):
            yield tile


@functools.lru_cache(maxsize=1024)
def _warp_boxes(most: tuple[int, int, int]) -> tuple[tuple[int, int, int], ...]:
    """Warps of a block along each axis, no more than there are row tiles (``most``, at most ``_MOST_WARPS``)."""
    boxes = [box for box in itertools.product(*(range(1, m + 1) for m in most)) if math.prod(box) <= _MOST_WARPS]
    # Long rows of D take more than one warp to fetch, even if it has no tile of its own.
    return tuple(boxes + ([(1, 1, 2), (1, 1, 4)] if max(most) == 1 else []))


def _boxes(space: Space, demands: Demands, row_tile: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    z, y, x = (box_extent(axis, demands.rows_are, tile) for axis, tile in zip(space.axes, row_tile, strict=True))
    if x <= 8:
        yield z, round_up(y, 2), 8
    yield z, y, round_up(x, 16)


class Block(NamedTuple):
    """``count`` warps side by side; ``halo``: what their boxes cover together, in whole banks.

    ``tiles`` blocks lie along each axis of a dilation group, ``combinations`` in all groups and heads.
    """

    row_tile: tuple[int, int, int]
    warps: tuple[int, int, int]
    box: tuple[int, int, int]
    halo: tuple[int, int, int]
    tiles: tuple[int, int, int]
    count: int
    combinations: int


class Columns(NamedTuple):
    """How a block goes over its columns; the fields are those of ``Plan``."""

    chunk: tuple[int, int, int]
    step: tuple[int, int, int]
    resident: bool
    chunked_x: bool
    start_table: int
    classes: Classes | None = None

    @property
    def groups(self) -> int:
        """16 columns each, of a step."""
        return math.prod(self.step) // 16


class Draft(NamedTuple):
    """A legal plan before its cost and its splits, which take longer to find than the rest.

    ``computed``: groups of 16 columns that a warp computes; ``fetched``: columns of a block, in ``chunks``.
    """

    block: Block
    columns: Columns
    stages: int
    min_blocks: int
    shared_bytes: int
    table_bytes: int
    chunks: int
    computed: int
    fetched: int


@dataclass(frozen=True)
class Costs:
    """What the warps of a kernel take for an image, in cycles, and what they need.

    Attributes:
        tile: of a row tile.
        group: of 16 columns, besides what grows with their rows.
        word: of 16 columns, for 128 bytes of their rows.
        float32: times ``word``: twice the products, whose factors are rounded first.
        column_uses: products that read a column; NATRAIN_COLUMN_USES of the kernel.
        straight: in float32, times all of it for the straight-line code of a resident halo, which spills more.
        diagonals: of 16 columns whose share of the bias gradient does not stay in registers.
        chunk: beyond the first one.
        cached: rows of a warp that come from the second-level cache besides its columns, of K and V each.
        moved: rows of K and V (of Q and dO) that go through memory for each of a warp's.
        registers: that a thread has use for, (a, b) of a + b head_dim, in 16 bits and in float32.
    """

    tile: float
    group: float
    word: float
    float32: float
    column_uses: int
    straight: float
    diagonals: float
    chunk: float
    cached: float
    moved: float
    registers: tuple[tuple[float, float], tuple[float, float]]


class Search:
    """The legal plans of a kernel, and the best of them.

    The cost is a model: what warps do and what memory moves go on at once as far as blocks or stages take turns.
    Fitted to 330 plans of ten problems (an H200; scripts/bench_plans.py) and to the times of the fused kernels in the
    frozen sweep (an H100), whose logarithms it meets with a standard deviation of 0.19 forward and 0.17 backward.
    """

    def __init__(self, space: Space, demands: Demands, device: Device, costs: Costs) -> None:
        self.space, self.demands, self.device, self.costs = space, demands, device, costs
        self._per_multiprocessor, self._per_block = shared_capacity(device.capability)
        self._pitches = [row_pitch(dim, space.itemsize) for dim in demands.columns] + [demands.column_bytes]
        self._token_bytes = sum(self._pitches)
        self._row_bytes = sum(demands.columns) * space.itemsize
        self._row_buffer = demands.row_buffer(space.itemsize)
        self._memory_bytes = _MEMORY_SHARE * device.memory_bytes
        self._line_multiple = line_multiple(demands.columns, space.itemsize)
        self._lengths = [axis.group_lengths[0] for axis in space.axes]
        self._groups_and_heads = space.heads * math.prod(axis.dilation for axis in space.axes)
        self._is_float32 = space.itemsize == 4
        base, of_dim = costs.registers[self._is_float32]
        self._wanted_registers = base + of_dim * max(demands.columns)

    def fit(self, draft: Draft) -> tuple[int, int]:
        """Blocks of a multiprocessor, 0 where not one fits, and the bytes of each."""
        return draft.min_blocks, draft.shared_bytes

    def group_cycles(self, columns: Columns) -> float:
        """Of 16 columns, besides what is the same for every plan."""
        if columns.start_table == 0:
            return _START_CYCLES[0] if self.space.has_rpb else 0
        return _START_CYCLES[columns.start_table]

    def least_of_block(self, block: Block) -> float:
        """At most the cost of any draft of this block: ``_cycles`` without the factors that are 1 at the least."""
        tokens = math.prod(block.box)
        chunks = self._fewest_chunks(block) if tokens > 16 * self.demands.most_groups else 1
        work = self._warp_cycles(block, tokens // 16, 0, chunks, self._most_blocks(block.count))
        cycles = max(work, self._memory_cycles(block.count, math.prod(block.halo)))
        return block.combinations * self.space.batch * cycles / self.device.multiprocessors

    def least(self, draft: Draft) -> float:
        """At most the cost of the draft; infinite where it is not legal after all."""
        blocks, _ = self.fit(draft)
        if not blocks:
            return math.inf
        cycles = self._cycles(draft, blocks)
        setup = _setup_images(draft, cycles)
        slots = self.device.multiprocessors * blocks
        images = -(-self.space.batch // _most_splits(self.space.batch, draft.block.combinations, slots))
        return cycles * max(draft.block.combinations / slots * (self.space.batch + setup), images + setup)

    def finished(self, draft: Draft) -> Plan:
        """The plan of a draft that is legal."""
        block, columns, stages, *_ = draft
        blocks, shared_bytes = self.fit(draft)
        cycles = self._cycles(draft, blocks)
        slots, setup = self.device.multiprocessors * blocks, _setup_images(draft, cycles)
        splits, images = _splits(self.space.batch, block.combinations, slots, setup)
        return Plan(
            block.row_tile, block.warps, block.box, *columns, stages, blocks, shared_bytes, block.tiles, splits,
            block.combinations * splits, self.demands.rows_are, cycles, images * cycles,
        )  # fmt: skip

    def walking(self, plan: Plan) -> Plan:
        """``plan``, or where it spares time, with blocks that walk (fused_walk.py)."""
        return (
            walking(plan, self.space, self.device, _SETUP_CYCLES[plan.start_table]) if self.demands.may_walk else plan
        )

    @staticmethod
    def rank(plan: Plan) -> tuple[float, ...]:
        """What is least for the best plan."""
        return plan.cost, plan.stages, plan.shared_bytes

    def best(self, kernel: str) -> Plan | None:
        """The plan that was measured to be best (``kernel`` as in ``measured``), on this GPU or on ours, where one was,
        else that of the least cost; None where none is legal."""
        if own := fused_tuned.find(kernel, self.space, self.demands, self.device):
            plans = self.plans(tuple(own["row_tile"]), tuple(own["warps"]))
            if plan := fused_tuned.matching(own, plans):
                return self.walking(plan) if own["walks"] else plan
        head_dim = max(self.demands.columns)
        if choice := measured_choice(kernel, self.space, head_dim):
            row_tile, warps, *_ = choice
            if plans := measured(kernel, self.space, head_dim, self.plans(row_tile, warps)):
                return self.walking(min(plans, key=self.rank))
        plan = self.cheapest()
        return plan and self.walking(plan)

    def plans(self, row_tile: tuple | None = None, warps: tuple | None = None) -> Iterator[Plan]:
        """Every legal plan, or those of one row tile and block."""
        for block in self._blocks():
            if row_tile in (None, block.row_tile) and warps in (None, block.warps):
                for draft in self._drafts(block):
                    if self.least(draft) < math.inf:
                        yield self.finished(draft)

    def cheapest(self) -> Plan | None:
        """The first of the plans of the least rank, without a look at most of the others."""
        best, best_rank, limit = None, (math.inf,), math.inf
        for bound, index, block in sorted((self.least_of_block(b), index, b) for index, b in enumerate(self._blocks())):
            if bound > limit:
                break
            for draft in self._drafts(block):
                bound = self.least(draft)
                if bound > limit or bound == math.inf:
                    continue
                plan = self.finished(draft)
                rank = *self.rank(plan), index
                if rank < best_rank:
                    # Bounds are sums in another order: they may be a rounding above the cost.
                    best, best_rank, limit = plan, rank, plan.cost * (1 + 1e-9)
        return best

    def _blocks(self) -> Iterator[Block]:
        fewest_warps = max(self.demands.columns) * self.space.itemsize // 16 / 32
        for row_tile in _row_tiles(self.space):
            offsets = [
                box_offsets(axis, self.demands.rows_are, tile, _MOST_WARPS)
                for axis, tile in zip(self.space.axes, row_tile, strict=True)
            ]
            most = tuple(
                min(-(-length // tile), _MOST_WARPS) for length, tile in zip(self._lengths, row_tile, strict=True)
            )
            for box in _boxes(self.space, self.demands, row_tile):
                for warps in _warp_boxes(most):
                    if math.prod(warps) >= fewest_warps:
                        yield self._block(row_tile, warps, box, offsets)

    def _block(self, row_tile: tuple, warps: tuple, box: tuple, offsets: Sequence[tuple[int, ...]]) -> Block:
        (tile_z, tile_y, tile_x), (warps_z, warps_y, warps_x) = row_tile, warps
        length_z, length_y, length_x = self._lengths
        offset_z, offset_y, offset_x = offsets
        halo_x = round_up(offset_x[warps_x - 1] + box[2], self._line_multiple)
        tiles = (
            -(-length_z // (tile_z * warps_z)),
            -(-length_y // (tile_y * warps_y)),
            -(-length_x // (tile_x * warps_x)),
        )
        return Block(
            row_tile,
            warps,
            box,
            (offset_z[warps_z - 1] + box[0], offset_y[warps_y - 1] + box[1], halo_x),
            tiles,
            warps_z * warps_y * warps_x,
            self._groups_and_heads * math.prod(tiles),
        )

    def _drafts(self, block: Block) -> Iterator[Draft]:
        """Drafts of one block: the halo resident, or in chunks."""
        row_tile, warps, box, halo, *_ = block
        table = table_bytes(self.space, row_tile, warps, box[2])
        has_table = int(table <= _TABLE_BYTES)
        groups = math.prod(box) // 16
        if groups <= self.demands.most_groups:
            if box[0] == self.space.axes[0].kernel_size == 1 and row_tile[1] * warps[1] <= 32:
                classes = Classes.of(self.space, self.demands.rows_are, row_tile, warps, box)
                class_bytes = classes.bytes(row_tile, warps, box)
                if class_bytes <= _TABLE_BYTES:
                    columns = Columns(halo, box, True, False, 2, classes)
                    yield from self._with_stages(block, columns, class_bytes, math.prod(halo), groups, 1)
            if box[0] * box[1] <= 32 and has_table:
                columns = Columns(halo, box, True, False, 1)
                yield from self._with_stages(block, columns, table, math.prod(halo), groups, 1)
        # In chunks, with an online softmax from step to step; fewer columns a step where shared memory holds no more.
        for step_groups in (4, 2, 1):
            if step_groups > self.demands.most_groups:
                continue
            drafts = list(self._in_lines(block, step_groups, table if has_table else None))
            if not drafts and box[2] % 16 == 0:
                drafts = list(self._in_columns(block, step_groups))
            yield from drafts
            if drafts:
                return

    def _in_lines(self, block: Block, step_groups: int, table: int | None) -> Iterator[Draft]:
        """Chunks of whole lines of the halo. ``table``: bytes of the table of starts, None where it is too large."""
        box, halo, columns = block.box, block.halo, 16 * step_groups
        if box[2] > columns or (box[2] == 8 and table is None):
            return
        lines = min(columns // box[2], round_up(box[1], 2 if box[2] == 8 else 1))
        step = (1, lines, box[2])
        computed = lines * box[2] // 16 * box[0] * -(-box[1] // lines)
        for steps in range(1, 9):
            lines_of_chunk, tokens = lines * steps, lines * steps * halo[2]
            if steps > 1 and (tokens * self._token_bytes > _CHUNK_BYTES or lines_of_chunk >= halo[1] + lines):
                break
            chunks = halo[0] * -(-halo[1] // lines_of_chunk)
            yield from self._with_stages(
                block,
                Columns((1, lines_of_chunk, halo[2]), step, False, False, int(table is not None)),
                self._bias_bytes if table is None else table,
                chunks * tokens,
                computed,
                chunks,
            )

    def _in_columns(self, block: Block, step_groups: int) -> Iterator[Draft]:
        """Chunks of a part of a line, wherever a box lies in it."""
        box, halo, columns = block.box, block.halo, 16 * step_groups
        chunks = halo[0] * halo[1] * -(-halo[2] // columns)
        # Groups outside the box are skipped.
        computed = box[0] * box[1] * (-(-box[2] // 16) + 1)
        step = (1, 1, columns)
        yield from self._with_stages(
            block, Columns(step, step, False, True, 0), self._bias_bytes, chunks * columns, computed, chunks
        )

    @functools.cached_property
    def _bias_bytes(self) -> int:
        """Of the bias in shared memory, where there is no table of starts."""
        if not self.space.has_rpb:
            return 0
        bias = 4 * math.prod(2 * axis.kernel_size - 1 for axis in self.space.axes)
        return round_up(bias, 16) if bias <= STAGED_BIAS_BYTES else 0

    def _with_stages(
        self, block: Block, columns: Columns, table: int, fetched: int, computed: int, chunks: int
    ) -> Iterator[Draft]:
        """Every number of stages that fits beside ``table`` bytes; the other arguments are those of ``Draft``."""
        step, tokens = columns.step, math.prod(columns.chunk)
        stage = block.count * self._row_buffer
        for pitch in self._pitches:
            stage += round_up(tokens * pitch, 128)
        if table + self.demands.fewest_stages * stage > self._per_block:
            return
        # Pointers into the table, one a line and half, that the compiler keeps from image to image.
        pointers = min(2 * step[0] * step[1], 16) if columns.start_table == 1 and columns.resident else 0
        registers = min(255, self.demands.registers + self.demands.per_group * columns.groups + pointers)
        most_blocks = min(
            _REGISTERS // (32 * block.count * round_up(registers, 8)), _MOST_RESIDENT_WARPS // block.count, 16
        )
        for stages in range(self.demands.fewest_stages, 4):
            shared = stages * stage + table
            min_blocks = min(most_blocks, self._per_multiprocessor // (shared + _RESERVED_BYTES))
            if shared > self._per_block or min_blocks < 1:
                break
            yield Draft(block, columns, stages, min_blocks, shared, table, chunks, computed, fetched)

    def _most_blocks(self, warp_count: int) -> int:
        """Blocks of so many warps that a multiprocessor holds, whatever else they need, but one at the least."""
        registers = round_up(min(255, self.demands.registers), 8)
        return max(1, min(_REGISTERS // (32 * warp_count * registers), _MOST_RESIDENT_WARPS // warp_count, 16))

    def _fewest_chunks(self, block: Block) -> float:
        """Chunks of a halo that is not resident, at the least."""
        most_lines = max(_CHUNK_BYTES / (block.halo[2] * self._token_bytes), 64 / block.box[2])
        return block.halo[0] * max(1, block.halo[1] / most_lines)

    def _cycles(self, draft: Draft, blocks: int) -> float:
        """Of a multiprocessor for one image of all its blocks."""
        block, columns, stages, _, _, _, chunks, computed, fetched = draft
        work = self._warp_cycles(block, computed, self.group_cycles(columns), chunks, blocks)
        if self._is_float32:
            work *= self.costs.straight if columns.resident else 1
        else:
            work *= 1 if columns.resident else 1.3
        if not columns.resident:
            work *= _idleness(block, columns.chunk) ** _IDLE
        # What registers the warps of a multiprocessor lack is spilled.
        registers = min(255, _REGISTERS // (32 * block.count * blocks) // 8 * 8)
        work *= math.exp(3 * max(0.0, 1 - registers / self._wanted_registers) ** 2)
        memory = self._memory_cycles(block.count, fetched)
        # While one waits another works: blocks of a multiprocessor, or stages of a block.
        hidden = 1 - (1.0 if stages == 1 else 0.35) / blocks
        return blocks * (work + memory - hidden * min(work, memory))

    def _warp_cycles(self, block: Block, computed: int, of_group: float, chunks: float, blocks: int) -> float:
        """Of a block's warps for an image. Four schedulers share them; few warps wait for themselves."""
        costs, count = self.costs, block.count
        word, alone = costs.word, 1.0
        if self._is_float32:
            word *= costs.float32 * (1 if self._is_rounded(block) else _UNROUNDED)
            alone = _LONE_WARP if count == 1 else 1
        group = costs.group + of_group + word * self._row_bytes / 128
        cycles = count * (costs.tile + computed * group + costs.chunk * (chunks - 1)) / 4
        return cycles * alone * (1.2 if count < 4 else 1) * max(1, 17 / (blocks * count)) ** 0.72

    def _is_rounded(self, block: Block) -> bool:
        """IS_ROUNDED of csrc/fused/halo.cuh, for TF32."""
        axes = zip(block.box, block.warps, block.row_tile, strict=True)
        covered = math.prod(box + (warps - 1) * rows for box, warps, rows in axes)
        return self.costs.column_uses * block.count * math.prod(block.box) >= 2 * covered

    def _memory_cycles(self, warp_count: int, fetched: int) -> float:
        """Of a block for an image: columns and rows through the second-level cache, every row through memory."""
        rows = 16 * warp_count * self._row_bytes
        cached = fetched * self._row_bytes + self.costs.cached * rows
        return max(cached / _CACHE_BYTES, self.costs.moved * rows / self._memory_bytes)


def _idleness(block: Block, chunk: tuple[int, int, int]) -> float:
    """Chunks of a block times the part of its box that a warp finds in one: 1 where none waits for others' columns."""
    idle = 1.0
    for box, halo, extent in zip(block.box, block.halo, chunk, strict=True):
        if extent < halo:
            idle *= max(1.0, -(-halo // extent) * min(box, extent) / box)
    return idle


def _setup_images(draft: Draft, cycles: float) -> float:
    """Of a block, in images of ``cycles``."""
    return round(_SETUP_CYCLES[draft.columns.start_table] / cycles, 2)


@functools.lru_cache(maxsize=65536)
def _splits(batch: int, combinations: int, slots: int, setup: float) -> tuple[int, float]:
    """Over how many blocks the images of a tile are spread, and the time until the last block ends, in images.

    ``setup``: of a block, in images.
    """
    best = None
    splits, most = 1, _most_splits(batch, combinations, slots)
    while splits <= most:
        images = -(-batch // splits)
        waves = combinations * splits / slots
        # Beyond a few waves blocks no longer end together.
        time = (math.ceil(waves) if waves < 4 else waves + 0.5) * (images + setup)
        if best is None or time < best[1]:
            best = splits, time
        # More blocks are no faster until each has an image less.
        splits = -(-batch // (images - 1)) if images > 1 else most + 1
    return best


def _most_splits(batch: int, combinations: int, slots: int) -> int:
    return max(1, min(batch, -(-8 * slots // combinations)))
