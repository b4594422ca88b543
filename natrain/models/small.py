"""Our own small NATs for small images: the architecture of NAT with a stem that keeps more of the few pixels.

Not published variants. Head dim 32 as in the published ones, so that every kernel serves them.
"""

from __future__ import annotations

from functools import partial

from timm.models import generate_default_cfgs

from natrain.layers import ConvTokenizer
from natrain.models.nat import NAT
from natrain.models.published import tagged_cfgs
from natrain.models.registry import build, imagenet_cfg, register


class DigitsNAT(NAT):
    """NAT whose tokenizer keeps every pixel as a token."""

    tokenizer = staticmethod(partial(ConvTokenizer, strides=(1, 1)))


class CifarNAT(NAT):
    """NAT whose tokenizer makes one token of 2x2 pixels."""

    tokenizer = staticmethod(partial(ConvTokenizer, strides=(1, 2)))


# Means and deviations are the training images': scikit-learn's digits scaled from 16 grey levels to [0, 1]; CIFAR-10.
default_cfgs = generate_default_cfgs(
    tagged_cfgs(
        {
            "nat_digits": imagenet_cfg(
                "patch_embed.proj.0",
                input_size=(1, 8, 8),
                pool_size=(4, 4),
                num_classes=10,
                crop_pct=1.0,
                mean=(0.305,),
                std=(0.376,),
            ),
            "nat_cifar": imagenet_cfg(
                "patch_embed.proj.0",
                input_size=(3, 32, 32),
                pool_size=(4, 4),
                num_classes=10,
                crop_pct=1.0,
                mean=(0.4914, 0.4822, 0.4465),
                std=(0.2470, 0.2435, 0.2616),
            ),
        }
    )
)


@register
def nat_digits(pretrained: bool = False, **kwargs) -> DigitsNAT:
    architecture = dict(dim=32, depths=(1, 1), heads=1, mlp_ratio=2, kernel_size=(5, 3))
    return build(DigitsNAT, "nat_digits", pretrained, architecture, kwargs)


@register
def nat_cifar(pretrained: bool = False, **kwargs) -> CifarNAT:
    # Windows of 5 instead of 7 tokens and one block at 16x16: five times the images a second on a CPU.
    architecture = dict(dim=64, depths=(1, 3, 4), heads=2, mlp_ratio=2, kernel_size=(5, 5, 3), drop_path_rate=0.1)
    return build(CifarNAT, "nat_cifar", pretrained, architecture, kwargs)
