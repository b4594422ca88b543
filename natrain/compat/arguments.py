"""Argument checks of the versions of NATTEN: what each accepted, and the type of error it raised for the rest.

NATTEN checked in Python (ValueError, AssertionError, NotImplementedError) and in C++ (RuntimeError); code that catches
one of them keeps working. The wording is natrain's: argument, value, what is allowed, what to type.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from natrain.errors import invalid


def refuse(kind: type[Exception], argument: str, value: object, allowed: str, fix: str) -> Exception:
    """The error of ``natrain.errors.invalid`` as an exception of ``kind``."""
    return kind(str(invalid(argument, value, allowed, fix)))


def _per_axis(argument: str, value: Any, na_dim: int, kind: type, containers: tuple, minimum: int | None) -> tuple:
    """``value`` for each axis; one that is no container serves every axis."""
    entries = tuple(value) if isinstance(value, containers) else (value,) * na_dim
    right_kind = all(isinstance(entry, kind) for entry in entries)
    if len(entries) == na_dim and right_kind and (minimum is None or min(entries) >= minimum):
        return entries
    least = "" if minimum is None else f" >= {minimum}"
    example = {"kernel_size": 7, "is_causal": False}.get(argument, 1)
    raise refuse(
        ValueError,
        argument,
        value,
        f"one {kind.__name__}{least}, or a tuple of {na_dim}",
        f"{argument}={example}",
    )


def check_kernel_size_arg(na_dim: int, kernel_size: Any, minimum: int | None = None) -> tuple[int, ...]:
    """``kernel_size`` as a tuple; 0.17 tests the types only, 0.20 also that each is at least 2."""
    containers = (tuple, list) if minimum is None else (Sequence,)
    return _per_axis("kernel_size", kernel_size, na_dim, int, containers, minimum)


def check_dilation_arg(na_dim: int, dilation: Any, minimum: int | None = None) -> tuple[int, ...]:
    """``dilation`` as a tuple; None means 1."""
    containers = (tuple, list) if minimum is None else (Sequence,)
    return _per_axis("dilation", 1 if dilation is None else dilation, na_dim, int, containers, minimum)


def check_stride_arg(na_dim: int, stride: Any) -> tuple[int, ...]:
    """``stride`` as a tuple (0.20 on); None means 1."""
    return _per_axis("stride", 1 if stride is None else stride, na_dim, int, (Sequence,), 1)


def check_causal_arg(na_dim: int, is_causal: Any) -> tuple[bool, ...]:
    """``is_causal`` as a tuple; None means not causal."""
    return _per_axis("is_causal", False if is_causal is None else is_causal, na_dim, bool, (Sequence,), None)


def check_input_size_arg(na_dim: int, input_size: Any) -> tuple[int, ...]:
    """``input_size`` as a tuple (0.17.5)."""
    return _per_axis("input_size", input_size, na_dim, int, (tuple, list), None)


def check_all_args(na_dim: int, kernel_size: Any, dilation: Any, is_causal: Any) -> tuple[tuple, tuple, tuple]:
    """0.17: ``(kernel_size, dilation, is_causal)``, a tuple of ``na_dim`` each."""
    return (
        check_kernel_size_arg(na_dim, kernel_size),
        check_dilation_arg(na_dim, dilation),
        check_causal_arg(na_dim, is_causal),
    )


def get_num_na_weights(kernel_size: tuple[int, ...]) -> int:
    """Attention weights of a token; the kernel size must be a tuple."""
    if not isinstance(kernel_size, tuple):
        raise refuse(ValueError, "kernel_size", kernel_size, "a tuple", f"kernel_size=({kernel_size},)")
    return math.prod(kernel_size)


def check_tensors(na_dim: int, query: Tensor, **others: Tensor) -> None:
    """RuntimeError unless all have rank ``na_dim + 3``, one shape, dtype and kind of device (0.14 to 0.17, C++)."""
    for name, tensor in {"query": query, **others}.items():
        if tensor.dim() != na_dim + 3:
            raise refuse(
                RuntimeError, f"{name}.shape", tuple(tensor.shape), f"{na_dim + 3} axes", "the function of its rank"
            )
        if tensor.shape != query.shape:
            raise refuse(
                RuntimeError, f"{name}.shape", tuple(tensor.shape), f"query's, {tuple(query.shape)}", "equal shapes"
            )
        if tensor.dtype != query.dtype:
            raise refuse(
                RuntimeError, f"{name}.dtype", tensor.dtype, f"query's, {query.dtype}", f"{name}.to(query.dtype)"
            )
        if tensor.device.type != query.device.type:
            raise refuse(
                RuntimeError, f"{name}.device", str(tensor.device), f"query's, {query.device}", f"{name}.to(query)"
            )


def check_window(
    spatial: Sequence[int], kernel_size: tuple[int, ...], dilation: tuple[int, ...], *, odd: str | None
) -> None:
    """RuntimeError unless the window is one that 0.14 to 0.17 computed.

    Args:
        odd: who demands odd kernel sizes (for the message); None where even ones are allowed.
    """
    for length, k, d in zip(spatial, kernel_size, dilation, strict=True):
        if k <= 1 or (odd and k % 2 == 0):
            allowed = f"odd numbers above 1: {odd} defines no even window" if odd else "numbers above 1"
            raise refuse(RuntimeError, "kernel_size", kernel_size, allowed, "kernel_size=7")
        if d < 1:
            raise refuse(RuntimeError, "dilation", dilation, "numbers >= 1", "dilation=1")
        if k * d > length:
            raise refuse(
                RuntimeError,
                "kernel_size, dilation",
                (kernel_size, dilation),
                f"kernel_size * dilation <= {tuple(spatial)}, the input's axes",
                f"dilation={max(1, int(length) // k)} on the short axis, or a larger input",
            )


def check_bias(rpb: Tensor, heads: int, kernel_size: tuple[int, ...]) -> None:
    """RuntimeError unless the bias has shape [heads, 2 * kernel_size - 1 per axis]."""
    expected = (heads, *(2 * k - 1 for k in kernel_size))
    if tuple(rpb.shape) != expected:
        raise refuse(
            RuntimeError, "rpb.shape", tuple(rpb.shape), f"{expected} = [heads, 2 * kernel_size - 1 ...]", "that shape"
        )


def refuse_causal_bias(is_causal: tuple[bool, ...], has_bias: bool) -> None:
    """NotImplementedError for a bias in causal attention, as 0.17 raises (natrain's own operators compute it)."""
    if any(is_causal) and has_bias:
        raise refuse(
            NotImplementedError,
            "is_causal",
            is_causal,
            "False on every axis together with a positional bias: NATTEN defines none for causal attention",
            "rpb=None (or natrain.na2d, which has it)",
        )


def check_additional_keys(input_tensor: Tensor, additional_keys: Tensor | None) -> int:
    """Number of additional tokens of ``additional_keys`` [B, heads, tokens, head_dim]; ValueError where it differs."""
    if additional_keys is None:
        return 0
    expected = (input_tensor.shape[0], input_tensor.shape[1], input_tensor.shape[-1])
    shape = additional_keys.shape
    if additional_keys.dim() != 4 or (shape[0], shape[1], shape[3]) != expected:
        raise refuse(
            ValueError,
            "additional_keys.shape",
            tuple(shape),
            f"[{expected[0]}, {expected[1]}, tokens, {expected[2]}] = [batch, heads, tokens, head_dim] of query",
            "additional_keys.reshape to that layout",
        )
    return shape[2]


def check_additional_values(
    attn_tensor: Tensor, additional_values: Tensor | None, value: Tensor, expected_attn_weights: int
) -> int:
    """Number of additional tokens of ``additional_values``; ValueError where it or the weights do not fit."""
    weights = attn_tensor.shape[-1]
    if additional_values is None:
        if weights != expected_attn_weights:
            raise refuse(
                ValueError,
                "attn.shape",
                tuple(attn_tensor.shape),
                f"{expected_attn_weights} weights a token (the window's) without additional_values",
                "additional_values=..., or the kernel_size that made attn",
            )
        return 0
    expected = (attn_tensor.shape[0], attn_tensor.shape[1], weights - expected_attn_weights, value.shape[-1])
    if tuple(additional_values.shape) != expected:
        raise refuse(
            ValueError,
            "additional_values.shape",
            tuple(additional_values.shape),
            f"{expected} = [batch, heads, tokens beyond the window's {expected_attn_weights}, head_dim]",
            "additional_values.reshape to that layout",
        )
    return expected[2]


def make_attn_tensor_from_input(input_tensor: Tensor, attention_dim: int) -> Tensor:
    """Uninitialised weights [*input_tensor.shape[:-1], attention_dim] of its dtype and device."""
    return input_tensor.new_empty(*input_tensor.shape[:-1], attention_dim, requires_grad=input_tensor.requires_grad)
