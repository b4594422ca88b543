"""Without a GPU: the gemm kernels compile for the oldest and the newest architecture that is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from natrain.jit import cuda
from natrain.ops import gemm, naive
from natrain.ops.problem import Problem, Window
from natrain.ops.registry import get_kernel
from tests.emulator.fixture import emulated
from tests.ops import judge
from tests.ops.grid import Case
from tests.ops.judge import Inputs

pytestmark = pytest.mark.usefixtures("own_cache")
NAT = Window((7, 7), (1, 1), (1, 1), (False, False))
CAUSAL_3D = Window((2, 3, 5), (1, 2, 1), (2, 1, 3), (True, False, False))
TINY = Problem(128, (56, 56), 2, 32, NAT, torch.float16, "cuda", (9, 0), has_rpb=True, needs_grad=True)
PROBLEMS = {
    "NAT-Tiny, float16": TINY,
    "NAT-Tiny, float32": replace(TINY, dtype=torch.float32),
    "3-D, causal, bfloat16": Problem(1, (9, 12, 14), 2, 40, CAUSAL_3D, torch.bfloat16, "cuda", (9, 0), has_rpb=True),
    "chunks, 64-bit offsets": Problem(
        1, (1500, 1500), 16, 64, Window((63, 63), (1, 1), (1, 1), (False, False)), torch.float16, "cuda", (9, 0)
    ),
}
FIRST = {("NAT-Tiny, float16", "sm_90a"), ("3-D, causal, bfloat16", "sm_80")}


def specs(problem: Problem, arch: str):
    """Of the three products; the rest is naive's."""
    return [spec for spec in get_kernel("gemm").build_specs(problem, arch) if spec.name.startswith("natrain_gemm")]


# A compile costs seconds of a small machine: each template once there, everything where there is a GPU.
@pytest.mark.parametrize("compiler", ["nvcc", pytest.param("nvrtc", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize(
    ("name", "arch"),
    [
        pytest.param(name, arch, marks=() if (name, arch) in FIRST else pytest.mark.gpu)
        for name in PROBLEMS
        for arch in ("sm_80", "sm_90a")
    ],
)
def test_every_primitive_compiles(name, arch, compiler):
    built = specs(PROBLEMS[name], arch)
    names = {spec.name for spec in built}
    assert names == {f"natrain_gemm_{primitive}" for primitive in ("qk", "av", "inverse")}
    for spec, cubin in zip(built, cuda.build_all(built), strict=True):
        assert spec.name.encode() in cubin.read_bytes()


@pytest.mark.parametrize(
    "problem", [TINY, pytest.param(replace(TINY, dtype=torch.float32), marks=pytest.mark.gpu)], ids=["fp16", "fp32"]
)
def test_the_common_kernels_spill_no_register(problem, ptxas_report):
    for spec in specs(problem, "sm_90a"):
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in ptxas_report(spec), spec.name


@pytest.mark.parametrize("kernel_size", [(7, 7), (9, 13)], ids=["softmax in qk", "softmax by naive"])
def test_what_is_compiled_ahead_is_what_a_step_launches(kernel_size, monkeypatch):
    """The kernels that a forward and a backward load on the emulator, by their macros."""
    loaded = set()
    case = Case(2, (9, 14), 2, 32, kernel_size, (1, 1), (1, 1), (False, False), True)
    with emulated(get_kernel("gemm")):
        emulated_load = cuda.load

        def load(source, name, defines, device):
            loaded.add(cuda.kernel_spec(source, name, defines, "sm_90a").key())
            return emulated_load(source, name, defines, device)

        monkeypatch.setattr(cuda, "load", load)
        for cached in (gemm._kernel, naive._problem_kernel, naive._row_kernel):
            cached.cache_clear()
        plans = {}
        for module in (gemm, naive):
            monkeypatch.setattr(module, "plans", plans)
        judge.outputs(case, Inputs.draw(case, torch.float16, device="cpu"), "gemm")
    window = Window(case.kernel_size, case.dilation, case.stride, case.is_causal)
    problem = Problem(2, case.spatial, 2, 32, window, torch.float16, "cuda", (9, 0), has_rpb=True, needs_grad=True)
    ahead = {spec.key() for spec in get_kernel("gemm").build_specs(problem, "sm_90a") if "dropout" not in spec.name}
    assert loaded == ahead
