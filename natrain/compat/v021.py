"""NATTEN 0.21.5 on: 0.20's operators with grouped heads (GQA), ``return_lse``, causal and variable-length attention.

``merge_attentions`` returns (output, lse) here, where it returned the output alone before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from natrain import ops
from natrain.compat import heads_last, v020
from natrain.compat.arguments import refuse
from natrain.compat.arguments020 import check_backend, check_kernel_schedule, check_merge, check_qkv, check_rank

VERSION = "0.21.7"


def _make(na_dim: int):
    def na(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size,
        stride=1,
        dilation=1,
        is_causal=False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict | None = None,
        backend: str | None = None,
        q_tile_shape=None,
        kv_tile_shape=None,
        backward_q_tile_shape=None,
        backward_kv_tile_shape=None,
        backward_kv_splits=None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule=None,
        torch_compile: bool = False,
        return_lse: bool = False,
    ):
        check_rank(query, na_dim)
        return v020.generic(
            query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values,
            backend, kernel_schedule, return_lse, attention_kwargs, grouped=True,
        )  # fmt: skip

    na.__name__ = na.__qualname__ = f"na{na_dim}d"
    na.__doc__ = getattr(v020, na.__name__).__doc__.replace(
        "\n\n    Raises:",
        " Key and value may have a divisor of query's heads; ``return_lse`` also returns lse [B, *spatial, heads]."
        "\n\n    Raises:",
    )
    return na


na1d, na2d, na3d = (_make(na_dim) for na_dim in (1, 2, 3))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule=None,
    torch_compile: bool = False,
    return_lse: bool = False,
):
    """Plain attention as ``natrain.compat.v020``, with grouped heads, causal masks and packed sequences.

    A causal query sees keys up to its own index. Packed: batch 1, sequences behind each other, their lengths (int32)
    in ``seqlens_*`` or, summed up from 0, in ``cumulative_seqlen_*``; ``max_seqlen_*`` change nothing.

    Raises:
        NotImplementedError, RuntimeError, ValueError: as in 0.20; ValueError for lengths that do not fit.
    """
    check_qkv(query, key, value, ranks=(4,), grouped=True)
    check_kernel_schedule(kernel_schedule)
    check_backend(backend, "fmha", query.device)
    scale = scale or query.shape[-1] ** -0.5
    ends_q = _ends("Q", query, seqlens_Q, cumulative_seqlen_Q)
    ends_kv = _ends("KV", key, seqlens_KV, cumulative_seqlen_KV)
    if (ends_q is None) != (ends_kv is None) or (ends_q and len(ends_q) != len(ends_kv)):
        raise refuse(ValueError, "seqlens_Q, seqlens_KV", (ends_q, ends_kv), "as many lengths of both, or none", "both")
    with torch.autocast(query.device.type, enabled=False):
        if ends_q is None:
            out, lse = heads_last.dense_attention(query, key, value, scale, is_causal)
        else:
            parts = [
                heads_last.dense_attention(query[:, q0:q1], key[:, k0:k1], value[:, k0:k1], scale, is_causal)
                for q0, q1, k0, k1 in zip([0, *ends_q], ends_q, [0, *ends_kv], ends_kv, strict=False)
            ]
            out, lse = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return (out, lse) if return_lse else out


def _ends(name: str, tokens: Tensor, lengths: Tensor | None, cumulative: Tensor | None) -> list[int] | None:
    """Where each packed sequence ends; None for plain batches."""
    given = lengths if lengths is not None else cumulative
    if given is None:
        return None
    argument = f"seqlens_{name}" if lengths is not None else f"cumulative_seqlen_{name}"
    if not isinstance(given, Tensor) or given.dtype != torch.int32 or given.dim() != 1 or not given.numel():
        value = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise refuse(ValueError, argument, value, "an int32 tensor with one axis", f"{argument}.to(torch.int32)")
    bounds = [0, *given.cumsum(0).tolist()] if lengths is not None else given.tolist()
    is_whole = len(bounds) > 1 and bounds[0] == 0 and bounds[-1] == tokens.shape[1] and bounds == sorted(bounds)
    if tokens.shape[0] != 1 or not is_whole:
        say = "lengths that sum" if lengths is not None else "their sums from 0"
        allowed = f"batch 1 and {say} to its {tokens.shape[1]} tokens (batch is {tokens.shape[0]})"
        raise refuse(ValueError, argument, given.tolist(), allowed, "sequences packed behind each other")
    return bounds[1:]


def merge_attentions(
    outputs: list[Tensor], lse_tensors: list[Tensor], torch_compile: bool = True, use_autograd_fix: bool = True
) -> tuple[Tensor, Tensor]:
    """(output, lse) as if all parts' keys had been in one softmax.

    Differentiable in every output and lse by torch, so ``use_autograd_fix`` and ``torch_compile`` change nothing.

    Raises:
        ValueError: fewer than two parts, shapes that disagree, an output that is not contiguous.
    """
    check_merge(outputs, lse_tensors)
    return ops.merge_attentions(outputs, lse_tensors)


LAYOUT = v020.layout(
    {"na1d": na1d, "na2d": na2d, "na3d": na3d, "attention": attention, "merge_attentions": merge_attentions}
)
