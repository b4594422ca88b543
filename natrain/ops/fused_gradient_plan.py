"""How the backward kernels of csrc/fused cover a problem: the search of fused_search.py, by costs of their own.

The gradients of k and v compute four products of matrices where forward computes two, that of q three, and the sums of
the bias gradient fill registers: so what a block holds, how many blocks fit and what a warp costs differ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

from natrain.ops.fused_plan import Demands, Device, Plan, Space
from natrain.ops.fused_search import Block, Columns, Costs, Draft, Search
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


def _may_walk(problem: Problem) -> bool:
    return not (problem.has_key_mask or problem.has_dropout or problem.is_grouped)


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
        may_walk=_may_walk(problem),
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
        rows_are="keys",
        fewest_stages=1,
        may_walk=_may_walk(problem),
    )


def demands_of_qkv(problem: Problem) -> Demands:
    """Of csrc/fused/backward_qkv.cu."""
    head_dim, value_dim, itemsize = problem.head_dim, problem.value_dim, problem.dtype.itemsize
    has_room = (head_dim + value_dim) * (itemsize + 4) <= 1024  # HAS_ROOM there
    held = _held_registers(head_dim, itemsize) + _held_registers(value_dim, itemsize) if has_room else 0
    # As ptxas was seen to need them; short rows in 16 bits are computed with more at once.
    registers = held + (head_dim + value_dim) // 2 + (112 if itemsize == 2 and head_dim + value_dim <= 64 else 72)
    return Demands(
        (head_dim, head_dim, value_dim, value_dim, max(head_dim, value_dim)),
        (head_dim, value_dim),
        registers,
        per_group=0,
        most_groups=12,  # boxes of 208 columns took 1.11 and 1.26 times as long as two passes
        row_buffers=0,
        column_bytes=8,
        rows_are="both",
        fewest_stages=1,
    )


_OF_Q = Costs(
    tile=16,
    group=60,
    word=60,
    float32=3.4,
    column_uses=2,
    straight=1.2,
    diagonals=526,
    chunk=430,
    cached=2,
    moved=2.5,
    registers=((56, 1.5), (156, 1.6)),
)
_OF_KV = Costs(
    tile=370,
    group=70,
    word=39,
    float32=2.6,
    column_uses=2,
    straight=1.2,
    diagonals=0,
    chunk=240,
    cached=2,
    moved=3,
    registers=((140, 1.25), (200, 1.6)),
)

# Fitted to 392 plans of 50 problems (an H200), whose times it meets with a standard deviation of 0.14.
_OF_QKV = Costs(
    tile=1158,
    group=88,
    word=50,
    float32=1.81,
    column_uses=2,
    straight=1.0,
    diagonals=0,
    chunk=0,
    cached=0.8,
    moved=0.775,
    registers=((145, 1.5), (164, 1.23)),
)
# Of a block of one warp; in float32 the search has a factor of its own (_LONE_WARP).
_LONE_WARP_16_BITS = 1.15
_COSTS = {"queries": _OF_Q, "keys": _OF_KV, "both": _OF_QKV}
_KERNELS = {"queries": "backward_q", "keys": "backward_kv", "both": "backward_qkv"}


def _most_blocks(warps: int, registers: int) -> int:
    """Of a multiprocessor: warps are dealt to four schedulers with 512 registers for each of their lanes."""
    return max(warps <= 4, 4 * (512 // (-(-min(255, registers) // 8) * 8)) // warps)


class _Gradient(Search):
    """Where the bias gradient is summed, every warp has a table of ``bias_entries`` besides what a draft holds."""

    def __init__(self, space: Space, demands: Demands, device: Device, bias_entries: int) -> None:
        super().__init__(space, demands, device, _COSTS[demands.rows_are])
        self._warp_bytes = _MATRIX_BYTES + 4 * bias_entries if bias_entries else 0

    def fit(self, draft: Draft) -> tuple[int, int]:
        warps = draft.block.count
        shared = -(-draft.shared_bytes // 16) * 16 + warps * self._warp_bytes
        if shared > self._per_block:
            return 0, shared
        by_shared = self._per_multiprocessor // (shared + 1024)
        return min(draft.min_blocks, by_shared, _most_blocks(warps, self._needed_registers(draft))), shared

    def group_cycles(self, columns: Columns) -> float:
        cycles = super().group_cycles(columns)
        if self._warp_bytes and not (columns.resident and columns.groups <= _GROUPS_HELD):
            cycles += self.costs.diagonals
        return cycles

    def _needed_registers(self, draft: Draft) -> int:
        """Of a thread, so that the compiler keeps all in registers. Wide heads want more than there are: some are
        spilled rather than every second warp lost."""
        columns = draft.columns
        more = _LOOP_REGISTERS if not columns.resident else _POINTER_REGISTERS if columns.start_table == 1 else 0
        return min(255, self.demands.registers + self.demands.per_group * columns.groups + more)


class _OnePass(Search):
    """Of csrc/fused/backward_qkv.cu: the halo is resident, a box one line, and no start values are tabled."""

    def __init__(self, space: Space, demands: Demands, device: Device) -> None:
        super().__init__(space, demands, device, _COSTS["both"])

    def _warp_cycles(self, block: Block, computed: int, of_group: float, chunks: float, blocks: int) -> float:
        cycles = super()._warp_cycles(block, computed, of_group, chunks, blocks)
        return cycles * (_LONE_WARP_16_BITS if block.count == 1 and not self._is_float32 else 1)

    def fit(self, draft: Draft) -> tuple[int, int]:
        return min(draft.min_blocks, _most_blocks(draft.block.count, self.demands.registers)), draft.shared_bytes

    def _drafts(self, block: Block) -> Iterator[Draft]:
        tokens, groups = math.prod(block.halo), block.box[2] // 16
        is_line = block.box[:2] == (1, 1) and block.box[2] % 16 == 0
        # A warp's gradients leave through a place of its own in the halo of ``out``.
        if is_line and groups <= self.demands.most_groups and tokens >= 16 * block.count:
            yield from self._with_stages(block, Columns(block.halo, block.box, True, False, 0), 0, tokens, groups, 1)


def gradient_search(space: Space, demands: Demands, device: Device, bias_entries: int = 0) -> Search:
    """Of the plans of a gradient kernel, at its costs.

    Where the bias gradient is summed, every warp has a table of ``bias_entries`` besides what a draft holds.
    """
    if demands.rows_are == "both":
        return _OnePass(space, demands, device)
    return _Gradient(space, demands, device, bias_entries)


@functools.lru_cache(maxsize=4096)
@under_no_mode
def choose_gradient_plan(space: Space, demands: Demands, device: Device, bias_entries: int = 0) -> Plan:
    """The plan that was measured to be best, where one was, else the legal plan of least cost.

    Raises:
        ValueError: none is legal.
    """
    plan = gradient_search(space, demands, device, bias_entries).best(_KERNELS[demands.rows_are])
    if plan is None:
        raise ValueError(f"no plan of a gradient for {space}")
    return plan


@functools.lru_cache(maxsize=4096)
@under_no_mode
def least_gradient_cost(space: Space, demands: Demands, device: Device) -> float:
    """Cycles of the cheapest plan without a bias gradient, by the model alone; infinite where none is legal."""
    plan = gradient_search(space, demands, device).cheapest()
    return math.inf if plan is None else plan.cost
