"""How the backward kernels of csrc/fused cover a problem: the search of fused_search.py, by costs of their own.

The gradients of k and v compute four products of matrices where forward computes two, that of q three, and the sums of
the bias gradient fill registers: so what a block holds, how many blocks fit and what a warp costs differ.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from natrain.ops.fused_plan import Demands, Device, Plan, Space
from natrain.ops.fused_search import Columns, Costs, Draft, Search
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


class _Gradient(Search):
    """Where the bias gradient is summed, every warp has a table of ``bias_entries`` besides what a draft holds."""

    def __init__(self, space: Space, demands: Demands, device: Device, bias_entries: int) -> None:
        super().__init__(space, demands, device, _OF_KV if demands.rows_are_keys else _OF_Q)
        self._warp_bytes = _MATRIX_BYTES + 4 * bias_entries if bias_entries else 0

    def fit(self, draft: Draft) -> tuple[int, int]:
        warps = draft.block.count
        shared = -(-draft.shared_bytes // 16) * 16 + warps * self._warp_bytes
        if shared > self._per_block:
            return 0, shared
        # Warps are dealt to four schedulers with 512 registers for each of their lanes.
        most_warps = 4 * (512 // (-(-self._needed_registers(draft) // 8) * 8))
        by_shared = self._per_multiprocessor // (shared + 1024)
        return min(draft.min_blocks, by_shared, max(warps <= 4, most_warps // warps)), shared

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
