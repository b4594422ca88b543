"""How the backward kernels of csrc/fused cover a problem: the search of fused_search.py, by costs of their own.

The gradients of k and v compute four products of matrices where forward computes two, that of q three, and the sums of
the bias gradient fill registers: so what a block holds, how many blocks fit and what a warp costs differ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from natrain.ops.fused_plan import Demands, Device, Plan, Space
from natrain.ops.fused_search import Block, Draft, Search
from natrain.ops.geometry import under_no_mode
from natrain.ops.problem import Problem

_MATRIX_BYTES = 16 * 17 * 4  # MATRIX_BYTES of csrc/fused/backward_q.cu
_GROUPS_HELD = 8  # groups whose dS stays in registers there
# Beyond ``Demands``: pointers into a table with a line for every difference; the loops over chunks.
_POINTER_REGISTERS = 24
_LOOP_REGISTERS = 8


def _held_registers(dim: int, itemsize: int) -> int:
    """Of the rows of a warp as csrc/fused/products.cuh keeps them."""
    held = dim * itemsize // 8
    return held if held <= 48 else 4


def demands_of_q(problem: Problem) -> Demands:
    """Of csrc/fused/backward_q.cu."""
    head_dim, value_dim, itemsize = problem.head_dim, problem.value_dim, problem.dtype.itemsize
    registers = _held_registers(head_dim, itemsize) + _held_registers(value_dim, itemsize) + head_dim // 2 + 72
    return Demands(
        (head_dim, value_dim),
        (head_dim, value_dim),
        registers,
        per_group=8 if problem.has_rpb else 0,
        most_groups=_GROUPS_HELD if problem.has_rpb else 16,
        row_buffers=3,
        fewest_stages=1,
    )


def demands_of_kv(problem: Problem, gradients: int) -> Demands:
    """Of csrc/fused/backward_kv.cu; ``gradients`` as NATRAIN_GRADIENTS there."""
    head_dim, value_dim, itemsize = problem.head_dim, problem.value_dim, problem.dtype.itemsize
    sums = (head_dim // 2 if gradients & 1 else 0) + (value_dim // 2 if gradients & 2 else 0)
    registers = _held_registers(head_dim, itemsize) + _held_registers(value_dim, itemsize) + sums * 3 // 2 + 72
    return Demands(
        (head_dim, value_dim),
        (head_dim, value_dim),
        registers,
        per_group=0,
        most_groups=16,
        row_buffers=2,
        column_bytes=8,
        rows_are_keys=True,
        fewest_stages=1,
    )


@dataclass(frozen=True)
class _Cycles:
    """Of a warp and image. Fitted to 473 measured plans a kernel, of eleven layers with and without a bias (an H100,
    bfloat16): the time of the whole backward pass is met within 3 % in the mean, and the plan that is taken was within
    3 % of the best one in most layers."""

    tile: float
    group: float  # of 16 columns, at head dim 32 in 16 bits
    wider: float  # share of ``group`` that grows with the bytes of a row
    column: float  # fetched by the block, over its warps
    chunk: float
    diagonals: float  # a group whose dS does not stay in registers
    few_warps: float  # resident warps at which half of the time is waiting
    pointers: float  # factor: a comparison a line, and a pointer
    bias: float  # factor: the bias added by pairs
    single_stage: float  # factor; of a block alone on its multiprocessor, where nothing hides the wait
    alone: float
    needless_chunks: float  # factor: chunks where the whole halo would fit
    block: float
    table_byte: float
    few_registers: float


_OF_Q = _Cycles(16, 76, 0.61, 1.69, 443, 526, 4.3, 0.99, 0.98, 0.85, 1.07, 1.7, 257, 0.16, 0.44)
_OF_KV = _Cycles(484, 90, 0.27, 0.22, 82, 0, 13.1, 0.9, 1.32, 1.05, 1.22, 1.0, 450, 0.11, 0.82)


def _halo(block: Block) -> list[int]:
    """Extents of the columns that a block reaches, as far as its window begins a row further with every row."""
    return [b + (w - 1) * t for b, w, t in zip(block.box, block.warps, block.row_tile, strict=True)]


class _Gradient(Search):
    """Where the bias gradient is summed, every warp has a table of ``bias_entries`` besides what a draft holds."""

    def __init__(self, space: Space, demands: Demands, device: Device, bias_entries: int) -> None:
        super().__init__(space, demands, device)
        self._of = _OF_KV if demands.rows_are_keys else _OF_Q
        self._is_bias_summed = bias_entries > 0
        self._warp_bytes = _MATRIX_BYTES + 4 * bias_entries if bias_entries else 0
        # 1 at head_dim 32 in 16 bits.
        self._width = sum(demands.columns) * space.itemsize / 128

    def least_of_block(self, block: Block) -> float:
        of, count, tokens = self._of, block.count, math.prod(block.box)
        cycles = self._box_cycles(tokens)
        cycles += of.column * self._width * min(math.prod(block.halo), 1.3 * tokens) / count
        is_chunked = tokens > 16 * self.demands.most_groups
        if is_chunked:
            cycles += of.diagonals * tokens / 16 if self._is_bias_summed else 0
            cycles += of.chunk * self._fewest_chunks(block, _halo(block))
        # The factors of ``_cycles`` that may be below 1; all others are 1 at the least.
        cycles *= min(1, of.single_stage, of.alone)
        cycles *= min(1, 1 if is_chunked else of.pointers, of.bias if self.space.has_rpb else 1)
        cycles *= count / 4 * (1 + of.few_warps / (count * self._most_blocks(count)))
        return block.combinations * ((self.space.batch + 1) * cycles + of.block) / self.device.multiprocessors

    def least(self, draft: Draft) -> float:
        blocks, _ = self._fit(draft)
        if not blocks:
            return math.inf
        cycles, setup = self._cycles(draft, blocks)
        waves = draft.block.combinations / (self.device.multiprocessors * blocks)
        images = self._least_images(draft) + 1
        return max(waves * ((self.space.batch + 1) * cycles + setup), images * cycles + setup)

    def finished(self, draft: Draft) -> Plan:
        blocks, shared = self._fit(draft)
        cycles, setup = self._cycles(draft, blocks)
        splits, _ = self._spread(draft, self._forward_cycles(draft))
        waves = draft.block.combinations * splits / (self.device.multiprocessors * blocks)
        waves = math.ceil(waves) if waves < 4 else waves + 0.5
        cost = waves * ((-(-self.space.batch // splits) + 1) * cycles + setup)
        return self._plan(draft, blocks, shared, splits, cost)

    def rank(self, plan: Plan) -> tuple[float, ...]:
        return (plan.cost,)

    def _fit(self, draft: Draft) -> tuple[int, int]:
        """Blocks of a multiprocessor, 0 where not one fits, and the bytes of each."""
        warps = draft.block.count
        shared = -(-draft.shared_bytes // 16) * 16 + warps * self._warp_bytes
        if shared > self._per_block:
            return 0, shared
        # Warps are dealt to four schedulers with 512 registers for each of their lanes.
        most_warps = 4 * (512 // (-(-self._needed_registers(draft) // 8) * 8))
        by_shared = self._per_multiprocessor // (shared + 1024)
        return min(draft.min_blocks, by_shared, max(warps <= 4, most_warps // warps)), shared

    def _needed_registers(self, draft: Draft) -> int:
        """Of a thread, so that the compiler keeps all in registers. Wide heads want more than there are: some are
        spilled rather than every second warp lost."""
        columns = draft.columns
        more = _LOOP_REGISTERS if not columns.resident else _POINTER_REGISTERS if columns.start_table == 1 else 0
        return min(255, self.demands.registers + self.demands.per_group * columns.groups + more)

    def _box_cycles(self, tokens: int) -> float:
        """Of a warp, for its tile and the columns of its box."""
        of = self._of
        return of.tile + of.group * (tokens / 16) * (1 + of.wider * (self._width - 1))

    def _cycles(self, draft: Draft, blocks: int) -> tuple[float, float]:
        """Cycles of an image and of the setup, for all ``blocks`` of a multiprocessor, as far as they tell plans
        apart."""
        of, block, columns = self._of, draft.block, draft.columns
        warps, tokens = block.count, math.prod(block.box)
        resident_warps = warps * blocks
        cycles = self._box_cycles(tokens)
        cycles += of.column * self._width * (math.prod(columns.chunk) if columns.resident else 1.3 * tokens) / warps
        if self._is_bias_summed and not (columns.resident and columns.groups <= _GROUPS_HELD):
            cycles += of.diagonals * (tokens / 16)
        if not columns.resident:
            cycles *= of.needless_chunks if tokens <= 16 * self.demands.most_groups else 1
            cycles += of.chunk * math.prod(-(-h // c) for h, c in zip(_halo(block), columns.chunk, strict=True))
        if draft.stages == 1:
            cycles *= of.single_stage if blocks > 1 else of.alone
        elif draft.stages == 3:
            cycles *= 1.03
        if columns.start_table == 1 and columns.resident:
            cycles *= of.pointers
        elif columns.start_table == 0 and self.space.has_rpb:
            cycles *= of.bias
        registers = min(255, 512 // -(-resident_warps // 4) // 8 * 8)
        cycles *= math.exp(of.few_registers * max(0.0, 1 - registers / (1.2 * self._needed_registers(draft))))
        cycles *= blocks * warps / 4 * (1 + of.few_warps / resident_warps)
        table = draft.table_bytes if columns.start_table else 0
        return cycles, blocks * (of.block + of.table_byte * table)


def gradient_plans(space: Space, demands: Demands, device: Device, bias_entries: int = 0) -> Iterator[Plan]:
    """Every legal plan of a gradient kernel, with its cost in cycles of a multiprocessor.

    Where the bias gradient is summed, every warp has a table of ``bias_entries`` besides what ``candidates`` hold.
    """
    return _Gradient(space, demands, device, bias_entries).plans()


@functools.lru_cache(maxsize=4096)
@under_no_mode
def choose_gradient_plan(space: Space, demands: Demands, device: Device, bias_entries: int = 0) -> Plan:
    """The plan that was measured to be best, where one was, else the legal plan of least cost.

    Raises:
        ValueError: none is legal.
    """
    kernel = "backward_kv" if demands.rows_are_keys else "backward_q"
    plan = _Gradient(space, demands, device, bias_entries).best(kernel)
    if plan is None:
        raise ValueError(f"no plan of a gradient for {space}")
    return plan
