"""The torch operators of namespace ``natrain``: schemas, fakes, and what runs under which dispatch key.

Derivatives are written once for all kernels (attention.py, primitives.py). Autocast casts q, k, v; Autograd chooses the
kernel and differentiates; the backend key runs it. Kernels composed of torch operators are called under the Autograd
key itself, so that torch differentiates (and torch.compile sees) what they are made of. Unfused kernels are built from
four primitives whose derivatives are primitives again, hence of any order and in forward mode; one that also runs
attention as a whole does so for the value and the first derivative. A fused kernel has one backward; asking for more
raises and names the kernels that have it.

Every operator takes the window as four lists, then ``kernel``: a registered name or "auto".
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch._C import DispatchKey, DispatchKeySet, _AutoDispatchBelowAutograd, _ExcludeDispatchKeyGuard

from natrain.ops import attention, primitives, reference
from natrain.ops.run import Run, ops

_library = torch.library.Library("natrain", "DEF")
_WINDOW = "int[] kernel_size, int[] dilation, int[] stride, bool[] is_causal"
_RUN = f"{_WINDOW}, float scale, float dropout_p, str kernel"
_SAVED = "Tensor? rpb, Tensor? key_mask, Tensor out, Tensor lse, Tensor? seed"

for _schema in (
    f"attention(Tensor q, Tensor k, Tensor v, Tensor? rpb, Tensor? key_mask, Tensor? seed, {_RUN}) -> (Tensor, Tensor)",
    f"attention_qkvpacked(Tensor qkv, Tensor? rpb, Tensor? key_mask, Tensor? seed, {_RUN}) -> (Tensor, Tensor)",
    f"attention_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, {_SAVED}, {_RUN})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    f"attention_qkvpacked_backward(Tensor d_out, Tensor? d_lse, Tensor qkv, {_SAVED}, {_RUN}) -> (Tensor, Tensor)",
    f"attention_probs(Tensor[] tensors, Tensor? rpb, Tensor? key_mask, Tensor? seed, {_RUN})"
    " -> (Tensor, Tensor, Tensor)",
    "attention_probs_backward(Tensor d_out, Tensor? d_lse, Tensor[] tensors, Tensor? rpb, Tensor? key_mask,"
    f" Tensor probs, Tensor? seed, {_RUN}) -> (Tensor[], Tensor)",
    f"qk(Tensor q, Tensor k, Tensor? rpb, {_WINDOW}, float scale, float fill, str kernel) -> Tensor",
    f"av(Tensor weights, Tensor v, {_WINDOW}, str kernel) -> Tensor",
    f"inverse(Tensor weights, Tensor x, {_WINDOW}, str kernel) -> Tensor",
    f"rpb_grad(Tensor weights, {_WINDOW}, str kernel) -> Tensor",
):
    _library.define(_schema)


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
    lambda q, k, v, rpb, key_mask, seed, *run, autograd: attention.attention(
        (q, k, v), rpb, key_mask, seed, Run.of(*run), autograd=autograd
    ),
    lambda q, k, v, *_: attention.fake_attention((q, k, v)),
    cast=3,
)
_implement(
    "attention_qkvpacked",
    lambda qkv, rpb, key_mask, seed, *run, autograd: attention.attention(
        (qkv,), rpb, key_mask, seed, Run.of(*run), autograd=autograd
    ),
    lambda qkv, *_: attention.fake_attention((qkv,)),
    cast=1,
)
_implement(
    "attention_backward",
    lambda d_out, d_lse, q, k, v, rpb, key_mask, out, lse, seed, *run, autograd: attention.attention_backward(
        (q, k, v), d_out, d_lse, rpb, key_mask, out, lse, seed, Run.of(*run)
    ),
    lambda d_out, d_lse, q, k, v, rpb, *_: attention.fake_attention_backward((q, k, v), rpb),
    cast=0,
    autograd=lambda *args: attention.attention_backward_autograd(ops.attention_backward, *args),
)
_implement(
    "attention_qkvpacked_backward",
    lambda d_out, d_lse, qkv, rpb, key_mask, out, lse, seed, *run, autograd: attention.attention_backward(
        (qkv,), d_out, d_lse, rpb, key_mask, out, lse, seed, Run.of(*run)
    ),
    lambda d_out, d_lse, qkv, rpb, *_: attention.fake_attention_backward((qkv,), rpb),
    cast=0,
    autograd=lambda *args: attention.attention_backward_autograd(ops.attention_qkvpacked_backward, *args),
)
_implement(
    "attention_probs",
    lambda tensors, rpb, key_mask, seed, *run, autograd: attention.attention_probs(
        tensors, rpb, key_mask, seed, Run.of(*run)
    ),
    lambda tensors, rpb, key_mask, seed, *run: attention.fake_attention_probs(tensors, Run.of(*run)),
    cast=0,
    autograd=_below_autograd(ops.attention_probs),
)
_implement(
    "attention_probs_backward",
    lambda d_out, d_lse, tensors, rpb, key_mask, probs, seed, *run, autograd: attention.attention_probs_backward(
        d_out, d_lse, tensors, rpb, key_mask, probs, seed, Run.of(*run)
    ),
    lambda d_out, d_lse, tensors, rpb, *_: attention.fake_attention_probs_backward(tensors, rpb),
    cast=0,
    autograd=_below_autograd(ops.attention_probs_backward),
)
_implement(
    "qk",
    lambda q, k, rpb, ks, d, s, c, scale, fill, kernel, autograd: primitives.qk(
        q, k, rpb, Run.of(ks, d, s, c, scale, 0.0, kernel), fill, autograd=autograd
    ),
    lambda q, k, rpb, kernel_size, *_: q.new_empty(*q.shape[:-1], math.prod(kernel_size)),
    cast=2,
)
_implement(
    "av",
    lambda weights, v, ks, d, s, c, kernel, autograd: primitives.av(
        weights, v, Run.of(ks, d, s, c, 1.0, 0.0, kernel), autograd=autograd
    ),
    lambda weights, v, *_: torch.empty_like(v, memory_format=torch.contiguous_format),
    cast=2,
)
_implement(
    "inverse",
    lambda weights, x, ks, d, s, c, kernel, autograd: primitives.inverse(
        weights, x, Run.of(ks, d, s, c, 1.0, 0.0, kernel), autograd=autograd
    ),
    lambda weights, x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    cast=0,
)
_implement(
    "rpb_grad",
    lambda weights, ks, d, s, c, kernel, autograd: primitives.rpb_grad(
        weights, Run.of(ks, d, s, c, 1.0, 0.0, kernel), autograd=autograd
    ),
    lambda weights, kernel_size, *_: weights.new_empty(
        weights.shape[-2], *[2 * k - 1 for k in kernel_size], dtype=reference.accumulate_dtype(weights.dtype)
    ),
    cast=0,
)
