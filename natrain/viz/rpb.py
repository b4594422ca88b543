"""Learned relative position biases as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from natrain.errors import invalid
from natrain.layers import GlobalAttention2d
from natrain.models.surgery import stages_of
from natrain.viz.attention import find_layer
from natrain.viz.figure import panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_rpb(model: nn.Module, layer: str | None, title: str) -> Figure:
    """Biases over the offset from query to key, in tokens; red attracts, blue repels, one scale for all panels.

    Args:
        layer: show each head of this layer (``find_layer``); None: the mean over heads of every block, a row a stage.

    Raises:
        ValueError: a model without such biases, no such layer.
    """
    if model.pos != "rpb":
        raise invalid(
            "CHECKPOINT", title, f"a model with relative position biases; this one has pos={model.pos}", "another file"
        )
    if layer is not None:
        name, module = find_layer(model, layer)
        entries = [(f"head {head}", bias, module) for head, bias in enumerate(module.rpb.detach())]
        rows = [entries[start : start + 8] for start in range(0, len(entries), 8)]
        title = f"{title}, {name}"
    else:
        rows = [
            [(f"{stage}.{block}", module.rpb.detach().mean(0), module) for block, module in enumerate(layers)]
            for stage, layers in enumerate(stages_of(model))
        ]
        rows = [row[start : start + 9] for row in rows for start in range(0, len(row), 9)]
    largest = max(bias.abs().max() for row in rows for _, bias, _ in row).clamp(min=torch.finfo(torch.float32).tiny)
    figure, grid = panels(len(rows), max(map(len, rows)))
    for axes_row, row in zip(grid, rows, strict=True):
        for axes, (name, bias, module) in zip(axes_row, row, strict=False):
            axes.set_axis_on()
            step = 1 if isinstance(module, GlobalAttention2d) else module.window.dilation[0]
            height, width = (step * side / 2 for side in bias.shape)
            image = axes.imshow(
                bias.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, extent=(-width, width, height, -height)
            )
            axes.set_title(f"{name}" + (f", dilation {step}" if step > 1 else ""), fontsize=8)
            axes.tick_params(labelsize=6)
    figure.colorbar(image, ax=grid[0][-1], shrink=0.8)
    figure.suptitle(title, fontsize=10)
    return figure
