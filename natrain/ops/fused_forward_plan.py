"""How csrc/fused/forward.cu covers a problem: the search of fused_search.py by forward's costs."""

from __future__ import annotations

import functools
from dataclasses import replace

from natrain.ops.fused_plan import Demands, Device, Plan, Space, shared_capacity
from natrain.ops.fused_search import Costs, Search
from natrain.ops.geometry import under_no_mode
from natrain.ops.problem import Problem

_COSTS = Costs(
    tile=557,
    group=46,
    word=30.5,
    float32=3.0,
    column_uses=1,
    straight=1.0,
    diagonals=0,
    chunk=500,
    cached=1,
    moved=2,
    registers=((48, 1.62), (150, 1.2)),
)


def demands_of_forward(problem: Problem) -> Demands:
    """Of csrc/fused/forward.cu."""
    demands = Demands.of_forward(problem.head_dim, problem.value_dim, problem.dtype)
    return replace(demands, may_walk=not (problem.has_key_mask or problem.has_dropout))


def forward_search(space: Space, demands: Demands, device: Device) -> Search:
    """Of the plans of forward, at its costs."""
    return Search(space, demands, device, _COSTS)


@functools.lru_cache(maxsize=4096)
@under_no_mode
def choose_plan(space: Space, demands: Demands, device: Device) -> Plan:
    """The forward plan that was measured to be best, where one was, else the legal plan of least cost.

    Raises:
        ValueError: none is legal (a device with little shared memory, a large head dim).
    """
    plan = forward_search(space, demands, device).best("forward")
    if plan is None:
        _, most = shared_capacity(device.capability)
        dims = demands.columns
        raise ValueError(f"a block has {most} bytes of shared memory, too few for rows of {dims} elements")
    return plan
