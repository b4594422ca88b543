"""Problems whose blocks can walk over tiles that are alike, and what makes them: NATRAIN_WALK of csrc/fused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch

from natrain.ops import fused
from natrain.ops.fused_forward_plan import choose_plan
from natrain.ops.fused_gradient_plan import choose_gradient_plan
from natrain.ops.fused_plan import Plan
from natrain.ops.fused_search import Search
from natrain.ops.fused_walk import walks
from tests.ops.grid import Case


@dataclass(frozen=True)
class Walked:
    """``axis``: along which blocks walk, over tiles or dilation groups. ``has_splits``: they share a tile's images."""

    case: Case
    axis: int
    over_groups: bool = False
    has_splits: bool = False
    is_resident: bool = True
    one_pass: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        over = "groups" if self.over_groups else "tiles"
        way = [name for name in ("has_splits", "is_resident", "one_pass") if getattr(self, name)]
        return "-".join([str(self.case), f"axis{self.axis}", over, *way, str(self.dtype).removeprefix("torch.")])


WALKS = [
    Walked(Case(2, (150,), 2, 16, (9,), (1,), (1,), (False,), True), 2),
    Walked(Case(2, (150,), 2, 16, (9,), (1,), (1,), (False,), True), 2, has_splits=True, dtype=torch.float32),
    Walked(Case(2, (131,), 2, 8, (5,), (2,), (1,), (True,), False), 2),
    Walked(Case(1, (200,), 1, 16, (4,), (1,), (2,), (False,), False), 2),
    Walked(Case(2, (330,), 1, 16, (101,), (1,), (1,), (False,), True), 2, is_resident=False),
    Walked(Case(2, (46, 9), 2, 32, (7, 3), (1, 1), (1, 1), (False, False), True), 1, has_splits=True),
    Walked(Case(2, (46, 9), 2, 32, (7, 3), (1, 1), (1, 1), (False, False), True), 1, dtype=torch.float32),
    Walked(Case(1, (9, 75), 1, 8, (5, 5), (1, 2), (1, 1), (True, False), True), 2),
    Walked(Case(2, (70, 20), 1, 16, (17, 17), (1, 1), (1, 1), (False, False), False), 1, is_resident=False),
    Walked(Case(1, (41, 5, 6), 1, 16, (5, 3, 3), (1, 1, 1), (1, 1, 1), (False, False, False), True), 0),
    Walked(Case(2, (5, 39, 4), 2, 8, (3, 4, 2), (1, 1, 2), (1, 1, 1), (True, False, False), True), 1),
    Walked(Case(1, (83,), 2, 16, (5,), (7,), (1,), (False,), False), 2, over_groups=True),
    Walked(Case(3, (23, 10), 1, 16, (3, 3), (5, 2), (1, 1), (False, True), True), 1, over_groups=True, has_splits=True),
    Walked(Case(1, (9, 5, 29), 1, 16, (3, 3, 5), (2, 1, 5), (1, 1, 1), (False, False, False), True), 2, True),
    Walked(Case(2, (150,), 2, 16, (9,), (1,), (1,), (False,), False), 2, has_splits=True, one_pass=True),
    Walked(Case(2, (160,), 1, 8, (8,), (1,), (4,), (False,), False), 2, one_pass=True),
    Walked(Case(1, (400,), 1, 8, (64,), (1,), (32,), (False,), False), 2, one_pass=True),
    Walked(Case(1, (83,), 2, 16, (5,), (7,), (1,), (False,), False), 2, over_groups=True, one_pass=True),
]


@contextmanager
def walking(walked: Walked) -> Iterator[None]:
    """Every fused kernel gets a plan whose blocks walk, in runs of unlike lengths where there are any."""
    taken: list[Plan] = []

    def walk(search: Search, plan: Plan) -> Plan:
        space, batch = search.space, search.space.batch if walked.has_splits else 1
        plans = [plan, *(other for other in search.plans() if other.threads in (32, 64))]
        ways = [
            found
            for other in sorted(plans, key=lambda plan: plan.cost)
            for _, found in walks(replace(other, splits=batch, grid=other.grid // other.splits * batch), space, 0.5, 4)
            if (found.walk.axis, found.walk.is_over_groups) == (walked.axis, walked.over_groups)
            and found.splits == batch
        ]
        # What is preferred first; some kernels have no plan that comes in chunks, or no uneven runs.
        ways.sort(key=lambda found: (found.resident != walked.is_resident, not found.walk.count % found.walk.runs))
        taken.append(ways[0])
        return ways[0]

    def one_pass(problem, device):
        return original(problem, device) if walked.one_pass and fused.can_take_one_pass(problem) else None

    original = fused.one_pass_plan
    cheap = mock.patch.object(fused, "least_gradient_cost", lambda space, demands, device: demands.rows_are != "both")
    with mock.patch.object(Search, "walking", walk), mock.patch.object(fused, "one_pass_plan", one_pass), cheap:
        with fused.launching({}):
            _forget()
            try:
                yield
            finally:
                _forget()
    assert {plan.rows_are for plan in taken} == ({"queries", "both"} if walked.one_pass else {"queries", "keys"})
    assert all(plan.walk is not None and (plan.splits > 1) == walked.has_splits for plan in taken)


def _forget() -> None:
    for function in (choose_plan, choose_gradient_plan):
        function.cache_clear()
