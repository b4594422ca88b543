"""qk, av, inverse, rpb_grad: linear in each tensor, so that every derivative is made of the four again."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

from natrain.ops import reference
from natrain.ops.registry import UnfusedKernel, choose, get_kernel
from natrain.ops.run import Run, needs_grad, ops


class _Primitive(torch.autograd.Function):
    """Forward below autograd, backward and jvp through the operators, hence differentiable themselves."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.run, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)


def _sum(*terms: Tensor | None) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


class _QK(_Primitive):
    @staticmethod
    def forward(run: Run, q, k, rpb, fill):
        with _AutoDispatchBelowAutograd():
            return ops.qk(q, k, rpb, *run.window_args, run.scale, fill, run.kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _Primitive.setup_context(ctx, inputs[:-1], output)

    @staticmethod
    def backward(ctx, d_scores):
        q, k, rpb = ctx.saved_tensors
        window, kernel = ctx.run.window_args, ctx.run.kernel
        needs_q, needs_k, needs_rpb = ctx.needs_input_grad[1:4]
        return (
            None,
            ops.av(d_scores, k, *window, kernel) * ctx.run.scale if needs_q else None,
            ops.inverse(d_scores, q, *window, kernel) * ctx.run.scale if needs_k else None,
            ops.rpb_grad(d_scores, *window, kernel).to(rpb.dtype) if needs_rpb else None,
            None,
        )

    @staticmethod
    def jvp(ctx, _, t_q, t_k, t_rpb, __):
        q, k, _rpb = ctx.saved_tensors
        return _sum(
            None if t_q is None else ops.qk(t_q, k, None, *ctx.run.window_args, ctx.run.scale, 0.0, ctx.run.kernel),
            None if t_k is None else ops.qk(q, t_k, None, *ctx.run.window_args, ctx.run.scale, 0.0, ctx.run.kernel),
            None if t_rpb is None else _spread_rpb(t_rpb, q, ctx.run),
        )


class _Gather(_Primitive):
    """av and inverse, each other's adjoint: one sums over a query's keys, the other over a key's queries."""

    @staticmethod
    def forward(run: Run, weights, x, is_inverse: bool):
        with _AutoDispatchBelowAutograd():
            return _gather(run, weights, x, is_inverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *others, ctx.is_inverse = inputs
        _Primitive.setup_context(ctx, others, output)

    @staticmethod
    def backward(ctx, d_out):
        weights, x = ctx.saved_tensors
        run, (_, needs_weights, needs_x, _) = ctx.run, ctx.needs_input_grad
        # The outputs of av lie at the queries, those of inverse at the keys.
        at_queries, at_keys = (x, d_out) if ctx.is_inverse else (d_out, x)
        return (
            None,
            ops.qk(at_queries, at_keys, None, *run.window_args, 1.0, 0.0, run.kernel) if needs_weights else None,
            _gather(run, weights, d_out, not ctx.is_inverse) if needs_x else None,
            None,
        )

    @staticmethod
    def jvp(ctx, _, t_weights, t_x, __):
        weights, x = ctx.saved_tensors
        return _sum(
            None if t_weights is None else _gather(ctx.run, t_weights, x, ctx.is_inverse),
            None if t_x is None else _gather(ctx.run, weights, t_x, ctx.is_inverse),
        )


def _gather(run: Run, weights: Tensor, x: Tensor, is_inverse: bool) -> Tensor:
    op = ops.inverse if is_inverse else ops.av
    return op(weights, x, *run.window_args, run.kernel)


class _RpbGrad(_Primitive):
    @staticmethod
    def forward(run: Run, weights):
        with _AutoDispatchBelowAutograd():
            return ops.rpb_grad(weights, *run.window_args, run.kernel)

    @staticmethod
    def backward(ctx, d_rpb):
        (weights,) = ctx.saved_tensors
        return None, _spread_rpb(d_rpb, weights, ctx.run)

    @staticmethod
    def jvp(ctx, _, t_weights):
        return ops.rpb_grad(t_weights, *ctx.run.window_args, ctx.run.kernel)


def _spread_rpb(rpb: Tensor, like: Tensor, run: Run) -> Tensor:
    """rpb read at every (query, slot), [B, *S, N, K] in the dtype of ``like`` [B, *S, N, *]: qk of nothing."""
    nothing = like.new_zeros(*like.shape[:-1], 8)
    return ops.qk(nothing, nothing, rpb, *run.window_args, 1.0, 0.0, run.kernel)


def qk(q, k, rpb, run: Run, fill: float, *, autograd: bool) -> Tensor:
    problem = run.problem(q, k, q, rpb, None, needs_grad=autograd and needs_grad(q, k, rpb), unfused=True)
    kernel = choose(problem, run.kernel)
    if not isinstance(kernel, UnfusedKernel):
        scores = reference.qk(q, k, rpb, run.window, run.scale)
        return scores if fill == -math.inf else scores.masked_fill(scores == -math.inf, fill)
    if autograd:
        return _QK.apply(replace(run, kernel=kernel.name), q, k, rpb, fill)
    return kernel.qk(problem, q, k, rpb, run.scale, fill)


def av(weights, v, run: Run, *, autograd: bool) -> Tensor:
    problem = run.problem(v, v, v, None, None, needs_grad=autograd and needs_grad(weights, v), unfused=True)
    kernel = choose(problem, run.kernel)
    if not isinstance(kernel, UnfusedKernel):
        return reference.av(weights, v, run.window)
    if autograd:
        return _Gather.apply(replace(run, kernel=kernel.name), weights, v, False)
    return kernel.av(problem, weights, v)


def inverse(weights, x, run: Run, *, autograd: bool) -> Tensor:
    if autograd:
        return _Gather.apply(run, weights, x, True)
    kernel = get_kernel(run.kernel)
    assert isinstance(kernel, UnfusedKernel), "only derivatives of unfused kernels ask for inverse"
    return kernel.inverse(run.problem(x, x, x, None, None, needs_grad=False, unfused=True), weights, x)


def rpb_grad(weights, run: Run, *, autograd: bool) -> Tensor:
    if autograd:
        return _RpbGrad.apply(run, weights)
    kernel = get_kernel(run.kernel)
    assert isinstance(kernel, UnfusedKernel), "only derivatives of unfused kernels ask for rpb_grad"
    x = weights[..., :1]
    return kernel.rpb_grad(run.problem(x, x, x, None, None, needs_grad=False, unfused=True), weights)
