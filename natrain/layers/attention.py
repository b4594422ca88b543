"""Attention layers: neighborhood attention of rank 1, 2 and 3, and global attention with the same bias.

Legend: B batch, Z Y X spatial axes, C channels, N heads, D head dim.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from natrain.errors import invalid
from natrain.layers.padding import Fit, check_na_padding, fit_window
from natrain.layers.position import check_pos, rotary_angles, rotate
from natrain.ops import (
    na1d,
    na1d_qk,
    na1d_qkvpacked,
    na2d,
    na2d_qk,
    na2d_qkvpacked,
    na3d,
    na3d_qk,
    na3d_qkvpacked,
)
from natrain.ops.problem import check_window
from natrain.ops.registry import get_kernel


def head_dim_of(dim: int, num_heads: int) -> int:
    """Channels of a head; ``dim`` must be a multiple of ``num_heads``."""
    if num_heads < 1 or dim % num_heads:
        raise invalid("num_heads", num_heads, f"a divisor of dim ({dim})", f"num_heads={max(1, dim // 32)}")
    return dim // num_heads


def check_rates(**rates: float) -> None:
    """Each of ``rates`` must be a probability to drop something, in [0, 1); a NaN would silently drop nothing."""
    for argument, rate in rates.items():
        if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise invalid(argument, rate, "a number in [0, 1)", f"{argument}=0.1")


def check_counts(**counts: int) -> None:
    """Each of ``counts`` must be a whole number >= 1."""
    for argument, count in counts.items():
        if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
            raise invalid(argument, count, "a whole number >= 1", f"{argument}={64 if argument == 'dim' else 3}")


def _at_the_ends(pad: Sequence[int]) -> list[int]:
    """``pad`` tokens behind each axis, as ``F.pad`` takes them: last axis first."""
    return [n for count in reversed(pad) for n in (0, count)]


class _NeighborhoodAttention(nn.Module):
    """Self-attention of each token to its neighbourhood (NAT, 2204.07143, section 3.1; DiNAT, 2209.15001, section 3.1).

    Input and output ``[B, *spatial, dim]``; ``forward(x, key_mask)`` leaves masked keys out. Parameters: ``qkv``,
    ``proj`` (linear) and ``rpb`` ``[num_heads, 2 * kernel_size - 1 per axis]`` where ``pos="rpb"``, named as in the
    published checkpoints.

    Args:
        dim: channels C.
        num_heads: heads N; a divisor of ``dim``.
        kernel_size: tokens per axis, int or one per axis.
        dilation: gap between neighbouring keys, int or one per axis.
        stride: queries that share a window, int or one per axis; 1 is standard, ``kernel_size`` blocked attention.
        is_causal: bool or one per axis.
        qkv_bias: give the qkv projection a bias.
        pos: ``"rpb"``, ``"rope"`` or ``"none"``; see ``natrain.layers.position``. The bias is shared across dilation
            groups, that is, counted in dilated steps; rotations count tokens.
        scale: factor on q.k; None means head_dim ** -0.5.
        attn_drop: dropout on the attention probabilities, in training only.
        proj_drop: dropout after the output projection, in training only.
        kernel: the kernel that computes it, by name; ``natrain.ops.list_kernels()`` knows them.
        na_padding: what to do where an axis is shorter than kernel_size * dilation; see ``natrain.layers.padding``.

    Raises:
        ValueError: an argument out of range (construction); an axis too short under ``na_padding="raise"`` (forward).
    """

    na_dim: int
    attend: Callable[..., Tensor]
    attend_packed: Callable[..., Tensor]
    score: Callable[..., Tensor]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        pos: str = "rpb",
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        kernel: str = "auto",
        na_padding: str = "raise",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim_of(dim, num_heads)
        self.pos = check_pos(pos, self.head_dim, self.na_dim)
        self.window = check_window((sys.maxsize,) * self.na_dim, kernel_size, dilation, stride, is_causal)
        self.scale = scale
        check_rates(attn_drop=attn_drop, proj_drop=proj_drop)
        self.attn_drop = attn_drop
        if kernel != "auto":
            get_kernel(kernel)
        self.kernel = kernel
        self.na_padding = check_na_padding(na_padding)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = nn.Parameter(torch.zeros(num_heads, *self.window.rpb_shape)) if pos == "rpb" else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """``key_mask``: bool [B, *spatial], False where a token is padding of yours that nobody may attend to."""
        qkv, fit = self._project(x)
        if key_mask is not None and any(fit.pad):
            key_mask = F.pad(key_mask, _at_the_ends(fit.pad), value=True)
        options = dict(
            **self._window_arguments(fit),
            key_mask=key_mask,
            dropout_p=self.attn_drop if self.training else 0.0,
            kernel=self.kernel,
        )
        if self.pos == "rope":
            out = self.attend(*self._rotated(qkv), **options).flatten(-2)
        else:
            out = self.attend_packed(qkv, **options).flatten(-2)
        if any(fit.pad):
            out = out[(slice(None), *map(slice, x.shape[1:-1]))]
        return self.proj_drop(self.proj(out))

    @torch.no_grad()
    def attention_probs(self, x: Tensor) -> tuple[Tensor, Fit]:
        """What every query attends to, as the layer does in evaluation: for people, not for training.

        Returns:
            probabilities float32 ``[B, *spatial, N, K]``, K in the order of ``natrain.ops.window.axis_window``, and the
            window they belong to; the map has ``fit.pad`` tokens more per axis than ``x`` where the policy pads.
        """
        qkv, fit = self._project(x)
        q, k, _ = self._rotated(qkv) if self.pos == "rope" else qkv.unbind(-3)
        return self.score(q, k, **self._window_arguments(fit)).float().softmax(-1), fit

    def _project(self, x: Tensor) -> tuple[Tensor, Fit]:
        """Pad as the policy says, then project: qkv ``[B, *spatial, 3, N, D]`` and the window to use."""
        lengths = x.shape[1:-1]
        if len(lengths) != self.na_dim:
            raise invalid("x.shape", tuple(x.shape), f"[B, {self.na_dim} spatial axes, C]", "the layer of another rank")
        fit = fit_window(lengths, self.window, self.na_padding)
        if any(fit.pad):
            x = F.pad(x, [0, 0, *_at_the_ends(fit.pad)])
        return self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)), fit

    def _rotated(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unbind(-3)
        angles = rotary_angles(qkv.shape[1:-3], self.head_dim, qkv.device)
        return rotate(q, angles), rotate(k, angles), v

    def _window_arguments(self, fit: Fit) -> dict[str, Any]:
        return dict(
            kernel_size=fit.kernel_size,
            dilation=fit.dilation,
            stride=fit.stride,
            is_causal=self.window.is_causal,
            rpb=self._rpb_of(fit.kernel_size),
            scale=self.scale,
        )

    def _rpb_of(self, kernel_size: tuple[int, ...]) -> Tensor | None:
        """The part of ``rpb`` that a (smaller) window uses: equal offsets keep equal biases."""
        if self.rpb is None or kernel_size == self.window.kernel_size:
            return self.rpb
        ends = zip(self.window.kernel_size, kernel_size, strict=True)
        return self.rpb[(slice(None), *(slice(full - used, full + used - 1) for full, used in ends))]

    def extra_repr(self) -> str:
        window = self.window
        parts = [f"heads={self.num_heads}, kernel_size={window.kernel_size}, dilation={window.dilation}"]
        if max(window.stride) > 1:
            parts.append(f"stride={window.stride}")
        if any(window.is_causal):
            parts.append(f"is_causal={window.is_causal}")
        if self.pos != "rpb":
            parts.append(f"pos={self.pos!r}")
        return ", ".join([*parts, f"kernel={self.kernel!r}, na_padding={self.na_padding!r}"])


class NeighborhoodAttention1d(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    na_dim = 1
    attend = staticmethod(na1d)
    attend_packed = staticmethod(na1d_qkvpacked)
    score = staticmethod(na1d_qk)


class NeighborhoodAttention2d(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    na_dim = 2
    attend = staticmethod(na2d)
    attend_packed = staticmethod(na2d_qkvpacked)
    score = staticmethod(na2d_qk)


class NeighborhoodAttention3d(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    na_dim = 3
    attend = staticmethod(na3d)
    attend_packed = staticmethod(na3d_qkvpacked)
    score = staticmethod(na3d_qk)


class GlobalAttention2d(nn.Module):
    """Attention of every token to every token of a fixed map, with a relative position bias (ViT-rpb of 2209.15001).

    Input and output ``[B, Y, X, dim]`` with ``(Y, X) == input_size``. It is neighborhood attention with a kernel as
    large as the map, computed by PyTorch's scaled_dot_product_attention. Parameters ``qkv``, ``proj``, ``rpb``
    ``[num_heads, 2Y-1, 2X-1]``; buffer ``relative_position_index`` ``[YX, YX]`` (flat index into rpb of each query and
    key), which the published checkpoints hold.

    Raises:
        ValueError: ``dim`` is no multiple of ``num_heads``; a map of another size (forward).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        input_size: tuple[int, int],
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim_of(dim, num_heads)
        self.input_size = tuple(input_size)
        check_rates(attn_drop=attn_drop, proj_drop=proj_drop)
        self.attn_drop = attn_drop
        height, width = self.input_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * height - 1, 2 * width - 1))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.register_buffer("relative_position_index", self.position_index(height, width))
        trunc_normal_(self.rpb, std=0.02)

    @staticmethod
    def position_index(height: int, width: int) -> Tensor:
        """Flat index into ``rpb`` of each query and key of a map, ``[YX, YX]``."""
        y, x = torch.arange(height), torch.arange(width)
        offset_y = (y[None, :] - y[:, None] + height - 1)[:, None, :, None]
        offset_x = (x[None, :] - x[:, None] + width - 1)[None, :, None, :]
        return (offset_y * (2 * width - 1) + offset_x).reshape(height * width, height * width)

    @torch.no_grad()
    def attention_probs(self, x_BYXC: Tensor) -> tuple[Tensor, Fit]:
        """As of the neighborhood attention layers; every token is a key, in row-major order."""
        q_BYXND, k_BYXND, _ = self.qkv(x_BYXC).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        scores = torch.einsum("btnd,bsnd->btns", q_BYXND.flatten(1, 2), k_BYXND.flatten(1, 2)) * self.head_dim**-0.5
        bias_NTT = self.rpb.flatten(1)[:, self.relative_position_index]
        probs = (scores + bias_NTT.transpose(0, 1)).float().softmax(-1)
        return probs.unflatten(1, self.input_size), Fit(self.input_size, (1, 1), (1, 1), (0, 0))

    def forward(self, x_BYXC: Tensor) -> Tensor:
        if tuple(x_BYXC.shape[1:3]) != self.input_size:
            raise invalid(
                "input size (tokens per axis)",
                tuple(x_BYXC.shape[1:3]),
                f"{self.input_size}: global attention's bias belongs to one map size",
                "img_size=... when the model is created, or resized images",
            )
        q_BNTD, k_BNTD, v_BNTD = (
            self.qkv(x_BYXC).flatten(1, 2).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        )
        bias_NTT = self.rpb.flatten(1)[:, self.relative_position_index]
        out_BNTD = F.scaled_dot_product_attention(
            q_BNTD,
            k_BNTD,
            v_BNTD,
            attn_mask=bias_NTT.to(q_BNTD.dtype)[None],
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        out_BYXC = out_BNTD.transpose(1, 2).flatten(-2).unflatten(1, self.input_size)
        return self.proj_drop(self.proj(out_BYXC))

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, input_size={self.input_size}"
