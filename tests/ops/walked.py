"""Problems whose blocks can walk over tiles that are alike, and what makes them: NATRAIN_WALK of csrc/fused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from natrain.ops import fused
from natrain.ops.fused_forward_plan import choose_plan
from natrain.ops.fused_gradient_plan import choose_gradient_plan
from natrain.ops.fused_plan import Plan
from natrain.ops.fused_search import Search
from tests.ops.grid import Case

# The axis they walk along.
_TILES = [
    (Case(2, (150,), 2, 16, (9,), (1,), (1,), (False,), True), 2),
    (Case(2, (131,), 2, 8, (5,), (2,), (1,), (True,), False), 2),
    (Case(1, (200,), 1, 16, (4,), (1,), (2,), (False,), False), 2),
    (Case(1, (330,), 1, 16, (101,), (1,), (1,), (False,), True), 2),  # in chunks
    (Case(2, (46, 9), 2, 32, (7, 3), (1, 1), (1, 1), (False, False), True), 1),
    (Case(1, (9, 75), 1, 8, (5, 5), (1, 2), (1, 1), (True, False), True), 2),
    (Case(1, (70, 20), 1, 16, (17, 17), (1, 1), (1, 1), (False, False), False), 1),  # in chunks
    (Case(1, (41, 5, 6), 1, 16, (5, 3, 3), (1, 1, 1), (1, 1, 1), (False, False, False), True), 0),
    (Case(2, (5, 39, 4), 2, 8, (3, 4, 2), (1, 1, 2), (1, 1, 1), (True, False, False), True), 1),
]
# Over dilation groups, of two lengths.
_GROUPS = [
    (Case(1, (83,), 2, 16, (5,), (7,), (1,), (False,), False), 2),
    (Case(2, (23, 10), 1, 16, (3, 3), (5, 2), (1, 1), (False, True), True), 1),
    (Case(1, (9, 5, 29), 1, 16, (3, 3, 5), (2, 1, 5), (1, 1, 1), (False, False, False), True), 2),
]
# (problem, axis, over groups?, dtype)
WALKS = (
    [(*case, False, torch.bfloat16) for case in _TILES]
    + [(*case, True, torch.bfloat16) for case in _GROUPS]
    + [(*_TILES[i], False, torch.float32) for i in (0, 1, 4)]
)


@contextmanager
def walking(axis: int, is_over_groups: bool) -> Iterator[None]:
    """Every fused kernel gets a plan whose blocks walk, in runs of unlike lengths where there are any."""
    taken = []

    def walk(search: Search, plan: Plan) -> Plan:
        plans = [plan, *(other for other in search.plans() if other.threads in (32, 64))]
        walks = [
            found
            for other in sorted(plans, key=lambda plan: plan.cost)
            for _, found in search._walks(other, 0.5, 4)
            if (found.walk.axis, found.walk.is_over_groups) == (axis, is_over_groups)
        ]
        uneven = [found for found in walks if found.walk.count % found.walk.runs]
        taken.append((uneven or walks)[0])
        return taken[-1]

    with mock.patch.object(Search, "walking", walk), fused.launching({}):
        _forget()
        try:
            yield
        finally:
            _forget()
    assert len(taken) >= 2 and all(plan.walk is not None for plan in taken)


def _forget() -> None:
    for function in (choose_plan, choose_gradient_plan):
        function.cache_clear()
