"""Argument checks of NATTEN 0.20 on: sizes, tensors, backends; as in ``arguments``, types of errors are NATTEN's."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor

from natrain.compat import arguments
from natrain.compat.arguments import refuse

# backend -> compute capabilities (major) it ran on; None: any device.
BACKENDS = {"cutlass": range(6, 99), "hopper": (9,), "blackwell": (10,), "flex": None}


class KernelSchedule(Enum):
    NonPersistent = 0
    WarpSpecializedCooperative = 1
    WarpSpecializedPingpong = 2


SCHEDULES = dict(zip(("non", "coop", "pp"), KernelSchedule, strict=True))


def check_kernel_schedule(kernel_schedule: Any) -> KernelSchedule | None:
    """The schedule of that name; ValueError for another."""
    if kernel_schedule is None or isinstance(kernel_schedule, KernelSchedule):
        return kernel_schedule
    if kernel_schedule not in SCHEDULES:
        raise refuse(ValueError, "kernel_schedule", kernel_schedule, f"None or one of {', '.join(SCHEDULES)}", "None")
    return SCHEDULES[kernel_schedule]


def check_backend(backend: str | None, kind: str, device: torch.device) -> None:
    """Refuse a backend that NATTEN would not have run on that device: natrain then runs its own kernel instead.

    Args:
        kind: ``fna`` or ``fmha``.

    Raises:
        NotImplementedError: no backend of NATTEN has that name.
        RuntimeError: that backend did not run on such a device.
    """
    if backend is None:
        return
    names = {f"{family}-{kind}": majors for family, majors in BACKENDS.items()}
    if backend not in names:
        raise refuse(NotImplementedError, "backend", backend, f"None or one of {', '.join(names)}", "backend=None")
    majors = names[backend]
    if majors is None:
        return
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
    if major not in majors:
        here = device.type if major is None else f"CUDA capability {major}.x"
        where = "any CUDA device" if len(majors) > 1 else f"CUDA capability {majors[0]}.x"
        raise refuse(
            RuntimeError, "backend", backend, f"a backend for {here}; {backend} is for {where}", "backend=None"
        )


def check_all_args(na_dim: int, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any) -> tuple:
    """``(kernel_size, stride, dilation, is_causal)``, a tuple of ``na_dim`` each; kernel sizes from 2."""
    return (
        arguments.check_kernel_size_arg(na_dim, kernel_size, minimum=2),
        arguments.check_stride_arg(na_dim, stride),
        arguments.check_dilation_arg(na_dim, dilation, minimum=1),
        arguments.check_causal_arg(na_dim, is_causal),
    )


def check_args_against_input(input_tensor: Tensor, kernel_size, stride, dilation, is_causal) -> None:
    """ValueError where a window is longer than its axis, or a stride than its window."""
    spatial = tuple(input_tensor.shape[1:-2])
    if any(k * d > n for n, k, d in zip(spatial, kernel_size, dilation, strict=True)):
        raise refuse(
            ValueError,
            "kernel_size, dilation",
            (kernel_size, dilation),
            f"kernel_size * dilation <= {spatial}, the input's axes",
            "smaller windows or a larger input",
        )
    if any(s > k for k, s in zip(kernel_size, stride, strict=True)):
        raise refuse(ValueError, "stride", stride, f"at most kernel_size {kernel_size} on every axis", "stride=1")


def check_qkv(query: Tensor, key: Tensor, value: Tensor, *, ranks: tuple[int, ...], grouped: bool) -> None:
    """NotImplementedError for sparse or nested tensors; ValueError where shapes, dtypes or devices disagree.

    Args:
        ranks: allowed numbers of axes.
        grouped: whether key and value may have fewer heads (0.21.5 on).
    """
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if tensor.is_sparse or tensor.is_nested:
            raise refuse(NotImplementedError, name, "sparse or nested", "dense tensors", f"{name}.to_dense()")
        for attribute in ("device", "dtype"):
            if getattr(tensor, attribute) != getattr(query, attribute):
                value_of, wanted = getattr(tensor, attribute), getattr(query, attribute)
                raise refuse(ValueError, f"{name}.{attribute}", value_of, f"query's, {wanted}", f"{name}.to(query)")
        if tensor.dim() not in ranks or tensor.dim() != query.dim():
            wanted = f"{' or '.join(map(str, ranks))} axes, as many as query"
            raise refuse(ValueError, f"{name}.shape", tuple(tensor.shape), wanted, "[B, *tokens, heads, head_dim]")
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.shape[-1] != key.shape[-1]:
        raise refuse(ValueError, "head_dim", shapes, "one head_dim in query and key", "key of query's head_dim")
    if len({t.shape[0] for t in named.values()}) > 1 or key.shape[1:-2] != value.shape[1:-2]:
        raise refuse(ValueError, "shapes", shapes, "one batch size; key and value of the same tokens", "equal shapes")
    heads, heads_kv = query.shape[-2], key.shape[-2]
    fits = heads % heads_kv == 0 if grouped and heads_kv else heads == heads_kv
    if heads_kv != value.shape[-2] or not fits:
        allowed = "heads of query divided by those of key and value" if grouped else "equal heads"
        fix = "key of a divisor of query's heads" if grouped else "key.repeat_interleave(...), or natten 0.21.5 on"
        raise refuse(ValueError, "heads", shapes, allowed, fix)


def check_additional(query, key, value, additional_keys, additional_values, *, grouped: bool) -> None:
    """ValueError unless both or neither are given and fit the others."""
    if (additional_keys is None) != (additional_values is None):
        raise refuse(ValueError, "additional_keys", "one of two", "both keys and values, or neither", "both")
    if additional_keys is None:
        return
    tokens = query.flatten(1, -3)
    check_qkv(tokens, additional_keys, additional_values, ranks=(4,), grouped=grouped)
    if additional_keys.shape[-2:] != key.shape[-2:] or additional_values.shape[-2:] != value.shape[-2:]:
        raise refuse(
            ValueError,
            "additional_keys.shape",
            tuple(additional_keys.shape),
            f"key's heads and head_dim {tuple(key.shape[-2:])}, and value's {tuple(value.shape[-2:])}",
            "the projections of key and value",
        )


def check_rank(query: Tensor, na_dim: int) -> None:
    if query.dim() != na_dim + 3:
        layout = f"[B, {na_dim} spatial axes, heads, head_dim]"
        raise refuse(ValueError, "query.shape", tuple(query.shape), layout, "the function of that rank")


def check_merge(outputs: list[Tensor], lse_tensors: list[Tensor]) -> None:
    """ValueError unless there are at least two outputs [B, T, heads, head_dim] with an lse [B, T, heads] each."""
    if len(outputs) < 2 or len(outputs) != len(lse_tensors):
        counts = (len(outputs), len(lse_tensors))
        raise refuse(ValueError, "outputs, lse_tensors", counts, "at least two of each, equally many", "one lse each")
    shape = tuple(outputs[0].shape)
    for output, lse in zip(outputs, lse_tensors, strict=True):
        if output.dim() != 4 or tuple(output.shape) != shape or not output.is_contiguous():
            allowed = f"contiguous [B, T, heads, head_dim], all {shape}"
            raise refuse(ValueError, "outputs", tuple(output.shape), allowed, "output.flatten(1, -3).contiguous()")
        if tuple(lse.shape) != shape[:3]:
            raise refuse(
                ValueError, "lse_tensors", tuple(lse.shape), f"{shape[:3]} = [B, T, heads]", "lse.flatten(1, -2)"
            )
