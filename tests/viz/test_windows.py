"""Which pixels reach a token, against the gradient of that token's features with respect to the image."""

from __future__ import annotations

import pytest
import timm
import torch

import natrain  # noqa: F401
from natrain.models import NAT, DiNATs, NATIsotropic, ViTRPB
from natrain.models.small import CifarNAT
from natrain.viz import pixel_reach

SMALL = dict(dim=8, heads=1, mlp_ratio=1, num_classes=0, kernel="reference")
CASES = {
    "nat": (lambda: NAT(depths=(1, 1), kernel_size=3, **SMALL), (61, 90), (20, 71)),
    "dinat": (lambda: NAT(depths=(2, 2), kernel_size=3, dilations=[[1, 4], [1, 2]], **SMALL), (90, 61), (44, 0)),
    "dinat, shrunk": (
        lambda: NAT(depths=(2,), kernel_size=3, dilations=[[1, 9]], na_padding="shrink", **SMALL),
        (61, 40),
        (30, 12),
    ),
    "dinat, padded": (
        lambda: NAT(depths=(1,), kernel_size=3, dilations=5, na_padding="natten014", **SMALL),
        (61, 40),
        (60, 39),
    ),
    "dinat_s": (lambda: DiNATs(depths=(1, 1), kernel_size=3, dilations=[2, 1], **SMALL), (58, 77), (57, 30)),
    "cifar": (lambda: CifarNAT(depths=(1, 1), kernel_size=3, **SMALL), (33, 32), (5, 31)),
    "isotropic": (lambda: NATIsotropic(depth=2, kernel_size=3, dilations=(1, 2), **SMALL), (100, 130), (99, 64)),
    "vitrpb": (lambda: ViTRPB(depth=1, img_size=(50, 70), **{**SMALL, "kernel": "auto"}), (50, 70), (3, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_exactly_the_pixels_with_a_gradient_reach_the_token(case):
    make, size, pixel = CASES[case]
    torch.manual_seed(0)
    model = make().double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    image = torch.randn(1, 3, *size, dtype=torch.float64, requires_grad=True)
    maps = model.forward_intermediates(image, intermediates_only=True, output_fmt="NHWC")
    reaches = pixel_reach(model, size, pixel)
    assert len(reaches) == len(maps)
    for reach, features in zip(reaches, maps, strict=True):
        assert tuple(features.shape[1:3]) == reach.map_size
        # Squares: the sum of a normalised token's channels alone would have no gradient.
        score = features[0][reach.token].square().sum()
        (gradient,) = torch.autograd.grad(score, image, retain_graph=True)
        expected = gradient[0].abs().sum(0) > 0
        assert torch.equal(reach.rows[:, None] & reach.columns[None, :], expected)
        assert reach.share == pytest.approx(expected.double().mean().item(), abs=1e-6)


def test_keys_are_counted_over_the_blocks_of_a_stage():
    """DiNAT's first stage at 224: two blocks of dilation 1 and one of dilation 8, on a map of 56 tokens."""
    with torch.device("meta"):
        model = timm.create_model("dinat_mini")
    (first, *_) = pixel_reach(model, (224, 224), (100, 0))
    assert (first.token, first.map_size, first.dilations) == ((25, 0), (56, 56), (1, 8, 1))
    expected = torch.zeros(56, 56, dtype=torch.int64)
    expected[22:29, 0:7] += 2
    expected[1:56:8, 0:56:8] += 1
    assert torch.equal(first.keys, expected)


def test_a_pixel_outside_of_the_image():
    model = timm.create_model("nat_cifar")
    with pytest.raises(ValueError, match=r"--query=\(32, 0\) .* a pixel of the 32x32 image"):
        pixel_reach(model, (32, 32), (32, 0))
