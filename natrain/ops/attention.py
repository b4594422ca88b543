"""Attention as a whole: out and lse of (q, k, v) or of one packed qkv, by each kind of kernel, and its derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd
from torch.autograd import forward_ad

from natrain.ops import reference
from natrain.ops.registry import FusedKernel, Kernel, UnfusedAttentionKernel, UnfusedKernel, choose, get_kernel
from natrain.ops.run import Run, needs_grad, ops, refuse


def _unpacked(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """(q, k, v) of ``tensors``, which are that or one packed [B, *S, 3, N, D]; views, no copies."""
    return tensors if len(tensors) == 3 else tensors[0].unbind(-3)


def _compose(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, seed: Tensor | None, run: Run
) -> tuple[Tensor, Tensor]:
    """(out, lse) by a kernel that is made of torch operators, or of the primitives below."""
    if not isinstance(kernel, UnfusedKernel):
        return reference.attention(q, k, v, rpb, seed, run.window, run.scale, run.dropout_p)
    scores = ops.qk(q, k, rpb, *run.window_args, run.scale, -math.inf, kernel.name)
    scores = scores.to(reference.accumulate_dtype(q.dtype))
    lse = torch.logsumexp(scores, dim=-1)
    probs = torch.softmax(scores, dim=-1)
    if seed is not None:
        probs = reference.dropout(probs, seed, run.dropout_p, q.shape, slice(None), slice(None))
    return ops.av(probs.to(q.dtype), v, *run.window_args, kernel.name), lse


class _FusedAttention(torch.autograd.Function):
    """One forward and one backward. ``tensors`` is (q, k, v), or (qkv,) whose gradient is then one tensor too."""

    @staticmethod
    def forward(run: Run, rpb: Tensor | None, seed: Tensor | None, *tensors: Tensor):
        op = ops.attention if len(tensors) == 3 else ops.attention_qkvpacked
        with _AutoDispatchBelowAutograd():
            return op(*tensors, rpb, seed, *run.args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.run, rpb, seed, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rpb, seed, *output, *tensors)

    @staticmethod
    def backward(ctx, d_out, d_lse):
        rpb, seed, out, lse, *tensors = ctx.saved_tensors
        op = ops.attention_backward if len(tensors) == 3 else ops.attention_qkvpacked_backward
        d_out = torch.zeros_like(out) if d_out is None else d_out
        *d_tensors, d_rpb = op(d_out, d_lse, *tensors, rpb, out, lse, seed, *ctx.run.args)
        return None, None if rpb is None else d_rpb, None, *d_tensors

    @staticmethod
    def jvp(ctx, *tangents):
        raise refuse(ctx.run.kernel, "forward-mode derivative", "forward_ad")


def attention(tensors: tuple[Tensor, ...], rpb: Tensor | None, seed: Tensor | None, run: Run, *, autograd: bool):
    """Choose and run a kernel on (q, k, v) or (qkv,); under ``autograd`` the result is differentiable."""
    q, k, v = _unpacked(tensors)
    is_recorded = autograd and needs_grad(*tensors, rpb)
    kernel = choose(run.problem(q, rpb, needs_grad=is_recorded), run.kernel)
    run = replace(run, kernel=kernel.name)
    if isinstance(kernel, UnfusedAttentionKernel) and not (autograd and _has_tangent(*tensors, rpb)):
        if is_recorded:
            return _ProbsAttention.apply(run, rpb, seed, *tensors)[:2]
        with _AutoDispatchBelowAutograd():
            return ops.attention_probs(tensors, rpb, seed, *run.args)[:2]
    if not isinstance(kernel, FusedKernel):
        return _compose(kernel, q, k, v, rpb, seed, run)
    if autograd:
        return _FusedAttention.apply(run, rpb, seed, *tensors)
    problem = run.problem(q, rpb, needs_grad=False)
    return kernel.forward(problem, q, k, v, rpb, seed, run.scale, run.dropout_p)


def _has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD is at work on one of them."""
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


class _ProbsAttention(torch.autograd.Function):
    """Attention whose probabilities are kept for the first derivative; a second one is that of the composition."""

    @staticmethod
    def forward(ctx, run: Run, rpb: Tensor | None, seed: Tensor | None, *tensors: Tensor):
        # The context as an argument: torch inspects the signature of the other form in every call, 50 us.
        with _AutoDispatchBelowAutograd():
            out, lse, probs = ops.attention_probs(tensors, rpb, seed, *run.args)
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(probs)
        ctx.save_for_backward(rpb, seed, probs, *tensors)
        return out, lse, probs

    @staticmethod
    def backward(ctx, d_out, d_lse, _):
        rpb, seed, probs, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _ProbsAttention._differentiable_backward(ctx, d_out, d_lse, rpb, seed, tensors)
        if d_out is None:
            v = tensors[-1] if len(tensors) == 3 else tensors[0].select(-3, 2)
            d_out = torch.zeros_like(v, memory_format=torch.contiguous_format)
        with _AutoDispatchBelowAutograd():
            d_tensors, d_rpb = ops.attention_probs_backward(d_out, d_lse, tensors, rpb, probs, seed, *ctx.run.args)
        return None, None if rpb is None else d_rpb, None, *d_tensors

    @staticmethod
    def _differentiable_backward(ctx, d_out, d_lse, rpb, seed, tensors):
        arguments = [None, rpb, None, *tensors]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        q, k, v = _unpacked(tensors)
        outputs = _compose(get_kernel(ctx.run.kernel), q, k, v, rpb, seed, ctx.run)
        given = [(out, d) for out, d in zip(outputs, (d_out, d_lse), strict=True) if d is not None]
        grads = torch.autograd.grad(
            [out for out, _ in given], [arguments[i] for i in wanted], [d for _, d in given],
            create_graph=True, allow_unused=True,
        )  # fmt: skip
        by_argument = dict(zip(wanted, grads, strict=True))
        return tuple(by_argument.get(i) for i in range(len(arguments)))


def attention_probs(tensors, rpb, seed, run: Run):
    q, k, v = _unpacked(tensors)
    kernel, problem = get_kernel(run.kernel), run.problem(q, rpb, needs_grad=False)
    assert isinstance(kernel, UnfusedAttentionKernel)
    return kernel.forward(problem, q, k, v, rpb, seed, run.scale, run.dropout_p)


def attention_probs_backward(d_out, d_lse, tensors, rpb, probs, seed, run: Run):
    kernel, problem = get_kernel(run.kernel), run.problem(d_out, rpb, needs_grad=True)
    assert isinstance(kernel, UnfusedAttentionKernel)
    d_tensors = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    q, k, v = _unpacked(tensors)
    d_q, d_k, d_v = _unpacked(d_tensors)
    d_rpb = kernel.backward(
        problem, d_out, d_lse, q, k, v, probs, seed, run.scale, run.dropout_p, d_q, d_k, d_v
    )  # fmt: skip
    return d_tensors, d_out.new_empty(0) if d_rpb is None or rpb is None else d_rpb.to(rpb.dtype)


def fake_attention_probs_backward(tensors, rpb):
    *d_tensors, d_rpb = fake_attention_backward(tensors, rpb)
    return d_tensors, d_rpb


def fake_attention_probs(tensors, run: Run):
    out, lse = fake_attention(tensors)
    return out, lse, get_kernel(run.kernel).empty_probs(out, run.window)


def attention_backward(tensors, d_out, d_lse, rpb, out, lse, seed, run: Run):
    """Gradients in the layout of ``tensors``, then rpb's (empty where there is none)."""
    problem = run.problem(out, rpb, needs_grad=True)
    kernel = choose(problem, run.kernel)
    assert isinstance(kernel, FusedKernel)
    # Explicitly contiguous: the inputs may be views with gaps or expanded axes, which a gradient must not inherit.
    d_tensors = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)
    q, k, v = _unpacked(tensors)
    d_q, d_k, d_v = _unpacked(d_tensors)
    d_rpb = kernel.backward(
        problem,
        d_out, d_lse, q, k, v, rpb, out, lse, seed, run.scale, run.dropout_p, d_q, d_k, d_v,
    )  # fmt: skip
    return *d_tensors, out.new_empty(0) if d_rpb is None or rpb is None else d_rpb.to(rpb.dtype)


class _NoDoubleBackward(torch.autograd.Function):
    """Passes the gradients on and raises, naming a kernel that can, when they are differentiated again."""

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor | None):
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx, *_):
        raise refuse(ctx.name, "double backward", "double_backward")

    @staticmethod
    def jvp(ctx, *_):
        raise refuse(ctx.name, "forward-mode derivative", "forward_ad")


def attention_backward_autograd(op, *args):
    """The first derivative is an end: what comes out remembers that it cannot be differentiated again."""
    with _AutoDispatchBelowAutograd():
        grads = op(*args)
    inputs = [arg for arg in args if isinstance(arg, Tensor)]
    if not needs_grad(*inputs):
        return grads
    return _NoDoubleBackward.apply(args[-1], len(grads), *grads, *inputs)


def fake_attention(tensors: tuple[Tensor, ...]):
    q = tensors[0] if len(tensors) == 3 else tensors[0].select(-3, 0)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:-1], dtype=reference.accumulate_dtype(q.dtype))


def fake_attention_backward(tensors, rpb):
    d_rpb = tensors[0].new_empty(0) if rpb is None else torch.empty_like(rpb, memory_format=torch.contiguous_format)
    return *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors), d_rpb
