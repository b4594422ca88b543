"""What torch asks of an operator: schema, fakes, compile, autocast, every derivative; for every kind of kernel.

``Loops``, ``Whole`` and ``Fused`` below are kernels that a user package might add; they exercise the paths that the
reference, composed of torch operators, does not take.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad

import natrain
from natrain.ops import reference, registry
from natrain.ops.problem import Problem
from natrain.ops.registry import FusedKernel, Limits, UnfusedAttentionKernel, UnfusedKernel
from tests.ops import oracle
from tests.ops.grid import FEATURES


def _every_head(x, problem):
    return x.repeat_interleave(problem.heads // problem.kv_heads, dim=-2)


def _of_groups(d_x, problem):
    """The gradient of k or v out of that of its repetition."""
    return d_x.unflatten(-2, (problem.kv_heads, -1)).sum(-2)


class Loops(UnfusedKernel):
    """The four primitives as one list of (query, slot, key, bias) pairs, in plain indexing."""

    name, summary, priority = "loops", "primitives by index lists", 90
    limits = Limits(gqa=True, value_dim=True, key_mask=True, unfused=True, double_backward=True, forward_ad=True)

    def _pairs(self, problem: Problem):
        w = problem.window
        table = oracle.neighbors(problem.spatial, w.kernel_size, w.dilation, w.stride, w.is_causal)
        return [
            torch.tensor(column)
            for column in zip(
                *[(i, slot, j, *bias) for i, row in enumerate(table) for slot, j, bias in row], strict=True
            )
        ]

    def probs(self, problem, q, k, rpb, key_mask, scale):
        """(lse, probs) in the accumulator's dtype."""
        i, slot, j, *_ = self._pairs(problem)
        scores = self.qk(problem, q, _every_head(k, problem), rpb, scale, -math.inf)
        scores = scores.to(reference.accumulate_dtype(q.dtype))
        if key_mask is not None:
            masked = torch.zeros(*key_mask.flatten(1).shape, scores.shape[-1], dtype=torch.bool)
            masked[:, i, slot] = ~key_mask.flatten(1)[:, j]
            scores = scores.masked_fill(masked.view(*key_mask.shape, 1, -1), -math.inf)
        lse = scores.logsumexp(-1)
        return lse, (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()

    def qk(self, problem, q, k, rpb, scale, fill):
        i, slot, j, *bias = self._pairs(problem)
        qf, kf = q.flatten(1, -3), k.flatten(1, -3)
        pairs = scale * (qf[:, i] * kf[:, j]).sum(-1)
        if rpb is not None:
            pairs = pairs + rpb[(slice(None), *bias)].T
        scores = q.new_full((q.shape[0], qf.shape[1], q.shape[-2], problem.window.num_neighbors), fill)
        scores[:, i, :, slot] = pairs.transpose(0, 1).to(q.dtype)
        return scores.view(*q.shape[:-1], -1)

    def av(self, problem, weights, v):
        i, slot, j, *_ = self._pairs(problem)
        out = torch.zeros_like(v.flatten(1, -3))
        terms = weights.flatten(1, -3)[:, i, :, slot].transpose(0, 1)[..., None] * v.flatten(1, -3)[:, j]
        return out.index_add(1, i, terms).view(v.shape)

    def inverse(self, problem, weights, x):
        i, slot, j, *_ = self._pairs(problem)
        out = torch.zeros_like(x.flatten(1, -3))
        terms = weights.flatten(1, -3)[:, i, :, slot].transpose(0, 1)[..., None] * x.flatten(1, -3)[:, i]
        return out.index_add(1, j, terms).view(x.shape)

    def rpb_grad(self, problem, weights):
        i, slot, _, *bias = self._pairs(problem)
        grad = weights.new_zeros(weights.shape[-2], *problem.window.rpb_shape)
        values = weights.flatten(1, -3)[:, i, :, slot].sum(1).T
        return grad.index_put((torch.arange(grad.shape[0])[:, None], *bias), values, accumulate=True)


class Fused(FusedKernel):
    """One forward and one backward, by the closed formula of the gradient of a softmax; nothing more."""

    name, summary, priority = "fused_test", "the closed formula as a fused kernel", 80
    limits = Limits(gqa=True, value_dim=True, key_mask=True)
    loops = Loops()

    def _keep(self, probs, seed, dropout_p, shape):
        if seed is None:
            return torch.ones_like(probs)
        return reference.dropout(torch.ones_like(probs), seed, dropout_p, shape, slice(None), slice(None))

    def forward(self, problem, q, k, v, rpb, key_mask, seed, scale, dropout_p):
        lse, probs = self.loops.probs(problem, q, k, rpb, key_mask, scale)
        probs = probs * self._keep(probs, seed, dropout_p, q.shape)
        return self.loops.av(problem, probs, _every_head(v, problem).to(probs.dtype)).to(q.dtype), lse

    def backward(self, problem, d_out, d_lse, q, k, v, rpb, key_mask, out, lse, seed, scale, dropout_p, d_q, d_k, d_v):
        loops, dtype = self.loops, lse.dtype
        d_out, q, k, v = (t.to(dtype) for t in (d_out, q, k, v))
        _, probs = loops.probs(problem, q, k, rpb, key_mask, scale)
        k, v = _every_head(k, problem), _every_head(v, problem)
        keep = self._keep(probs, seed, dropout_p, q.shape)
        d_probs = loops.qk(problem, d_out, v, None, 1.0, 0.0) * keep
        delta = (probs * d_probs).sum(-1, keepdim=True) - (0 if d_lse is None else d_lse[..., None])
        d_scores = probs * (d_probs - delta)
        d_q.copy_(loops.av(problem, d_scores, k) * scale)
        d_k.copy_(_of_groups(loops.inverse(problem, d_scores, q) * scale, problem))
        d_v.copy_(_of_groups(loops.inverse(problem, probs * keep, d_out), problem))
        return loops.rpb_grad(problem, d_scores)


class Whole(Loops, UnfusedAttentionKernel):
    """The primitives, and attention as a whole that keeps its probabilities, one slot too many a row."""

    name, summary, priority = "whole", "primitives, and attention out of them", 85

    def empty_probs(self, q, window):
        return q.new_empty(*q.shape[:-1], window.num_neighbors + 1)

    def _keep(self, probs, seed, dropout_p, shape):
        return Fused._keep(self, probs, seed, dropout_p, shape)

    def forward(self, problem, q, k, v, rpb, key_mask, seed, scale, dropout_p):
        probs = self.empty_probs(q, problem.window)
        lse, probs[..., :-1] = self.probs(problem, q, k, rpb, key_mask, scale)
        kept = probs[..., :-1] * self._keep(probs[..., :-1], seed, dropout_p, q.shape)
        return self.av(problem, kept, _every_head(v, problem)), lse, probs

    def backward(self, problem, d_out, d_lse, q, k, v, probs, seed, scale, dropout_p, d_q, d_k, d_v):
        probs, k, v = probs[..., :-1], _every_head(k, problem), _every_head(v, problem)
        keep = self._keep(probs, seed, dropout_p, q.shape)
        d_probs = self.qk(problem, d_out, v, None, 1.0, 0.0) * keep
        delta = (probs * d_probs).sum(-1, keepdim=True) - (0 if d_lse is None else d_lse[..., None])
        d_scores = (probs * (d_probs - delta)).to(q.dtype)
        d_q.copy_(self.av(problem, d_scores, k) * scale)
        d_k.copy_(_of_groups(self.inverse(problem, d_scores, q) * scale, problem))
        d_v.copy_(_of_groups(self.inverse(problem, (probs * keep).to(q.dtype), d_out), problem))
        return self.rpb_grad(problem, d_scores) if problem.has_rpb else None


@pytest.fixture(autouse=True)
def test_kernels(monkeypatch):
    """These kernels, for one test; ``auto`` would take them, so every test here names its kernel."""
    registry.kernels()
    monkeypatch.setattr(registry, "_KERNELS", dict(registry._KERNELS))
    registry.register(Loops())
    registry.register(Whole())
    registry.register(Fused())
    yield
    registry._choose_cached.cache_clear()


def _leaves(*spatial, heads=1, head_dim=2, kernel_size=3, dtype=torch.float64):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, *spatial, heads, head_dim, dtype=dtype, requires_grad=True) for _ in range(3))
    return q, k, v, torch.randn(heads, *[2 * kernel_size - 1] * len(spatial), dtype=dtype, requires_grad=True)


KINDS = ["reference", "loops", "whole", "fused_test"]


@pytest.mark.parametrize("kernel", KINDS)
def test_every_kind_of_kernel_agrees_with_the_dense_softmax(kernel):
    q, k, v, rpb = _leaves(6, 5, heads=2, head_dim=4)
    window = {"kernel_size": (3, 3), "dilation": (2, 1), "stride": (1, 2), "is_causal": (False, True)}
    out, lse = natrain.na2d(q, k, v, **window, rpb=rpb, return_lse=True, kernel=kernel)
    truth, truth_lse = oracle.dense_attention(q, k, v, rpb, window, 0.5)
    torch.testing.assert_close((out, lse), (truth, truth_lse))
    weights = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out, lse), (q, k, v, rpb), weights)
    torch.testing.assert_close(got, torch.autograd.grad((truth, truth_lse), (q, k, v, rpb), weights))


@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_every_kind_has_key_masks_grouped_heads_and_value_dims(case, kernel):
    q, k, v, rpb = case.tensors()
    mask = case.key_mask()
    out, lse = case.function()(q, k, v, **case.window, rpb=rpb, key_mask=mask, return_lse=True, kernel=kernel)
    truth, truth_lse = oracle.dense_attention(q, k, v, rpb, case.window, case.head_dim**-0.5, mask)
    torch.testing.assert_close((out, lse), (truth, truth_lse))
    weights = torch.randn_like(out), torch.randn_like(lse)
    leaves = [t for t in (q, k, v, rpb) if t is not None]
    got = torch.autograd.grad((out, lse), leaves, weights)
    torch.testing.assert_close(got, torch.autograd.grad((truth, truth_lse), leaves, weights))


@pytest.mark.parametrize("kernel", ["reference", "loops", "whole"])
def test_second_derivatives_with_a_key_mask_and_grouped_heads(kernel):
    torch.manual_seed(0)
    q = torch.randn(1, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 5, 1, 2, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 5, 1, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False, False, True, False, True]])  # query 0 sees keys 0 to 1 alone

    def attend(q, k, v):
        return natrain.na1d(q, k, v, 2, key_mask=mask, kernel=kernel)

    assert torch.autograd.gradcheck(attend, (q, k, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attend, (q, k, v))


@pytest.mark.parametrize("kernel", KINDS)
def test_packed_gradient_of_every_kind(kernel):
    qkv = torch.randn(2, 7, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    rpb = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    out = natrain.na1d_qkvpacked(qkv, 3, rpb=rpb, kernel=kernel)
    d_out = torch.randn_like(out)
    got = torch.autograd.grad(out, (qkv, rpb), d_out)
    q, k, v = qkv.unbind(-3)
    window = {"kernel_size": (3,), "dilation": (1,), "stride": (1,), "is_causal": (False,)}
    truth, _ = oracle.dense_attention(q, k, v, rpb, window, 0.5)
    torch.testing.assert_close(got, torch.autograd.grad(truth, (qkv, rpb), d_out))


@pytest.mark.parametrize("kernel", ["reference", "loops", "whole"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck_gradgradcheck_and_forward_ad(kernel, is_causal):
    q, k, v, rpb = _leaves(4)

    def attend(q, k, v, rpb):
        return natrain.na1d(q, k, v, 3, is_causal=is_causal, rpb=rpb, return_lse=True, kernel=kernel)

    assert torch.autograd.gradcheck(attend, (q, k, v, rpb), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attend, (q, k, v, rpb), check_fwd_over_rev=True)


@pytest.mark.parametrize("kernel", ["reference", "loops", "whole"])
def test_gradgradcheck_in_two_dimensions_with_dilation_and_stride(kernel):
    q, k, v, rpb = _leaves(4, 3, head_dim=1, kernel_size=2)

    def attend(q, k, v, rpb):
        return natrain.na2d(q, k, v, 2, dilation=(2, 1), stride=(1, 2), rpb=rpb, kernel=kernel)

    assert torch.autograd.gradgradcheck(attend, (q, k, v, rpb))


@pytest.mark.parametrize("kernel", ["reference", "loops", "whole"])
def test_gradgradcheck_of_the_unfused_pair(kernel):
    q, k, v, rpb = _leaves(4)

    def attend(q, k, v, rpb):
        scores = natrain.na1d_qk(q, k, 3, rpb=rpb, kernel=kernel)
        return natrain.na1d_av(torch.tanh(scores), v, 3, kernel=kernel)

    assert torch.autograd.gradcheck(attend, (q, k, v, rpb), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attend, (q, k, v, rpb))


def test_a_fused_kernel_refuses_double_backward_and_forward_mode_by_name():
    q, k, v, rpb = _leaves(4)
    out = natrain.na1d(q, k, v, 3, rpb=rpb, kernel="fused_test")
    (d_q,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match='kernel="fused_test" has no double backward.*kernel="reference"'):
        d_q.sum().backward()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q.detach(), torch.ones_like(q))
        with pytest.raises(NotImplementedError, match='no forward-mode derivative.*kernel="reference"'):
            natrain.na1d(dual, k.detach(), v.detach(), 3, kernel="fused_test")


def test_lse_alone_has_a_gradient_through_a_fused_kernel():
    q, k, v, rpb = _leaves(5)
    grads = {}
    for kernel in ("reference", "fused_test"):
        _, lse = natrain.na1d(q, k, v, 3, rpb=rpb, return_lse=True, kernel=kernel)
        grads[kernel] = torch.autograd.grad(lse.sum(), (q, k, rpb))
    torch.testing.assert_close(grads["reference"], grads["fused_test"])


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("kernel", KINDS)
def test_opcheck(kernel):
    q, k, v, rpb = _leaves(6, 5, heads=2, head_dim=4, dtype=torch.float32)
    window = ([3, 3], [2, 1], [1, 1], [False, True])
    seed = torch.tensor([3])
    run = (*window, 0.5, 0.0, kernel)
    torch.library.opcheck(torch.ops.natrain.attention, (q, k, v, rpb, None, None, *run), test_utils=CHECKS)
    torch.library.opcheck(torch.ops.natrain.attention, (q, k, v, None, None, seed, *window, 0.5, 0.2, kernel))
    fewer = torch.randn(1, 6, 5, 1, 4, requires_grad=True), torch.randn(1, 6, 5, 1, 3, requires_grad=True)
    mask = torch.rand(1, 6, 5) > 0.3
    torch.library.opcheck(torch.ops.natrain.attention, (q, *fewer, rpb, mask, None, *run), test_utils=CHECKS)
    qkv = torch.randn(2, 6, 5, 3, 2, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.natrain.attention_qkvpacked, (qkv, rpb, None, None, *run), test_utils=CHECKS)


@pytest.mark.parametrize("kernel", ["reference", "loops", "whole"])
def test_opcheck_of_the_primitives(kernel):
    q, k, v, rpb = _leaves(6, heads=2, head_dim=4, dtype=torch.float32)
    window = ([3], [2], [1], [True])
    weights = torch.rand(1, 6, 2, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.natrain.qk, (q, k, rpb, *window, 0.5, 0.0, kernel))
    torch.library.opcheck(torch.ops.natrain.av, (weights, v, *window, kernel))
    if kernel != "reference":
        torch.library.opcheck(torch.ops.natrain.inverse, (weights, v, *window, kernel))
        torch.library.opcheck(torch.ops.natrain.rpb_grad, (weights, *window, kernel))


def _fullgraph(kernel: str, dynamic: bool, sizes):
    torch._dynamo.reset()

    def step(qkv, rpb):
        out, lse = natrain.na2d_qkvpacked(qkv, 3, dilation=(1, 2), rpb=rpb, return_lse=True, kernel=kernel)
        q, k, v = qkv.unbind(-3)
        mask = q[..., 0, 0] > -1.5
        options = dict(rpb=rpb, key_mask=mask, kernel=kernel)
        masked = natrain.na2d(q, k[..., :1, :], v[..., :1, :2], 3, **options)
        return out.square().sum() + lse.sum() + masked.square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, height, width in sizes:
        qkv = torch.randn(batch, height, width, 3, 2, 4, requires_grad=True)
        rpb = torch.randn(2, 5, 5, requires_grad=True)
        got, expected = compiled(qkv, rpb), step(qkv, rpb)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got, (qkv, rpb)), torch.autograd.grad(expected, (qkv, rpb)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kernel", ["auto", *KINDS])
def test_compile_fullgraph_static(kernel):
    _fullgraph(kernel, False, [(2, 7, 8)])


@pytest.mark.parametrize("kernel", ["auto", "reference", "whole", "fused_test"])
def test_compile_fullgraph_dynamic_without_recompiling(kernel):
    with torch._dynamo.config.patch(error_on_recompile=True):
        _fullgraph(kernel, True, [(11, 7, 8), (12, 9, 13), (6, 14, 10)])


@pytest.mark.slow
def test_compile_with_inductor():
    q, k, v, rpb = _leaves(9, 8, heads=2, head_dim=8, dtype=torch.float32)
    compiled = torch.compile(lambda *t: natrain.na2d(*t[:3], 3, rpb=t[3], kernel="reference"), fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, rpb), natrain.na2d(q, k, v, 3, rpb=rpb, kernel="reference"))


@pytest.mark.parametrize("kernel", KINDS)
def test_autocast_casts_q_k_v_and_leaves_bias_and_mask(kernel):
    q, k, v, rpb = _leaves(6, 5, heads=2, head_dim=4, dtype=torch.float32)
    options = dict(rpb=rpb, key_mask=torch.rand(1, 6, 5) > 0.3, kernel=kernel)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = natrain.na2d(q, k, v, 3, **options)
    expected = natrain.na2d(*(t.bfloat16() for t in (q, k, v)), 3, **options)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    out.float().sum().backward()
    assert rpb.grad.dtype == q.grad.dtype == torch.float32


@pytest.mark.parametrize("kernel", KINDS)
def test_inference_mode(kernel):
    q, k, v, rpb = (t.detach() for t in _leaves(6, 5, heads=2, head_dim=4))
    with torch.inference_mode():
        out = natrain.na2d(q, k, v, 3, rpb=rpb, kernel=kernel)
    torch.testing.assert_close(out, natrain.na2d(q, k, v, 3, rpb=rpb, kernel="reference"))
