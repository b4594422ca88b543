"""The naive CUDA kernels against the float64 oracle, on the device: the whole grid, every dtype, every derivative.

Deterministic mode fills uninitialised memory with NaN, so that an element nobody wrote shows.
"""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch.autograd import forward_ad

import natrain
from natrain.ops import reference
from natrain.ops.problem import Window
from tests.ops import oracle
from tests.ops.grid import CHOSEN, Case, grid
from tests.ops.judge import requested_bytes

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_filled_memory")]

GRID = grid(40)
SMALL = [case for case in CHOSEN if math.prod(case.spatial) * case.heads * case.head_dim <= 800]
# What the sum of a few hundred rounded terms may add to twice the error of the same-dtype reference.
ATOL = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def _dot(out, lse, d_out, d_lse):
    return (out * d_out).sum() + (lse * d_lse).sum()


def _outputs(case: Case, dtype: torch.dtype, kernel: str = "naive"):
    """out, lse and the gradients of q, k, v (and rpb), a loss that reaches both outputs."""
    q, k, v, rpb = case.tensors(dtype, "cuda")
    out, lse = case.function()(q, k, v, **case.window, rpb=rpb, return_lse=True, kernel=kernel)
    d_out, d_lse = _cotangents(case, dtype)
    inputs = [x for x in (q, k, v, rpb) if x is not None]
    return [out, lse, *torch.autograd.grad((out, lse), inputs, (d_out, d_lse.to(lse.dtype)))]


def _cotangents(case: Case, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, *case.spatial, case.heads)
    d_out = torch.randn(*shape, case.head_dim, dtype=torch.float64, generator=generator)
    d_lse = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return d_out.to("cuda", dtype), d_lse.to("cuda", dtype)


def _truth(case: Case, dtype: torch.dtype):
    """The dense oracle in float64 on the numbers that ``dtype`` holds."""
    q, k, v, rpb = (
        None if x is None else x.detach().cpu().double().requires_grad_() for x in case.tensors(dtype, "cpu")
    )
    out, lse = oracle.dense_attention(q, k, v, rpb, case.window, case.head_dim**-0.5)
    d_out, d_lse = (x.cpu().double() for x in _cotangents(case, dtype))
    inputs = [x for x in (q, k, v, rpb) if x is not None]
    return [out, lse, *torch.autograd.grad((out, lse), inputs, (d_out, d_lse))]


def _same_dtype_reference(case: Case, dtype: torch.dtype):
    """The unfused composition in plain PyTorch: weights and gradients stored in ``dtype``, softmax in float32."""
    q, k, v, rpb = case.tensors(dtype, "cuda")
    window = Window(case.kernel_size, case.dilation, case.stride, case.is_causal)
    scores = reference.qk(q, k, rpb, window, case.head_dim**-0.5).float()
    lse = scores.logsumexp(-1)
    out = reference.av(scores.softmax(-1).to(dtype), v, window)
    d_out, d_lse = _cotangents(case, dtype)
    inputs = [x for x in (q, k, v, rpb) if x is not None]
    return [out, lse, *torch.autograd.grad((out, lse), inputs, (d_out, d_lse.to(lse.dtype)))]


def _names(case: Case):
    return ["out", "lse", "d_q", "d_k", "d_v", *(["d_rpb"] if case.has_rpb else [])]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_float64_agrees_with_the_oracle(case):
    for name, mine, truth in zip(_names(case), _outputs(case, torch.float64), _truth(case, torch.float64), strict=True):
        error = (mine.cpu() - truth).norm() / truth.norm()
        assert error <= 1e-12, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", GRID[::2], ids=str)
def test_error_is_at_most_twice_the_same_dtype_reference(case, dtype):
    """Largest error, and for gradients direction (cosine) and signed bias: outliers must not hide a drift."""
    everything = zip(
        _names(case), _outputs(case, dtype), _same_dtype_reference(case, dtype), _truth(case, dtype), strict=True
    )
    for name, mine, same, truth in everything:
        mine, same, truth = mine.cpu().double(), same.cpu().double(), truth.double()
        scale = truth.abs().max()
        error, allowed = (mine - truth).abs().max(), 2 * (same - truth).abs().max() + ATOL[dtype] * scale
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"
        cosine = torch.cosine_similarity(mine.flatten(), truth.flatten(), dim=0)
        assert cosine >= 1 - ATOL[dtype], f"{name}: cosine {cosine:.6f}"
        bias = (mine - truth).mean().abs() / truth.abs().mean()
        assert bias <= 2 * ((same - truth).mean().abs() / truth.abs().mean()) + ATOL[dtype], f"{name}: bias {bias:.1e}"


@pytest.mark.parametrize("case", CHOSEN[::3], ids=str)
def test_runs_repeat_bit_by_bit(case):
    first, second = _outputs(case, torch.float16), _outputs(case, torch.float16)
    for name, a, b in zip(_names(case), first, second, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_visible_weights_agree_with_the_loops(case):
    q, k, v, rpb = case.tensors(torch.float64, "cuda", requires_grad=False)
    scores = case.function("_qk")(q, k, **case.window, rpb=rpb, kernel="naive")
    expected = reference.qk(q, k, rpb, Window(**case.window), case.head_dim**-0.5)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
    probs = scores.softmax(-1)
    out = case.function("_av")(probs, v, **case.window, kernel="naive")
    torch.testing.assert_close(out, reference.av(probs, v, Window(**case.window)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", SMALL[:6], ids=str)
def test_second_derivatives_and_forward_mode(case):
    tensors = [x for x in case.tensors(torch.float64, "cuda") if x is not None]

    def attend(q, k, v, rpb=None):
        return case.function()(q, k, v, **case.window, rpb=rpb, return_lse=True, kernel="naive")

    assert torch.autograd.gradcheck(attend, tensors, check_forward_ad=True, fast_mode=True, nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(attend, tensors, fast_mode=True, nondet_tol=0.0)


def test_forward_mode_equals_the_reference():
    case = CHOSEN[10]
    q, k, v, rpb = case.tensors(torch.float64, "cuda", requires_grad=False)
    tangents = [torch.randn_like(x) for x in (q, k, v, rpb)]

    def tangent(kernel):
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(x, t) for x, t in zip((q, k, v, rpb), tangents, strict=True)]
            out = case.function()(*dual[:3], **case.window, rpb=dual[3], kernel=kernel)
            return forward_ad.unpack_dual(out).tangent

    torch.testing.assert_close(tangent("naive"), tangent("reference"), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("head_dim", [1, 3, 5, 20, 33, 40, 96, 128, 200, 256, 300])
def test_any_head_dim(head_dim):
    case = Case(2, (6, 9), 3, head_dim, (3, 5), (2, 1), (1, 1), (False, False), True)
    for mine, other in zip(_outputs(case, torch.float32), _outputs(case, torch.float32, "reference"), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel_size", [65, 257, 1023, 4099])
def test_long_windows(kernel_size):
    case = Case(1, (kernel_size + 13,), 1, 8, (kernel_size,), (1,), (1,), (False,), True)
    for mine, other in zip(_outputs(case, torch.float32), _outputs(case, torch.float32, "reference"), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_packed_projection_is_read_in_place(dtype):
    """One packed gradient, equal to the unpacked form's, and no copy of qkv: peak memory says so."""
    qkv = torch.randn(8, 28, 28, 3, 4, 32, device="cuda", dtype=dtype, requires_grad=True)
    d_out = torch.randn(8, 28, 28, 4, 32, device="cuda", dtype=dtype)
    (packed,) = torch.autograd.grad(natrain.na2d_qkvpacked(qkv, 7, kernel="naive"), qkv, d_out)
    q, k, v = (x.contiguous().detach().requires_grad_() for x in qkv.unbind(-3))
    unpacked = torch.autograd.grad(natrain.na2d(q, k, v, 7, kernel="naive"), (q, k, v), d_out)
    assert torch.equal(packed, torch.stack(unpacked, dim=-3))
    assert packed.is_contiguous()

    del packed, unpacked, q, k, v
    with torch.no_grad():
        natrain.na2d_qkvpacked(qkv, 7, kernel="naive")
        before = requested_bytes("current")
        torch.cuda.reset_peak_memory_stats()
        natrain.na2d_qkvpacked(qkv, 7, kernel="naive")
    pitch = -(-49 * dtype.itemsize // 16) * 16
    rows = 8 * 28 * 28 * 4
    needed = rows * (32 * dtype.itemsize + pitch + 4)
    assert requested_bytes("peak") - before <= needed + 2**16


def test_strided_and_expanded_tensors():
    """Transposed heads, a sliced channel and an expanded output gradient: layouts that no kernel may assume away."""
    base = torch.randn(2, 3, 10, 11, 41, device="cuda", dtype=torch.float32)
    q, k, v = (base[..., i : i + 33].movedim(1, 3).detach().requires_grad_() for i in (0, 3, 8))
    assert not q.is_contiguous()
    for kernel in ("naive", "reference"):
        grads = torch.autograd.grad(natrain.na2d(q, k, v, 5, 2, kernel=kernel).sum(), (q, k, v))
        if kernel == "naive":
            mine = grads
    for a, b in zip(mine, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CHOSEN[::4], ids=str)
def test_dropout_draws_the_documented_mask(case):
    results = []
    for kernel in ("naive", "reference"):
        torch.manual_seed(5)
        q, k, v, rpb = case.tensors(torch.float64, "cuda")
        out, lse = case.function()(q, k, v, **case.window, rpb=rpb, dropout_p=0.3, return_lse=True, kernel=kernel)
        inputs = [x for x in (q, k, v, rpb) if x is not None]
        results.append([out, lse, *torch.autograd.grad((out, lse), inputs, _cotangents(case, torch.float64))])
    for name, mine, other in zip(_names(case), *results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_nan_reaches_only_queries_whose_window_holds_it():
    q, k, v = (torch.randn(2, 12, 12, 2, 32, device="cuda", dtype=torch.float16) for _ in range(3))
    k[0, 3, 4, 1] = math.nan
    v[1, 7, 8, 0] = math.inf
    mine, other = (natrain.na2d(q, k, v, 3, 2, kernel=kernel) for kernel in ("naive", "reference"))
    assert torch.equal(mine.isfinite(), other.isfinite())


def test_infinite_scores_are_those_of_the_reference():
    q, k, v = (torch.randn(1, 12, 2, 8, device="cuda") for _ in range(3))
    q[0, 3, 0, 0], q[0, 9, 1, 0] = 3e38, -3e38  # times the scale: infinite, of the sign of each key
    results = [natrain.na1d(q, k, v, 3, scale=10.0, return_lse=True, kernel=name) for name in ("naive", "reference")]
    for mine, other in zip(*results, strict=True):
        assert not other.isfinite().all()
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_many_heads_and_empty_batch():
    """Beyond 65,535 batch * heads, where a grid's second axis would end; and nothing at all."""
    q, k, v = (torch.randn(4500, 7, 15, 8, device="cuda") for _ in range(3))
    mine = natrain.na1d(q, k, v, 3, kernel="naive")
    torch.testing.assert_close(mine, natrain.na1d(q, k, v, 3, kernel="reference"), rtol=1e-5, atol=1e-5)
    empty = torch.empty(0, 7, 7, 2, 32, device="cuda", requires_grad=True)
    rpb = torch.randn(2, 5, 5, device="cuda", requires_grad=True)
    out = natrain.na2d(empty, empty, empty, 3, rpb=rpb, kernel="naive")
    d_empty, d_rpb = torch.autograd.grad(out.sum(), (empty, rpb))
    assert d_empty.shape == empty.shape and not d_rpb.any()


@pytest.mark.slow
def test_beyond_two_to_the_31_elements():
    """One image of 2^31 and more elements (64-bit offsets inside an image), judged on its far end."""
    length, heads, head_dim = 2**19 + 37, 64, 65
    assert length * heads * head_dim > 2**31
    q = torch.randn(1, length, heads, head_dim, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        out = natrain.na1d(q, q, q, 5, kernel="naive")
        tail = q[:, -64:]
        expected = natrain.na1d(tail, tail, tail, 5, kernel="reference")
    torch.testing.assert_close(out[:, -32:], expected[:, -32:], rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    q = torch.randn(1, 9, 9, 2, 32, device="cuda:1", requires_grad=True)
    out = natrain.na2d(q, q, q, 3, kernel="naive")
    torch.testing.assert_close(out, natrain.na2d(q, q, q, 3, kernel="reference"))
    out.sum().backward()
    assert q.grad.isfinite().all()


def test_a_fresh_thread_has_no_context_of_its_own():
    q = torch.randn(1, 9, 9, 2, 32, device="cuda")
    results = []
    thread = threading.Thread(target=lambda: results.append(natrain.na2d(q, q, q, 3, kernel="naive")))
    thread.start()
    thread.join()
    assert torch.equal(results[0], natrain.na2d(q, q, q, 3, kernel="naive"))


def test_compiles_into_one_graph():
    case = CHOSEN[8]
    q, k, v, rpb = case.tensors(torch.float32, "cuda")

    def loss(q, k, v, rpb):
        return case.function()(q, k, v, **case.window, rpb=rpb, kernel="naive").square().sum()

    eager = torch.autograd.grad(loss(q, k, v, rpb), (q, k, v, rpb))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k, v, rpb), (q, k, v, rpb))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_replays_in_a_cuda_graph():
    qkv = torch.randn(2, 14, 14, 3, 4, 32, device="cuda", dtype=torch.float16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        natrain.na2d_qkvpacked(qkv, 7, kernel="naive")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = natrain.na2d_qkvpacked(qkv, 7, kernel="naive")
    qkv.normal_()
    graph.replay()
    assert torch.equal(out, natrain.na2d_qkvpacked(qkv, 7, kernel="naive"))


def test_the_named_kernel_is_the_one_that_runs():
    qkv = torch.randn(2, 14, 14, 3, 4, 32, device="cuda", requires_grad=True)
    rpb = torch.randn(4, 13, 13, device="cuda", requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        natrain.na2d_qkvpacked(qkv, 7, rpb=rpb, kernel="naive").sum().backward()
        torch.cuda.synchronize()
    names = {event.key for event in profile.key_averages()}
    for primitive in ("qk", "softmax", "av", "inverse", "softmax_grad", "rpb_grad"):
        assert f"natrain_naive_{primitive}" in names
