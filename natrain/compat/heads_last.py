"""Attention of NATTEN 0.17 and later on natrain's operators: neighbours plus additional tokens, grouped heads, merging.

Heads last: query ``[B, *spatial, heads, head_dim]``, key and value ``[B, *spatial, heads_kv, head_dim]``, additional
keys and values ``[B, tokens, heads_kv, head_dim]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from natrain import ops

NA = {1: ops.na1d, 2: ops.na2d, 3: ops.na3d}


def _accumulate(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """Every key and value head once for each query head of its group (torch's order of grouped attention)."""
    return tensor if tensor.shape[-2] == heads else tensor.repeat_interleave(heads // tensor.shape[-2], dim=-2)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """(out [B, T, heads, head_dim_v], lse [B, T, heads]) of plain attention on ``[B, T, heads, head_dim]``.

    The scores of all pairs exist at once in float32 (float64 for it); a causal query sees keys up to its own index.
    """
    heads, dtype = query.shape[-2], _accumulate(query)
    key, value = _repeat_heads(key, heads), _repeat_heads(value, heads)
    scores = torch.einsum("btnd,bmnd->btnm", query.to(dtype) * scale, key.to(dtype))
    if is_causal:
        future = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(future[:, None], -torch.inf)
    out = torch.einsum("btnm,bmnd->btnd", scores.softmax(-1), value.to(dtype))
    return out.to(query.dtype), scores.logsumexp(-1)


def neighborhood_attention(
    na_dim: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: tuple[int, ...],
    is_causal: tuple[bool, ...],
    scale: float,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out, or (out, lse): every query attends to its neighbours and to all additional tokens, in one softmax.

    The two parts are computed apart and merged by their lse.
    """
    with torch.autocast(query.device.type, enabled=False):
        out, lse = NA[na_dim](
            query,
            key,
            value,
            kernel_size,
            dilation,
            stride=stride,
            is_causal=is_causal,
            rpb=rpb,
            scale=scale,
            return_lse=True,
        )
        if additional_keys is not None:
            extra, extra_lse = dense_attention(query.flatten(1, na_dim), additional_keys, additional_values, scale)
            parts = [out, extra.view(out.shape)], [lse, extra_lse.view(lse.shape)]
            out, lse = ops.merge_attentions(*parts)
    return (out, lse) if return_lse else out
