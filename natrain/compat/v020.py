"""NATTEN 0.20.0 to 0.21.1: ``na{1,2,3}d`` with stride, ``attention``, ``merge_attentions``, modules without bias.

Heads last. The fifth argument of ``na*d`` is stride, where 0.17 had dilation. Backend names are checked against the
device they were for, then natrain chooses its own kernel; tile shapes and schedules tuned their kernels and are
accepted without effect.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from natrain import ops
from natrain.compat import arguments, heads_last, switches, types, v017
from natrain.compat.arguments import refuse
from natrain.compat.arguments020 import (
    KernelSchedule,
    check_additional,
    check_all_args,
    check_args_against_input,
    check_backend,
    check_kernel_schedule,
    check_merge,
    check_qkv,
    check_rank,
)

VERSION = "0.21.1"


def generic(
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
    backend: str | None = None,
    kernel_schedule: Any = None,
    return_lse: bool = False,
    attention_kwargs: dict | None = None,
    grouped: bool = False,
):
    """Neighborhood attention of query's rank, with the checks of 0.20 on; ``grouped`` allows fewer key heads."""
    check_qkv(query, key, value, ranks=(4, 5, 6), grouped=grouped)
    if query.shape[1:-2] != key.shape[1:-2]:
        raise refuse(ValueError, "key.shape", tuple(key.shape), "query's token axes", "self-attention inputs")
    check_additional(query, key, value, additional_keys, additional_values, grouped=grouped)
    check_kernel_schedule(kernel_schedule)
    check_backend(backend, "fna", query.device)
    check_backend((attention_kwargs or {}).get("backend"), "fmha", query.device)
    na_dim = query.dim() - 3
    kernel_size, stride, dilation, is_causal = check_all_args(na_dim, kernel_size, stride, dilation, is_causal)
    check_args_against_input(query, kernel_size, stride, dilation, is_causal)
    return heads_last.neighborhood_attention(
        na_dim,
        query,
        key,
        value,
        kernel_size=kernel_size,
        dilation=dilation,
        stride=stride,
        is_causal=is_causal,
        scale=scale or query.shape[-1] ** -0.5,
        additional_keys=additional_keys,
        additional_values=additional_values,
        return_lse=return_lse,
    )


_TUNING = """``backend`` is checked against the device, then natrain chooses; q_tile_shape, kv_tile_shape,
    backward_q_tile_shape, backward_kv_tile_shape, backward_kv_splits, backward_use_pt_reduction, run_persistent_kernel,
    kernel_schedule, torch_compile and attention_kwargs tuned their kernels and change nothing."""


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
        try_fuse_additional_kv: bool = False,
    ) -> Tensor:
        check_rank(query, na_dim)
        return generic(
            query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values,
            backend, kernel_schedule, attention_kwargs=attention_kwargs,
        )  # fmt: skip

    na.__name__ = na.__qualname__ = f"na{na_dim}d"
    na.__doc__ = f"""Attention of rank {na_dim} on [B, *spatial, heads, head_dim]; value may have another head_dim.

    Additional keys and values [B, tokens, heads, head_dim] join the softmax. {_TUNING}

    Raises:
        NotImplementedError: sparse or nested tensors; an unknown backend.
        RuntimeError: a backend of another device.
        ValueError: shapes, dtypes or sizes that NATTEN refused, fewer key heads than query heads among them.
    """
    return na


na1d, na2d, na3d = (_make(na_dim) for na_dim in (1, 2, 3))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
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
    """Plain attention: query [B, T, heads, head_dim], key and value [B, S, heads, head_dim or head_dim_v].

    Returns out [B, T, heads, head_dim_v], and with ``return_lse`` the natural log of the sum of exp, [B, T, heads].
    Tile sizes and schedules tuned their kernels and change nothing.

    Raises:
        NotImplementedError: sparse or nested tensors; an unknown backend.
        RuntimeError: a backend of another device.
        ValueError: shapes or dtypes that do not fit.
    """
    check_qkv(query, key, value, ranks=(4,), grouped=False)
    check_kernel_schedule(kernel_schedule)
    check_backend(backend, "fmha", query.device)
    with torch.autocast(query.device.type, enabled=False):
        out, lse = heads_last.dense_attention(query, key, value, scale or query.shape[-1] ** -0.5)
    return (out, lse) if return_lse else out


def merge_attentions(outputs: list[Tensor], lse_tensors: list[Tensor], torch_compile: bool = True) -> Tensor:
    """The output as if all parts' keys had been in one softmax; differentiable. ``torch_compile`` changes nothing.

    Raises:
        ValueError: fewer than two parts, shapes that disagree, an output that is not contiguous.
    """
    check_merge(outputs, lse_tensors)
    return ops.merge_attentions(outputs, lse_tensors)[0]


class _NeighborhoodAttention(nn.Module):
    """Input and output ``[B, *spatial, embed_dim]``; no relative position bias.

    Raises:
        ValueError: heads that do not divide embed_dim, sizes out of range; an input of another shape (forward).
    """

    na_dim: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size,
        stride=1,
        dilation=1,
        is_causal=False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.kernel_size, self.stride, self.dilation, self.is_causal = check_all_args(
            self.na_dim, kernel_size, stride, dilation, is_causal
        )
        if embed_dim % num_heads:
            raise refuse(ValueError, "num_heads", num_heads, f"a divisor of embed_dim {embed_dim}", "num_heads=1")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.qkv = nn.Linear(embed_dim, embed_dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != self.na_dim + 2 or x.shape[-1] != self.embed_dim:
            layout = f"[B, {self.na_dim} spatial axes, {self.embed_dim}]"
            raise refuse(ValueError, "x.shape", tuple(x.shape), layout, "the module of that rank and width")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        out = generic(q, k, v, self.kernel_size, self.stride, self.dilation, self.is_causal, self.scale)
        return self.proj_drop(self.proj(out.flatten(-2)))

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, dilation={self.dilation}, is_causal={self.is_causal}"
        )


class NeighborhoodAttention1D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    na_dim = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    na_dim = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    na_dim = 3


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    """What ``use_kv_parallelism_in_fused_na`` set; on from the start, unlike in 0.17."""
    return switches.state.kv_parallelism is not False


def _no_configs(name: str):
    def get_configs(*args: Any, **kwargs: Any) -> list:
        return []

    get_configs.__name__ = get_configs.__qualname__ = name
    get_configs.__doc__ = "Empty: none of NATTEN's kernels is here, so none of their configurations is legal."
    return get_configs


_CONFIGS = {
    name: _no_configs(name)
    for family in ("cutlass", "cutlass_hopper", "cutlass_blackwell", "flex")
    for kind in ("fmha", "fna")
    for name in (f"get_configs_for_{family}_{kind}", f"get_bwd_configs_for_{family}_{kind}")
    if not name.startswith("get_bwd_configs_for_flex")
}
_CONTEXT = {
    name: getattr(switches, name)
    for name in (
        "allow_flex_compile allow_flex_compile_backprop are_deterministic_algorithms_enabled disable_flex_compile "
        "disable_flex_compile_backprop get_memory_usage_preference is_flex_compile_allowed "
        "is_flex_compile_backprop_allowed is_memory_usage_default is_memory_usage_strict is_memory_usage_unrestricted "
        "set_memory_usage_preference use_deterministic_algorithms use_kv_parallelism_in_fused_na"
    ).split()
} | {"is_kv_parallelism_in_fused_na_enabled": is_kv_parallelism_in_fused_na_enabled}
_MODULES = {
    f"NeighborhoodAttention{rank}D": module
    for rank, module in enumerate((NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D), 1)
}
_CHECKS = {
    "check_all_args": check_all_args,
    "check_args_against_input": check_args_against_input,
    "check_causal_arg": arguments.check_causal_arg,
    "check_kernel_schedule": check_kernel_schedule,
    "check_stride_arg": arguments.check_stride_arg,
}


def _of_any_rank(functions: dict[str, Any]):
    def neighborhood_attention_generic(query: Tensor, *args: Any, **kwargs: Any):
        if query.dim() not in (4, 5, 6):
            layout = "[B, *spatial, heads, head_dim] of rank 1 to 3"
            raise refuse(ValueError, "query.shape", tuple(query.shape), layout, "4 to 6 axes")
        return functions[f"na{query.dim() - 3}d"](query, *args, **kwargs)

    neighborhood_attention_generic.__doc__ = "``na1d``, ``na2d`` or ``na3d``, by query's rank; the same arguments."
    return neighborhood_attention_generic


def layout(functions: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The modules of 0.20 on around these five ``functions`` (na1d, na2d, na3d, attention, merge_attentions)."""
    return {
        "": {**_MODULES, **_CONTEXT, **_CONFIGS, **functions, "HAS_LIBNATTEN": torch.cuda.is_available()},
        "functional": {**functions, "neighborhood_attention_generic": _of_any_rank(functions)},
        "modules": _MODULES,
        "context": {**_CONTEXT, "MemoryUsagePreference": switches.MemoryUsagePreference},
        "backends": _CONFIGS,
        "types": {**types.NAMES, "KernelSchedule": KernelSchedule},
        "utils": {},
        "utils.checks": _CHECKS,
        "utils.log": v017.LAYOUT["utils.log"],
    }


LAYOUT = layout(
    {"na1d": na1d, "na2d": na2d, "na3d": na3d, "attention": attention, "merge_attentions": merge_attentions}
)
