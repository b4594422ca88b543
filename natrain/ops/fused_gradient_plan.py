"""How the backward kernels of csrc/fused cover a problem: candidates of fused_plan.py, by a cost model of their own.

The gradients of k and v compute four products of matrices where forward computes two, that of q three, and the sums of
the bias gradient fill registers: so what a block holds, how many blocks fit and what a warp costs differ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace

from natrain.ops.fused_plan import Demands, Device, Plan, Space, candidates, shared_capacity, table_bytes
from natrain.ops.problem import Problem

_MATRIX_BYTES = 16 * 17 * 4  # MATRIX_BYTES of csrc/fused/backward_q.cu
_GROUPS_HELD = 8  # groups whose dS stays in registers there
_MORE_REGISTERS = 16  # than ``Demands`` says, for addresses that plans count only with some tables


def _held_registers(dim: int, itemsize: int) -> int:
    """Of the rows of a warp as csrc/fused/products.cuh keeps them."""
    held = dim * itemsize // 8
    return held if held <= 48 else 4


def demands_of_q(problem: Problem) -> Demands:
    """Of csrc/fused/backward_q.cu."""
    head_dim, value_dim, itemsize = problem.head_dim, problem.value_dim, problem.dtype.itemsize
    registers = _held_registers(head_dim, itemsize) + _held_registers(value_dim, itemsize) + head_dim // 2 + 56
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
    registers = _held_registers(head_dim, itemsize) + _held_registers(value_dim, itemsize) + sums + 64
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


def gradient_plans(space: Space, demands: Demands, device: Device, bias_entries: int = 0) -> Iterator[Plan]:
    """Every legal plan of a gradient kernel, with its cost in cycles of a multiprocessor.

    Where the bias gradient is summed, every warp has a table of ``bias_entries`` besides what ``candidates`` hold.
    """
    per_multiprocessor, per_block = shared_capacity(device.capability)
    for plan in candidates(space, demands, device):
        warps = math.prod(plan.warps)
        shared = -(-plan.shared_bytes // 16) * 16
        shared += warps * (_MATRIX_BYTES + 4 * bias_entries) if bias_entries else 0
        # Warps are dealt to four schedulers with 16,384 registers each.
        registers = demands.registers + demands.per_group * plan.groups + _MORE_REGISTERS
        most_warps = 4 * (512 // (-(-registers // 8) * 8))
        blocks = min(plan.min_blocks, per_multiprocessor // (shared + 1024), max(warps <= 4, most_warps // warps))
        if shared <= per_block and blocks:
            plan = replace(plan, shared_bytes=shared, min_blocks=blocks)
            yield replace(plan, cost=_cost(plan, space, demands, device, bias_entries > 0))


@functools.lru_cache(maxsize=4096)
def choose_gradient_plan(space: Space, demands: Demands, device: Device, bias_entries: int = 0) -> Plan:
    """The plan of least cost.

    Raises:
        ValueError: none is legal.
    """
    plan = min(gradient_plans(space, demands, device, bias_entries), key=lambda plan: plan.cost, default=None)
    if plan is None:
        raise ValueError(f"no plan of a gradient for {space}")
    return plan


def _cost(plan: Plan, space: Space, demands: Demands, device: Device, is_bias_summed: bool) -> float:
    """Cycles, as far as they tell plans apart: instructions as compiled, factors as measured plans have them."""
    warps = math.prod(plan.warps)
    resident_warps = warps * plan.min_blocks
    width = sum(demands.columns) * space.itemsize / 128  # 1 at head_dim 32 in 16 bits
    per_group = 34 + (50 if demands.rows_are_keys else 36) * width
    if is_bias_summed and not (plan.resident and plan.groups <= _GROUPS_HELD):
        per_group += 150  # dS does not stay in registers: its diagonals are summed for every image
    chunks = math.prod(plan.chunk) if plan.resident else 1.2 * math.prod(plan.box)
    instructions = 200 + 100 * width + per_group * math.prod(plan.box) / 16 + 8 * 8 * width * chunks / (32 * warps)
    # Of a scheduler's slots a few warps fill few, and many no more than these.
    cycles = -(-resident_warps // 4) * instructions / min(0.45 + 0.004 * (resident_warps - 10), 0.045 * resident_warps)
    if plan.stages == 1:
        cycles *= 2  # nothing is fetched ahead; not measured
    # Of equals the one with less to wait for and to keep.
    cycles *= 1 + 0.002 * warps + 0.01 * plan.stages
    if plan.resident and plan.start_table == 1:
        cycles *= 1.05  # a comparison a line, and a pointer
    if not plan.resident:
        # A chunk is used only by the warps whose boxes it meets, and everyone waits for it.
        axes = 3 if plan.chunked_x else 2
        box = math.prod(plan.box[:axes])
        halo = math.prod(b + (w - 1) * t for b, w, t in zip(plan.box, plan.warps, plan.row_tile, strict=True))
        if not plan.chunked_x:
            halo //= plan.box[2] + (plan.warps[2] - 1) * plan.row_tile[2]
        cycles *= (1.3 if math.prod(plan.box) <= 256 else 0.9) * (halo / box) ** 0.4
        cycles *= 1.2 if plan.min_blocks == 1 else 1
    table = 0
    if plan.start_table:
        table = table_bytes(space, plan.row_tile, plan.warps, plan.box[2])
        if plan.classes:
            table = plan.classes.bytes(plan.row_tile, plan.warps, plan.box)
    waves = plan.grid / (device.multiprocessors * plan.min_blocks)
    images = -(-space.batch // plan.splits)
    return (math.ceil(waves) if waves < 4 else waves + 0.5) * ((images + 1) * cycles + 0.15 * table * plan.min_blocks)
