"""The isotropic models of 2209.15001, section 4.3: ViT's skeleton on a 14x14 map, without absolute position embedding.

``nat_isotropic_*`` and ``dinat_isotropic_*`` use neighborhood attention, ``vitrpb_*`` global attention with the same
relative position bias: the controlled comparison of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import nn

from natrain.errors import invalid
from natrain.layers import (
    GlobalAttention2d,
    NeighborhoodAttention2d,
    PatchTokenizer,
    TransformerBlock,
    check_counts,
    check_na_padding,
)
from natrain.models.base import Backbone
from natrain.models.published import tagged_cfgs
from natrain.models.registry import build, imagenet_cfg, register
from natrain.models.spec import StageWindows, check_windows, dilation_plan, image_size, per_stage

PATCH_SIZE = 16


class _Isotropic(Backbone):
    """Equal blocks on one map; ``attention(block)`` makes the attention layer of a block."""

    trunk_name = "layers"
    default_out_indices = 3

    def _make_blocks(
        self,
        attention: Callable[[int], nn.Module],
        dim: int,
        depth: int,
        mlp_ratio: float,
        proj_drop_rate: float,
        drop_path_rate: float,
        global_pool: str,
    ) -> None:
        self.patch_embed = PatchTokenizer(self.in_chans, dim, PATCH_SIZE)
        self.layers = nn.ModuleList(
            TransformerBlock(dim, attention(block), mlp_ratio, proj_drop_rate, rate)
            for block, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth))
        )
        self._finish([dim] * depth, [PATCH_SIZE] * depth, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to norm, for layer-wise learning rates (timm's ``group_parameters``)."""
        return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None), (r"^norm", (99999,))]}


class NATIsotropic(_Isotropic):
    """Isotropic NAT and DiNAT.

    Args:
        dim, depth, heads, mlp_ratio: channels, blocks, heads of each block, hidden channels of the MLP per channel.
        kernel_size: tokens per axis of a window.
        dilations: an int, or a pattern of ints that repeats over the blocks; ``(1, 2)`` is the published DiNAT.
        pos: ``"rpb"``, ``"rope"`` or ``"none"``: how attention knows positions; see ``natrain.layers.position``.
        kernel: name of the attention kernel (or a list of that one name: there is one stage).
        na_padding: policy for maps shorter than kernel_size * dilation; see ``natrain.layers.padding``.
        img_size: the size (pixels) the model is meant for. Any size works later; naming it here checks it at once.
        in_chans, num_classes, global_pool, drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: as in timm;
            ``drop_rate`` is the head's.

    Raises:
        ValueError: an argument out of range, an ``img_size`` that windows do not fit in.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        depth: int = 12,
        mlp_ratio: float = 4,
        kernel_size: int = 7,
        dilations: int | Sequence[int] = 1,
        pos: str = "rpb",
        kernel: str | Sequence[str] = "auto",
        na_padding: str = "raise",
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        rates = dict(drop_path_rate=drop_path_rate, proj_drop_rate=proj_drop_rate, attn_drop_rate=attn_drop_rate)
        super().__init__(in_chans, num_classes, drop_rate, **rates)
        check_counts(dim=dim, heads=heads, depth=depth)
        (plan,) = dilation_plan(dilations if isinstance(dilations, (int, str)) else [dilations], (depth,), {})
        (kernel_size,) = per_stage("kernel_size", kernel_size, 1, int)
        (kernel,) = per_stage("kernel", kernel, 1, str)
        check_na_padding(na_padding)

        def attention(block: int) -> nn.Module:
            return NeighborhoodAttention2d(
                dim,
                heads,
                kernel_size,
                plan[block],
                pos=pos,
                attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate,
                kernel=kernel,
                na_padding=na_padding,
            )

        self._make_blocks(attention, dim, depth, mlp_ratio, proj_drop_rate, drop_path_rate, global_pool)
        self.na_padding = na_padding
        self.pos = pos
        self.windows = [StageWindows(PATCH_SIZE, kernel_size, max(plan))]
        if img_size is not None:
            self.check_image(*image_size(img_size))

    def check_image(self, height: int, width: int) -> None:
        if self.na_padding == "raise":
            check_windows(height, width, self.windows)


class ViTRPB(_Isotropic):
    """Isotropic ViT with relative position biases; ``img_size`` (pixels) fixes its map.

    Args:
        dim, depth, heads, mlp_ratio: channels, blocks, heads of each block, hidden channels of the MLP per channel.
        img_size: int or (height, width); images of other sizes raise.
        kernel: only ``"auto"``: global attention is PyTorch's, no neighborhood attention kernel computes it.
        in_chans, num_classes, global_pool, drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: as in timm;
            ``drop_rate`` is the head's.

    Raises:
        ValueError: ``kernel`` is another; an argument out of range; an image of another size (forward).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        depth: int = 12,
        mlp_ratio: float = 4,
        img_size: int | tuple[int, int] = 224,
        kernel: str = "auto",
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        rates = dict(drop_path_rate=drop_path_rate, proj_drop_rate=proj_drop_rate, attn_drop_rate=attn_drop_rate)
        super().__init__(in_chans, num_classes, drop_rate, **rates)
        check_counts(dim=dim, heads=heads, depth=depth)
        if kernel != "auto":
            raise invalid(
                "kernel", kernel, "'auto': ViT-rpb has global attention, which PyTorch computes", "kernel='auto'"
            )
        map_size = _map_size(*image_size(img_size))

        def attention(block: int) -> nn.Module:
            return GlobalAttention2d(dim, heads, map_size, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate)

        self._make_blocks(attention, dim, depth, mlp_ratio, proj_drop_rate, drop_path_rate, global_pool)
        self.map_size = map_size

    def check_image(self, height: int, width: int) -> None:
        if _map_size(height, width) != self.map_size:
            fixed = tuple(side * PATCH_SIZE for side in self.map_size)
            raise invalid(
                "image size (H, W)",
                (int(height), int(width)),
                f"{fixed}: the position bias of ViT-rpb belongs to one map size",
                f"img_size={(int(height), int(width))} when the model is created, or resized images",
            )


def _map_size(height: int, width: int) -> tuple[int, int]:
    return -(-height // PATCH_SIZE), -(-width // PATCH_SIZE)


SMALL = dict(dim=384, heads=12, drop_path_rate=0.1)
BASE = dict(dim=768, heads=24, drop_path_rate=0.4)
DILATIONS = (1, 2)

NAMES = ("nat_isotropic_small", "nat_isotropic_base", "dinat_isotropic_small", "dinat_isotropic_base")
NAMES_GLOBAL = ("vitrpb_small", "vitrpb_base")
_cfg = imagenet_cfg("patch_embed.proj", pool_size=(14, 14))
default_cfgs = generate_default_cfgs(
    tagged_cfgs({name: _cfg for name in NAMES} | {name: {**_cfg, "fixed_input_size": True} for name in NAMES_GLOBAL})
)


@register
def nat_isotropic_small(pretrained: bool = False, **kwargs) -> NATIsotropic:
    return build(NATIsotropic, "nat_isotropic_small", pretrained, SMALL, kwargs)


@register
def nat_isotropic_base(pretrained: bool = False, **kwargs) -> NATIsotropic:
    return build(NATIsotropic, "nat_isotropic_base", pretrained, BASE, kwargs)


@register
def dinat_isotropic_small(pretrained: bool = False, **kwargs) -> NATIsotropic:
    return build(NATIsotropic, "dinat_isotropic_small", pretrained, {**SMALL, "dilations": DILATIONS}, kwargs)


@register
def dinat_isotropic_base(pretrained: bool = False, **kwargs) -> NATIsotropic:
    return build(NATIsotropic, "dinat_isotropic_base", pretrained, {**BASE, "dilations": DILATIONS}, kwargs)


@register
def vitrpb_small(pretrained: bool = False, **kwargs) -> ViTRPB:
    return build(ViTRPB, "vitrpb_small", pretrained, SMALL, kwargs)


@register
def vitrpb_base(pretrained: bool = False, **kwargs) -> ViTRPB:
    return build(ViTRPB, "vitrpb_base", pretrained, BASE, kwargs)
