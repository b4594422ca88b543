"""The policy for axes shorter than kernel_size * dilation: decided here once, for every layer and so every model.

- ``"raise"`` (default): an error that names the sizes and dilations that work.
- ``"shrink"``: per axis, first the dilation becomes the largest that fits (``length // kernel_size``); where not even
  dilation 1 fits, the kernel size becomes the length, so that a query sees the whole axis. The bias of a relative
  offset stays what it was: a smaller kernel uses the centre of ``rpb``. A stride above the new kernel size becomes it.
- ``"natten014"``: the layer's input is padded with zeros at the end of the axis, up to kernel_size * dilation, before
  the qkv projection, as NATTEN did up to 0.15. Pad tokens therefore carry the bias of that projection and take part
  in the softmax. The weights of 2022 were trained with it; detection and segmentation results need it exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from natrain.errors import invalid, nearest
from natrain.ops.problem import Window

NA_PADDING = ("raise", "shrink", "natten014")


class Fit(NamedTuple):
    """The window a layer really uses on a map, and the tokens it appends to the end of each axis."""

    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]


def check_na_padding(policy: str) -> str:
    """``policy`` if it is one of NA_PADDING.

    Raises:
        ValueError: it is not; the message names the most similar policy.
    """
    if policy not in NA_PADDING:
        closest = nearest(str(policy), NA_PADDING) or "raise"
        raise invalid("na_padding", policy, f"one of {', '.join(NA_PADDING)}", f"na_padding={closest!r}")
    return policy


def fit_window(lengths: Sequence[int], window: Window, policy: str) -> Fit:
    """Fit ``window`` into axes of ``lengths`` tokens as ``policy`` says.

    Raises:
        ValueError: an axis is shorter than kernel_size * dilation and the policy is ``"raise"``.
    """
    kernel_size, dilation, stride = window.kernel_size, window.dilation, window.stride
    spans = [k * d for k, d in zip(kernel_size, dilation, strict=True)]
    no_pad = (0,) * len(spans)
    if all(length >= span for length, span in zip(lengths, spans, strict=True)):
        return Fit(kernel_size, dilation, stride, no_pad)
    if policy == "natten014":
        return Fit(
            kernel_size, dilation, stride, tuple(max(0, span - n) for n, span in zip(lengths, spans, strict=True))
        )
    if policy == "shrink":
        kernel_size = tuple(min(k, n) for k, n in zip(kernel_size, lengths, strict=True))
        dilation = tuple(min(d, n // k) for d, n, k in zip(dilation, lengths, kernel_size, strict=True))
        return Fit(kernel_size, dilation, tuple(map(min, stride, kernel_size)), no_pad)
    lengths = tuple(map(int, lengths))
    largest = tuple(n // k for n, k in zip(lengths, kernel_size, strict=True))
    fix = f"dilation={largest}" if min(largest) > 0 else f"kernel_size={tuple(map(min, kernel_size, lengths))}"
    raise invalid(
        "input size (tokens per axis)",
        lengths,
        f"at least kernel_size * dilation = {kernel_size} * {dilation} = {tuple(spans)} "
        f"(at this size dilations up to {largest} work)",
        f"{fix}, a larger input, or na_padding='shrink' or 'natten014'",
    )
