"""scripts/bench_plans.py: the choice comes first, then other plans, none twice."""

from __future__ import annotations

import runpy

import torch

from natrain.bench import layers
from natrain.ops.fused_plan import Device


def test_the_choice_and_others(repository):
    script = runpy.run_path(str(repository / "scripts/bench_plans.py"))
    layer = next(layer for layer in layers.LAYERS if layer.name == "7/1")
    found = script["plans"](layer, torch.bfloat16, True, Device(), 3)
    assert len(set(found)) == len(found) == 4
    assert (found[0].row_tile, found[0].warps) == ((1, 2, 8), (1, 4, 1))  # as measured
    assert "stages 2" in script["describe"](found[0])
