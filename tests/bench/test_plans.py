"""scripts/bench_plans.py and bench_gemm_plans.py: the choice comes first, then other plans, none twice."""

from __future__ import annotations

import runpy

import torch

from natrain.bench import layers
from natrain.bench.case import Case
from natrain.bench.plans import plans
from natrain.ops.fused_plan import Device


def test_the_choice_and_others(repository):
    describe = runpy.run_path(str(repository / "scripts/bench_plans.py"))["describe"]
    layer = next(layer for layer in layers.LAYERS if layer.name == "7/1")
    found = plans(layer.case(torch.bfloat16, True), Device(), 3)
    assert len(set(found)) == len(found) == 4
    assert (found[0].row_tile, found[0].warps) == ((1, 2, 8), (1, 4, 1))  # as measured
    assert "stages 2" in describe(found[0])


def test_tilings_of_every_kind(repository):
    """scripts/bench_gemm_plans.py: of a wide float32 head sliced ones, and halves of a product."""
    script = runpy.run_path(str(repository / "scripts/bench_gemm_plans.py"))
    words = {"shape": "12x12", "batch": 2, "heads": 2, "head_dim": 128, "kernel_size": 3, "dtype": "fp32"}
    for primitive in ("qk", "av", "inverse"):
        found = script["tilings"](primitive, Case.of(words), 1)
        assert len(set(found)) == len(found) > 4
        assert {tiling.slices for tiling in found} == {1, 2, 4}
        assert {tiling.columns for tiling in found} == ({8} if primitive == "qk" else {8, 16})
        assert f"slices {found[0].slices}" in script["describe"](found[0])
