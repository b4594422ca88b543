"""Every family, at tiny size and on odd, non-square images, against the forward pass of the papers."""

from __future__ import annotations

import pytest
import torch

from natrain.models import NAT, DiNATs, NATIsotropic, ViTRPB
from natrain.models.small import CifarNAT, DigitsNAT
from tests.models import published

TINY = dict(dim=8, heads=2, mlp_ratio=2, num_classes=5, kernel="reference")


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights far from their initialisation, so that a forgotten bias, norm or scale shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.double().named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("rpb"):
                parameter.copy_(noise)
            elif parameter.dim() > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    return model.eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


PLAN = [(1, 7, 1), (1, 3), (1, 2), (1,)]
DEPTHS = tuple(map(len, PLAN))
CASES = {
    "nat": (
        lambda: NAT(depths=DEPTHS, kernel_size=3, **TINY),
        (83, 117),
        lambda x, w: published.nat(x, w, [(1,) * depth for depth in DEPTHS], 2, (3, 3, 3, 3)),
    ),
    "dinat with layer scale, a kernel size per stage": (
        lambda: NAT(depths=DEPTHS, kernel_size=(3, 3, 3, 2), dilations=PLAN, layer_scale=0.1, **TINY),
        (83, 117),
        lambda x, w: published.nat(x, w, PLAN, 2, (3, 3, 3, 2)),
    ),
    "dinat_s": (
        lambda: DiNATs(depths=DEPTHS, kernel_size=3, dilations=PLAN, **TINY),
        (83, 117),
        lambda x, w: published.dinats(x, w, PLAN, 2, 3),
    ),
    "nat_isotropic": (
        lambda: NATIsotropic(depth=2, kernel_size=5, **TINY),
        (97, 131),
        lambda x, w: published.isotropic(x, w, (1, 1), 2, 5),
    ),
    "dinat_isotropic": (
        lambda: NATIsotropic(depth=4, kernel_size=3, dilations=(1, 2), **TINY),
        (97, 131),
        lambda x, w: published.isotropic(x, w, (1, 2, 1, 2), 2, 3),
    ),
    "vitrpb": (
        lambda: ViTRPB(depth=2, img_size=(52, 70), **{**TINY, "kernel": "auto"}),
        (52, 70),
        lambda x, w: published.isotropic(x, w, (0, 0), 2, 0),
    ),
    "nat_digits": (
        lambda: DigitsNAT(depths=(2, 1), kernel_size=(5, 3), **TINY),
        (8, 9),
        lambda x, w: published.nat(x, w, [(1, 1), (1,)], 2, (5, 3), strides=(1, 1)),
    ),
    "nat_cifar": (
        lambda: CifarNAT(depths=(2, 1), kernel_size=(5, 3), **TINY),
        (17, 20),
        lambda x, w: published.nat(x, w, [(1, 1), (1,)], 2, (5, 3), strides=(1, 2)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_is_the_published_one(case: str) -> None:
    make, size, truth = CASES[case]
    model = randomise(make())
    x = images(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), truth(x, model.state_dict()), rtol=1e-9, atol=1e-9)


def test_float32_stays_within_1e4_of_float64() -> None:
    make, size, truth = CASES["dinat with layer scale, a kernel size per stage"]
    model = randomise(make())
    x = images(2, 3, *size)
    with torch.no_grad():
        expected = truth(x, model.state_dict())
        got = model.float()(x.float()).double()
    assert (got - expected).norm() <= 1e-4 * expected.norm()


def test_gradients_are_the_published_ones() -> None:
    model = randomise(NAT(depths=(1, 2), kernel_size=3, dilations=(1, (1, 2)), layer_scale=0.5, **TINY))
    x = images(2, 3, 45, 51)
    weights = dict(model.named_parameters())
    truth = published.nat(x, weights, [(1,), (1, 2)], 2, (3, 3)).logsumexp(1).sum()
    expected = torch.autograd.grad(truth, list(weights.values()))
    got = torch.autograd.grad(model(x).logsumexp(1).sum(), list(weights.values()))
    for name, a, b in zip(weights, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
