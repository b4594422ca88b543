"""The short way of an eager call: from checked arguments straight to the kernel, past torch's dispatcher.

Operators (library.py) are what torch.compile, vmap, modes and tensor subclasses see; a call that none of them watches
need not pay for them. Calls that look alike are checked once and remembered, and everything that is neither plain nor
computed by a kernel as a whole takes the operator.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _dispatch_tls_local_exclude_set,
    _dispatch_tls_local_include_set,
    _ExcludeDispatchKeyGuard,
    _len_torch_function_stack,
)
from torch.autograd import forward_ad

from natrain.ops import attention
from natrain.ops.dropout import draw_seed
from natrain.ops.problem import autocast_dtype
from natrain.ops.registry import FusedKernel, UnfusedAttentionKernel, choose
from natrain.ops.run import Run, needs_grad

_PLAIN_TYPES = frozenset({Tensor, nn.Parameter})
_OPTION_TYPES = frozenset({int, bool, float, str, tuple, type(None)})
_AUTOCAST = DispatchKeySet(DispatchKey.AutocastCPU) | DispatchKeySet(DispatchKey.AutocastCUDA)
_AUTOCAST_BITS = _AUTOCAST.raw_repr()
_MOST_CALLS = 4096


def _dispatch_state() -> tuple[int, int]:
    """What this thread adds to and takes from every dispatch; autocast aside, which ``autocast_dtype`` asks for."""
    return (
        _dispatch_tls_local_include_set().raw_repr(),
        _dispatch_tls_local_exclude_set().raw_repr() | _AUTOCAST_BITS,
    )


def _plain_states() -> frozenset[tuple[int, int]]:
    """The states of a thread under no mode and no transform: as it starts, in inference mode, in a backward pass."""
    states = []

    class Visit(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, d_x: Tensor) -> Tensor:
            states.append(_dispatch_state())
            return d_x

    def visit() -> None:
        states.append(_dispatch_state())
        with torch.inference_mode():
            states.append(_dispatch_state())
        Visit.apply(torch.zeros((), requires_grad=True)).backward()

    # Whoever imports this module may be inside of anything; a new thread is not.
    thread = threading.Thread(target=visit)
    thread.start()
    thread.join()
    return frozenset(states)


_PLAIN_STATES = _plain_states()


def is_plain() -> bool:
    """Whether nothing but autograd and autocast would see an operator that is called now."""
    return (
        not torch.compiler.is_compiling()
        and _dispatch_state() in _PLAIN_STATES
        and not _len_torch_function_stack()
        and forward_ad._current_level < 0
    )


def look(check: Callable, tensors: Sequence[Tensor], rpb: Any, key_mask: Any, options: tuple) -> tuple | None:
    """A key that two calls share only if ``check`` says the same of both; None where that cannot be said cheaply.

    ``options``: whatever else the caller gave, in a fixed order.
    """
    key: list[Any] = [check, torch.are_deterministic_algorithms_enabled()]
    is_recorded = False
    try:
        for x in (*tensors, rpb, key_mask):
            if x is None:
                key.append(None)
            elif type(x) in _PLAIN_TYPES and not x.is_neg():  # negated when the dispatcher sees it
                key += (x.shape, x.dtype, x.device)
                is_recorded = is_recorded or x.requires_grad
            else:
                return None
    except RuntimeError:  # a nested tensor has no shape; the check will say so
        return None
    for option in options:
        # Types as well: 1, 1.0 and True are equal, and not all of them are allowed.
        kind = type(option)
        if kind not in _OPTION_TYPES:
            return None
        key.append(tuple(map(type, option)) if kind is tuple else kind)
    if tensors[0] is None:
        return None
    device = tensors[0].device.type
    if device == "meta":  # shapes come from the operator's fake
        return None
    key += (is_recorded and torch.is_grad_enabled(), autocast_dtype(device), options)
    return tuple(key)


class Call:
    """What all calls of one key share: the checked arguments and the problem they make."""

    __slots__ = ("run", "problem", "autocast", "is_recorded")

    def __init__(self, run: Run, tensors: Sequence[Tensor], rpb: Tensor | None, key_mask: Tensor | None) -> None:
        self.run = run
        is_cast = tensors[0].dtype != torch.float64
        self.autocast = autocast_dtype(tensors[0].device.type) if is_cast else None
        self.is_recorded = needs_grad(*tensors, rpb)
        tensors = attention.unpacked(self._cast(tensors))
        self.problem = run.problem(*tensors, rpb, key_mask, needs_grad=self.is_recorded)

    def _cast(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors if self.autocast is None else [t.to(self.autocast) for t in tensors]

    def __call__(
        self, tensors: Sequence[Tensor], rpb: Tensor | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """``(out, lse)``, or None where no kernel computes the whole and the operator has to compose it.

        Raises:
            ValueError: no kernel supports the problem.
        """
        kernel = choose(self.problem, self.run.kernel)
        if not isinstance(kernel, (FusedKernel, UnfusedAttentionKernel)):
            return None
        seed = draw_seed(tensors[0].device) if self.run.dropout_p > 0 else None
        if self.autocast is None:
            return self._run(kernel, tensors, rpb, key_mask, seed)
        tensors = self._cast(tensors)
        with _ExcludeDispatchKeyGuard(_AUTOCAST):
            return self._run(kernel, tensors, rpb, key_mask, seed)

    def _run(self, kernel, tensors, rpb, key_mask, seed) -> tuple[Tensor, Tensor]:
        if not self.is_recorded:
            return self.forward(kernel, tensors, rpb, key_mask, seed)[:2]
        if isinstance(kernel, FusedKernel):
            return _Fused.apply(self, kernel, rpb, key_mask, seed, *tensors)
        return _Probs.apply(self, kernel, rpb, key_mask, seed, *tensors)[:2]

    def forward(self, kernel, tensors, rpb, key_mask, seed) -> tuple[Tensor, ...]:
        q, k, v = attention.unpacked(tensors)
        run = self.run
        return kernel.forward(self.problem, q, k, v, rpb, key_mask, seed, run.scale, run.dropout_p)


class _Fused(torch.autograd.Function):
    """``attention.FusedAttention`` without operators in between."""

    @staticmethod
    def forward(ctx, call: Call, kernel: FusedKernel, rpb, key_mask, seed, *tensors):
        out, lse = call.forward(kernel, tensors, rpb, key_mask, seed)
        ctx.call, ctx.kernel = call, kernel
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rpb, key_mask, seed, out, lse, *tensors)
        return out, lse

    @staticmethod
    def backward(ctx, d_out, d_lse):
        call, kernel, saved = ctx.call, ctx.kernel, ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain():
            run = replace(call.run, kernel=kernel.name)
            return None, None, *attention.fused_gradients(run, d_out, d_lse, saved)
        rpb, key_mask, seed, out, lse, *tensors = saved
        d_lse = None if d_lse is None else d_lse.resolve_neg()
        d_out = torch.zeros_like(out) if d_out is None else d_out.resolve_neg()
        d_tensors, d_rpb = attention.run_fused_backward(
            kernel, call.problem, call.run, d_out, d_lse, tensors, rpb, key_mask, out, lse, seed
        )
        return None, None, None if rpb is None else d_rpb.to(rpb.dtype), None, None, *d_tensors


class _Probs(torch.autograd.Function):
    """``attention.ProbsAttention`` without operators in between."""

    @staticmethod
    def forward(ctx, call: Call, kernel: UnfusedAttentionKernel, rpb, key_mask, seed, *tensors):
        out, lse, probs = call.forward(kernel, tensors, rpb, key_mask, seed)
        ctx.call, ctx.kernel = call, kernel
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(probs)
        ctx.save_for_backward(rpb, key_mask, seed, probs, *tensors)
        return out, lse, probs

    @staticmethod
    def backward(ctx, d_out, d_lse, _):
        call, kernel, saved = ctx.call, ctx.kernel, ctx.saved_tensors
        if torch.is_grad_enabled():
            run = replace(call.run, kernel=kernel.name)
            needed = ctx.needs_input_grad[2:]
            return None, None, *attention.composed_gradients(run, d_out, d_lse, saved, needed)
        if not is_plain():
            run = replace(call.run, kernel=kernel.name)
            return None, None, *attention.probs_gradients(run, d_out, d_lse, saved)
        rpb, _, seed, probs, *tensors = saved
        d_lse = None if d_lse is None else d_lse.resolve_neg()
        d_out = attention.zeros_of_out(tensors) if d_out is None else d_out.resolve_neg()
        d_tensors, d_rpb = attention.run_probs_backward(
            kernel, call.problem, call.run, d_out, d_lse, tensors, probs, seed
        )
        return None, None, None if rpb is None else d_rpb.to(rpb.dtype), None, None, *d_tensors


_calls: dict[tuple, Call] = {}


def recall(key: tuple) -> Call | None:
    """The call remembered for ``key``, a result of ``look``; None for one not seen yet."""
    try:
        return _calls.get(key)
    except TypeError:  # an option of options that cannot be hashed; the check will say so
        return None


def remember(key: tuple, run: Run, tensors: Sequence[Tensor], rpb: Tensor | None, key_mask: Tensor | None) -> Call:
    """The call that ``recall`` finds from now on."""
    if len(_calls) >= _MOST_CALLS:
        _calls.clear()
    _calls[key] = call = Call(run, tensors, rpb, key_mask)
    return call
