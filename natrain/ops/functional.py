"""The public functions: check and canonicalise the arguments, then call one operator.

Layout: heads last. q, k, v are ``[B, x, heads, head_dim]``, ``[B, y, x, heads, head_dim]`` or
``[B, z, y, x, heads, head_dim]`` for rank 1, 2, 3. K, the number of neighbours, is the product of ``kernel_size``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from natrain.errors import invalid
from natrain.ops import eager
from natrain.ops.dropout import draw_seed
from natrain.ops.problem import (
    AXES,
    Problem,
    check_dropout,
    check_heads_last,
    check_key_mask,
    check_kv,
    check_rpb,
    check_same,
    check_scale,
    check_window,
)
from natrain.ops.registry import Explanation, explain_problem
from natrain.ops.run import Run, ops

_ARGUMENTS = """
        kernel_size: neighbours per axis, int or tuple of {na_dim}, >= 1; even sizes 2r: r before, itself, r-1 after.
        dilation: tokens between neighbouring keys per axis, >= 1; kernel_size * dilation <= length of the axis.
        stride: queries of one stride group share a window, 1 <= stride <= kernel_size; 1 is standard.
        is_causal: per axis, keys after the query are left out.
"""
_RPB = "rpb: relative position bias [heads, {rpb_shape}], q's dtype or float32; index = key - query + kernel_size - 1."
_KEY_MASK = (
    "key_mask: bool [B, {axes}], True where a key may be attended to (padding is False). What masked keys hold must\n"
    "            be finite. A query whose keys are all masked gets out 0, lse -inf and zero gradients."
)
_KERNEL = 'kernel: "auto", or a name of ``natrain.list_kernels()``; a named kernel is never replaced, it raises.'
_ATTENTION = (
    _ARGUMENTS
    + """        {rpb}
        {key_mask}
        scale: factor on q.k before the bias; default head_dim ** -0.5.
        dropout_p: probability in [0, 1) of dropping a key; the caller passes 0 in evaluation.
        return_lse: also return the natural log of the sum of exp(scores), differentiable.
        {kernel}

    Returns:
        out [B, {axes}, heads, head_dim of v], and with ``return_lse`` lse [B, {axes}, heads] float32 (float64 for it).

    Raises:
        ValueError: an argument is not allowed, or no kernel supports the problem.

    Source: Neighborhood Attention Transformer (arXiv 2204.07143, equations 1 to 3) with dilation (arXiv 2209.15001),
    causal masking (arXiv 2403.04690) and stride (arXiv 2504.16922).
    """
)


def _check_kernel(kernel: str) -> str:
    # Whether the name exists, the operator finds out: a registry is nothing for traced code.
    if not isinstance(kernel, str):
        raise invalid("kernel", kernel, 'a name of natrain.list_kernels(), or "auto"', 'kernel="auto"')
    return kernel


def _attend(check: Callable[..., Run], tensors: tuple[Tensor, ...], rpb, key_mask, options: tuple, return_lse: bool):
    """``check`` makes a Run of all these or raises; ``options`` are those of ``_run_of``."""
    key = eager.look(check, tensors, rpb, key_mask, options) if eager.is_plain() else None
    call = None if key is None else eager.recall(key)
    if call is None:
        run = check(*tensors, rpb, key_mask, *options)
        if key is not None:
            call = eager.remember(key, run, tensors, rpb, key_mask)
    outputs = None if call is None else call(tensors, rpb, key_mask)
    if outputs is None:
        run = run if call is None else call.run
        seed = draw_seed(tensors[0].device) if run.dropout_p > 0 else None
        op = ops.attention if len(tensors) == 3 else ops.attention_qkvpacked
        outputs = op(*tensors, rpb, key_mask, seed, *run.args)
    out, lse = outputs
    return (out, lse) if return_lse else out


def _run_of(q: Tensor, rpb, kernel_size, dilation, stride, is_causal, scale, dropout_p, kernel) -> Run:
    window = check_window(q.shape[1:-2], kernel_size, dilation, stride, is_causal)
    check_rpb(rpb, q, window)
    return Run(window, check_scale(scale, q.shape[-1]), check_dropout(dropout_p), _check_kernel(kernel))


def _make(na_dim: int) -> dict[str, Callable]:
    """The functions of one rank."""
    axes = ", ".join(AXES[na_dim])
    text = {"na_dim": na_dim, "axes": axes, "kernel": _KERNEL}
    text["key_mask"] = _KEY_MASK.format(axes=axes)
    text["rpb"] = _RPB.format(rpb_shape=", ".join(f"2 * k_{axis} - 1" for axis in AXES[na_dim]))

    def check(q: Tensor, k: Tensor, v: Tensor, rpb, key_mask, *options) -> Run:
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            check_heads_last(name, tensor, na_dim)
        check_kv(k, v, q)
        check_key_mask(key_mask, q)
        return _run_of(q, rpb, *options)

    def check_packed(qkv: Tensor, rpb, key_mask, *options) -> Run:
        check_heads_last("qkv", qkv, na_dim, extra="3, ")
        if qkv.shape[-3] != 3:
            raise invalid(
                "qkv.shape", tuple(qkv.shape), f"[B, {axes}, 3, heads, head_dim]", "qkv.unflatten(-1, (3, heads, -1))"
            )
        q = qkv.select(-3, 0)
        check_key_mask(key_mask, q)
        return _run_of(q, rpb, *options)

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kernel_size: int | tuple[int, ...],
        dilation: int | tuple[int, ...] = 1,
        stride: int | tuple[int, ...] = 1,
        is_causal: bool | tuple[bool, ...] = False,
        rpb: Tensor | None = None,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        return_lse: bool = False,
        kernel: str = "auto",
    ) -> Any:
        options = (kernel_size, dilation, stride, is_causal, scale, dropout_p, kernel)
        return _attend(check, (q, k, v), rpb, key_mask, options, return_lse)

    def attention_qkvpacked(
        qkv: Tensor,
        kernel_size: int | tuple[int, ...],
        dilation: int | tuple[int, ...] = 1,
        stride: int | tuple[int, ...] = 1,
        is_causal: bool | tuple[bool, ...] = False,
        rpb: Tensor | None = None,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        return_lse: bool = False,
        kernel: str = "auto",
    ) -> Any:
        options = (kernel_size, dilation, stride, is_causal, scale, dropout_p, kernel)
        return _attend(check_packed, (qkv,), rpb, key_mask, options, return_lse)

    def qk(
        q: Tensor,
        k: Tensor,
        kernel_size: int | tuple[int, ...],
        dilation: int | tuple[int, ...] = 1,
        stride: int | tuple[int, ...] = 1,
        is_causal: bool | tuple[bool, ...] = False,
        rpb: Tensor | None = None,
        scale: float | None = None,
        kernel: str = "auto",
    ) -> Tensor:
        check_heads_last("q", q, na_dim)
        check_heads_last("k", k, na_dim)
        check_same("k", k, q)
        run = _run_of(q, rpb, kernel_size, dilation, stride, is_causal, scale, 0.0, kernel)
        return ops.qk(q, k, rpb, *run.window_args, run.scale, -math.inf, run.kernel)

    def av(
        probs: Tensor,
        v: Tensor,
        kernel_size: int | tuple[int, ...],
        dilation: int | tuple[int, ...] = 1,
        stride: int | tuple[int, ...] = 1,
        is_causal: bool | tuple[bool, ...] = False,
        kernel: str = "auto",
    ) -> Tensor:
        check_heads_last("v", v, na_dim)
        run = _run_of(v, None, kernel_size, dilation, stride, is_causal, None, 0.0, kernel)
        if not isinstance(probs, Tensor):
            raise invalid("probs", type(probs).__name__, "a torch.Tensor", "probs=scores.softmax(-1)")
        check_same("probs", probs, v, (*v.shape[:-1], run.window.num_neighbors))
        return ops.av(probs, v, *run.window_args, run.kernel)

    documents = {
        attention: f"""Neighborhood attention of rank {na_dim}: every query attends to its nearest keys.

    Args:
        q, k, v: [B, {axes}, heads, head_dim], one floating dtype (any under autocast), one device, any strides. k
            and v may have fewer heads, a divisor of q's (query head n uses head n // (heads // kv_heads)), and v a
            head_dim of its own."""
        + _ATTENTION.format(**text),
        attention_qkvpacked: f"""``na{na_dim}d`` on the packed output of a qkv projection, with one packed gradient.

    Args:
        qkv: [B, {axes}, 3, heads, head_dim], a floating dtype; read in place."""
        + _ATTENTION.format(**text),
        qk: f"""Scores of rank {na_dim}: scale * q.k + rpb of every query with each of its neighbours.

    Args:
        q, k: [B, {axes}, heads, head_dim]."""
        + _ARGUMENTS.format(**text)
        + f"""        {text["rpb"]}
        scale: factor on q.k before the bias; default head_dim ** -0.5.
        {_KERNEL}

    Returns:
        scores [B, {axes}, heads, K] in q's dtype, K in row-major order of the window from its start; a slot that a
        causal query lacks holds -inf.

    Raises:
        ValueError: an argument is not allowed, or no kernel supports the problem.
    """,
        av: f"""Weighted sum of rank {na_dim}: probs times the values of every query's neighbours.

    Args:
        probs: [B, {axes}, heads, K] in v's dtype (any under autocast), in the order of ``na{na_dim}d_qk``; slots that a
            causal query lacks are ignored.
        v: [B, {axes}, heads, head_dim]."""
        + _ARGUMENTS.format(**text)
        + f"""        {_KERNEL}

    Returns:
        out [B, {axes}, heads, head_dim] in v's dtype.

    Raises:
        ValueError: an argument is not allowed, or no kernel supports the problem.
    """,
    }
    suffixes = {attention: "", attention_qkvpacked: "_qkvpacked", qk: "_qk", av: "_av"}
    for function, suffix in suffixes.items():
        function.__name__ = function.__qualname__ = f"na{na_dim}d{suffix}"
        function.__doc__ = documents[function]
    return {function.__name__: function for function in suffixes}


_FUNCTIONS = {name: function for na_dim in AXES for name, function in _make(na_dim).items()}
na1d, na1d_qkvpacked, na1d_qk, na1d_av = (_FUNCTIONS[f"na1d{s}"] for s in ("", "_qkvpacked", "_qk", "_av"))
na2d, na2d_qkvpacked, na2d_qk, na2d_av = (_FUNCTIONS[f"na2d{s}"] for s in ("", "_qkvpacked", "_qk", "_av"))
na3d, na3d_qkvpacked, na3d_qk, na3d_av = (_FUNCTIONS[f"na3d{s}"] for s in ("", "_qkvpacked", "_qk", "_av"))


def explain(problem: Problem | Tensor, *args: Any, **kwargs: Any) -> Explanation:
    """Which kernel ``kernel="auto"`` takes and why every other one is passed over; print the result.

    Call it with a ``Problem``, or exactly as you call ``na1d``, ``na2d`` or ``na3d`` (rank is read off ``q``),
    under the same autocast and grad mode.
    """
    if isinstance(problem, Problem):
        return explain_problem(problem)
    return explain_problem(_problem(problem, *args, **kwargs))


def _problem(
    q,
    k,
    v,
    kernel_size,
    dilation=1,
    stride=1,
    is_causal=False,
    rpb=None,
    key_mask=None,
    scale=None,
    dropout_p=0.0,
    return_lse=False,
    kernel="auto",
) -> Problem:
    if not isinstance(q, Tensor) or q.dim() - 3 not in AXES:
        value = tuple(q.shape) if isinstance(q, Tensor) else q
        raise invalid("q", value, "a Problem, or [B, *spatial, heads, head_dim] of rank 1 to 3", "explain(q, k, v, 7)")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_heads_last(name, tensor, q.dim() - 3)
    check_kv(k, v, q)
    check_key_mask(key_mask, q)
    run = _run_of(q, rpb, kernel_size, dilation, stride, is_causal, scale, dropout_p, kernel)
    return eager.Call(run, (q, k, v), rpb, key_mask).problem
