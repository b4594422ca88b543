"""The reference kernel against a dense masked softmax in float64 and against loops that follow the definition."""

from __future__ import annotations

import math

import pytest
import torch

import natrain
from natrain.ops import reference
from tests.ops import oracle
from tests.ops.grid import CHOSEN, FEATURES, grid

REFERENCE = {"kernel": "reference"}


def _close(actual, expected, rtol=1e-11):
    scale = expected.abs().max().clamp(min=1e-30)
    assert torch.isfinite(actual).all()
    assert ((actual - expected).abs().max() / scale) < rtol


@pytest.mark.parametrize("case", grid(count=60) + FEATURES, ids=str)
def test_forward_lse_and_gradients_equal_the_dense_softmax(case):
    q, k, v, rpb = case.tensors()
    mask = case.key_mask()
    out, lse = case.function()(q, k, v, **case.window, rpb=rpb, key_mask=mask, return_lse=True, **REFERENCE)
    expected_out, expected_lse = oracle.dense_attention(q, k, v, rpb, case.window, case.head_dim**-0.5, mask)
    _close(out, expected_out)
    empty = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    assert bool(empty.any()) == (case.has_key_mask and case.kernel_size != case.spatial)
    _close(lse[~empty], expected_lse[~empty])
    leaves = [t for t in (q, k, v, rpb) if t is not None]
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out, lse), leaves, (d_out, d_lse))
    expected = torch.autograd.grad((expected_out, expected_lse), leaves, (d_out, d_lse))
    for name, actual, truth in zip(("q", "k", "v", "rpb"), got, expected, strict=False):
        if case.num_neighbors == 1 and name in ("q", "k"):
            continue
        _close(actual, truth, rtol=1e-10)


@pytest.mark.parametrize("case", [c for c in CHOSEN if math.prod(c.spatial) <= 150 and c.heads < 9], ids=str)
def test_unfused_pair_equals_loops_over_the_definition(case):
    q, k, v, rpb = case.tensors(requires_grad=False)
    q, k, v = (t[:1] for t in (q, k, v))
    scores = case.function("_qk")(q, k, **case.window, rpb=rpb, scale=0.3, **REFERENCE)
    torch.testing.assert_close(scores, oracle.loop_qk(q, k, rpb, case.window, 0.3), rtol=1e-11, atol=1e-12)
    probs = scores.softmax(-1)
    missing = scores == -math.inf
    assert (probs[missing] == 0).all() and bool(missing.any()) == any(case.is_causal)
    out = case.function("_av")(probs, v, **case.window, **REFERENCE)
    torch.testing.assert_close(out, oracle.loop_av(probs, v, case.window), rtol=1e-11, atol=1e-12)
    fused = case.function()(q, k, v, **case.window, rpb=rpb, scale=0.3, **REFERENCE)
    torch.testing.assert_close(fused, out, rtol=1e-11, atol=1e-12)


def test_masked_keys_are_as_if_absent():
    """The window as long as the axis: attention over the keys that are left, by torch; masked keys get no gradient."""
    q, k, v = (torch.randn(1, 9, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False, True, True, False, True, True, True, False]])
    out = natrain.na1d(q, k, v, 9, key_mask=mask, **REFERENCE)
    flat = [t.transpose(1, 2) for t in (q, k[:, mask[0]], v[:, mask[0]])]
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2))
    d_k, d_v = torch.autograd.grad(out.square().sum(), (k, v))
    assert (d_k[:, ~mask[0]] == 0).all() and (d_v[:, ~mask[0]] == 0).all() and d_k.abs().sum() > 0


def test_queries_without_a_key_give_zero_and_minus_infinity_and_no_gradient():
    q, k, v = (torch.randn(2, 9, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    rpb = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :5] = False  # windows of 3: queries 0 to 3 see nothing
    out, lse = natrain.na1d(q, k, v, 3, rpb=rpb, key_mask=mask, return_lse=True, **REFERENCE)
    assert (out[0, :4] == 0).all() and (lse[0, :4] == -math.inf).all()
    assert torch.isfinite(lse[0, 4:]).all() and torch.isfinite(lse[1]).all()
    grads = torch.autograd.grad((out, lse), (q, k, v, rpb), (torch.ones_like(out), torch.ones_like(lse)))
    assert all(torch.isfinite(g).all() for g in grads) and (grads[0][0, :4] == 0).all()
    assert grads[0][0, 4:].abs().sum() > 0


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_equal_repeated_ones(kv_heads):
    q = torch.randn(2, 7, 8, 4, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 7, 8, kv_heads, 8, dtype=torch.float64) for _ in range(2))
    repeated = [t.repeat_interleave(4 // kv_heads, dim=-2) for t in (k, v)]
    out, expected = natrain.na2d(q, k, v, 3, **REFERENCE), natrain.na2d(q, *repeated, 3, **REFERENCE)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)


def test_av_ignores_weights_in_slots_without_a_key():
    probs, v = torch.rand(1, 6, 1, 3, dtype=torch.float64), torch.randn(1, 6, 1, 4, dtype=torch.float64)
    window = {"kernel_size": (3,), "dilation": (1,), "stride": (1,), "is_causal": (True,)}
    torch.testing.assert_close(natrain.na1d_av(probs, v, **window), oracle.loop_av(probs, v, window))


def test_whole_axis_is_plain_attention():
    q, k, v = (torch.randn(2, 5, 6, 3, 16, dtype=torch.float64) for _ in range(3))
    out = natrain.na2d(q, k, v, (5, 6), **REFERENCE)
    flat = [t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).view_as(q)
    torch.testing.assert_close(out, expected)


def test_stride_equal_to_kernel_is_blocked_attention():
    q, k, v = (torch.randn(1, 12, 2, 8, dtype=torch.float64) for _ in range(3))
    out = natrain.na1d(q, k, v, 4, stride=4, **REFERENCE)
    blocks = [t.view(3, 4, 2, 8).transpose(1, 2) for t in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*blocks).transpose(1, 2).reshape_as(q)
    torch.testing.assert_close(out, expected)


def test_packed_equals_unpacked_with_one_gradient():
    qkv = torch.randn(2, 6, 7, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    rpb = torch.randn(2, 5, 5, dtype=torch.float64)
    out, lse = natrain.na2d_qkvpacked(qkv, 3, dilation=2, rpb=rpb, return_lse=True)
    expected, expected_lse = natrain.na2d(*qkv.unbind(-3), 3, dilation=2, rpb=rpb, return_lse=True)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    d_out = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, d_out)
    (truth,) = torch.autograd.grad(expected, qkv, d_out)
    assert grad.shape == qkv.shape and torch.equal(grad, truth)


@pytest.mark.parametrize("chunk_bytes", [1, 40_000, 200_000])
def test_chunks_change_neither_values_nor_gradients(monkeypatch, chunk_bytes):
    case = next(c for c in CHOSEN if c.na_dim == 2 and any(c.is_causal) and c.has_rpb)
    q, k, v, rpb = case.tensors()
    seed = torch.tensor([1234567890123])

    def run():
        args = [list(value) for value in case.window.values()]
        out, lse = torch.ops.natrain.attention(q, k, v, rpb, None, seed, *args, 0.5, 0.25, "reference")
        return out, lse, *torch.autograd.grad((out, lse), (q, k, v, rpb), (torch.ones_like(out), torch.ones_like(lse)))

    whole = run()
    monkeypatch.setattr(reference, "GATHER_BUDGET_BYTES", chunk_bytes)
    for actual, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_memory_stays_within_the_budget_at_56_pixels():
    """Batch 8, 56x56, kernel 7: the largest tensor of forward and backward is bounded, not 49 times the keys."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return result

    qkv = torch.randn(8, 56, 56, 3, 2, 32, requires_grad=True)
    with Watch():
        out = natrain.na2d_qkvpacked(qkv, 7, rpb=torch.zeros(2, 13, 13), **REFERENCE)
        out.sum().backward()
    assert qkv.grad is not None and torch.isfinite(qkv.grad).all()
    assert largest <= reference.GATHER_BUDGET_BYTES


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_accumulated_in_float32(dtype):
    q, k, v = (torch.randn(1, 9, 9, 2, 32).to(dtype) for _ in range(3))
    rpb = torch.randn(2, 13, 13)
    out, lse = natrain.na2d(q, k, v, 7, rpb=rpb, return_lse=True, **REFERENCE)
    truth, truth_lse = natrain.na2d(*(t.double() for t in (q, k, v)), 7, rpb=rpb.double(), return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    # Only the output's own rounding is left: half a unit in the last place.
    assert (out.double() - truth).abs().max() <= truth.abs().max() * torch.finfo(dtype).eps
    torch.testing.assert_close(lse.double(), truth_lse, rtol=1e-5, atol=1e-5)


def test_8_bit_inputs_are_accumulated_in_float32():
    q, k, v = (torch.randn(1, 9, 2, 8).to(torch.float8_e4m3fn) for _ in range(3))
    out, lse = natrain.na1d(q, k, v, 3, return_lse=True)
    expected, expected_lse = natrain.na1d(*(x.float() for x in (q, k, v)), 3, return_lse=True, **REFERENCE)
    assert torch.equal(out.float(), expected.to(out.dtype).float()) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_tokens_reach_only_the_queries_that_hold_them(poison):
    q, k, v = (torch.randn(1, 12, 1, 4, dtype=torch.float64) for _ in range(3))
    k[0, 4], v[0, 4] = poison, poison
    out = natrain.na1d(q, k, v, 3, dilation=2, **REFERENCE)
    window = natrain.Window((3,), (2,), (1,), (False,))
    table = oracle.neighbors((12,), window.kernel_size, window.dilation, window.stride, window.is_causal)
    touched = {i for i, row in enumerate(table) if any(token == 4 for _, token, _ in row)}
    assert {i for i in range(12) if not torch.isfinite(out[0, i]).all()} == touched
    assert 0 < len(touched) < 6


def test_empty_batch():
    q = torch.randn(0, 8, 2, 4, requires_grad=True)
    out, lse = natrain.na1d(q, q, q, 3, return_lse=True, **REFERENCE)
    assert out.shape == q.shape and lse.shape == (0, 8, 2)
    out.sum().backward()
    assert q.grad.shape == q.shape
