"""Every family and layout: an original with random weights, stored, imported, compared in logits and every stage."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from natrain.models.weights import load_weights, save_weights
from tests.models.weights.cases import FAMILIES, original, write

TOLERANCE = 1e-4  # of the norm, float32 against a float64 truth
# Smaller than kernel_size * dilation in most stages, so that the padding of 2022 is at work; not square.
SMALL = (72, 104)
LAYOUTS = ("official", "hf", "official, wrapped", "hf, bin", "timm", "timm, run", "lightning")
CASES = [
    # All layouts of one family, and two of every family, in the quick run.
    pytest.param(variant, layout, marks=[] if variant == "nat_mini" or layout in LAYOUTS[:2] else pytest.mark.slow)
    for variant, family in FAMILIES.items()
    for layout in LAYOUTS
    if family.hf or not layout.startswith("hf")
]


def images(variant: str, size: tuple[int, int]) -> torch.Tensor:
    size = (224, 224) if variant.startswith("vitrpb") else size  # global attention has one size
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))


@cache
def truth(variant: str, tree: str, size: tuple[int, int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model = original(variant, tree).double()
    with torch.no_grad():
        return model(images(variant, size).double())


def compare(model: torch.nn.Module, x: torch.Tensor, expected: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
        got = [model(x), *maps]
    wanted = [expected[0], *expected[1]]
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        error = (one.double() - other).norm() / other.norm()
        assert error <= TOLERANCE, error


def padding_of_2022(variant: str) -> dict:
    return {"kernel": "auto"} if variant.startswith("vitrpb") else {"kernel": "reference", "na_padding": "natten014"}


def imported(variant: str, layout: str, folder: Path, **changes):
    tree = "hf" if layout.startswith("hf") else "official"
    weights = load_weights(write(original(variant, tree), variant, layout, folder))
    assert weights.model_name == variant and weights.num_classes == 11 and not weights.missing
    if not variant.startswith("vitrpb"):
        changes = {"img_size": None, **changes}
    return weights, weights.create_model(**changes)


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_layouts(variant: str, layout: str, tmp_path: Path) -> None:
    tree = "hf" if layout.startswith("hf") else "official"
    weights, model = imported(variant, layout, tmp_path, **padding_of_2022(variant))
    compare(model, images(variant, SMALL), truth(variant, tree, SMALL))
    if layout == "lightning":
        assert {name: list(tensor.shape) for name, tensor in weights.beside.items()} == {"class_weights": [11]}
    else:
        assert not weights.beside and not weights.not_tensors


@pytest.mark.parametrize("variant", FAMILIES)
def test_our_own_file_gives_the_same_model(variant: str, tmp_path: Path) -> None:
    """Imported once, then read from the safetensors file that the import wrote."""
    first, _ = imported(variant, "official", tmp_path, **padding_of_2022(variant))
    save_weights(first, tmp_path / "model.safetensors")
    again = load_weights(tmp_path / "model.safetensors")
    assert again.layout == "natrain" and again.model_name == variant
    assert again.state.keys() == first.state.keys()
    assert all(torch.equal(again.state[name], first.state[name]) for name in first.state)


@pytest.mark.parametrize(
    ("variant", "size"),
    [
        ("nat_mini", (195, 230)),
        ("nat_isotropic_small", (112, 150)),
        pytest.param("dinat_isotropic_small", (224, 230), marks=pytest.mark.slow),
        pytest.param("dinat_mini", (224, 224), marks=pytest.mark.slow),
        pytest.param("dinat_s_tiny", (224, 231), marks=pytest.mark.slow),
    ],
)
def test_images_in_which_every_window_fits(variant: str, size: tuple[int, int], tmp_path: Path) -> None:
    _, model = imported(variant, "official", tmp_path, kernel="reference", na_padding="raise")
    compare(model, images(variant, size), truth(variant, "official", size))


def test_nat_weights_with_dilations(tmp_path: Path) -> None:
    """Table 12 of 2209.15001 runs NAT's weights at dilations that they were not trained with."""
    plan = [8, 4, 2, 1]
    nat = original("nat_mini")
    for dilation, stage in zip(plan, nat.levels, strict=True):
        for block in stage.blocks:
            block.attn.dilation = dilation
    with torch.no_grad():
        expected = nat.double()(images("nat_mini", SMALL).double())
    _, model = imported("nat_mini", "official", tmp_path, dilations=plan, **padding_of_2022("nat_mini"))
    compare(model, images("nat_mini", SMALL), expected)
    as_dinat = load_weights(tmp_path / "nat_mini_in1k_224.pth", model="dinat_mini")
    model = as_dinat.create_model(img_size=None, **padding_of_2022("dinat_mini"))
    compare(model, images("dinat_mini", SMALL), truth("dinat_mini", "official", SMALL))
