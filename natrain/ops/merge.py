"""Attention over several sets of keys, computed apart, as one softmax over all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from natrain.errors import invalid
from natrain.ops.reference import accumulate_dtype


def merge_attentions(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join attention of the same queries to several sets of keys, as if all keys had been in one softmax.

    Neighbours and register tokens, neighbours and text (cross attention), windows of several sizes that share no key:
    each part is computed by whatever is best for it, and merged here. Differentiable, to any order, in every out and
    lse.

    Args:
        outs: each [..., heads, head_dim], all of one shape, dtype and device; one or more.
        lses: each [..., heads], natural log of the sum of exp(scores) of that part (``return_lse=True``); -inf where
            a part has no key for a query.

    Returns:
        ``(out, lse)`` as one attention would return them: out in the dtype of ``outs``, lse in float32 (float64 for
        it), in which all is summed. Where every part is empty, out is 0 and lse -inf.

    Raises:
        ValueError: no part, not as many of each, something that is no floating point tensor, or parts that disagree in
            shape, dtype or device.

    Source: FlashDecoding's merge of partial results; the identity is in Online normalizer calculation for softmax
    (arXiv 1805.02867, section 3.1).
    """
    _check(outs, lses)
    dtype = accumulate_dtype(outs[0].dtype)
    lses = [lse.to(dtype) for lse in lses]
    largest = torch.stack([lse.detach() for lse in lses]).amax(0)
    is_empty = largest == -math.inf
    shift = largest.masked_fill(is_empty, 0.0)
    weights = [(lse - shift).exp() for lse in lses]
    total = sum(weights[1:], weights[0]).masked_fill(is_empty, 1.0)
    out = sum(part.to(dtype) * (weight / total).unsqueeze(-1) for part, weight in zip(outs, weights, strict=True))
    return out.to(outs[0].dtype), (total.log() + shift).masked_fill(is_empty, -math.inf)


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if not len(outs) or len(outs) != len(lses):
        counts = (len(outs), len(lses))
        raise invalid("outs, lses", counts, "one or more outs and as many lses", "return_lse=True for every part")
    for name, tensors in (("outs", outs), ("lses", lses)):
        for index, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise invalid(f"{name}[{index}]", type(tensor).__name__, "a torch.Tensor", "return_lse=True")
            if not tensor.is_floating_point():
                raise invalid(f"{name}[{index}].dtype", tensor.dtype, "a floating point dtype", ".float()")
    first = outs[0]
    for name, tensors, shape in (("outs", outs, first.shape), ("lses", lses, first.shape[:-1])):
        for index, tensor in enumerate(tensors):
            if tensor.shape != shape:
                raise invalid(
                    f"{name}[{index}].shape", tuple(tensor.shape), f"{tuple(shape)}, as outs[0] has", "equal queries"
                )
            if tensor.device != first.device:
                raise invalid(
                    f"{name}[{index}].device", str(tensor.device), f"that of outs[0], {first.device}", "one device"
                )
    for index, out in enumerate(outs):
        if out.dtype != first.dtype:
            raise invalid(f"outs[{index}].dtype", out.dtype, f"that of outs[0], {first.dtype}", "one dtype")
