"""What the modules of NATTEN 0.14 to 0.17 share: parameters by their names, and one call of a natrain operator.

Parameters ``qkv``, ``proj`` (linear), ``rpb``; submodules ``attn_drop``, ``proj_drop``; attributes ``num_heads``,
``head_dim``, ``scale``, ``kernel_size``, ``dilation``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from natrain import ops
from natrain.compat.arguments import refuse

QKVPACKED = {1: ops.na1d_qkvpacked, 2: ops.na2d_qkvpacked, 3: ops.na3d_qkvpacked}


class Attention(nn.Module):
    """Projections and bias of one layer; ``attend`` runs it on ``[B, *spatial, dim]``."""

    na_dim: int

    def _build(
        self,
        dim: int,
        num_heads: int,
        bias_kernel: tuple[int, ...] | None,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
    ) -> None:
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        if bias_kernel is None:
            self.register_parameter("rpb", None)
        else:
            self.rpb = nn.Parameter(torch.zeros(num_heads, *(2 * k - 1 for k in bias_kernel)))
            trunc_normal_(self.rpb, std=0.02, mean=0.0, a=-2.0, b=2.0)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _check_rank(self, x: Tensor) -> None:
        if x.dim() != self.na_dim + 2:
            layout = f"[B, {self.na_dim} spatial axes, dim]"
            raise refuse(ValueError, "x.shape", tuple(x.shape), layout, "the module of that rank")

    def _attend(self, x: Tensor, kernel_size, dilation, is_causal, dropout_p: float) -> Tensor:
        """Attention without ``proj``; dropout on the probabilities, drawn by natrain's operator."""
        qkv = self.qkv(x).reshape(*x.shape[:-1], 3, self.num_heads, self.head_dim)
        out = QKVPACKED[self.na_dim](
            qkv, kernel_size, dilation, is_causal=is_causal, rpb=self.rpb, scale=self.scale, dropout_p=dropout_p
        )
        return out.flatten(-2)

    def _dropout_p(self) -> float:
        return self.attn_drop.p if self.attn_drop.training else 0.0
