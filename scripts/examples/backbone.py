"""A natrain model as the backbone of torchvision's detectors and of a segmentation head: feature pyramid included."""

from __future__ import annotations

from collections import OrderedDict

import timm
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import natrain  # noqa: F401 - registers the models with timm


class Pyramid(nn.Module):
    """Images ``[B, 3, H, W]`` to maps ``{"0": [B, 256, H/4, W/4], ..., "3", "pool"}``.

    A LayerNorm on each stage's map comes first, as in NAT's published detection backbones (``norm0`` to ``norm3``).

    Args:
        name: a hierarchical model.
        options: of ``timm.create_model``: ``pretrained=True``, ``dilations="coco800"``, ``na_padding="shrink"``, ...
    """

    out_channels = 256

    def __init__(self, name: str, **options: object) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, **options)
        widths = self.body.feature_info.channels()
        self.norms = nn.ModuleList(LayerNorm2d(width) for width in widths)
        self.fpn = FeaturePyramidNetwork(widths, self.out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = [norm(one) for norm, one in zip(self.norms, self.body(images), strict=True)]
        return self.fpn(OrderedDict((str(level), one) for level, one in enumerate(maps)))
