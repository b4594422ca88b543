"""The transformer block all families share: attention and MLP, pre-norm, with drop path and optional layer scale."""

from __future__ import annotations

import torch
from timm.layers import DropPath, Mlp
from timm.models import checkpoint
from torch import Tensor, nn

from natrain.errors import invalid
from natrain.layers.attention import check_rates


class TransformerBlock(nn.Module):
    """``x + attn(norm1(x))`` then ``x + mlp(norm2(x))`` on ``[B, *spatial, dim]`` (NAT, 2204.07143, figure 5).

    Args:
        dim: channels.
        attn: the attention layer; keeps its input's shape.
        mlp_ratio: hidden channels of the MLP in units of ``dim``.
        proj_drop: dropout in the MLP.
        drop_path: probability to drop a residual branch for one image (stochastic depth).
        layer_scale: initial value of the per-channel factors ``gamma1``, ``gamma2`` on the branches; None for none.

    Raises:
        ValueError: a probability outside [0, 1), an MLP without channels, a ``layer_scale`` that is no number.

    ``grad_checkpointing`` (attribute, off) trades a second forward pass for the memory of the block's activations.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        check_rates(proj_drop=proj_drop, drop_path=drop_path)
        if not isinstance(mlp_ratio, (int, float)) or not dim * mlp_ratio >= 1:
            raise invalid("mlp_ratio", mlp_ratio, "a number > 0, hidden channels in units of dim", "mlp_ratio=3")
        if layer_scale is not None and not isinstance(layer_scale, (int, float)):
            raise invalid("layer_scale", layer_scale, "a number, or None for none", "layer_scale=1e-5")
        self.grad_checkpointing = False
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        for name in ("gamma1", "gamma2"):
            self.register_parameter(
                name, None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
            )

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """``key_mask``: bool [B, *spatial] for ``attn``, which must be a neighborhood attention layer then."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, key_mask)
        return self._forward(x, key_mask)

    def _forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        options = {} if key_mask is None else {"key_mask": key_mask}
        x = x + self._branch(self.attn(self.norm1(x), **options), self.gamma1)
        return x + self._branch(self.mlp(self.norm2(x)), self.gamma2)

    def _branch(self, y: Tensor, gamma: Tensor | None) -> Tensor:
        return self.drop_path(y if gamma is None else gamma * y)
