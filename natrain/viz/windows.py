"""Which pixels can reach a token: windows, downsamplers and tokenizer traced back, one axis at a time.

The keys of a query are a product of two axes, and so is what a convolution reads: the pixels that reach a token are the
product of those that reach it along each axis, and nothing larger than one axis needs to be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from natrain.errors import invalid
from natrain.layers import GlobalAttention2d
from natrain.layers.padding import fit_window
from natrain.models.surgery import stages_of
from natrain.ops.window import axis_window
from natrain.viz.figure import panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Reach:
    """What the token of one pixel sees after one unit of the trunk (a stage, or a block of an isotropic model).

    Attributes:
        unit: its number.
        token: (row, column) of the token on that unit's map.
        map_size: (rows, columns) of that map.
        keys: int64 ``[rows, columns]`` of the map: in how many of the unit's blocks a token is a key of this one.
        rows, columns: bool ``[H]`` and ``[W]``; pixel (y, x) reaches the token where both are true.
        dilations: of the unit's blocks.
    """

    unit: int
    token: tuple[int, int]
    map_size: tuple[int, int]
    keys: Tensor
    rows: Tensor
    columns: Tensor
    dilations: tuple[int, ...]

    @property
    def share(self) -> float:
        """The share of the image that reaches the token."""
        return (self.rows.float().mean() * self.columns.float().mean()).item()


def pixel_reach(model: nn.Module, img_size: tuple[int, int], pixel: tuple[int, int]) -> list[Reach]:
    """What the token of ``pixel`` (row, column) sees after each unit, on images of ``img_size`` (height, width).

    Raises:
        ValueError: a pixel outside of the image, or an image that the model's windows do not fit in.
    """
    if not all(0 <= place < side for place, side in zip(pixel, img_size, strict=True)):
        raise invalid(
            "--query", pixel, f"a pixel of the {img_size[0]}x{img_size[1]} image", f"--query 0,{img_size[1] // 2}"
        )
    model.check_image(*img_size)
    lengths = _map_sides(model, img_size)
    per_axis = [_axis_reach(model, axis, lengths, img_size[axis], pixel[axis]) for axis in (0, 1)]
    units = _units(model)
    return [
        Reach(
            unit,
            (rows[0], columns[0]),
            lengths[unit],
            _keys(layers, lengths[unit], (rows[0], columns[0])),
            rows[1],
            columns[1],
            tuple(1 if isinstance(layer, GlobalAttention2d) else layer.window.dilation[0] for layer in layers),
        )
        for unit, (rows, columns, layers) in enumerate(zip(*per_axis, units, strict=True))
    ]


def _keys(layers: Sequence[nn.Module], map_size: tuple[int, int], token: tuple[int, int]) -> Tensor:
    """In how many of ``layers`` each token of the map is a key of ``token``."""
    count = torch.zeros(map_size, dtype=torch.int64)
    for layer in layers:
        rows, columns = (_axis_keys(layer, axis, map_size)[token[axis]] for axis in (0, 1))
        count += rows[:, None] & columns[None, :]
    return count


def _units(model: nn.Module) -> list[list[nn.Module]]:
    """The attention layers of every unit of the trunk."""
    stages = stages_of(model)
    return stages if len(stages) == len(model.trunk) else [[layer] for layer in stages[0]]


def _convolutions(model: nn.Module) -> list[tuple[int, int, int]]:
    """(kernel, stride, padding) of the tokenizer's convolutions, in order."""
    found = [module for module in model.patch_embed.modules() if isinstance(module, nn.Conv2d)]
    return [(conv.kernel_size[0], conv.stride[0], conv.padding[0]) for conv in found]


def _between(model: nn.Module, unit: int) -> tuple[int, int, int] | None:
    """(kernel, stride, padding) of the downsampler after ``unit``; None where there is none."""
    downsample = getattr(model.trunk[unit], "downsample", None)
    if downsample is None:
        return None
    conv = downsample.reduction
    # Patch merging is a linear layer over 2x2 tokens.
    return (conv.kernel_size[0], conv.stride[0], conv.padding[0]) if isinstance(conv, nn.Conv2d) else (2, 2, 0)


def _map_sides(model: nn.Module, img_size: Sequence[int]) -> list[tuple[int, int]]:
    """(rows, columns) of the map of every unit. Tokenizers and downsamplers all round up."""
    sides = list(img_size)
    for _, stride, _ in _convolutions(model):
        sides = [-(-side // stride) for side in sides]
    maps = []
    for unit in range(len(model.trunk)):
        maps.append((sides[0], sides[1]))
        if (step := _between(model, unit)) is not None:
            sides = [-(-side // step[1]) for side in sides]
    return maps


def _axis_reach(
    model: nn.Module, axis: int, maps: list[tuple[int, int]], length: int, pixel: int
) -> list[tuple[int, Tensor]]:
    """Along one axis, after each unit: the pixel's token, and the pixels that reach it."""
    back: list[Callable[[Tensor], Tensor]] = []  # from what a step writes to what it reads
    for kernel, stride, padding in _convolutions(model):
        back.append(partial(_read_by_convolution, length=length, kernel=kernel, stride=stride, padding=padding))
        length = -(-length // stride)
    found = []
    for unit, layers in enumerate(_units(model)):
        back += [partial(_read_by_attention, layer=layer, axis=axis, lengths=maps[unit]) for layer in layers]
        tokens = maps[unit][axis]
        token = min(pixel // model.feature_info[unit]["reduction"], tokens - 1)
        mask = torch.zeros(tokens, dtype=torch.bool)
        mask[token] = True
        for step in reversed(back):
            mask = step(mask)
        found.append((token, mask))
        if (step := _between(model, unit)) is not None:
            kernel, stride, padding = step
            back.append(partial(_read_by_convolution, length=tokens, kernel=kernel, stride=stride, padding=padding))
    return found


def _read_by_convolution(written: Tensor, length: int, kernel: int, stride: int, padding: int) -> Tensor:
    first = written.nonzero().flatten() * stride - padding
    read = (first[:, None] + torch.arange(kernel)).flatten()
    mask = torch.zeros(length, dtype=torch.bool)
    mask[read[(read >= 0) & (read < length)]] = True
    return mask


def _read_by_attention(written: Tensor, layer: nn.Module, axis: int, lengths: tuple[int, int]) -> Tensor:
    """Every key of every token written, and, through the residual path, the tokens themselves."""
    return _axis_keys(layer, axis, lengths)[written].any(0) | written


def _axis_keys(layer: nn.Module, axis: int, lengths: tuple[int, int]) -> Tensor:
    """Bool ``[length, length]``: which tokens (columns) are keys of which queries (rows) along an axis of the map."""
    length = lengths[axis]
    if isinstance(layer, GlobalAttention2d):
        return torch.ones(length, length, dtype=torch.bool)
    fit = fit_window(lengths, layer.window, layer.na_padding)
    window = axis_window(
        length + fit.pad[axis],
        fit.kernel_size[axis],
        fit.dilation[axis],
        fit.stride[axis],
        layer.window.is_causal[axis],
    )
    keys = torch.zeros(length + fit.pad[axis], length + fit.pad[axis], dtype=torch.bool)
    keys.scatter_(1, window.keys, True)
    return keys[:length, :length]  # a pad token holds nothing of the image


def draw_windows(reaches: Sequence[Reach], pixel: tuple[int, int], title: str) -> Figure:
    """Per unit two panels, which share a column: the keys of the token of ``pixel``, and the pixels that reach it."""
    columns = min(len(reaches), 6)
    figure, grid = panels(2 * -(-len(reaches) // columns), columns)
    for number, reach in enumerate(reaches):
        above, axes = (grid[2 * (number // columns) + row][number % columns] for row in (0, 1))
        for one in (above, axes):
            one.set_axis_on()
            one.tick_params(labelsize=7)
        above.imshow(reach.keys.numpy(), cmap="Blues", vmin=0, interpolation="nearest")
        above.plot(reach.token[1], reach.token[0], "r+", markersize=8, markeredgewidth=1.5)
        dilations = ",".join(map(str, dict.fromkeys(reach.dilations)))
        above.set_title(
            f"{number + 1}: keys on the {reach.map_size[0]}x{reach.map_size[1]} map\n"
            f"{len(reach.dilations)} block{'s' * (len(reach.dilations) > 1)}, dilation {dilations}",
            fontsize=8,
        )
        seen = reach.rows[:, None] & reach.columns[None, :]
        axes.imshow(seen.numpy(), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
        axes.plot(pixel[1], pixel[0], "r+", markersize=10, markeredgewidth=2)
        axes.set_title(f"pixels that reach it after {number + 1}:\n{100 * reach.share:.3g} % of the image", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
