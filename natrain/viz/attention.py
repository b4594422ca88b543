"""What one query attends to, head by head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from natrain.errors import invalid
from natrain.layers import GlobalAttention2d
from natrain.ops.window import axis_window
from natrain.viz.figure import panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADS_SHOWN = 14  # with the image and the mean: two rows of eight


def find_layer(model: nn.Module, name: str | None) -> tuple[str, nn.Module]:
    """The attention layer ``STAGE.BLOCK`` (``BLOCK`` in an isotropic model), counted from 0; None: the last one.

    Also its full name (``levels.2.blocks.5.attn``) is understood.

    Raises:
        ValueError: no such layer.
    """
    layers = {key: module for key, module in model.named_modules() if key.endswith(".attn")}
    short = {".".join(part for part in key.split(".") if part.isdigit()): key for key in layers}
    if name is None:
        name = list(layers)[-1]
    key = short.get(name, name)
    if key not in layers:
        raise invalid("--layer", name, f"one of {', '.join(short)}", f"--layer {list(short)[-1]}")
    return key, layers[key]


def attention_map(model: nn.Module, layer: nn.Module, image: Tensor, query: tuple[int, int]) -> tuple[Tensor, tuple]:
    """The attention probabilities of the token at pixel ``query`` (row, column) of ``image`` ``[C, H, W]``.

    Returns:
        ``[N, Y, X]`` over the layer's map, zero where a token is no key, and the token's (row, column). Where the layer
        pads its map, keys in the padding are left out, so that a head sums to less than one.

    Raises:
        ValueError: a pixel outside of the image.
    """
    sides = tuple(image.shape[1:])
    if not all(0 <= place < side for place, side in zip(query, sides, strict=True)):
        raise invalid("--query", query, f"a pixel of the {sides[0]}x{sides[1]} image", "--query 0,0")
    caught: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        with torch.no_grad():
            model.eval()(image[None])
    finally:
        handle.remove()
    x_BYXC = caught[0]
    height, width = x_BYXC.shape[1:3]
    token = (query[0] * height // sides[0], query[1] * width // sides[1])
    probs, fit = layer.attention_probs(x_BYXC)
    probs_NK = probs[0, token[0], token[1]]
    if isinstance(layer, GlobalAttention2d):
        return probs_NK.unflatten(-1, (height, width)), token
    keys = [
        axis_window(
            length + fit.pad[axis],
            fit.kernel_size[axis],
            fit.dilation[axis],
            fit.stride[axis],
            layer.window.is_causal[axis],
        ).keys[token[axis]]
        for axis, length in enumerate((height, width))
    ]
    full = torch.zeros(len(probs_NK), height + fit.pad[0], width + fit.pad[1])
    # Added, not set: the slots that a causal query lacks name the query itself, with probability 0.
    full.index_put_(
        (torch.arange(len(full))[:, None, None], keys[0][None, :, None], keys[1][None, None, :]),
        probs_NK.unflatten(-1, fit.kernel_size),
        accumulate=True,
    )
    return full[:, :height, :width], token


def draw_attention(picture: np.ndarray, maps_NYX: Tensor, query: tuple[int, int], title: str) -> Figure:
    """The image with its query, the mean over the heads, and each head; every map from 0 to its own largest value.

    Args:
        picture: ``[H, W, 3]`` in 0..1, as the model sees it.
        maps_NYX: of ``attention_map``.
        query: the pixel.
    """
    height, width = picture.shape[:2]
    shown = [("mean of heads", maps_NYX.mean(0))]
    shown += [(f"head {head}", one) for head, one in enumerate(maps_NYX[:HEADS_SHOWN])]
    columns = min(8, len(shown) + 1)
    figure, grid = panels(-(-(len(shown) + 1) // columns), columns)
    flat = [axes for row in grid for axes in row]
    flat[0].imshow(picture)
    flat[0].set_title("query +", fontsize=8)
    for axes, (name, one) in zip(flat[1:], shown, strict=False):
        axes.imshow(picture.mean(-1), cmap="gray", extent=(0, width, height, 0))
        axes.imshow(one.numpy(), cmap="inferno", alpha=0.75, extent=(0, width, height, 0), interpolation="nearest")
        axes.set_title(f"{name}, max {one.max():.2g}", fontsize=8)
    for axes in flat[: len(shown) + 1]:
        axes.plot(query[1] + 0.5, query[0] + 0.5, "c+", markersize=9, markeredgewidth=2)
    left_out = len(maps_NYX) - HEADS_SHOWN
    figure.suptitle(title + (f" (the first {HEADS_SHOWN} heads)" if left_out > 0 else ""), fontsize=10)
    return figure
