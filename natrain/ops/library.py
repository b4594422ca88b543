"""The torch operators of namespace ``natrain`` and their derivatives, once for all kernels.

Python implementations under dispatch keys: Autocast casts q, k, v; Autograd chooses the kernel and differentiates;
the backend key runs it. Kernels composed of torch operators are called under the Autograd key itself, so that torch
differentiates (and torch.compile sees) what they are made of. Unfused kernels are built from four primitives whose
derivatives are primitives again, hence of any order and in forward mode; one that also runs attention as a whole does
so for the value and the first derivative. A fused kernel has one backward; asking for more raises and names the kernels
that have it.

Every operator takes the window as four lists, then ``kernel``: a registered name or "auto".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _AutoDispatchBelowAutograd, _ExcludeDispatchKeyGuard
from torch.autograd import forward_ad

from natrain.ops import reference
from natrain.ops.problem import Problem, Window, problem_of
from natrain.ops.registry import (
    FusedKernel,
    Kernel,
    UnfusedAttentionKernel,
    UnfusedKernel,
    choose,
    get_kernel,
    kernels,
)

_library = torch.library.Library("natrain", "DEF")
_WINDOW = "int[] kernel_size, int[] dilation, int[] stride, bool[] is_causal"
_RUN = f"{_WINDOW}, float scale, float dropout_p, str kernel"
_SAVED = "Tensor? rpb, Tensor out, Tensor lse, Tensor? seed"

for _schema in (
    f"attention(Tensor q, Tensor k, Tensor v, Tensor? rpb, Tensor? seed, {_RUN}) -> (Tensor, Tensor)",
    f"attention_qkvpacked(Tensor qkv, Tensor? rpb, Tensor? seed, {_RUN}) -> (Tensor, Tensor)",
    f"attention_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, {_SAVED}, {_RUN})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    f"attention_qkvpacked_backward(Tensor d_out, Tensor? d_lse, Tensor qkv, {_SAVED}, {_RUN}) -> (Tensor, Tensor)",
    f"attention_probs(Tensor[] tensors, Tensor? rpb, Tensor? seed, {_RUN}) -> (Tensor, Tensor, Tensor)",
    "attention_probs_backward(Tensor d_out, Tensor? d_lse, Tensor[] tensors, Tensor? rpb, Tensor probs, Tensor? seed,"
    f" {_RUN}) -> (Tensor[], Tensor)",
    f"qk(Tensor q, Tensor k, Tensor? rpb, {_WINDOW}, float scale, float fill, str kernel) -> Tensor",
    f"av(Tensor weights, Tensor v, {_WINDOW}, str kernel) -> Tensor",
    f"inverse(Tensor weights, Tensor x, {_WINDOW}, str kernel) -> Tensor",
    f"rpb_grad(Tensor weights, {_WINDOW}, str kernel) -> Tensor",
):
    _library.define(_schema)

ops = torch.ops.natrain


@dataclass(frozen=True)
class Run:
    """The arguments of an operator that are no tensors."""

    window: Window
    scale: float = 1.0
    dropout_p: float = 0.0
    kernel: str = "auto"

    @staticmethod
    def of(kernel_size, dilation, stride, is_causal, scale, dropout_p, kernel) -> Run:
        window = Window(tuple(kernel_size), tuple(dilation), tuple(stride), tuple(is_causal))
        return Run(window, scale, dropout_p, kernel)

    @property
    def window_args(self) -> tuple:
        window = self.window
        return list(window.kernel_size), list(window.dilation), list(window.stride), list(window.is_causal)

    @property
    def args(self) -> tuple:
        """In the order of the schemas of attention."""
        return *self.window_args, self.scale, self.dropout_p, self.kernel

    def problem(self, x: Tensor, rpb: Tensor | None, *, needs_grad: bool, unfused: bool = False) -> Problem:
        return problem_of(x, self.window, rpb, self.dropout_p, needs_grad=needs_grad, unfused=unfused)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _refuse(kernel: str, what: str, capability: str) -> NotImplementedError:
    able = " or ".join(f'kernel="{k.name}"' for k in kernels() if getattr(k.limits, capability))
    return NotImplementedError(f'kernel="{kernel}" has no {what}. Try: {able}')


# ---------------------------------------------------------------------------------------------------------------------
# attention: out and lse of q, k, v or of one packed qkv


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
        raise _refuse(ctx.run.kernel, "forward-mode derivative", "forward_ad")


def _attention(tensors: tuple[Tensor, ...], rpb: Tensor | None, seed: Tensor | None, run: Run, *, autograd: bool):
    """Choose and run a kernel on (q, k, v) or (qkv,); under ``autograd`` the result is differentiable."""
    q, k, v = tensors if len(tensors) == 3 else tensors[0].unbind(-3)
    needs_grad = autograd and _needs_grad(*tensors, rpb)
    kernel = choose(run.problem(q, rpb, needs_grad=needs_grad), run.kernel)
    run = replace(run, kernel=kernel.name)
    if isinstance(kernel, UnfusedAttentionKernel) and not (autograd and _has_tangent(*tensors, rpb)):
        if needs_grad:
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
        q, k, v = tensors if len(tensors) == 3 else tensors[0].unbind(-3)
        outputs = _compose(get_kernel(ctx.run.kernel), q, k, v, rpb, seed, ctx.run)
        given = [(out, d) for out, d in zip(outputs, (d_out, d_lse), strict=True) if d is not None]
        grads = torch.autograd.grad(
            [out for out, _ in given], [arguments[i] for i in wanted], [d for _, d in given],
            create_graph=True, allow_unused=True,
        )  # fmt: skip
        by_argument = dict(zip(wanted, grads, strict=True))
        return tuple(by_argument.get(i) for i in range(len(arguments)))


def _attention_probs(tensors, rpb, seed, run: Run):
    q, k, v = tensors if len(tensors) == 3 else tensors[0].unbind(-3)
    kernel, problem = get_kernel(run.kernel), run.problem(q, rpb, needs_grad=False)
    assert isinstance(kernel, UnfusedAttentionKernel)
    return kernel.forward(problem, q, k, v, rpb, seed, run.scale, run.dropout_p)


def _attention_probs_backward(d_out, d_lse, tensors, rpb, probs, seed, run: Run):
    kernel, problem = get_kernel(run.kernel), run.problem(d_out, rpb, needs_grad=True)
    assert isinstance(kernel, UnfusedAttentionKernel)
    d_tensors = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    q, k, v = tensors if len(tensors) == 3 else tensors[0].unbind(-3)
    d_q, d_k, d_v = d_tensors if len(tensors) == 3 else d_tensors[0].unbind(-3)
    d_rpb = kernel.backward(
        problem, d_out, d_lse, q, k, v, probs, seed, run.scale, run.dropout_p, d_q, d_k, d_v
    )  # fmt: skip
    return d_tensors, d_out.new_empty(0) if d_rpb is None or rpb is None else d_rpb.to(rpb.dtype)


def _fake_attention_probs_backward(tensors, rpb):
    *d_tensors, d_rpb = _fake_attention_backward(tensors, rpb)
    return d_tensors, d_rpb


def _fake_attention_probs(tensors, run: Run):
    out, lse = _fake_attention(tensors)
    return out, lse, get_kernel(run.kernel).empty_probs(out, run.window)


def _attention_backward(tensors, d_out, d_lse, rpb, out, lse, seed, run: Run):
    """Gradients in the layout of ``tensors``, then rpb's (empty where there is none)."""
    kernel = choose(run.problem(out, rpb, needs_grad=True), run.kernel)
    assert isinstance(kernel, FusedKernel)
    # Explicitly contiguous: the inputs may be views with gaps or expanded axes, which a gradient must not inherit.
    d_tensors = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)
    q, k, v = tensors if len(tensors) == 3 else tensors[0].unbind(-3)
    d_q, d_k, d_v = d_tensors if len(tensors) == 3 else d_tensors[0].unbind(-3)
    d_rpb = kernel.backward(
        run.problem(out, rpb, needs_grad=True),
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
        raise _refuse(ctx.name, "double backward", "double_backward")

    @staticmethod
    def jvp(ctx, *_):
        raise _refuse(ctx.name, "forward-mode derivative", "forward_ad")


def _attention_backward_autograd(op, *args):
    """The first derivative is an end: what comes out remembers that it cannot be differentiated again."""
    with _AutoDispatchBelowAutograd():
        grads = op(*args)
    inputs = [arg for arg in args if isinstance(arg, Tensor)]
    if not _needs_grad(*inputs):
        return grads
    return _NoDoubleBackward.apply(args[-1], len(grads), *grads, *inputs)


def _fake_attention(tensors: tuple[Tensor, ...]):
    q = tensors[0] if len(tensors) == 3 else tensors[0].select(-3, 0)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:-1], dtype=reference.accumulate_dtype(q.dtype))


def _fake_attention_backward(tensors, rpb):
    d_rpb = tensors[0].new_empty(0) if rpb is None else torch.empty_like(rpb, memory_format=torch.contiguous_format)
    return *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors), d_rpb


# ---------------------------------------------------------------------------------------------------------------------
# qk, av, inverse, rpb_grad: linear in each tensor, so every derivative is made of the four again


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


class _AV(_Primitive):
    @staticmethod
    def forward(run: Run, weights, v):
        with _AutoDispatchBelowAutograd():
            return ops.av(weights, v, *run.window_args, run.kernel)

    @staticmethod
    def backward(ctx, d_out):
        weights, v = ctx.saved_tensors
        window, kernel = ctx.run.window_args, ctx.run.kernel
        _, needs_weights, needs_v = ctx.needs_input_grad
        return (
            None,
            ops.qk(d_out, v, None, *window, 1.0, 0.0, kernel) if needs_weights else None,
            ops.inverse(weights, d_out, *window, kernel) if needs_v else None,
        )

    @staticmethod
    def jvp(ctx, _, t_weights, t_v):
        weights, v = ctx.saved_tensors
        window, kernel = ctx.run.window_args, ctx.run.kernel
        return _sum(
            None if t_weights is None else ops.av(t_weights, v, *window, kernel),
            None if t_v is None else ops.av(weights, t_v, *window, kernel),
        )


class _Inverse(_Primitive):
    @staticmethod
    def forward(run: Run, weights, x):
        with _AutoDispatchBelowAutograd():
            return ops.inverse(weights, x, *run.window_args, run.kernel)

    @staticmethod
    def backward(ctx, d_out):
        weights, x = ctx.saved_tensors
        window, kernel = ctx.run.window_args, ctx.run.kernel
        _, needs_weights, needs_x = ctx.needs_input_grad
        return (
            None,
            ops.qk(x, d_out, None, *window, 1.0, 0.0, kernel) if needs_weights else None,
            ops.av(weights, d_out, *window, kernel) if needs_x else None,
        )

    @staticmethod
    def jvp(ctx, _, t_weights, t_x):
        weights, x = ctx.saved_tensors
        window, kernel = ctx.run.window_args, ctx.run.kernel
        return _sum(
            None if t_weights is None else ops.inverse(t_weights, x, *window, kernel),
            None if t_x is None else ops.inverse(weights, t_x, *window, kernel),
        )


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


def _qk(q, k, rpb, run: Run, fill: float, *, autograd: bool) -> Tensor:
    needs_grad = autograd and _needs_grad(q, k, rpb)
    problem = run.problem(q, rpb, needs_grad=needs_grad, unfused=True)
    kernel = choose(problem, run.kernel)
    if not isinstance(kernel, UnfusedKernel):
        scores = reference.qk(q, k, rpb, run.window, run.scale)
        return scores if fill == -math.inf else scores.masked_fill(scores == -math.inf, fill)
    if autograd:
        return _QK.apply(replace(run, kernel=kernel.name), q, k, rpb, fill)
    return kernel.qk(problem, q, k, rpb, run.scale, fill)


def _av(weights, v, run: Run, *, autograd: bool) -> Tensor:
    problem = run.problem(v, None, needs_grad=autograd and _needs_grad(weights, v), unfused=True)
    kernel = choose(problem, run.kernel)
    if not isinstance(kernel, UnfusedKernel):
        return reference.av(weights, v, run.window)
    if autograd:
        return _AV.apply(replace(run, kernel=kernel.name), weights, v)
    return kernel.av(problem, weights, v)


def _inverse(weights, x, run: Run, *, autograd: bool) -> Tensor:
    if autograd:
        return _Inverse.apply(run, weights, x)
    kernel = get_kernel(run.kernel)
    assert isinstance(kernel, UnfusedKernel), "only derivatives of unfused kernels ask for inverse"
    return kernel.inverse(run.problem(x, None, needs_grad=False, unfused=True), weights, x)


def _rpb_grad(weights, run: Run, *, autograd: bool) -> Tensor:
    if autograd:
        return _RpbGrad.apply(run, weights)
    kernel = get_kernel(run.kernel)
    assert isinstance(kernel, UnfusedKernel), "only derivatives of unfused kernels ask for rpb_grad"
    return kernel.rpb_grad(run.problem(weights[..., :1], None, needs_grad=False, unfused=True), weights)


# ---------------------------------------------------------------------------------------------------------------------
# registration


def _implement(name: str, run: Callable, fake: Callable, *, cast: int, autograd: Callable | None = None) -> None:
    """Register ``run(*args, autograd=)`` under Autograd and the backend, ``fake`` for shapes, a cast under autocast.

    ``cast``: how many leading tensors autocast casts (q, k, v: rpb keeps its precision); 0 for internal operators.
    """
    op = getattr(ops, name)

    def under_autocast(device: str, key: DispatchKey) -> Callable:
        def fn(*args):
            dtype = torch.get_autocast_dtype(device)
            casted = [
                a.to(dtype) if i < cast and a.is_floating_point() and a.dtype != torch.float64 else a
                for i, a in enumerate(args)
            ]
            with _ExcludeDispatchKeyGuard(DispatchKeySet(key)):
                return op(*casted)

        return fn

    _library.impl(name, autograd or (lambda *args: run(*args, autograd=True)), "Autograd")
    _library.impl(name, lambda *args: run(*args, autograd=False), "CompositeExplicitAutograd")
    torch.library.register_fake(f"natrain::{name}", fake, lib=_library)
    if cast:
        _library.impl(name, under_autocast("cpu", DispatchKey.AutocastCPU), "AutocastCPU")
        _library.impl(name, under_autocast("cuda", DispatchKey.AutocastCUDA), "AutocastCUDA")


def _below_autograd(op) -> Callable:
    """An internal operator, called by ``_ProbsAttention`` and by the graphs that torch.compile makes of it: what it
    returns requires no gradient, so that asking for one raises."""

    def run(*args):
        with _AutoDispatchBelowAutograd():
            return op(*args)

    return run


_implement(
    "attention",
    lambda q, k, v, rpb, seed, *run, autograd: _attention((q, k, v), rpb, seed, Run.of(*run), autograd=autograd),
    lambda q, k, v, *_: _fake_attention((q, k, v)),
    cast=3,
)
_implement(
    "attention_qkvpacked",
    lambda qkv, rpb, seed, *run, autograd: _attention((qkv,), rpb, seed, Run.of(*run), autograd=autograd),
    lambda qkv, *_: _fake_attention((qkv,)),
    cast=1,
)
_implement(
    "attention_backward",
    lambda d_out, d_lse, q, k, v, rpb, out, lse, seed, *run, autograd: _attention_backward(
        (q, k, v), d_out, d_lse, rpb, out, lse, seed, Run.of(*run)
    ),
    lambda d_out, d_lse, q, k, v, rpb, *_: _fake_attention_backward((q, k, v), rpb),
    cast=0,
    autograd=lambda *args: _attention_backward_autograd(ops.attention_backward, *args),
)
_implement(
    "attention_qkvpacked_backward",
    lambda d_out, d_lse, qkv, rpb, out, lse, seed, *run, autograd: _attention_backward(
        (qkv,), d_out, d_lse, rpb, out, lse, seed, Run.of(*run)
    ),
    lambda d_out, d_lse, qkv, rpb, *_: _fake_attention_backward((qkv,), rpb),
    cast=0,
    autograd=lambda *args: _attention_backward_autograd(ops.attention_qkvpacked_backward, *args),
)
_implement(
    "attention_probs",
    lambda tensors, rpb, seed, *run, autograd: _attention_probs(tensors, rpb, seed, Run.of(*run)),
    lambda tensors, rpb, seed, *run: _fake_attention_probs(tensors, Run.of(*run)),
    cast=0,
    autograd=_below_autograd(ops.attention_probs),
)
_implement(
    "attention_probs_backward",
    lambda d_out, d_lse, tensors, rpb, probs, seed, *run, autograd: _attention_probs_backward(
        d_out, d_lse, tensors, rpb, probs, seed, Run.of(*run)
    ),
    lambda d_out, d_lse, tensors, rpb, *_: _fake_attention_probs_backward(tensors, rpb),
    cast=0,
    autograd=_below_autograd(ops.attention_probs_backward),
)
_implement(
    "qk",
    lambda q, k, rpb, ks, d, s, c, scale, fill, kernel, autograd: _qk(
        q, k, rpb, Run.of(ks, d, s, c, scale, 0.0, kernel), fill, autograd=autograd
    ),
    lambda q, k, rpb, kernel_size, *_: q.new_empty(*q.shape[:-1], math.prod(kernel_size)),
    cast=2,
)
_implement(
    "av",
    lambda weights, v, ks, d, s, c, kernel, autograd: _av(
        weights, v, Run.of(ks, d, s, c, 1.0, 0.0, kernel), autograd=autograd
    ),
    lambda weights, v, *_: torch.empty_like(v, memory_format=torch.contiguous_format),
    cast=2,
)
_implement(
    "inverse",
    lambda weights, x, ks, d, s, c, kernel, autograd: _inverse(
        weights, x, Run.of(ks, d, s, c, 1.0, 0.0, kernel), autograd=autograd
    ),
    lambda weights, x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    cast=0,
)
_implement(
    "rpb_grad",
    lambda weights, ks, d, s, c, kernel, autograd: _rpb_grad(
        weights, Run.of(ks, d, s, c, 1.0, 0.0, kernel), autograd=autograd
    ),
    lambda weights, kernel_size, *_: weights.new_empty(
        weights.shape[-2], *[2 * k - 1 for k in kernel_size], dtype=reference.accumulate_dtype(weights.dtype)
    ),
    cast=0,
)
