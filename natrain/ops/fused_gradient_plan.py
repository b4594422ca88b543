"""How the backward kernels of csrc/fused cover a problem: candidates of fused_plan.py, by a cost model of their own.

The gradients of k and v compute four products of matrices where forward computes two, that of q three, and the sums of
the bias gradient fill registers: so what a block holds, how many blocks fit and what a warp costs differ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from natrain.ops.fused_measured import measured
from natrain.ops.fused_plan import Demands, Device, Plan, Space, candidates, shared_capacity, table_bytes
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


def gradient_plans(space: Space, demands: Demands, device: Device, bias_entries: int = 0) -> Iterator[Plan]:
    """Every legal plan of a gradient kernel, with its cost in cycles of a multiprocessor.

    Where the bias gradient is summed, every warp has a table of ``bias_entries`` besides what ``candidates`` hold.
    """
    per_multiprocessor, per_block = shared_capacity(device.capability)
    for plan in candidates(space, demands, device):
        warps = math.prod(plan.warps)
        shared = -(-plan.shared_bytes // 16) * 16
        shared += warps * (_MATRIX_BYTES + 4 * bias_entries) if bias_entries else 0
        # Warps are dealt to four schedulers with 512 registers for each of their lanes.
        needed = _needed_registers(plan, demands)
        most_warps = 4 * (512 // (-(-needed // 8) * 8))
        blocks = min(plan.min_blocks, per_multiprocessor // (shared + 1024), max(warps <= 4, most_warps // warps))
        if shared <= per_block and blocks:
            plan = replace(plan, shared_bytes=shared, min_blocks=blocks)
            yield replace(plan, cost=_cost(plan, space, demands, device, bias_entries > 0))


@functools.lru_cache(maxsize=4096)
@under_no_mode
def choose_gradient_plan(space: Space, demands: Demands, device: Device, bias_entries: int = 0) -> Plan:
    """The plan that was measured to be best, where one was, else the legal plan of least cost.

    Raises:
        ValueError: none is legal.
    """
    plans = list(gradient_plans(space, demands, device, bias_entries))
    if not plans:
        raise ValueError(f"no plan of a gradient for {space}")
    kernel = "backward_kv" if demands.rows_are_keys else "backward_q"
    return min(measured(kernel, space, max(demands.columns), plans) or plans, key=lambda plan: plan.cost)


def _needed_registers(plan: Plan, demands: Demands) -> int:
    """Of a thread, so that the compiler keeps all in registers. Wide heads want more than there are: some are spilled
    rather than every second warp lost."""
    more = _LOOP_REGISTERS if not plan.resident else _POINTER_REGISTERS if plan.start_table == 1 else 0
    return min(255, demands.registers + demands.per_group * plan.groups + more)


def _cost(plan: Plan, space: Space, demands: Demands, device: Device, is_bias_summed: bool) -> float:
    """Cycles, as far as they tell plans apart."""
    of = _OF_KV if demands.rows_are_keys else _OF_Q
    warps = math.prod(plan.warps)
    resident_warps = warps * plan.min_blocks
    width = sum(demands.columns) * space.itemsize / 128  # 1 at head_dim 32 in 16 bits
    groups = math.prod(plan.box) / 16
    cycles = of.tile + of.group * groups * (1 + of.wider * (width - 1))
    cycles += of.column * width * (math.prod(plan.chunk) if plan.resident else 1.3 * math.prod(plan.box)) / warps
    if is_bias_summed and not (plan.resident and plan.groups <= _GROUPS_HELD):
        cycles += of.diagonals * groups
    if not plan.resident:
        halo = [b + (w - 1) * t for b, w, t in zip(plan.box, plan.warps, plan.row_tile, strict=True)]
        cycles *= of.needless_chunks if math.prod(plan.box) <= 16 * demands.most_groups else 1
        cycles += of.chunk * math.prod(-(-h // c) for h, c in zip(halo, plan.chunk, strict=True))
    if plan.stages == 1:
        cycles *= of.single_stage if plan.min_blocks > 1 else of.alone
    elif plan.stages == 3:
        cycles *= 1.03
    if plan.start_table == 1 and plan.resident:
        cycles *= of.pointers
    elif plan.start_table == 0 and space.has_rpb:
        cycles *= of.bias
    registers = 512 // -(-resident_warps // 4) // 8 * 8
    cycles *= math.exp(of.few_registers * max(0.0, 1 - min(255, registers) / (1.2 * _needed_registers(plan, demands))))
    cycles *= plan.min_blocks * warps / 4 * (1 + of.few_warps / resident_warps)
    table = 0
    if plan.start_table:
        table = table_bytes(space, plan.row_tile, plan.warps, plan.box[2])
        if plan.classes:
            table = plan.classes.bytes(plan.row_tile, plan.warps, plan.box)
    waves = plan.grid / (device.multiprocessors * plan.min_blocks)
    waves = math.ceil(waves) if waves < 4 else waves + 0.5
    setup = plan.min_blocks * (of.block + of.table_byte * table)
    return waves * ((-(-space.batch // plan.splits) + 1) * cycles + setup)
