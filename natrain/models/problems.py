"""The attention problems inside a model: what to compile ahead for it, and what to count when it is measured."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from natrain.layers.attention import NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d
from natrain.layers.padding import fit_window
from natrain.ops.problem import Problem, Window

_LAYERS = (NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d)


def attention_problems(
    model: nn.Module,
    images: torch.Size | tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    capability: tuple[int, int] | None,
) -> dict[Problem, int]:
    """Each problem of a training step on ``images`` [B, C, H, W], and the number of layers that have it.

    Args:
        model: on torch's meta device, so that neither memory nor time is spent; nothing runs.
        dtype: of queries, keys and values, autocast's where it is used.
        device, capability: of the machine in question, which need not be this one.
    """
    found: Counter[Problem] = Counter()

    def record(layer: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        batch, *lengths, _ = arguments[0].shape
        fit = fit_window(lengths, layer.window, layer.na_padding)
        found[
            Problem(
                batch,
                tuple(length + pad for length, pad in zip(lengths, fit.pad, strict=True)),
                layer.num_heads,
                layer.head_dim,
                Window(fit.kernel_size, fit.dilation, fit.stride, layer.window.is_causal),
                dtype,
                device,
                capability,
                has_rpb=layer.rpb is not None,
                has_dropout=layer.attn_drop > 0,
                needs_grad=True,
            )
        ] += 1

    hooks = [layer.register_forward_pre_hook(record) for layer in model.modules() if isinstance(layer, _LAYERS)]
    try:
        with torch.no_grad():
            model(torch.empty(images, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return dict(found)
