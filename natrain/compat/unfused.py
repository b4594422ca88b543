"""qk and av as NATTEN 0.14 to 0.17 had them: heads first, no scale, additional tokens behind the window's.

Layouts: query, key, value ``[B, heads, *spatial, head_dim]``, weights ``[B, heads, *spatial, K + tokens]``,
additional keys and values ``[B, heads, tokens, head_dim]``. Results are contiguous, as theirs. Slots of keys that a
causal query lacks hold -inf in the scores and are ignored in the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from natrain import ops
from natrain.compat.arguments import (
    check_additional_keys,
    check_additional_values,
    check_bias,
    check_tensors,
    check_window,
    get_num_na_weights,
    refuse,
    refuse_causal_bias,
)
from natrain.compat.switches import unfused_kernel

QK = {1: ops.na1d_qk, 2: ops.na2d_qk, 3: ops.na3d_qk}
AV = {1: ops.na1d_av, 2: ops.na2d_av, 3: ops.na3d_av}


def qk(
    na_dim: int,
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    additional_keys: Tensor | None,
    version: str,
) -> Tensor:
    """Scores q.k + rpb of every query with its neighbours, then with the additional keys (no scale).

    Raises:
        NotImplementedError: a bias with causal attention.
        RuntimeError: shapes, dtypes or a window that NATTEN refused, even kernel sizes among them.
        ValueError: additional keys that do not fit, nested tensors beside others.
    """
    if query.is_nested or key.is_nested:
        _check_nested({"query": query, "key": key}, {"additional_keys": additional_keys})
        extra = [None] * query.size(0) if additional_keys is None else additional_keys.unbind()
        return torch.nested.nested_tensor(
            [
                qk(na_dim, q, k, rpb, kernel_size, dilation, is_causal, k_extra, version)
                for q, k, k_extra in zip(query.unbind(), key.unbind(), extra, strict=True)
            ]
        )
    refuse_causal_bias(is_causal, rpb is not None)
    check_tensors(na_dim, query, key=key)
    check_window(query.shape[2:-1], kernel_size, dilation, odd=f"NATTEN {version}'s qk")
    if rpb is not None:
        check_bias(rpb, query.shape[1], kernel_size)
        rpb = rpb.to(key.dtype)
    num_additional = check_additional_keys(query, additional_keys)
    with torch.autocast(query.device.type, enabled=False):
        scores = QK[na_dim](
            query.movedim(1, -2),
            key.movedim(1, -2),
            kernel_size,
            dilation,
            is_causal=is_causal,
            rpb=rpb,
            scale=1.0,
            kernel=unfused_kernel(query.device),
        ).movedim(-2, 1)
        if num_additional:
            flat = query.flatten(2, -2) @ additional_keys.transpose(-2, -1)
            scores = torch.cat([scores, flat.unflatten(2, query.shape[2:-1])], dim=-1)
    return scores.contiguous()


def av(
    na_dim: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    additional_values: Tensor | None,
    version: str,
) -> Tensor:
    """Per query: weights times the values of its neighbours and the additional values; weights take value's dtype.

    Raises:
        RuntimeError: shapes or a window that NATTEN refused, even kernel sizes among them.
        ValueError: weights or additional values that do not fit, nested tensors beside others.
    """
    if attn.is_nested or value.is_nested:
        _check_nested({"attn": attn, "value": value}, {"additional_values": additional_values})
        extra = [None] * value.size(0) if additional_values is None else additional_values.unbind()
        return torch.nested.nested_tensor(
            [
                av(na_dim, a, v, kernel_size, dilation, is_causal, v_extra, version)
                for a, v, v_extra in zip(attn.unbind(), value.unbind(), extra, strict=True)
            ]
        )
    check_tensors(na_dim, value)
    if attn.shape[:-1] != value.shape[:-1]:
        raise refuse(
            RuntimeError,
            "attn.shape",
            tuple(attn.shape),
            f"{tuple(value.shape[:-1])} = value's axes without head_dim, then the weights",
            "weights of the same input",
        )
    check_window(value.shape[2:-1], kernel_size, dilation, odd=f"NATTEN {version}'s av")
    num_neighbors = get_num_na_weights(kernel_size)
    num_additional = check_additional_values(attn, additional_values, value, num_neighbors)
    attn = attn.to(value.dtype)
    with torch.autocast(value.device.type, enabled=False):
        out = AV[na_dim](
            attn[..., :num_neighbors].movedim(1, -2),
            value.movedim(1, -2),
            kernel_size,
            dilation,
            is_causal=is_causal,
            kernel=unfused_kernel(value.device),
        ).movedim(-2, 1)
        if num_additional:
            extra = attn[..., num_neighbors:].flatten(2, -2) @ additional_values
            out = out + extra.unflatten(2, value.shape[2:-1])
    return out.contiguous()


def _check_nested(tensors: dict[str, Tensor], optional: dict[str, Tensor | None]) -> None:
    """ValueError unless all are nested, as many, and none wants a gradient: what 0.15 to 0.17 did with nested ones."""
    present = {**tensors, **{name: tensor for name, tensor in optional.items() if tensor is not None}}
    first = next(iter(tensors.values()))
    for name, tensor in present.items():
        if not tensor.is_nested:
            raise refuse(ValueError, name, "a plain tensor", "nested like the others", "torch.nested.nested_tensor")
        if tensor.requires_grad:
            raise refuse(ValueError, f"{name}.requires_grad", True, "False for nested tensors", "torch.no_grad()")
        if tensor.size(0) != first.size(0):
            raise refuse(ValueError, f"{name}.size(0)", tensor.size(0), f"{first.size(0)}", "as many tensors in each")
