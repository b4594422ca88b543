"""From NCHW images to NHWC token maps (tokenizers), and from one map to the next, half as large (downsamplers)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

__all__ = ["ConvDownsampler", "ConvTokenizer", "PatchMerging", "PatchTokenizer"]


class ConvTokenizer(nn.Module):
    """Overlapping tokenizer: two 3x3 convolutions, then LayerNorm (NAT, 2204.07143, section 3.3).

    ``[B, in_chans, H, W]`` to ``[B, ceil(H / r), ceil(W / r), dim]``, where r = ``reduction`` is the product of
    ``strides``; (2, 2) is the published one, smaller strides serve small images.
    """

    def __init__(self, in_chans: int, dim: int, strides: Sequence[int] = (2, 2)) -> None:
        super().__init__()
        first, second = strides
        self.reduction = first * second
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, kernel_size=3, stride=first, padding=1),
            nn.Conv2d(dim // 2, dim, kernel_size=3, stride=second, padding=1),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.norm(self.proj(x_BCHW).permute(0, 2, 3, 1))


class PatchTokenizer(nn.Module):
    """Swin's patch embedding with its LayerNorm: one token a patch; odd sides are padded with zeros at their end.

    ``[B, in_chans, H, W]`` to ``[B, ceil(H / patch_size), ceil(W / patch_size), dim]``.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int = 4) -> None:
        super().__init__()
        self.reduction = patch_size
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = x_BCHW.shape[2:]
        missing = (0, -width % self.reduction, 0, -height % self.reduction)
        if any(missing):
            x_BCHW = F.pad(x_BCHW, missing)
        return self.norm(self.proj(x_BCHW).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """Overlapping downsampler: 3x3 convolution of stride 2 without bias, then LayerNorm (NAT, 2204.07143, section 3.3).

    ``[B, Y, X, dim]`` to ``[B, ceil(Y / 2), ceil(X / 2), 2 * dim]``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x_BYXC: Tensor) -> Tensor:
        return self.norm(self.reduction(x_BYXC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
