"""The oracle: neighborhood attention in plain PyTorch, any device and dtype, differentiated by torch itself.

Keys and values are gathered, never masked densely, so that a NaN or inf reaches only queries whose window holds it.
Inputs narrower than float32 are computed in it. Shapes: B batch, S spatial axes, N heads, D head_dim, K neighbours; k
and v have KV heads, one for each N // KV of q's, and v a head_dim Dv of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from natrain.ops.dropout import keep_mask
from natrain.ops.problem import Problem, Window
from natrain.ops.registry import Kernel, Limits, register
from natrain.ops.window import AxisWindow, axis_window

# Above this many bytes of gathered keys (or values) the work is cut into chunks that backward recomputes.
GATHER_BUDGET_BYTES = 256 * 2**20

_QUERY_AXES, _SLOT_AXES = "xyz", "ijk"


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scores, softmax and lse for inputs of ``dtype``."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def axis_windows(q: Tensor, window: Window) -> list[AxisWindow]:
    """The windows along each axis of ``q`` [B, *S, N, D]."""
    axes = zip(q.shape[1:-2], window.kernel_size, window.dilation, window.stride, window.is_causal, strict=True)
    return [axis_window(*axis, device=q.device) for axis in axes]


def _gather(x: Tensor, indices: list[Tensor]) -> Tensor:
    """[B, *S, ...] -> [B, S1, k1, S2, k2, ..., ...] with ``indices`` [S_a, k_a] along each spatial axis."""
    for axis, index in enumerate(indices):
        x = x.index_select(1 + 2 * axis, index.reshape(-1)).unflatten(1 + 2 * axis, index.shape)
    return x


def _letters(na_dim: int) -> tuple[str, str, str]:
    """Einsum subscripts of queries, window slots, and gathered keys, without batch, heads and head_dim."""
    queries, slots = _QUERY_AXES[:na_dim], _SLOT_AXES[:na_dim]
    return queries, slots, "".join(q + s for q, s in zip(queries, slots, strict=True))


def _slot_mask(axes: list[AxisWindow]) -> Tensor | None:
    """bool [*S, 1 (heads), K] of the slots that are neighbours; None when all are."""
    if all(axis.valid is None for axis in axes):
        return None
    na_dim = len(axes)
    mask = torch.ones((), dtype=torch.bool, device=axes[0].keys.device)
    for index, axis in enumerate(axes):
        valid = axis.valid if axis.valid is not None else torch.ones_like(axis.keys, dtype=torch.bool)
        shape = [1] * (2 * na_dim + 1)
        shape[index], shape[na_dim + 1 + index] = valid.shape
        mask = mask & valid.view(shape)
    return mask.flatten(-na_dim)


def neighbor_mask(key_mask: Tensor, axes: list[AxisWindow]) -> Tensor:
    """``key_mask`` [B, *S] at every neighbour of every query: bool [B, *S, 1 (heads), K]."""
    na_dim = len(axes)
    gathered = _gather(key_mask, [axis.keys for axis in axes])
    order = [0, *range(1, 2 * na_dim, 2), *range(2, 2 * na_dim + 1, 2)]
    return gathered.permute(order).flatten(-na_dim).unsqueeze(-2)


def normalize(scores: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(lse [...], probs [..., K])`` of scores; slots not ``allowed`` (bool, None for all) get none.

    A row without an allowed slot has lse -inf, probabilities 0 and no gradient.
    """
    if allowed is None:
        return torch.logsumexp(scores, dim=-1), torch.softmax(scores, dim=-1)
    scores = scores.masked_fill(~allowed, -math.inf)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(empty.squeeze(-1), -math.inf)
    return lse, torch.softmax(scores, dim=-1).masked_fill(empty, 0.0)


def _scores(q: Tensor, k: Tensor, rpb: Tensor | None, scale: float, axes: list[AxisWindow]) -> Tensor:
    """scale * q.k + rpb, [B, *S, N, K]; slots that are no neighbours hold -inf."""
    na_dim = len(axes)
    queries, slots, gathered = _letters(na_dim)
    k_neighbors = _gather(k, [axis.keys for axis in axes])
    # Only where heads are shared: an axis of one head would cost an ONNX file half of its speed.
    group = "g" if q.shape[-2] != k.shape[-2] else ""
    q = q.unflatten(-2, (k.shape[-2], -1)) if group else q
    scores = torch.einsum(f"b{queries}n{group}d,b{gathered}nd->b{queries}n{group}{slots}", q * scale, k_neighbors)
    scores = scores.flatten(-na_dim - 2, -na_dim - 1) if group else scores
    if rpb is not None:
        bias = _gather(rpb.to(q.dtype), [axis.bias for axis in axes])
        scores = scores + torch.einsum(f"n{gathered}->{queries}n{slots}", bias)
    scores = scores.flatten(-na_dim)
    mask = _slot_mask(axes)
    return scores if mask is None else scores.masked_fill(~mask, -math.inf)


def _weighted_sum(probs: Tensor, v: Tensor, axes: list[AxisWindow]) -> Tensor:
    """sum of probs [B, *S, N, K] times values over the neighbours: [B, *S, N, Dv]."""
    na_dim = len(axes)
    queries, slots, gathered = _letters(na_dim)
    mask = _slot_mask(axes)
    if mask is not None:
        probs = probs.masked_fill(~mask, 0.0)
    probs = probs.unflatten(-1, tuple(axis.keys.shape[1] for axis in axes))
    group = "g" if probs.shape[1 + na_dim] != v.shape[-2] else ""
    probs = probs.unflatten(1 + na_dim, (v.shape[-2], -1)) if group else probs
    v_neighbors = _gather(v, [axis.keys for axis in axes])
    out = torch.einsum(f"b{queries}n{group}{slots},b{gathered}nd->b{queries}n{group}d", probs, v_neighbors)
    return out.flatten(-3, -2) if group else out


def _chunks(x: Tensor, window: Window) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch and of the first spatial axis whose gathered keys stay within the budget each.

    Traced shapes (torch.compile with dynamic sizes) are never cut: a loop count cannot be symbolic, and a compiled
    graph plans its own memory.
    """
    batch, rows = x.shape[:2]
    if any(isinstance(size, torch.SymInt) for size in x.shape):
        yield slice(None), slice(None)
        return
    row_bytes = math.prod(x.shape[2:]) * window.num_neighbors * accumulate_dtype(x.dtype).itemsize
    rows_fit = max(1, GATHER_BUDGET_BYTES // max(row_bytes, 1))
    images_step = max(1, rows_fit // max(rows, 1))
    rows_step = max(1, rows if images_step > 1 else min(rows, rows_fit))
    for image in range(0, max(batch, 1), images_step):
        for row in range(0, max(rows, 1), rows_step):
            yield slice(image, min(image + images_step, batch)), slice(row, min(row + rows_step, rows))


def _run_chunks(x: Tensor, window: Window, compute: Callable[[slice, slice], tuple[Tensor, ...]]) -> list[Tensor]:
    """Run ``compute(images, rows)`` on every chunk and join its outputs; several chunks are checkpointed.

    ``x`` [B, *S, N, D]: what is gathered, or as large. Transforms of torch.func know no checkpoints: under them a
    derivative keeps what every chunk gathered.
    """
    chunks = list(_chunks(x, window))
    if len(chunks) == 1:
        return list(compute(*chunks[0]))
    by_image: dict[tuple[int, int], list[tuple[Tensor, ...]]] = {}
    is_recomputed = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
    for images, rows in chunks:
        if is_recomputed:
            outputs = checkpoint(compute, images, rows, use_reentrant=False, preserve_rng_state=False)
        else:
            outputs = compute(images, rows)
        by_image.setdefault((images.start, images.stop), []).append(outputs)
    joined = [[torch.cat(parts, dim=1) for parts in zip(*rows, strict=True)] for rows in by_image.values()]
    return [torch.cat(parts, dim=0) for parts in zip(*joined, strict=True)]


def dropout(probs: Tensor, seed: Tensor, dropout_p: float, shape: torch.Size, images: slice, rows: slice) -> Tensor:
    """Drop from ``probs``, the chunk ``(images, rows)`` of a problem whose q has ``shape``, and rescale the rest."""
    batch, *spatial, heads, _ = shape
    tokens = math.prod(spatial)
    query = torch.arange(tokens, device=probs.device).view(spatial)[rows].unsqueeze(-1)
    image = torch.arange(batch, device=probs.device)[images].view(-1, *[1] * (len(spatial) + 1))
    head = torch.arange(heads, device=probs.device)
    keep = keep_mask(seed, (image * heads + head) * tokens + query, probs.shape[-1], dropout_p)
    return torch.where(keep, probs / (1 - dropout_p), 0.0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    window: Window,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """``(out [B, *S, N, Dv], lse [B, *S, N])``; see ``natrain.na2d`` for the arguments."""
    dtype = accumulate_dtype(q.dtype)
    axes = axis_windows(q, window)
    qf, kf, vf = (x.to(dtype) for x in (q, k, v))

    def compute(images: slice, rows: slice) -> tuple[Tensor, Tensor]:
        own = [axes[0].of(rows), *axes[1:]]
        scores = _scores(qf[images, rows], kf[images], rpb, scale, own)
        lse, probs = normalize(scores, None if key_mask is None else neighbor_mask(key_mask[images], own))
        if seed is not None:
            probs = dropout(probs, seed, dropout_p, q.shape, images, rows)
        return _weighted_sum(probs, vf[images], own), lse

    out, lse = _run_chunks(max(q, v, key=lambda x: math.prod(x.shape[-2:])), window, compute)
    return out.to(q.dtype), lse


def qk(q: Tensor, k: Tensor, rpb: Tensor | None, window: Window, scale: float) -> Tensor:
    """Scores [B, *S, N, K] in q's dtype."""
    dtype = accumulate_dtype(q.dtype)
    axes = axis_windows(q, window)
    qf, kf = q.to(dtype), k.to(dtype)

    def compute(images: slice, rows: slice) -> tuple[Tensor]:
        own = [axes[0].of(rows), *axes[1:]]
        return (_scores(qf[images, rows], kf[images], rpb, scale, own),)

    (scores,) = _run_chunks(q, window, compute)
    return scores.to(q.dtype)


def av(probs: Tensor, v: Tensor, window: Window) -> Tensor:
    """sum probs * v: [B, *S, N, D] in v's dtype."""
    dtype = accumulate_dtype(v.dtype)
    axes = axis_windows(v, window)
    pf, vf = probs.to(dtype), v.to(dtype)

    def compute(images: slice, rows: slice) -> tuple[Tensor]:
        own = [axes[0].of(rows), *axes[1:]]
        return (_weighted_sum(pf[images, rows], vf[images], own),)

    (out,) = _run_chunks(v, window, compute)
    return out.to(v.dtype)


class ReferenceKernel(Kernel):
    """Dispatched by composition: torch differentiates it, to any order and in forward mode."""

    name = "reference"
    summary = "plain PyTorch, the oracle; any device and dtype, derivatives of any order"
    priority = 100
    limits = Limits(gqa=True, value_dim=True, key_mask=True, unfused=True, double_backward=True, forward_ad=True)

    def extra_reasons(self, problem: Problem) -> list[str]:
        return []


register(ReferenceKernel())
