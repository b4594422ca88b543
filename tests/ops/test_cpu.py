"""The cpu kernel against the reference in float64: every gradient, layout, dtype, instruction set and thread count."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch

import natrain
from natrain.jit import cache, host, source_root
from natrain.ops import cpu
from tests.ops.grid import CHOSEN, FEATURES, Case, grid
from tests.ops.test_cpu_headers import levels

pytestmark = pytest.mark.skipif(host.find_compiler() is None, reason=f"no C++ compiler: {host.REMEDY}")

OUTPUTS = ("out", "lse", "d_q", "d_k", "d_v", "d_rpb")
SLABBED = Case(1, (90, 9), 1, 8, (7, 3), (1, 1), (1, 1), (False, False), True)
LONG = Case(1, (90,), 2, 8, (37,), (1,), (1,), (False,), True)
SEQUENCE = Case(1, (500,), 1, 16, (9,), (2,), (1,), (False,), True)
VOLUME = Case(1, (40, 5, 6), 1, 8, (3, 3, 3), (1, 1, 2), (2, 1, 1), (True, False, False), True)
# Every window is its whole dilation group; with stride or causal along axes where that changes nothing.
DENSE = Case(2, (14, 6), 3, 20, (7, 3), (2, 2), (1, 1), (False, False), True)
DENSE_VOLUME = Case(1, (4, 3, 8), 2, 24, (2, 3, 4), (2, 1, 2), (2, 1, 3), (False, False, False), True)
DENSE_SEQUENCE = Case(1, (320,), 2, 8, (32,), (10,), (1,), (False,), False)


@pytest.fixture
def threads():
    """Sets torch's thread count for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def solve(case: Case, kernel: str, dtype=torch.float64, *, requires_grad=True, **options) -> list[torch.Tensor]:
    """out, lse and the gradients of one scalar that both enter, on the case's own numbers."""
    q, k, v, rpb = case.tensors(dtype=dtype)
    out, lse = case.function()(q, k, v, **case.window, rpb=rpb, return_lse=True, kernel=kernel, **options)
    generator = torch.Generator().manual_seed(1)
    leaves = [q, k, v] + ([rpb] if rpb is not None else [])
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype) for x in (out, lse)]
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, weights)]


@functools.cache
def truth(case: Case) -> list[torch.Tensor]:
    return solve(case, "reference")


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    "case", [*grid(60), SLABBED, LONG, SEQUENCE, VOLUME, DENSE, DENSE_VOLUME, DENSE_SEQUENCE], ids=str
)
def test_forward_and_every_gradient(case):
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 5e-6)):
        for name, got, expected in zip(OUTPUTS, solve(case, "cpu", dtype), truth(case), strict=False):
            assert relative_error(got, expected) <= tolerance, (name, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CHOSEN[7:12], *grid(8)[-8:], DENSE], ids=str)
def test_error_is_within_twice_the_references_in_the_same_dtype(case, dtype):
    """bf16 and fp16 accumulate in float32, so that only inputs, rpb and results round."""
    expected = truth(case)
    same = solve(case, "reference", dtype)
    for name, got, reference, exact in zip(OUTPUTS, solve(case, "cpu", dtype), same, expected, strict=False):
        assert got.dtype == reference.dtype
        allowed = 2 * relative_error(reference, exact) + 4 * torch.finfo(got.dtype).eps
        assert relative_error(got, exact) <= allowed, name


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_instruction_set(level, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "_library", lambda dtype: host.load(cpu.build_spec(dtype, level)))
    tolerance = {torch.float32: 5e-6, torch.float64: 1e-13, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    for case in (CHOSEN[8], CHOSEN[13], CHOSEN[18], LONG, SEQUENCE, DENSE):
        for name, got, expected in zip(OUTPUTS, solve(case, "cpu", dtype), truth(case), strict=False):
            assert relative_error(got, expected) <= tolerance, (case, name)


@pytest.mark.parametrize("case", [case for case in FEATURES if not case.has_key_mask], ids=str)
def test_fewer_heads_of_k_and_v_and_another_value_dim(case):
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 5e-6)):
        for name, got, expected in zip(OUTPUTS, solve(case, "cpu", dtype), truth(case), strict=False):
            assert relative_error(got, expected) <= tolerance, (name, dtype)


def test_a_derivative_it_lacks_is_refused_with_a_kernel_of_processors():
    q = torch.randn(1, 9, 2, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(natrain.na1d(q, q, q, 3, kernel="cpu").square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match='kernel="cpu" has no double backward. Try: kernel="reference"$'):
        grad.sum().backward()


def test_what_it_lacks_is_refused_with_the_reason():
    q, k = torch.randn(1, 9, 4, 8), torch.randn(1, 9, 2, 8)
    with pytest.raises(ValueError, match="no dropout_p where k and v have fewer heads"):
        natrain.na1d(q, k, k, 3, dropout_p=0.1, kernel="cpu")
    with pytest.raises(ValueError, match="no key_mask"):
        natrain.na1d(q, q, q, 3, key_mask=torch.ones(1, 9, dtype=torch.bool), kernel="cpu")


def test_gradcheck():
    case = Case(1, (5, 6), 2, 3, (3, 2), (1, 2), (1, 2), (False, True), True)
    q, k, v, rpb = case.tensors()
    torch.autograd.gradcheck(
        lambda q, k, v, rpb: natrain.na2d(q, k, v, **case.window, rpb=rpb, return_lse=True, kernel="cpu"),
        (q, k, v, rpb),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_and_strided_inputs_are_read_in_place(dtype):
    """A slice of a wider projection, a transposed batch, an expanded gradient: bitwise what contiguous copies give."""
    wide = torch.randn(9, 2, 8, 3, 4, 40, dtype=dtype).transpose(0, 1)
    qkv = wide[..., 8:32].detach().requires_grad_()
    rpb = torch.randn(4, 9, 5)
    grown = torch.randn(1, dtype=dtype).expand(2, 9, 8, 4, 24)
    packed = natrain.na2d_qkvpacked(qkv, (5, 3), rpb=rpb, kernel="cpu")
    (d_qkv,) = torch.autograd.grad(packed, qkv, grown)
    q, k, v = (x.contiguous().detach().requires_grad_() for x in qkv.unbind(-3))
    out = natrain.na2d(q, k, v, (5, 3), rpb=rpb, kernel="cpu")
    assert torch.equal(packed, out)
    expected = torch.autograd.grad(out, (q, k, v), grown.contiguous())
    assert torch.equal(d_qkv, torch.stack(expected, dim=-3))


@pytest.mark.parametrize("case", [CHOSEN[4], CHOSEN[10], CHOSEN[13], CHOSEN[18], VOLUME, DENSE_VOLUME], ids=str)
def test_dropout_draws_the_references_mask(case):
    results = []
    for kernel in ("cpu", "reference"):
        torch.manual_seed(3)
        results.append(solve(case, kernel, dropout_p=0.3))
    for name, got, expected in zip(OUTPUTS, *results, strict=False):
        assert relative_error(got, expected) <= 1e-13, name
    assert relative_error(results[0][0], truth(case)[0]) > 1e-3


@pytest.mark.parametrize("case", [CHOSEN[9], CHOSEN[13], SLABBED, SEQUENCE, VOLUME, DENSE], ids=str)
def test_results_do_not_depend_on_the_threads(case, threads):
    results = []
    for count in (1, 2, 7):
        threads(count)
        results.append(solve(case, "cpu", torch.float32))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "d_out"])
@pytest.mark.parametrize("case", [CHOSEN[10], CHOSEN[13], CHOSEN[17], SLABBED, SEQUENCE, DENSE], ids=str)
def test_what_is_not_finite_stays_inside_its_windows(case, which, bad):
    """Exactly the elements that are finite in the reference are finite here, and those are right."""
    results = []
    for kernel in ("cpu", "reference"):
        q, k, v, rpb = case.tensors()
        d_out = torch.ones_like(q)
        tensors = [q, k, v, d_out]
        with torch.no_grad():
            tensors[which].view(-1)[tensors[which].numel() // 3] = bad
        out = case.function()(q, k, v, **case.window, kernel=kernel)
        results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), d_out)])
    for name, got, expected in zip(("out", "d_q", "d_k", "d_v"), *results, strict=True):
        finite = expected.isfinite()
        assert torch.equal(got.isfinite(), finite), name
        assert finite.any(), name
        torch.testing.assert_close(got[finite], expected[finite], rtol=1e-10, atol=1e-12)


def test_empty_problems():
    for shape in ((0, 4, 4, 2, 8), (1, 4, 4, 0, 8), (1, 4, 4, 2, 0)):
        q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
        out = natrain.na2d(q, k, v, 3, kernel="cpu")
        assert out.shape == shape
        out.sum().backward()
        assert q.grad.shape == shape


def test_values_without_keys_get_a_gradient():
    """With nothing to compare, every neighbour counts the same."""
    q, v = torch.randn(1, 6, 1, 0), torch.randn(1, 6, 1, 4)
    grads = []
    for kernel in ("cpu", "reference"):
        leaf = v.clone().requires_grad_()
        natrain.na1d(q, q, leaf, 3, kernel=kernel).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_out_may_be_changed_in_place_however_often_its_problem_came_before(kv_heads):
    """Autograd refuses that to a view that is one of several results."""
    q, k = torch.randn(1, 8, 8, 2, 16, requires_grad=True), torch.randn(1, 8, 8, kv_heads, 16)
    for kernel in ("cpu", "auto"):  # calls that look different, of one problem
        natrain.na2d(q, k, k, 3, kernel=kernel).mul_(2)


def test_no_attention_tensor_is_stored():
    """Forward and backward together raise the process's peak memory by far less than one [B, *S, N, K] tensor."""
    code = """
import resource, sys, torch, natrain
torch.set_num_threads(2)
natrain.na2d(*[torch.randn(1, 13, 13, 1, 8, requires_grad=True) for _ in range(3)], 13, kernel="cpu").sum().backward()
qkv = torch.randn(1, 160, 160, 3, 4, 8, requires_grad=True)
out = torch.randn(1, 160, 160, 4, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
natrain.na2d_qkvpacked(qkv, 13, kernel="cpu").backward(out)
grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
attention_bytes = 160 * 160 * 4 * 169 * 4
assert grown_bytes < attention_bytes / 3, (grown_bytes, attention_bytes)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_scratch_memory_that_runs_out_raises():
    """Rows of one component are padded to whole vectors: scratch is many times the size of the tensors."""
    code = """
import resource, torch, natrain
torch.set_num_threads(2)
small, large = torch.randn(1, 16, 16, 1, 1), torch.randn(1, 1400, 1400, 1, 1)
expected = natrain.na2d(small, small, small, 5, kernel="cpu")
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
used_bytes = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used_bytes + (100 << 20), hard))
for _ in range(2):
    try:
        natrain.na2d(large, large, large, 1399, kernel="cpu")
    except MemoryError as error:
        assert "1400x1400" in str(error) and "fewer threads" in str(error), error
    else:
        raise AssertionError("no error")
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
assert torch.equal(natrain.na2d(small, small, small, 5, kernel="cpu"), expected)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_auto_prefers_it_and_falls_back_with_one_sentence(monkeypatch, caplog, tmp_path):
    q = torch.randn(1, 8, 8, 2, 8)
    assert natrain.explain(q, q, q, kernel_size=3).chosen == "cpu"
    monkeypatch.setenv("NATRAIN_CXX", "/no/such/compiler")
    monkeypatch.setenv("NATRAIN_CACHE", str(tmp_path / "cache"))
    cpu._reasons.cache_clear()
    with caplog.at_level(logging.WARNING, logger="natrain"):
        for _ in range(3):
            explanation = natrain.explain(q, q, q, kernel_size=3)
    cpu._reasons.cache_clear()
    assert explanation.chosen == "reference"
    assert [r for r in caplog.messages if "install a C++ compiler" in r] == [caplog.messages[0]]
    assert "NATRAIN_CXX='/no/such/compiler' is no program" in " ".join(explanation.reasons["cpu"])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NATRAIN_CACHE", str(tmp_path / "file"))
    assert natrain.explain(q, q, q, kernel_size=3).chosen == "reference"
    cpu._reasons.cache_clear()


def compile_driver(program, compiler: str, flags: Sequence[str], real: str) -> subprocess.CompletedProcess:
    """tests/ops/cpu_sanitize.cpp, forward and backward over a small grid."""
    source = os.path.join(os.path.dirname(__file__), "cpu_sanitize.cpp")
    includes = [f"-I{source_root() / 'cpu'}", f"-I{source_root() / 'include'}", f"-DNATRAIN_REAL={real}"]
    command = [compiler, *flags, "-std=c++17", "-fopenmp", *includes, source, "-o", str(program)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("real", ["float", "double"])
@pytest.mark.parametrize("level", levels())
def test_sanitizers_find_nothing(real, level, tmp_path):
    """AddressSanitizer and UndefinedBehaviorSanitizer over a small grid, whose results are right."""
    program = tmp_path / "sanitize"
    flags = [*host.LEVELS[level], "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compiled = compile_driver(program, host.find_compiler(), flags, real)
    if "cannot find" in compiled.stderr and "san" in compiled.stderr:
        pytest.skip("the compiler has no sanitizer libraries")
    assert compiled.returncode == 0, compiled.stderr
    # The OpenMP runtime keeps its threads for the next region; they are no leak of ours.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run([str(program)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and result.stdout == "clean\n", result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("real", ["float", "double"])
def test_arm(real, tmp_path):
    """The same grid in 64-bit Arm's instructions, by a cross compiler and an emulator of user programs."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (apt install g++-aarch64-linux-gnu qemu-user)")
    program = tmp_path / "arm"
    compiled = compile_driver(program, compiler, ["-O2", "-static", "-Wall", "-Wextra", "-Werror"], real)
    assert compiled.returncode == 0, compiled.stderr
    result = subprocess.run([emulator, str(program)], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "clean\n", result.stdout + result.stderr


def test_the_cache_lists_it(monkeypatch):
    solve(CHOSEN[7], "cpu", torch.float32)
    assert any(entry["name"].startswith("cpu-float-") for entry in cache.entries())
