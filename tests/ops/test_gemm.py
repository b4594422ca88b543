"""The gemm CUDA kernels against the float64 oracle, on the device: the grid, dtypes, precisions, every derivative.

Deterministic mode fills uninitialised memory with NaN, so that an element nobody wrote shows.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import natrain
from natrain.ops import reference
from natrain.ops.problem import Window
from tests.ops import judge
from tests.ops.grid import CHOSEN, Case, grid
from tests.ops.judge import ATOL, Inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_filled_memory")]

GRID = grid(40)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAT = Case(2, (20, 27), 2, 32, (7, 7), (1, 1), (1, 1), (False, False), True)


def check(case: Case, dtype: torch.dtype, atol: float | None = None, **variant) -> None:
    """All outputs and gradients of one problem by the rule of ``judge``."""
    inputs = Inputs.draw(case, dtype, **variant)
    mine = judge.outputs(case, inputs, "gemm")
    exact = judge.truth(case, inputs)
    judge.judge(inputs.names, mine, judge.same_dtype(case, inputs), exact, ATOL[dtype] if atol is None else atol)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", [NAT, *GRID[::2]], ids=str)
def test_error_is_at_most_twice_the_same_dtype_composition(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("case", [NAT, *GRID[::4]], ids=str)
def test_tf32_where_torch_allows_it(case, tf32):
    judge.check_tf32(case, "gemm")


def test_float32_is_not_tf32_where_torch_forbids_it():
    inputs = Inputs.draw(NAT, torch.float32)
    exact = judge.truth(NAT, inputs)
    before = torch.get_float32_matmul_precision()
    errors = {}
    for precision in ("high", "highest"):
        torch.set_float32_matmul_precision(precision)
        mine = judge.outputs(NAT, inputs, "gemm")
        errors[precision] = max(((x.cpu() - z).norm() / z.norm()).item() for x, z in zip(mine, exact, strict=True))
    torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 2e-6 and errors["high"] > 1e-5, errors


@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 72, 96, 128, 200, 256])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_head_dim(head_dim, dtype):
    check(Case(2, (9, 14), 2, head_dim, (3, 5), (2, 1), (1, 1), (False, False), True), dtype)


@pytest.mark.parametrize("variant", [{"value_dim": 64}, {"value_dim": 8}], ids=str)
def test_value_dims_of_their_own(variant):
    check(Case(2, (9, 14), 4, 32, (3, 5), (2, 1), (1, 1), (False, False), True), torch.float16, **variant)


@pytest.mark.parametrize(
    ("spatial", "kernel_size"),
    [((300,), 65), ((700,), 257), ((1300,), 1023), ((70, 40), 31), ((70, 66), 63), ((17, 18, 19), 11)],
    ids=str,
)
def test_large_windows(spatial, kernel_size):
    rank = len(spatial)
    case = Case(1, spatial, 1, 64, (kernel_size,) * rank, (1,) * rank, (1,) * rank, (False,) * rank, False)
    inputs = Inputs.draw(case, torch.float16)
    exact = judge.outputs(case, inputs.to(torch.float32, "cuda"), "naive")
    for name, x, z in zip(inputs.names, judge.outputs(case, inputs, "gemm"), exact, strict=True):
        assert (x.float() - z).norm() <= 2e-3 * z.norm(), name


@pytest.mark.parametrize("case", CHOSEN[::3], ids=str)
def test_runs_repeat_bit_by_bit(case):
    inputs = Inputs.draw(case, torch.float16)
    for name, a, b in zip(inputs.names, *(judge.outputs(case, inputs, "gemm") for _ in range(2)), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("case", CHOSEN[::2], ids=str)
def test_visible_weights_agree_with_the_reference(case):
    q, k, v, rpb = case.tensors(torch.float32, "cuda", requires_grad=False)
    window = Window(**case.window)
    scores = case.function("_qk")(q, k, **case.window, rpb=rpb, kernel="gemm")
    torch.testing.assert_close(scores, reference.qk(q, k, rpb, window, case.head_dim**-0.5), rtol=1e-5, atol=1e-5)
    probs = scores.softmax(-1)
    out = case.function("_av")(probs, v, **case.window, kernel="gemm")
    torch.testing.assert_close(out, reference.av(probs, v, window), rtol=1e-5, atol=1e-5)


def test_second_derivatives_and_forward_mode():
    case = CHOSEN[10]
    q, k, v, rpb = (x.detach() for x in case.tensors(torch.float32, "cuda"))
    tangents = [torch.randn_like(x) for x in (q, k, v, rpb)]

    def derivatives(kernel):
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(x, t) for x, t in zip((q, k, v, rpb), tangents, strict=True)]
            out = case.function()(*dual[:3], **case.window, rpb=dual[3], kernel=kernel)
            forward = forward_ad.unpack_dual(out).tangent
        leaves = [x.clone().requires_grad_() for x in (q, k, v, rpb)]
        out = case.function()(*leaves[:3], **case.window, rpb=leaves[3], kernel=kernel)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return [forward, *torch.autograd.grad(sum(x.square().sum() for x in first), leaves)]

    for mine, other in zip(derivatives("gemm"), derivatives("reference"), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def test_packed_and_misaligned_tensors():
    """Packed rows are read in place; rows that no 16-byte access fits go to naive's kernels."""
    qkv = torch.randn(2, 14, 14, 3, 4, 33, device="cuda", dtype=torch.float16)
    for part in (qkv[..., :32], qkv[..., 1:], qkv[..., :32].contiguous()):
        q, k, v = (x.detach().requires_grad_() for x in part.unbind(-3))
        results = []
        for kernel in ("gemm", "naive"):
            out = natrain.na2d(q, k, v, 7, kernel=kernel)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
        for mine, other in zip(*results, strict=True):
            assert (mine - other).float().norm() <= 3e-3 * other.float().norm()


def test_many_heads_and_empty_batch():
    """Beyond 65,535 batch * heads, where a grid's second axis would end; and nothing at all."""
    check(Case(4500, (7,), 15, 8, (3,), (1,), (1,), (False,), False), torch.float16)
    empty = torch.empty(0, 7, 7, 2, 32, device="cuda", requires_grad=True)
    out = natrain.na2d(empty, empty, empty, 3, kernel="gemm")
    assert torch.autograd.grad(out.sum(), empty)[0].shape == empty.shape


@pytest.mark.parametrize("kernel_size", [7, 13])
def test_the_named_kernel_is_the_one_that_runs(kernel_size):
    """And the softmax has a kernel of its own where rows of weights are long alone."""
    qkv = torch.randn(2, 14, 14, 3, 4, 32, device="cuda", dtype=torch.float16, requires_grad=True)
    rpb = torch.randn(4, 2 * kernel_size - 1, 2 * kernel_size - 1, device="cuda", requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        natrain.na2d_qkvpacked(qkv, kernel_size, rpb=rpb, kernel="gemm").sum().backward()
        torch.cuda.synchronize()
    names = {event.key for event in profile.key_averages()}
    assert {f"natrain_{name}" for name in ("gemm_qk", "gemm_av", "gemm_inverse", "naive_rpb_grad")} <= names
    softmax = {"natrain_naive_softmax", "natrain_naive_softmax_grad"}
    assert softmax & names == (softmax if kernel_size == 13 else set())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_nan_reaches_only_rows_whose_window_holds_it(dtype):
    """Forward and backward, as the reference has it, though a tile multiplies every column by every row."""
    q, k, v = (torch.randn(2, 12, 12, 2, 32, device="cuda", dtype=dtype) for _ in range(3))
    k[0, 3, 4, 1], v[1, 7, 8, 0], q[1, 2, 2, 1] = float("nan"), float("inf"), float("nan")
    results = []
    for kernel in ("gemm", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = natrain.na2d(*leaves, 3, 2, kernel=kernel)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for mine, other in zip(*results, strict=True):
        assert not other.isfinite().all() and torch.equal(mine.isfinite(), other.isfinite())
