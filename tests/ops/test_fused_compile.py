"""Without a GPU: the fused kernels compile for the oldest and the newest architecture that is measured, with every
feature, and the common ones spill no register."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from natrain.jit import cuda
from natrain.jit.build import build
from natrain.ops import fused
from natrain.ops.precision import tf32_products
from natrain.ops.problem import Problem, Window
from natrain.ops.registry import get_kernel
from tests.emulator.fixture import emulated
from tests.ops import judge
from tests.ops.grid import Case
from tests.ops.judge import Inputs

pytestmark = pytest.mark.usefixtures("own_cache")
NAT = Window((7, 7), (1, 1), (1, 1), (False, False))
CAUSAL_3D = Window((5, 7, 7), (1, 1, 1), (1, 2, 1), (True, False, False))
STAGES = {  # NAT-Tiny at 224 pixels, and DiNAT's first layer
    "56": ((56, 56), 2, 1),
    "28": ((28, 28), 4, 1),
    "14": ((14, 14), 8, 1),
    "7": ((7, 7), 16, 1),
    "56 dilated": ((56, 56), 2, 8),
}


def problem_of(spatial, heads, dilation=1, dtype=torch.bfloat16, head_dim=32, window=NAT, **more) -> Problem:
    window = replace(window, dilation=(dilation,) * len(spatial))
    more = {"has_rpb": True, "needs_grad": True, **more}
    return Problem(128, spatial, heads, head_dim, window, dtype, "cuda", (9, 0), **more)


@pytest.fixture(autouse=True)
def planned_for_an_h100(monkeypatch):
    monkeypatch.setattr(fused, "device_ahead", fused.Device)


def specs(problem: Problem, arch: str):
    return get_kernel("fused").build_specs(problem, arch)


# A compile costs seconds of a small machine: a representative set there, everything where there is a GPU.
@pytest.mark.parametrize(
    ("compiler", "arch"),
    [
        ("nvcc", "sm_80"),
        ("nvrtc", "sm_90a"),
        pytest.param("nvrtc", "sm_80", marks=pytest.mark.gpu),
        pytest.param("nvcc", "sm_90a", marks=pytest.mark.gpu),
    ],
    indirect=["compiler"],
)
def test_a_training_step_compiles_ahead_without_a_gpu(arch, compiler):
    built = [build(spec) for spec in specs(problem_of((14, 14), 8), arch)]
    for entry, cubin in zip(("forward", "backward_q", "backward_kv"), built, strict=True):
        assert f"natrain_fused_{entry}".encode() in cubin.read_bytes()


FEATURES = [
    problem_of((14, 14), 4, dtype=torch.float16, kv_heads=2, value_dim=64, has_key_mask=True, has_dropout=True),
    problem_of((14, 14), 4, dtype=torch.float32, head_dim=40, has_dropout=True),
    problem_of((300,), 2, window=Window((255,), (1,), (3,), (True,))),
    problem_of((12, 16, 16), 2, dtype=torch.float32, window=CAUSAL_3D),
    problem_of((28, 28), 1, head_dim=256),
    problem_of((28, 28), 1, dtype=torch.float32, head_dim=256, has_rpb=False),
    problem_of((1024, 1024), 64, head_dim=128),  # offsets beyond 2^31 elements
]


@pytest.mark.parametrize(
    "problem", [FEATURES[0], *(pytest.param(p, marks=pytest.mark.gpu) for p in FEATURES[1:])], ids=str
)
def test_every_feature_compiles(problem):
    cuda.build_all(specs(problem, "sm_80"))


@pytest.mark.parametrize(
    "stage", ["56", "28", "7", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("14", "56 dilated"))]
)
def test_the_common_kernels_spill_nothing(stage, ptxas_report):
    for spec in specs(problem_of(*STAGES[stage]), "sm_90a"):
        assert re.search(r"(\d+) bytes spill stores", ptxas_report(spec))[1] == "0", spec.name


def test_four_blocks_of_a_long_window_share_a_multiprocessor(ptxas_report):
    """backward_q with a bias over 4,096 tokens: a register more than 168 would leave room for three."""
    window = Window((127,), (1,), (1,), (False,))
    found = [s for s in specs(problem_of((4096,), 8, window=window, head_dim=64), "sm_90a") if s.name.endswith("_q")]
    assert len(found) == 1 and ("NATRAIN_WARPS_X", "3") in found[0].defines
    assert int(re.search(r"Used (\d+) registers", ptxas_report(found[0]))[1]) <= 168


def test_a_wide_gradient_is_two_launches():
    entries = [spec.name for spec in specs(problem_of((28, 28), 1, head_dim=256), "sm_90a")]
    assert entries.count("natrain_fused_backward_kv") == 2


def test_what_is_compiled_ahead_is_what_a_step_launches(monkeypatch):
    """The launches of a forward and a backward, recorded instead of run."""
    launched = set()

    class Recorder:
        def launch(self, grid, threads, arguments, device, shared_bytes, overlaps):
            assert grid > 0 and threads % 32 == 0 and shared_bytes > 0

    def load(source, name, defines, device):
        launched.add(cuda.kernel_spec(source, name, defines, "sm_90a").key())
        return Recorder()

    fused._load.cache_clear()
    monkeypatch.setattr(fused, "_launches", {})
    case = Case(2, (14, 14), 4, 32, (7, 7), (1, 1), (1, 1), (False, False), True)
    inputs = Inputs.draw(case, torch.float16, "cpu")
    with emulated(get_kernel("fused")):
        monkeypatch.setattr(cuda, "load", load)
        judge.outputs(case, inputs, "fused")
    fused._load.cache_clear()
    problem = replace(problem_of((14, 14), 4, dtype=torch.float16), batch=2)
    assert launched == {spec.key() for spec in specs(problem, "sm_90a")}


@pytest.mark.parametrize("head_dim, overlaps", [(32, [False, False, True]), (256, [False, False, True, True])])
def test_only_what_awaits_the_kernel_before_may_start_early(head_dim, overlaps, monkeypatch):
    """Of forward, backward_q and backward_kv the last: its source waits, the others' do not."""
    seen = []

    class Recorder:
        def __init__(self, source):
            self.source = source

        def launch(self, grid, threads, arguments, device, shared_bytes, overlaps):
            seen.append((self.source, overlaps))

    monkeypatch.setattr(fused, "can_overlap", lambda device: True)
    monkeypatch.setattr(fused, "_launches", {})
    fused._load.cache_clear()
    case = Case(1, (7, 7), 1, head_dim, (7, 7), (1, 1), (1, 1), (False, False), True)
    inputs = Inputs.draw(case, torch.float16, "cpu")
    with emulated(get_kernel("fused")):
        monkeypatch.setattr(cuda, "load", lambda source, *_: Recorder(source))
        judge.outputs(case, inputs, "fused")
    fused._load.cache_clear()
    assert [early for _, early in seen] == overlaps
    for source, early in seen:
        assert early == ("await_previous_kernel();" in (cuda.source_root() / source).read_text())


def test_reasons_against_a_problem():
    kernel = get_kernel("fused")
    problem = problem_of((14, 14), 2)
    assert "float64" in "; ".join(kernel.unsupported_reasons(replace(problem, dtype=torch.float64)))
    assert kernel.unsupported_reasons(replace(problem, head_dim=30, value_dim=30)) == [
        "head_dim 30 (a multiple of 8)",
    ]
    assert "capability (7, 5) (needs (8, 0) or newer)" in kernel.unsupported_reasons(
        replace(problem, capability=(7, 5))
    )
    large = problem_of((64, 64, 64), 8, window=Window((15, 15, 15), (1, 1, 1), (1, 1, 1), (False, False, False)))
    assert any("bias gradient" in reason for reason in kernel.unsupported_reasons(large))
    assert not kernel.unsupported_reasons(replace(large, has_rpb=False))


def test_backward_of_a_wide_head_spills_nothing(ptxas_report, monkeypatch):
    """Head dim 128, short window, one dimension, whose loops over pieces of rows are the longest; in two passes."""
    window = Window((3,), (1,), (1,), (False,))
    problem = Problem(4, (7470,), 12, 128, window, torch.float16, "cuda", (9, 0), needs_grad=True)
    monkeypatch.setattr(fused, "one_pass_plan", lambda problem, device: None)
    backward = [spec for spec in specs(problem, "sm_90a") if "backward" in spec.name]
    assert len(backward) == 2
    for spec in backward:
        assert re.search(r"(\d+) bytes spill stores", ptxas_report(spec))[1] == "0", spec.name


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0), (torch.float32, 64)])
def test_backward_in_one_pass_spills_little(dtype, most, ptxas_report):
    """Of head dim 64, where the offsets of five tensors, if kept, left too few registers."""
    window = Window((5,), (1,), (1,), (False,))
    problem = Problem(51, (5066,), 8, 64, window, dtype, "cuda", (9, 0), needs_grad=True)
    with tf32_products(True):
        (spec,) = [spec for spec in specs(problem, "sm_90a") if "backward" in spec.name]
    assert int(re.search(r"(\d+) bytes spill stores", ptxas_report(spec))[1]) <= most
