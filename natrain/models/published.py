"""The weight files that the authors of NAT and DiNAT published, and the one natrain ships: timm's pretrained tags.

Addresses, resolutions and kernel sizes are those of the official repository (SHI-Labs/Neighborhood-Attention-
Transformer). A tag of another resolution or kernel size brings the arguments that its weights were trained with.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

SITE = "https://shi-labs.com/projects/"
ORIGIN = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"
LICENCE = "mit"  # of the official repository, in the spelling of Hugging Face's model cards
SHIPPED = Path(__file__).parent / "weights"
CLASSES_22K = 21841

DILATED_384 = {"dilations": ((1, 13), (1, 6), (1, 3), (1,))}
AT_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
IN22K = {"num_classes": CLASSES_22K}


class Published(NamedTuple):
    """One published file.

    Attributes:
        place: path below SITE, or the name of a file that natrain ships.
        args: arguments of the model beside the variant's own.
        cfg: what differs from the variant's ``pretrained_cfg`` (input_size, crop_pct, num_classes, ...).
    """

    place: str
    args: dict[str, Any] = {}  # noqa: RUF012 - never written
    cfg: dict[str, Any] = {}  # noqa: RUF012

    @property
    def is_shipped(self) -> bool:
        return "/" not in self.place


_IN1K = "dinat/checkpoints/imagenet1k/"
_IN22K = "dinat/checkpoints/imagenet22k/"

# variant -> tag -> file; the first tag is the variant's default.
PUBLISHED: dict[str, dict[str, Published]] = {
    **{
        f"nat_{size}": {"in1k": Published(f"nat/checkpoints/CLS/nat_{size}.pth")}
        for size in ("mini", "tiny", "small", "base")
    },
    **{
        f"dinat_{size}": {"in1k": Published(f"{_IN1K}dinat_{size}_in1k_224.pth")}
        for size in ("mini", "tiny", "small", "base", "s_tiny", "s_small", "s_base")
    },
    "dinat_large": {
        "in22k_ft_in1k": Published(f"{_IN1K}dinat_large_in22k_in1k_224.pth"),
        "in22k_ft_in1k_384": Published(f"{_IN1K}dinat_large_in22k_in1k_384.pth", DILATED_384, AT_384),
        "in22k_ft_in1k_384_k11": Published(f"{_IN1K}dinat_large_in22k_in1k_384_11x11.pth", {"kernel_size": 11}, AT_384),
        "in22k": Published(f"{_IN22K}dinat_large_in22k_224.pth", {}, IN22K),
        # The weights of in22k with biases interpolated to windows of 11, the start of the fine-tuning at 384: at 224
        # pixels windows of 11 do not fit.
        "in22k_k11": Published(
            f"{_IN22K}dinat_large_in22k_224_11x11interp.pth", {"kernel_size": 11}, {**IN22K, **AT_384}
        ),
    },
    "dinat_s_large": {
        "in22k_ft_in1k": Published(f"{_IN1K}dinat_s_large_in1k_224.pth"),
        "in22k_ft_in1k_384": Published(f"{_IN1K}dinat_s_large_in1k_384.pth", DILATED_384, AT_384),
        "in22k": Published(f"{_IN22K}dinat_s_large_in22k_224.pth", {}, IN22K),
    },
    **{
        f"{family}_{size}": {"in1k": Published(f"dinat/checkpoints/isotropic/{family}_{size}_in1k_224.pth")}
        for family in ("nat_isotropic", "dinat_isotropic", "vitrpb")
        for size in ("small", "base")
    },
    "nat_digits": {"natrain": Published("nat_digits.safetensors")},
}


def tagged_cfgs(base: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """timm's ``pretrained_cfg`` of every variant and tag, from the variants' own (keys of the result: ``variant.tag``).

    Variants without a published file keep their plain key.
    """
    cfgs: dict[str, dict[str, Any]] = {}
    for variant, cfg in base.items():
        for tag, file in PUBLISHED.get(variant, {}).items():
            source = {"file": str(SHIPPED / file.place)} if file.is_shipped else {"url": SITE + file.place}
            about = {"license": LICENCE, "origin_url": None if file.is_shipped else ORIGIN, "custom_load": True}
            cfgs[f"{variant}.{tag}"] = {**cfg, **source, **about, **file.cfg}
        if variant not in PUBLISHED:
            cfgs[variant] = cfg
    return cfgs


def published_args(variant: str, tag: Any) -> dict[str, Any]:
    """The arguments that a tag's weights were trained with; empty for no tag (None) or one of somebody else."""
    file = PUBLISHED.get(variant, {}).get(tag) if isinstance(tag, str) else None
    return dict(file.args) if file is not None else {}


def find_published(address: str) -> tuple[str, str] | None:
    """Variant and tag of the published file that an address or path ends in, by its file name; None for others."""
    name = PurePosixPath(urlsplit(address).path).name
    for variant, tags in PUBLISHED.items():
        for tag, file in tags.items():
            if not file.is_shipped and PurePosixPath(file.place).name == name:
                return variant, tag
    return None
