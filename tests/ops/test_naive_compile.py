"""Without a GPU: every naive template compiles for the oldest and the newest architecture that is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import natrain
from natrain.jit import cuda
from natrain.jit.build import build
from natrain.ops import naive, naive_specs, registry
from natrain.ops.problem import Problem, Window

pytestmark = pytest.mark.usefixtures("own_cache")
PROBLEM_PRIMITIVES = ("qk", "av", "inverse", "rpb_grad")
ROW_PRIMITIVES = ("softmax", "softmax_grad", "dropout")
NAT = Window((7, 7), (1, 1), (1, 1), (False, False))
CAUSAL_3D = Window((2, 3, 5), (1, 2, 1), (2, 1, 3), (True, False, False))
# A compile costs seconds of a small machine: what one compiler shows, the other repeats where there is a GPU.
NVCC_FIRST = pytest.mark.parametrize("compiler", ["nvcc", pytest.param("nvrtc", marks=pytest.mark.gpu)], indirect=True)
NVRTC_FIRST = pytest.mark.parametrize("compiler", ["nvrtc", pytest.param("nvcc", marks=pytest.mark.gpu)], indirect=True)


def _spec(primitive: str, arch: str):
    if primitive in ROW_PRIMITIVES:
        defines = naive_specs.row_defines(torch.bfloat16, 49, 56)[0]
    elif arch == "sm_80":
        defines = naive_specs.problem_defines(
            primitive, torch.float64, CAUSAL_3D, 5, 1, 8, 1, "long long", primitive == "qk"
        )
    else:
        defines = naive_specs.problem_defines(primitive, torch.float16, NAT, 32, 8, 4, 2, "int", primitive == "qk")
    return naive_specs.kernel_spec(primitive, defines, arch)


@NVCC_FIRST
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("primitive", [*PROBLEM_PRIMITIVES, *ROW_PRIMITIVES])
def test_every_template_compiles(primitive, arch, compiler):
    cubin = build(_spec(primitive, arch))
    assert f"natrain_naive_{primitive}".encode() in cubin.read_bytes()


@pytest.mark.gpu
@pytest.mark.slow
def test_every_template_compiles_for_every_supported_architecture(compiler):
    """Turing to Blackwell; gemm begins at sm_80: it needs asynchronous copies, and products of bfloat16 and TF32."""
    primitives = (*PROBLEM_PRIMITIVES, *ROW_PRIMITIVES)
    archs = [cuda.arch_of(c) for c in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))]
    specs = [_spec(primitive, arch) for arch in archs for primitive in primitives]
    problem = Problem(2, (14, 14), 4, 32, NAT, torch.bfloat16, "cuda", (8, 0), has_rpb=True, needs_grad=True)
    specs += [spec for arch in archs[1:] for spec in registry.get_kernel("gemm").build_specs(problem, arch)]
    assert len(cuda.build_all({spec.key(): spec for spec in specs}.values())) >= len(archs) * len(primitives)
    with pytest.raises(ValueError, match="capability"):
        registry.choose(replace(problem, capability=(7, 5)), "gemm")


@pytest.mark.parametrize("primitive", PROBLEM_PRIMITIVES)
def test_the_common_kernels_spill_no_register(primitive, ptxas_report):
    """head_dim 32, kernel 7, float16, as nvcc's resource report says it."""
    report = ptxas_report(_spec(primitive, "sm_90a"))
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report


def test_a_kernel_that_cannot_compile_says_what_to_type(compiler):
    from natrain.jit import BuildError

    defines = naive_specs.problem_defines("av", torch.float16, NAT, 32, 8, 4, 2, "no_such_type", False)
    with pytest.raises(BuildError, match="(?s)no_such_type.*Try: "):
        build(naive_specs.kernel_spec("av", defines, "sm_90a"))


def test_an_nvcc_that_knows_no_such_device_is_answered_with_the_setting_that_passes_it_over(tmp_path, monkeypatch):
    """NVRTC is at hand, but nvcc, found first, is the older one; named by a relative path."""
    from natrain.jit import BuildError

    (tmp_path / "nvcc").write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo 'release 11.5' && exit\n"
        "echo \"nvcc fatal: Unsupported gpu architecture 'compute_90a'\"; exit 1\n"
    )
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NATRAIN_NVCC", "./nvcc")
    monkeypatch.setenv("NATRAIN_CACHE", str(tmp_path / "cache"))
    cuda.find_nvcc.cache_clear()
    try:
        with pytest.raises(BuildError, match="(?s)release 11.5.*Unsupported gpu.*Try: NATRAIN_NVCC=nvrtc"):
            build(naive_specs.kernel_spec("softmax", naive_specs.row_defines(torch.float16, 9, 16)[0], "sm_90a"))
    finally:
        cuda.find_nvcc.cache_clear()


def test_reasons_against_a_device(monkeypatch):
    monkeypatch.setattr(cuda, "driver_version", lambda: 11080)
    assert "driver for CUDA 11 (needs 12 or newer)" in cuda.reasons_against((9, 0))
    monkeypatch.setattr(cuda, "driver_version", lambda: 12040)
    assert not any("driver" in reason for reason in cuda.reasons_against((9, 0)))
    assert cuda.reasons_against((7, 0))[0].startswith("capability (7, 0)")
    assert cuda.arch_of((8, 6)) == "sm_86" and cuda.arch_of((9, 0)) == "sm_90a" and cuda.arch_of((12, 0)) == "sm_120a"


@NVRTC_FIRST
def test_a_training_step_compiles_ahead_without_a_gpu(compiler):
    """Every kernel that forward and backward of a NAT layer launch, once each, side by side."""
    problem = Problem(2, (14, 14), 4, 32, NAT, torch.float16, "cuda", (9, 0), has_rpb=True, needs_grad=True)
    specs = naive_specs.build_specs(problem, "sm_90a")
    built = cuda.build_all(specs)
    assert len({path.parent for path in built}) == len(specs) == 8
    assert cuda.build_all(specs) == built


def test_what_is_compiled_ahead_is_what_a_step_launches(monkeypatch):
    """The launches of a forward and a backward with dropout, recorded instead of run."""
    launched = set()

    class Recorder:
        def launch(self, grid, threads, arguments, device, shared_bytes=0):
            assert grid > 0 and threads % 32 == 0

    def load(primitive, defines, device):
        launched.add(naive_specs.kernel_spec(primitive, defines, "sm_90a").key())
        return Recorder()

    for cached in (naive._problem_kernel, naive._row_kernel, registry._choose_cached):
        cached.cache_clear()
    monkeypatch.setattr(naive, "plans", {})
    monkeypatch.setattr(naive, "_load", load)
    monkeypatch.setattr(naive.NaiveKernel, "limits", registry.Limits(unfused=True))
    monkeypatch.setattr(naive.NaiveKernel, "extra_reasons", lambda self, problem: [])
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    qkv = torch.randn(2, 14, 14, 3, 4, 32, dtype=torch.float16, requires_grad=True)
    rpb = torch.randn(4, 13, 13, requires_grad=True)
    natrain.na2d_qkvpacked(qkv, 7, rpb=rpb, dropout_p=0.1, kernel="naive").sum().backward()
    problem = Problem(2, (14, 14), 4, 32, NAT, torch.float16, "cuda", (9, 0), has_rpb=True, needs_grad=True)
    assert launched == {spec.key() for spec in naive_specs.build_specs(problem, "sm_90a")}
    for cached in (naive._problem_kernel, naive._row_kernel, registry._choose_cached):
        cached.cache_clear()
