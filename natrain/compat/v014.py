"""NATTEN 0.14: ``natten{1,2}dqkrpb``, ``natten{1,2}dqk``, ``natten{1,2}dav`` and two modules.

Heads first; kernel size and dilation are ints and have no default. The modules pad short inputs before the qkv
projection and have a bias unless told otherwise. Under CUDA autocast the functions compute in float16, whatever dtype
autocast has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from natrain.compat import unfused
from natrain.compat.layers import Attention

VERSION = "0.14.6"


def _cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """float16 for CUDA tensors under autocast, as 0.14's functions cast their inputs."""
    if not torch.is_autocast_enabled("cuda"):
        return tensors
    return tuple(t.half() if t is not None and t.is_cuda and t.is_floating_point() else t for t in tensors)


def _functions(na_dim: int) -> tuple:
    not_causal = (False,) * na_dim

    def qkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
        query, key, rpb = _cast(query, key, rpb)
        window = (kernel_size,) * na_dim, (dilation,) * na_dim
        return unfused.qk(na_dim, query, key, rpb, *window, not_causal, None, VERSION)

    def qk(query: Tensor, key: Tensor, kernel_size: int, dilation: int) -> Tensor:
        return qkrpb(query, key, None, kernel_size, dilation)

    def av(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
        attn, value = _cast(attn, value)
        window = (kernel_size,) * na_dim, (dilation,) * na_dim
        return unfused.av(na_dim, attn, value, *window, not_causal, None, VERSION)

    what = {"qkrpb": "Scores q.k + rpb", "qk": "Scores q.k", "av": "Weighted sums of values"}
    for function, (suffix, text) in zip((qkrpb, qk, av), what.items(), strict=True):
        function.__name__ = function.__qualname__ = f"natten{na_dim}d{suffix}"
        function.__doc__ = f"{text} over odd windows, heads first, no scale; see ``natrain.compat.unfused``."
    return qkrpb, qk, av


natten1dqkrpb, natten1dqk, natten1dav = _functions(1)
natten2dqkrpb, natten2dqk, natten2dav = _functions(2)


class _NeighborhoodAttention(Attention):
    """Input and output ``[B, *spatial, dim]``; axes shorter than kernel_size * dilation are padded with zeros first.

    Raises:
        AssertionError: an even kernel size or one below 3; a dilation below 1.
    """

    def __init__(
        self,
        dim,
        num_heads,
        kernel_size,
        dilation=1,
        bias=True,
        qkv_bias=True,
        qk_scale=None,
        attn_drop=0.0,
        proj_drop=0.0,
    ):
        super().__init__()
        assert kernel_size > 1 and kernel_size % 2 == 1, f"kernel_size={kernel_size}: expected an odd number above 1"
        assert dilation is None or dilation >= 1, f"dilation={dilation}: expected a number >= 1"
        self.kernel_size = kernel_size
        self.dilation = dilation or 1
        self.window_size = self.kernel_size * self.dilation
        bias_kernel = (kernel_size,) * self.na_dim if bias else None
        self._build(dim, num_heads, bias_kernel, qkv_bias, qk_scale, attn_drop, proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        self._check_rank(x)
        lengths = x.shape[1:-1]
        missing = [max(0, self.window_size - length) for length in lengths]
        if any(missing):
            x = F.pad(x, [0, 0] + [n for pad in reversed(missing) for n in (0, pad)])
        out = self._attend(x, self.kernel_size, self.dilation, False, self._dropout_p())
        if any(missing):
            out = out[(slice(None), *(slice(length) for length in lengths))]
        return self.proj_drop(self.proj(out))

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"dilation={self.dilation}, rel_pos_bias={self.rpb is not None}"
        )


class NeighborhoodAttention1D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    na_dim = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    na_dim = 2


_MODULES = {"NeighborhoodAttention1D": NeighborhoodAttention1D, "NeighborhoodAttention2D": NeighborhoodAttention2D}
LAYOUT = {
    "": _MODULES,
    "functional": {
        function.__name__: function
        for function in (natten1dqkrpb, natten1dqk, natten1dav, natten2dqkrpb, natten2dqk, natten2dav)
    },
    "natten1d": {"NeighborhoodAttention1D": NeighborhoodAttention1D},
    "natten2d": {"NeighborhoodAttention2D": NeighborhoodAttention2D},
}
