"""NATTEN 0.17: ``na{1,2,3}d_qk``, ``na{1,2,3}d_av`` (heads first), ``na{1,2,3}d`` (heads last), causal masks, switches.

One size per axis, or one for all. qk and av refuse even sizes, ``na*d`` refuses them with a bias only; both refuse a
bias with causal masks. The modules have no bias unless told, raise where 0.15 padded, and follow the rules of qk and av
until ``use_fused_na()``, then those of ``na*d``, which apply no attention dropout. The names of 0.14 live on, with a
deprecation warning, as they did up to 0.17.4.
"""

from __future__ import annotations

import warnings

from torch import Tensor

from natrain.compat import arguments, heads_last, switches, types, unfused
from natrain.compat.arguments import check_all_args, refuse
from natrain.compat.layers import Attention

VERSION = "0.17.5"


def _unfused(na_dim: int) -> tuple:
    def qk(
        query: Tensor,
        key: Tensor,
        kernel_size,
        dilation=1,
        additional_keys: Tensor | None = None,
        is_causal=False,
        rpb: Tensor | None = None,
    ) -> Tensor:
        window = check_all_args(na_dim, kernel_size, dilation, is_causal)
        return unfused.qk(na_dim, query, key, rpb, *window, additional_keys, VERSION)

    def av(
        attn: Tensor, value: Tensor, kernel_size, dilation=1, additional_values: Tensor | None = None, is_causal=False
    ) -> Tensor:
        window = check_all_args(na_dim, kernel_size, dilation, is_causal)
        return unfused.av(na_dim, attn, value, *window, additional_values, VERSION)

    for function, what in ((qk, "Scores q.k + rpb"), (av, "Weighted sums of values")):
        function.__name__ = function.__qualname__ = f"na{na_dim}d_{function.__name__}"
        function.__doc__ = f"{what} over odd windows, heads first, no scale; see ``natrain.compat.unfused``."
    return qk, av


na1d_qk, na1d_av = _unfused(1)
na2d_qk, na2d_av = _unfused(2)
na3d_qk, na3d_av = _unfused(3)


def _check_fused(na_dim: int, query, key, value, rpb, window) -> None:
    kernel_size, dilation, is_causal = window
    arguments.refuse_causal_bias(is_causal, rpb is not None)
    arguments.check_tensors(na_dim, query, key=key, value=value)
    odd = f"NATTEN {VERSION} with a bias" if rpb is not None else None
    arguments.check_window(query.shape[1:-2], kernel_size, dilation, odd=odd)
    if rpb is not None:
        arguments.check_bias(rpb, query.shape[-2], kernel_size)


def _fused(na_dim: int):
    def na(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size,
        dilation=1,
        is_causal=False,
        rpb: Tensor | None = None,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        xformers_kwargs: dict | None = None,
    ) -> Tensor:
        if query.is_nested or key.is_nested or value.is_nested:
            raise refuse(NotImplementedError, "query", "a nested tensor", "plain tensors", "a loop over unbind()")
        if switches.should_force_flex_attention():
            for name, given in (("scale", scale), ("rpb", rpb)):
                if given is not None:
                    fix = "use_fused_na(True) without force_flex_attention"
                    raise refuse(NotImplementedError, name, "a value", "None while FlexAttention is forced", fix)
        if (additional_keys is None) != (additional_values is None):
            raise refuse(ValueError, "additional_keys", "one of two", "both keys and values, or neither", "both")
        window = check_all_args(na_dim, kernel_size, dilation, is_causal)
        _check_fused(na_dim, query, key, value, rpb, window)
        if additional_keys is not None:
            tokens = (query.shape[0], -1, *query.shape[-2:])
            additional_keys, additional_values = additional_keys.reshape(tokens), additional_values.reshape(tokens)
        return heads_last.neighborhood_attention(
            na_dim,
            query,
            key,
            value,
            kernel_size=window[0],
            dilation=window[1],
            stride=(1,) * na_dim,
            is_causal=window[2],
            scale=scale or query.shape[-1] ** -0.5,
            rpb=None if rpb is None else rpb.to(query.dtype),
            additional_keys=additional_keys,
            additional_values=additional_values,
        )

    na.__name__ = na.__qualname__ = f"na{na_dim}d"
    na.__doc__ = f"""Attention of rank {na_dim}, heads last: query, key, value [B, *spatial, heads, head_dim].

    Additional keys and values [B, tokens, heads, head_dim] join the softmax (0.17.5). ``xformers_kwargs`` is accepted
    and unused: no xFormers is at work.

    Raises:
        NotImplementedError: nested tensors; a bias with causal masks; scale or rpb while FlexAttention is forced.
        RuntimeError: shapes, dtypes or windows that NATTEN refused.
        ValueError: sizes of the wrong type; additional keys without values.
    """
    return na


na1d, na2d, na3d = (_fused(na_dim) for na_dim in (1, 2, 3))


def _deprecated(na_dim: int, kind: str, function):
    def old_qkrpb(query, key, rpb, *sizes):
        _warn_renamed(f"natten{na_dim}dqkrpb", function.__name__)
        kernel_size, dilation = _sizes(na_dim, sizes)
        return function(query, key, kernel_size, dilation, rpb=rpb)

    def old(first, second, *sizes):
        _warn_renamed(f"natten{na_dim}d{kind}", function.__name__)
        kernel_size, dilation = _sizes(na_dim, sizes)
        return function(first, second, kernel_size, dilation)

    chosen = old_qkrpb if kind == "qkrpb" else old
    chosen.__name__ = chosen.__qualname__ = f"natten{na_dim}d{kind}"
    sizes = "kernel_size, dilation" if na_dim < 3 else "kernel_size_d, kernel_size, dilation_d, dilation"
    chosen.__doc__ = f"0.14's name for ``{function.__name__}``; sizes are ints: {sizes}."
    return chosen


def _sizes(na_dim: int, sizes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if na_dim < 3:
        kernel_size, dilation = sizes
        return (kernel_size,) * na_dim, (dilation,) * na_dim
    kernel_size_d, kernel_size, dilation_d, dilation = sizes
    return (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)


def _warn_renamed(old: str, new: str) -> None:
    warnings.warn(f"natten.functional.{old} is deprecated; {new} computes the same", DeprecationWarning, stacklevel=3)


_OLD = {
    function.__name__: function
    for na_dim, qk, av in ((1, na1d_qk, na1d_av), (2, na2d_qk, na2d_av), (3, na3d_qk, na3d_av))
    for function in (
        _deprecated(na_dim, "qkrpb", qk),
        _deprecated(na_dim, "qk", qk),
        _deprecated(na_dim, "av", av),
    )
}


class _NeighborhoodAttention(Attention):
    """Input and output ``[B, *spatial, dim]``.

    Args:
        kernel_size, dilation, is_causal: one, or one per axis.
        rel_pos_bias: learn ``rpb`` [num_heads, 2 * kernel_size - 1 per axis].
        use_experimental_ops: accepted with fused attention; natrain's operators are compiled by torch either way.

    Raises:
        NotImplementedError: a bias with causal masks; experimental operators without ``use_fused_na()`` (forward).
        RuntimeError: an axis shorter than kernel_size * dilation; sizes that qk and av, or na*d, refuse (forward).
        ValueError: sizes of the wrong type; an input of another rank (forward).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size,
        dilation=1,
        is_causal=False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
    ):
        super().__init__()
        self.kernel_size, self.dilation, self.is_causal = check_all_args(self.na_dim, kernel_size, dilation, is_causal)
        arguments.refuse_causal_bias(self.is_causal, rel_pos_bias)
        self.attn_drop_rate = attn_drop
        self.use_experimental_ops = use_experimental_ops
        bias_kernel = self.kernel_size if rel_pos_bias else None
        self._build(dim, num_heads, bias_kernel, qkv_bias, qk_scale, attn_drop, proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        self._check_rank(x)
        fused = switches.is_fused_na_enabled()
        if self.use_experimental_ops and not fused:
            raise refuse(NotImplementedError, "use_experimental_ops", True, "False without fused", "use_fused_na()")
        if fused and self.attn_drop_rate > 0:
            switches.logger.error("attn_drop=%s is NOT applied: fused attention of 0.17 has none", self.attn_drop_rate)
        odd = f"NATTEN {VERSION} without use_fused_na(), or with a bias," if not fused or self.rpb is not None else None
        arguments.check_window(x.shape[1:-1], self.kernel_size, self.dilation, odd=odd)
        dropout_p = 0.0 if fused else self._dropout_p()
        out = self._attend(x, self.kernel_size, self.dilation, self.is_causal, dropout_p)
        return self.proj_drop(self.proj(out))

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"dilation={self.dilation}, is_causal={self.is_causal}, has_bias={self.rpb is not None}"
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


_MODULES = {
    f"NeighborhoodAttention{rank}D": module
    for rank, module in enumerate((NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D), 1)
}
_CONTEXT = {
    name: getattr(switches, name)
    for name in (
        "are_deterministic_algorithms_enabled disable_autotuner disable_gemm_na disable_tf32 disable_tiled_na "
        "enable_gemm_na enable_tf32 enable_tiled_na force_flex_attention get_memory_usage_preference has_bfloat "
        "has_cuda has_fna has_fp64_gemm has_gemm has_half has_tf32_gemm is_autotuner_enabled "
        "is_autotuner_enabled_for_backward is_autotuner_enabled_for_forward is_autotuner_thorough_for_backward "
        "is_autotuner_thorough_for_forward is_fused_na_enabled is_gemm_na_enabled "
        "is_kv_parallelism_in_fused_na_enabled is_memory_usage_default is_memory_usage_strict "
        "is_memory_usage_unrestricted is_tf32_in_gemm_na_enabled is_tiled_na_enabled set_memory_usage_preference "
        "use_autotuner use_deterministic_algorithms use_flex_attention use_fused_na use_gemm_na "
        "use_kv_parallelism_in_fused_na use_tf32_in_gemm_na use_tiled_na"
    ).split()
} | {
    "has_fused_na": switches.has_fna,
    "has_fp32_gemm": switches.has_tf32_gemm,
    "use_fna": switches.use_fused_na,
    "is_fna_enabled": switches.is_fused_na_enabled,
}
_CHECKS = {
    name: getattr(arguments, name)
    for name in (
        "check_all_args check_causal_arg check_dilation_arg check_input_size_arg check_kernel_size_arg "
        "get_num_na_weights"
    ).split()
}
_TENSOR_HELPERS = {
    name: getattr(arguments, name)
    for name in ("check_additional_keys", "check_additional_values", "make_attn_tensor_from_input")
}
_LOG = {"get_logger": switches.logger.manager.getLogger}


_FUNCTIONS = (na1d, na2d, na3d, na1d_qk, na1d_av, na2d_qk, na2d_av, na3d_qk, na3d_av)
LAYOUT = {
    "": {**_MODULES, **_CONTEXT},
    "functional": {**{function.__name__: function for function in _FUNCTIONS}, **_OLD},
    "context": {
        **_CONTEXT,
        "MemoryUsagePreference": switches.MemoryUsagePreference,
        "should_use_flex_attention": switches.should_use_flex_attention,
        "should_force_flex_attention": switches.should_force_flex_attention,
    },
    **{
        f"{prefix}{rank}d": {f"NeighborhoodAttention{rank}D": _MODULES[f"NeighborhoodAttention{rank}D"]}
        for prefix in ("na", "natten")
        for rank in (1, 2, 3)
    },
    "types": types.NAMES,
    "utils": {**_CHECKS, **_TENSOR_HELPERS, "get_device_cc": switches.get_device_cc},
    "utils.checks": _CHECKS,
    "utils.log": _LOG,
    "utils.misc": {"get_device_cc": switches.get_device_cc},
    "utils.tensor": _TENSOR_HELPERS,
}
