"""Which keys a query attends to: the window arithmetic, in Python (its twin for device code is csrc/include/window.h).

One axis at a time. Dilation splits the axis into ``dilation`` groups of tokens; all arithmetic below is in positions
inside one group. Definitions: NAT (arXiv 2204.07143, section 3.1) for the shifted window at borders, DiNAT
(arXiv 2209.15001, section 3.2) for dilation, GNA (arXiv 2504.16922, section 3) for stride.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def window_bounds(
    position: Tensor, group_length: Tensor, kernel_size: int, stride: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """First key and one past the last key of each query, in positions of its dilation group.

    Args:
        position: int64, any shape; the query's position in its group.
        group_length: int64, broadcastable to ``position``; number of tokens in that group, >= kernel_size.
        kernel_size, stride, is_causal: of this axis.

    Returns:
        ``(start, end)``, int64, of ``position``'s shape. Not causal: ``end - start == kernel_size`` always.
    """
    extent_left = kernel_size // 2
    extent_right = kernel_size // 2 + kernel_size % 2 - 1
    last = group_length - 1
    if is_causal:
        leader = torch.minimum(position // stride * stride + stride - 1, last)
        start = (leader - (kernel_size - 1)).clamp(min=0)
        return start, torch.minimum(position + 1, group_length)
    leader = torch.minimum(position // stride * stride + stride // 2, last)
    overhang = (leader + extent_right - last).clamp(min=0)
    start = (leader - extent_left).clamp(min=0) - overhang
    return start, start + kernel_size


@dataclass(frozen=True)
class AxisWindow:
    """The windows of all queries along one axis of length L with kernel size k; every tensor is [L, k].

    keys: int64 token index of each neighbour. A slot that a causal query lacks holds the query itself, so that
        reading it is harmless; ``valid`` tells.
    valid: bool, or None when every slot is a neighbour (not causal).
    bias: int64 index into the axis of the relative position bias, ``key position - query position + k - 1``.
    """

    keys: Tensor
    valid: Tensor | None
    bias: Tensor

    def of(self, queries: slice) -> AxisWindow:
        """The windows of these queries only."""
        valid = None if self.valid is None else self.valid[queries]
        return AxisWindow(self.keys[queries], valid, self.bias[queries])


def axis_window(
    length: int, kernel_size: int, dilation: int, stride: int, is_causal: bool, device: torch.device | str = "cpu"
) -> AxisWindow:
    """Neighbours of every query along one axis; slots are ordered from the window's start, as in ``scores``."""
    token = torch.arange(length, device=device)
    group = token % dilation
    position = token // dilation
    group_length = (length - group + dilation - 1) // dilation
    start, end = window_bounds(position, group_length, kernel_size, stride, is_causal)
    slots = start[:, None] + torch.arange(kernel_size, device=device)
    valid = None
    if is_causal:
        valid = slots < end[:, None]
        slots = torch.where(valid, slots, position[:, None])
    return AxisWindow(
        keys=slots * dilation + group[:, None],
        valid=valid,
        bias=slots - position[:, None] + kernel_size - 1,
    )
