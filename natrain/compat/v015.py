"""NATTEN 0.15: 0.14's functions and modules, rank 3, additional tokens, nested tensors, switches on the package.

Heads first. Rank 3 has a kernel size and a dilation for depth and one for height and width, depth first in the
functions, behind in the module. The module of rank 3 pads height and width only: a short depth raises.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from natrain.compat import arguments, switches, unfused, v014
from natrain.compat.layers import Attention

VERSION = "0.15.1"


def _window(na_dim: int, sizes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(kernel_size, dilation) per axis out of (k, d), or (k_depth, k, d_depth, d) for rank 3."""
    if na_dim < 3:
        kernel_size, dilation = sizes
        return (kernel_size,) * na_dim, (dilation,) * na_dim
    kernel_size_d, kernel_size, dilation_d, dilation = sizes
    return (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)


def _qk(na_dim, query, key, bias, sizes, additional_keys):
    window = _window(na_dim, sizes)
    return unfused.qk(na_dim, query, key, bias, *window, (False,) * na_dim, additional_keys, VERSION)


def _av(na_dim, attn, value, sizes, additional_values):
    window = _window(na_dim, sizes)
    return unfused.av(na_dim, attn, value, *window, (False,) * na_dim, additional_values, VERSION)


def na1d_qk(query: Tensor, key: Tensor, kernel_size: int, dilation: int, additional_keys: Tensor | None = None):
    """Scores [B, heads, X, K + tokens] of rank 1."""
    return _qk(1, query, key, None, (kernel_size, dilation), additional_keys)


def na1d_qk_with_bias(query, key, bias, kernel_size, dilation, additional_keys=None) -> Tensor:
    """Scores [B, heads, X, K + tokens] of rank 1, with a bias on the neighbours."""
    return _qk(1, query, key, bias, (kernel_size, dilation), additional_keys)


def na1d_av(attn: Tensor, value: Tensor, kernel_size: int, dilation: int, additional_values: Tensor | None = None):
    """Weighted sums [B, heads, X, head_dim] of rank 1."""
    return _av(1, attn, value, (kernel_size, dilation), additional_values)


def na2d_qk(query: Tensor, key: Tensor, kernel_size: int, dilation: int, additional_keys: Tensor | None = None):
    """Scores [B, heads, X, Y, K + tokens] of rank 2."""
    return _qk(2, query, key, None, (kernel_size, dilation), additional_keys)


def na2d_qk_with_bias(query, key, bias, kernel_size, dilation, additional_keys=None) -> Tensor:
    """Scores [B, heads, X, Y, K + tokens] of rank 2, with a bias on the neighbours."""
    return _qk(2, query, key, bias, (kernel_size, dilation), additional_keys)


def na2d_av(attn: Tensor, value: Tensor, kernel_size: int, dilation: int, additional_values: Tensor | None = None):
    """Weighted sums [B, heads, X, Y, head_dim] of rank 2."""
    return _av(2, attn, value, (kernel_size, dilation), additional_values)


def na3d_qk(query, key, kernel_size_d, kernel_size, dilation_d, dilation, additional_keys=None) -> Tensor:
    """Scores [B, heads, X, Y, Z, K + tokens] of rank 3."""
    return _qk(3, query, key, None, (kernel_size_d, kernel_size, dilation_d, dilation), additional_keys)


def na3d_qk_with_bias(query, key, bias, kernel_size_d, kernel_size, dilation_d, dilation, additional_keys=None):
    """Scores [B, heads, X, Y, Z, K + tokens] of rank 3, with a bias on the neighbours."""
    return _qk(3, query, key, bias, (kernel_size_d, kernel_size, dilation_d, dilation), additional_keys)


def na3d_av(attn, value, kernel_size_d, kernel_size, dilation_d, dilation, additional_values=None) -> Tensor:
    """Weighted sums [B, heads, X, Y, Z, head_dim] of rank 3."""
    return _av(3, attn, value, (kernel_size_d, kernel_size, dilation_d, dilation), additional_values)


def natten1dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    """``na1d_qk_with_bias`` by its old name."""
    return na1d_qk_with_bias(query, key, rpb, kernel_size, dilation)


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    """``na2d_qk_with_bias`` by its old name."""
    return na2d_qk_with_bias(query, key, rpb, kernel_size, dilation)


def natten3dqkrpb(query, key, rpb, kernel_size_d, kernel_size, dilation_d, dilation) -> Tensor:
    """``na3d_qk_with_bias`` by its old name."""
    return na3d_qk_with_bias(query, key, rpb, kernel_size_d, kernel_size, dilation_d, dilation)


class NeighborhoodAttention3D(Attention):
    """Input and output ``[B, D, H, W, dim]``; short height and width are padded with zeros first, depth is not.

    Raises:
        AssertionError: an even kernel size or one below 3; a dilation below 1.
        RuntimeError: a depth shorter than kernel_size_d * dilation_d; an even kernel_size_d (forward).
        ValueError: an input of another rank (forward).
    """

    na_dim = 3

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        kernel_size_d: int | None = None,
        dilation: int = 1,
        dilation_d: int | None = None,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.kernel_size, self.kernel_size_d = kernel_size, kernel_size_d or kernel_size
        self.dilation = dilation or 1
        self.dilation_d = dilation_d or self.dilation
        assert kernel_size > 1 and kernel_size % 2 == 1, f"kernel_size={kernel_size}: expected an odd number above 1"
        assert min(self.dilation, self.dilation_d) >= 1, f"dilation={dilation, dilation_d}: expected numbers >= 1"
        self.window_size = self.kernel_size * self.dilation
        self.window_size_d = self.kernel_size_d * self.dilation_d
        self._window = _window(3, (self.kernel_size_d, self.kernel_size, self.dilation_d, self.dilation))
        self._build(dim, num_heads, self._window[0] if bias else None, qkv_bias, qk_scale, attn_drop, proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        self._check_rank(x)
        _, _, height, width, _ = x.shape
        missing = max(0, self.window_size - height), max(0, self.window_size - width)
        x = F.pad(x, (0, 0, 0, missing[1], 0, missing[0])) if any(missing) else x
        arguments.check_window(x.shape[1:-1], *self._window, odd=f"NATTEN {VERSION}")
        out = self._attend(x, *self._window, False, self._dropout_p())
        return self.proj_drop(self.proj(out[:, :, :height, :width]))

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, kernel_size_d={self.kernel_size_d}, "
            f"dilation_d={self.dilation_d}, kernel_size={self.kernel_size}, dilation={self.dilation}, "
            f"has_bias={self.rpb is not None}"
        )


def enable_tiled_na() -> None:
    switches.use_tiled_na(True)


def disable_tiled_na() -> None:
    switches.use_tiled_na(False)


def enable_gemm_na() -> None:
    switches.use_gemm_na(True)


def disable_gemm_na() -> None:
    switches.use_gemm_na(False)


_MODULES = {**v014.LAYOUT[""], "NeighborhoodAttention3D": NeighborhoodAttention3D}
_SWITCHES = {
    "enable_tiled_na": enable_tiled_na,
    "disable_tiled_na": disable_tiled_na,
    "enable_gemm_na": enable_gemm_na,
    "disable_gemm_na": disable_gemm_na,
    "enable_tf32": switches.enable_tf32,
    "disable_tf32": switches.disable_tf32,
    "has_bfloat": switches.has_bfloat,
    "has_cuda": switches.has_cuda,
    "has_fp32_gemm": switches.has_tf32_gemm,
    "has_fp64_gemm": switches.has_fp64_gemm,
    "has_gemm": switches.has_gemm,
    "has_half": switches.has_half,
    "has_tf32_gemm": switches.has_tf32_gemm,
}
_TENSOR_HELPERS = {
    function.__name__: function
    for function in (
        arguments.check_additional_keys,
        arguments.check_additional_values,
        arguments.make_attn_tensor_from_input,
    )
}
_FUNCTIONS = (
    na1d_qk, na1d_qk_with_bias, na1d_av, na2d_qk, na2d_qk_with_bias, na2d_av, na3d_qk, na3d_qk_with_bias, na3d_av,
    natten1dqkrpb, natten2dqkrpb, natten3dqkrpb,
)  # fmt: skip
LAYOUT = {
    "": {**_MODULES, **_SWITCHES},
    "functional": {
        **{function.__name__: function for function in _FUNCTIONS},
        **{"natten1dqk": na1d_qk, "natten1dav": na1d_av, "natten2dqk": na2d_qk, "natten2dav": na2d_av},
        **{"natten3dqk": na3d_qk, "natten3dav": na3d_av, "get_device_cc": switches.get_device_cc},
        **_SWITCHES,
    },
    "natten1d": v014.LAYOUT["natten1d"],
    "natten2d": v014.LAYOUT["natten2d"],
    "natten3d": {"NeighborhoodAttention3D": NeighborhoodAttention3D},
    "utils": {**_TENSOR_HELPERS, "NoneType": type(None)},
    "utils.tensor": _TENSOR_HELPERS,
    "utils.typing": {"NoneType": type(None)},
}
