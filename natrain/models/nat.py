"""NAT (2204.07143) and DiNAT (2209.15001): stages of neighborhood attention on maps that halve from one to the next.

The two share every parameter; DiNAT dilates every other block. Architecture numbers stand here, sizes and recipes do
not: another resolution is an argument (``img_size``, ``dilations``, ``kernel_size``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from natrain.layers import (
    ConvDownsampler,
    ConvTokenizer,
    NeighborhoodAttention2d,
    TransformerBlock,
    check_counts,
    check_na_padding,
)
from natrain.models.base import Backbone
from natrain.models.plans import DILATIONS_224, DINAT, Dilations, Plans
from natrain.models.published import tagged_cfgs
from natrain.models.registry import build, imagenet_cfg, register
from natrain.models.spec import StageWindows, check_depths, check_windows, dilation_plan, image_size, per_stage


class Stage(nn.Module):
    """The blocks of one map size, and the downsampler to the next (None in the last stage)."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class NAT(Backbone):
    """A hierarchical neighborhood attention transformer.

    Args:
        dim: channels of stage 1; they double from stage to stage, and so do the heads.
        depths: blocks per stage.
        heads: heads of stage 1.
        mlp_ratio: hidden channels of the MLPs in units of the block's.
        layer_scale: initial layer scale; None for none.
        kernel_size: tokens per axis of a window, an int or one per stage.
        dilations: an int, or one entry per stage: an int, or a pattern that repeats over the stage's blocks, so that
            ``((1, 8), (1, 4), (1, 2), 1)`` is DiNAT's plan at 224 pixels; or the name of a published plan, as
            ``"coco800"`` (``natrain.models.plans``).
        pos: ``"rpb"``, ``"rope"`` or ``"none"``: how attention knows positions; see ``natrain.layers.position``.
        kernel: name of the attention kernel, or one name per stage.
        na_padding: policy for maps shorter than kernel_size * dilation; see ``natrain.layers.padding``.
        img_size: the size (pixels) the model is meant for. Any size works later; naming it here checks it at once.
        in_chans, num_classes, global_pool, drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: as in timm;
            ``drop_rate`` is the head's.

    Raises:
        ValueError: a list of the wrong length, an argument out of range, an ``img_size`` that windows do not fit in.
    """

    plans: Plans = DINAT
    tokenizer: Callable[[int, int], nn.Module] = ConvTokenizer
    downsampler: Callable[[int], nn.Module] = ConvDownsampler

    def __init__(
        self,
        dim: int,
        depths: Sequence[int],
        heads: int,
        mlp_ratio: float,
        layer_scale: float | None = None,
        kernel_size: int | Sequence[int] = 7,
        dilations: Dilations | str = 1,
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
        check_counts(dim=dim, heads=heads)
        check_depths(depths)
        count = len(depths)
        kernel_sizes = per_stage("kernel_size", kernel_size, count, int)
        kernels = per_stage("kernel", kernel, count, str)
        plan = dilation_plan(dilations, depths, self.plans)
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        widths = [dim * 2**stage for stage in range(count)]
        self.na_padding = check_na_padding(na_padding)
        self.pos = pos
        self.patch_embed = self.tokenizer(in_chans, dim)
        stages = []
        for stage, width in enumerate(widths):
            blocks = [
                TransformerBlock(
                    width,
                    NeighborhoodAttention2d(
                        width,
                        heads * 2**stage,
                        kernel_sizes[stage],
                        dilation,
                        pos=pos,
                        attn_drop=attn_drop_rate,
                        proj_drop=proj_drop_rate,
                        kernel=kernels[stage],
                        na_padding=na_padding,
                    ),
                    mlp_ratio,
                    proj_drop_rate,
                    rate,
                    layer_scale,
                )
                for dilation, rate in zip(plan[stage], drop_paths[stage], strict=True)
            ]
            stages.append(Stage(blocks, self.downsampler(width) if stage < count - 1 else None))
        setattr(self, self.trunk_name, nn.ModuleList(stages))
        reductions = [self.patch_embed.reduction * 2**stage for stage in range(count)]
        self._finish(widths, reductions, global_pool)
        self.windows = [StageWindows(*shape) for shape in zip(reductions, kernel_sizes, map(max, plan), strict=True)]
        if img_size is not None:
            self.check_image(*image_size(img_size))

    def check_image(self, height: int, width: int) -> None:
        if self.na_padding == "raise":
            check_windows(height, width, self.windows)

    def _between(self, unit: Stage, x: Tensor) -> Tensor:
        return x if unit.downsample is None else unit.downsample(x)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.trunk[-1].downsample = None
        self.windows = self.windows[: len(self.trunk)]
        return take

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to norm, for layer-wise learning rates (timm's ``group_parameters``)."""
        stage = rf"^{self.trunk_name}\.(\d+)"
        # (99999,) is timm's mark for "same group as the one before": a downsampler goes with the stage it ends.
        fine = [(rf"{stage}\.blocks\.(\d+)", None), (rf"{stage}\.downsample", (99999,)), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": stage if coarse else fine}


MINI = dict(dim=64, depths=(3, 4, 6, 5), heads=2, mlp_ratio=3, drop_path_rate=0.2)
TINY = dict(dim=64, depths=(3, 4, 18, 5), heads=2, mlp_ratio=3, drop_path_rate=0.2)
SMALL = dict(dim=96, depths=(3, 4, 18, 5), heads=3, mlp_ratio=2, drop_path_rate=0.3)
BASE = dict(dim=128, depths=(3, 4, 18, 5), heads=4, mlp_ratio=2, drop_path_rate=0.5, layer_scale=1e-5)
LARGE = dict(dim=192, depths=(3, 4, 18, 5), heads=6, mlp_ratio=2, drop_path_rate=0.35)

NAMES = ("nat_mini", "nat_tiny", "nat_small", "nat_base")
NAMES_DILATED = ("dinat_mini", "dinat_tiny", "dinat_small", "dinat_base", "dinat_large")
_cfg = imagenet_cfg("patch_embed.proj.0")
default_cfgs = generate_default_cfgs(tagged_cfgs({name: _cfg for name in NAMES + NAMES_DILATED}))


@register
def nat_mini(pretrained: bool = False, **kwargs) -> NAT:
    return build(NAT, "nat_mini", pretrained, MINI, kwargs)


@register
def nat_tiny(pretrained: bool = False, **kwargs) -> NAT:
    return build(NAT, "nat_tiny", pretrained, TINY, kwargs)


@register
def nat_small(pretrained: bool = False, **kwargs) -> NAT:
    return build(NAT, "nat_small", pretrained, {**SMALL, "layer_scale": 1e-5}, kwargs)


@register
def nat_base(pretrained: bool = False, **kwargs) -> NAT:
    return build(NAT, "nat_base", pretrained, BASE, kwargs)


@register
def dinat_mini(pretrained: bool = False, **kwargs) -> NAT:
    return build(NAT, "dinat_mini", pretrained, {**MINI, "dilations": DILATIONS_224}, kwargs)


@register
def dinat_tiny(pretrained: bool = False, **kwargs) -> NAT:
    return build(NAT, "dinat_tiny", pretrained, {**TINY, "dilations": DILATIONS_224}, kwargs)


@register
def dinat_small(pretrained: bool = False, **kwargs) -> NAT:
    return build(NAT, "dinat_small", pretrained, {**SMALL, "dilations": DILATIONS_224}, kwargs)


@register
def dinat_base(pretrained: bool = False, **kwargs) -> NAT:
    return build(NAT, "dinat_base", pretrained, {**BASE, "dilations": DILATIONS_224}, kwargs)


@register
def dinat_large(pretrained: bool = False, **kwargs) -> NAT:
    return build(NAT, "dinat_large", pretrained, {**LARGE, "dilations": DILATIONS_224}, kwargs)
