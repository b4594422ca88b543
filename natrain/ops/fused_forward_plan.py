"""How csrc/fused/forward.cu covers a problem: the search of fused_search.py by forward's cost."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

from natrain.ops.fused_plan import Demands, Device, Plan, Space, shared_capacity
from natrain.ops.fused_search import Block, Draft, Search, setup_images
from natrain.ops.geometry import under_no_mode


class _Forward(Search):
    def least_of_block(self, block: Block) -> float:
        # ``_forward_cycles`` without the factors that are 1 at the least.
        row_bytes, count, tokens = sum(self.demands.columns) * self.space.itemsize, block.count, math.prod(block.box)
        cycles = 157 + tokens // 16 * (46 + 49 * row_bytes / 128)
        is_chunked = tokens > 16 * self.demands.most_groups
        cycles += 403 * (self._fewest_chunks(block, block.halo) if is_chunked else 1)
        cycles = count * cycles / 4 + 0.15 * (math.prod(block.halo) + 16 * count) * row_bytes / 24
        cycles *= (1.15 if is_chunked else 1) * (1.1 if count < 4 else 1)
        cycles *= max(1, 16 / (self._most_blocks(count) * count)) ** 0.4
        return block.combinations * self.space.batch * cycles / self.device.multiprocessors

    def least(self, draft: Draft) -> float:
        cycles = self._forward_cycles(draft)
        setup = setup_images(draft, cycles)
        waves = draft.block.combinations / (self.device.multiprocessors * draft.min_blocks)
        return cycles * max(waves * (self.space.batch + setup), self._least_images(draft) + setup)

    def finished(self, draft: Draft) -> Plan:
        cycles = self._forward_cycles(draft)
        splits, images = self._spread(draft, cycles)
        return self._plan(draft, draft.min_blocks, draft.shared_bytes, splits, images * cycles)

    def rank(self, plan: Plan) -> tuple[float, ...]:
        return plan.cost, plan.stages, plan.shared_bytes


def candidates(space: Space, demands: Demands, device: Device) -> Iterator[Plan]:
    """Every legal plan, at the cost of forward."""
    return _Forward(space, demands, device).plans()


@functools.lru_cache(maxsize=4096)
@under_no_mode
def choose_plan(space: Space, demands: Demands, device: Device) -> Plan:
    """The forward plan that was measured to be best, where one was, else the legal plan of least cost.

    Raises:
        ValueError: none is legal (a device with little shared memory, a large head dim).
    """
    plan = _Forward(space, demands, device).best("forward")
    if plan is None:
        _, most = shared_capacity(device.capability)
        dims = demands.columns
        raise ValueError(f"a block has {most} bytes of shared memory, too few for rows of {dims} elements")
    return plan
