"""DiNATs (2209.15001): Swin's skeleton, patch embedding and merging, with dilated neighborhood attention."""

from __future__ import annotations

from timm.models import generate_default_cfgs

from natrain.layers import PatchMerging, PatchTokenizer
from natrain.models.nat import NAT
from natrain.models.plans import DILATIONS_224, DINATS
from natrain.models.published import tagged_cfgs
from natrain.models.registry import build, imagenet_cfg, register


class DiNATs(NAT):
    """NAT with non-overlapping patches; arguments as NAT's, the stages are called ``layers`` in the weights."""

    trunk_name = "layers"
    plans = DINATS
    tokenizer = PatchTokenizer
    downsampler = PatchMerging


SHARED = dict(mlp_ratio=4, dilations=DILATIONS_224)
TINY = dict(SHARED, dim=96, depths=(2, 2, 6, 2), heads=3, drop_path_rate=0.2)
SMALL = dict(SHARED, dim=96, depths=(2, 2, 18, 2), heads=3, drop_path_rate=0.3)
BASE = dict(SHARED, dim=128, depths=(2, 2, 18, 2), heads=4, drop_path_rate=0.5)
LARGE = dict(SHARED, dim=192, depths=(2, 2, 18, 2), heads=6, drop_path_rate=0.35)

NAMES = ("dinat_s_tiny", "dinat_s_small", "dinat_s_base", "dinat_s_large")
default_cfgs = generate_default_cfgs(tagged_cfgs({name: imagenet_cfg("patch_embed.proj") for name in NAMES}))


@register
def dinat_s_tiny(pretrained: bool = False, **kwargs) -> DiNATs:
    return build(DiNATs, "dinat_s_tiny", pretrained, TINY, kwargs)


@register
def dinat_s_small(pretrained: bool = False, **kwargs) -> DiNATs:
    return build(DiNATs, "dinat_s_small", pretrained, SMALL, kwargs)


@register
def dinat_s_base(pretrained: bool = False, **kwargs) -> DiNATs:
    return build(DiNATs, "dinat_s_base", pretrained, BASE, kwargs)


@register
def dinat_s_large(pretrained: bool = False, **kwargs) -> DiNATs:
    return build(DiNATs, "dinat_s_large", pretrained, LARGE, kwargs)
