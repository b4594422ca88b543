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
from natrain.ops.problem import Problem
from natrain.ops.registry import FusedKernel, Kernel, UnfusedAttentionKernel, UnfusedKernel, choose, get_kernel
from natrain.ops.run import Run, needs_grad, ops, refuse


def unpacked(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """(q, k, v) of ``tensors``, which are that or one packed [B, *S, 3, N, D]; views, no copies."""
    return tensors if len(tensors) == 3 else tensors[0].unbind(-3)


def _for_every_head(x: Tensor, heads: int) -> Tensor:
    """k or v with each head once for every head of q that uses it."""
    return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], dim=-2)


def _compose(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    run: Run,
) -> tuple[Tensor, Tensor]:
    """(out, lse) by a kernel that is made of torch operators, or of the primitives below."""
    if not isinstance(kernel, UnfusedKernel):
        return reference.attention(q, k, v, rpb, key_mask, seed, run.window, run.scale, run.dropout_p)
    k, v = _for_every_head(k, q.shape[-2]), _for_every_head(v, q.shape[-2])
    scores = ops.qk(q, k, rpb, *run.window_args, run.scale, -math.inf, kernel.name)
    scores = scores.to(reference.accumulate_dtype(q.dtype))
    allowed = None if key_mask is None else reference.neighbor_mask(key_mask, reference.axis_windows(q, run.window))
    lse, probs = reference.normalize(scores, allowed)
    if seed is not None:
        probs = reference.dropout(probs, seed, run.dropout_p, q.shape, slice(None), slice(None))
    return ops.av(probs.to(q.dtype), v, *run.window_args, kernel.name), lse


class FusedAttention(torch.autograd.Function):
    """One forward and one backward. ``tensors`` is (q, k, v), or (qkv,) whose gradient is then one tensor too."""

    @staticmethod
    def forward(run: Run, rpb: Tensor | None, key_mask: Tensor | None, seed: Tensor | None, *tensors: Tensor):
        op = ops.attention if len(tensors) == 3 else ops.attention_qkvpacked
        with _AutoDispatchBelowAutograd():
            return op(*tensors, rpb, key_mask, seed, *run.args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.run, rpb, key_mask, seed, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rpb, key_mask, seed, *output, *tensors)

    @staticmethod
    def backward(ctx, d_out, d_lse):
        return None, *fused_gradients(ctx.run, d_out, d_lse, ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, *tangents):
        raise refuse(ctx.run.kernel, "forward-mode derivative", "forward_ad")


def fused_gradients(run: Run, d_out: Tensor | None, d_lse: Tensor | None, saved: Sequence[Tensor | None]):
    """Gradients of (rpb, key_mask, seed, *tensors) by the operator; ``saved`` as ``FusedAttention`` saves."""
    rpb, key_mask, seed, out, lse, *tensors = saved
    op = ops.attention_backward if len(tensors) == 3 else ops.attention_qkvpacked_backward
    d_out = torch.zeros_like(out) if d_out is None else d_out
    *d_tensors, d_rpb = op(d_out, d_lse, *tensors, rpb, key_mask, out, lse, seed, *run.args)
    return None if rpb is None else d_rpb, None, None, *d_tensors


def attention(
    tensors: tuple[Tensor, ...],
    rpb: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    run: Run,
    *,
    autograd: bool,
):
    """Choose and run a kernel on (q, k, v) or (qkv,); under ``autograd`` the result is differentiable."""
    q, k, v = unpacked(tensors)
    is_recorded = autograd and needs_grad(*tensors, rpb)
    kernel = choose(run.problem(q, k, v, rpb, key_mask, needs_grad=is_recorded), run.kernel)
    run = replace(run, kernel=kernel.name)
    if autograd and torch._C._are_functorch_transforms_active() and isinstance(kernel, (FusedKernel, UnfusedKernel)):
        raise NotImplementedError(
            f'kernel="{kernel.name}" cannot be differentiated by torch.func. Try: kernel="reference", or torch.autograd'
        )
    if isinstance(kernel, UnfusedAttentionKernel) and not (autograd and _has_tangent(*tensors, rpb)):
        if is_recorded:
            return ProbsAttention.apply(run, rpb, key_mask, seed, *tensors)[:2]
        with _AutoDispatchBelowAutograd():
            return ops.attention_probs(tensors, rpb, key_mask, seed, *run.args)[:2]
    if not isinstance(kernel, FusedKernel):
        return _compose(kernel, q, k, v, rpb, key_mask, seed, run)
    if autograd:
        return FusedAttention.apply(run, rpb, key_mask, seed, *tensors)
    problem = run.problem(q, k, v, rpb, key_mask, needs_grad=False)
    return kernel.forward(problem, q, k, v, rpb, key_mask, seed, run.scale, run.dropout_p)


def _has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD is at work on one of them."""
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


class ProbsAttention(torch.autograd.Function):
    """Attention whose probabilities are kept for the first derivative; a second one is that of the composition."""

    @staticmethod
    def forward(run: Run, rpb: Tensor | None, key_mask: Tensor | None, seed: Tensor | None, *tensors: Tensor):
        with _AutoDispatchBelowAutograd():
            return ops.attention_probs(tensors, rpb, key_mask, seed, *run.args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.run, rpb, key_mask, seed, *tensors = inputs
        probs = output[2]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(probs)
        ctx.save_for_backward(rpb, key_mask, seed, probs, *tensors)

    @staticmethod
    def backward(ctx, d_out, d_lse, _):
        if torch.is_grad_enabled():
            return None, *composed_gradients(ctx.run, d_out, d_lse, ctx.saved_tensors, ctx.needs_input_grad[1:])
        return None, *probs_gradients(ctx.run, d_out, d_lse, ctx.saved_tensors)


def probs_gradients(run: Run, d_out: Tensor | None, d_lse: Tensor | None, saved: Sequence[Tensor | None]):
    """Gradients of (rpb, key_mask, seed, *tensors) by the operator; ``saved`` as ``ProbsAttention`` saves."""
    rpb, key_mask, seed, probs, *tensors = saved
    d_out = zeros_of_out(tensors) if d_out is None else d_out
    with _AutoDispatchBelowAutograd():
        d_tensors, d_rpb = ops.attention_probs_backward(d_out, d_lse, tensors, rpb, key_mask, probs, seed, *run.args)
    return None if rpb is None else d_rpb, None, None, *d_tensors


def composed_gradients(
    run: Run,
    d_out: Tensor | None,
    d_lse: Tensor | None,
    saved: Sequence[Tensor | None],
    needed: Sequence[bool],
):
    """``probs_gradients`` that can be differentiated again: those of the composition of primitives."""
    rpb, key_mask, seed, _, *tensors = saved
    arguments = [rpb, None, None, *tensors]
    wanted = [i for i, is_needed in enumerate(needed) if is_needed]
    outputs = _compose(get_kernel(run.kernel), *unpacked(tensors), rpb, key_mask, seed, run)
    given = [(out, d) for out, d in zip(outputs, (d_out, d_lse), strict=True) if d is not None]
    grads = torch.autograd.grad(
        [out for out, _ in given], [arguments[i] for i in wanted], [d for _, d in given],
        create_graph=True, allow_unused=True,
    )  # fmt: skip
    by_argument = dict(zip(wanted, grads, strict=True))
    return tuple(by_argument.get(i) for i in range(len(arguments)))


def zeros_of_out(tensors: Sequence[Tensor]) -> Tensor:
    """The gradient of an out that nobody used."""
    q, _, v = unpacked(tensors)
    return v.new_zeros(*q.shape[:-1], v.shape[-1])


def attention_probs(tensors, rpb, key_mask, seed, run: Run):
    q, k, v = unpacked(tensors)
    kernel, problem = get_kernel(run.kernel), run.problem(q, k, v, rpb, key_mask, needs_grad=False)
    assert isinstance(kernel, UnfusedAttentionKernel)
    return kernel.forward(problem, q, k, v, rpb, key_mask, seed, run.scale, run.dropout_p)


def attention_probs_backward(d_out, d_lse, tensors, rpb, key_mask, probs, seed, run: Run):
    problem = run.problem(*unpacked(tensors), rpb, key_mask, needs_grad=True)
    d_tensors, d_rpb = run_probs_backward(get_kernel(run.kernel), problem, run, d_out, d_lse, tensors, probs, seed)
    return d_tensors, d_out.new_empty(0) if d_rpb is None or rpb is None else d_rpb.to(rpb.dtype)


def run_probs_backward(
    kernel: Kernel,
    problem: Problem,
    run: Run,
    d_out: Tensor,
    d_lse: Tensor | None,
    tensors: Sequence[Tensor],
    probs: Tensor,
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor | None]:
    """(gradients in the layout of ``tensors``, rpb's in the kernel's dtype)."""
    assert isinstance(kernel, UnfusedAttentionKernel)
    d_tensors = _empty_gradients(tensors)
    d_rpb = kernel.backward(
        problem, d_out, d_lse, *unpacked(tensors), probs, seed, run.scale, run.dropout_p, *unpacked(d_tensors)
    )
    return d_tensors, d_rpb


def _empty_gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    # Explicitly contiguous: the inputs may be views with gaps or expanded axes, which a gradient must not inherit.
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


def fake_attention_probs_backward(tensors, rpb):
    *d_tensors, d_rpb = fake_attention_backward(tensors, rpb)
    return d_tensors, d_rpb


def fake_attention_probs(tensors, run: Run):
    out, lse = fake_attention(tensors)
    return out, lse, get_kernel(run.kernel).empty_probs(unpacked(tensors)[0], run.window)


def attention_backward(tensors, d_out, d_lse, rpb, key_mask, out, lse, seed, run: Run):
    """Gradients in the layout of ``tensors``, then rpb's (empty where there is none)."""
    problem = run.problem(*unpacked(tensors), rpb, key_mask, needs_grad=True)
    d_tensors, d_rpb = run_fused_backward(
        choose(problem, run.kernel), problem, run, d_out, d_lse, tensors, rpb, key_mask, out, lse, seed
    )
    return *d_tensors, out.new_empty(0) if d_rpb is None or rpb is None else d_rpb.to(rpb.dtype)


def run_fused_backward(
    kernel: Kernel,
    problem: Problem,
    run: Run,
    d_out: Tensor,
    d_lse: Tensor | None,
    tensors: Sequence[Tensor],
    rpb: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor | None]:
    """(gradients in the layout of ``tensors``, rpb's in the kernel's dtype)."""
    assert isinstance(kernel, FusedKernel)
    d_tensors = _empty_gradients(tensors)
    q, k, v = unpacked(tensors)
    d_q, d_k, d_v = unpacked(d_tensors)
    d_rpb = kernel.backward(
        problem, d_out, d_lse, q, k, v, rpb, key_mask, out, lse, seed, run.scale, run.dropout_p, d_q, d_k, d_v
    )
    return d_tensors, d_rpb


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
    q, _, v = unpacked(tensors)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[:-1], dtype=reference.accumulate_dtype(q.dtype))


def fake_attention_backward(tensors, rpb):
    d_rpb = tensors[0].new_empty(0) if rpb is None else torch.empty_like(rpb, memory_format=torch.contiguous_format)
    return *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors), d_rpb
