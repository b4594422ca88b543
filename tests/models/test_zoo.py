"""Published sizes of every variant, on the meta device: parameters exactly, multiply-adds within a percent."""

from __future__ import annotations

import functools
import math

import pytest
import timm
import torch
from torch import nn

import natrain
from natrain.layers import GlobalAttention2d, NeighborhoodAttention2d

# name: (parameters at 1,000 classes, GMACs at 224 pixels, heads per stage, drop path, dilation of every block)
PUBLISHED = {
    "nat_mini": (19_984_174, 2.7, (2, 4, 8, 16), 0.2, None),
    "nat_tiny": (27_901_582, 4.3, (2, 4, 8, 16), 0.2, None),
    "nat_small": (50_743_297, 7.8, (3, 6, 12, 24), 0.3, None),
    "nat_base": (89_769_652, 13.7, (4, 8, 16, 32), 0.5, None),
    "dinat_mini": (19_984_174, 2.7, (2, 4, 8, 16), 0.2, ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 3, (1,) * 5)),
    "dinat_tiny": (27_901_582, 4.3, (2, 4, 8, 16), 0.2, ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 9, (1,) * 5)),
    "dinat_small": (50_719_681, 7.8, (3, 6, 12, 24), 0.3, ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 9, (1,) * 5)),
    "dinat_base": (89_769_652, 13.7, (4, 8, 16, 32), 0.5, ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 9, (1,) * 5)),
    "dinat_large": (200_943_514, 30.6, (6, 12, 24, 48), 0.35, ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 9, (1,) * 5)),
    "dinat_s_tiny": (28_288_354, 4.5, (3, 6, 12, 24), 0.2, ((1, 8), (1, 4), (1, 2) * 3, (1, 1))),
    "dinat_s_small": (49_606_258, 8.7, (3, 6, 12, 24), 0.3, ((1, 8), (1, 4), (1, 2) * 9, (1, 1))),
    "dinat_s_base": (87_768_224, 15.4, (4, 8, 16, 32), 0.5, ((1, 8), (1, 4), (1, 2) * 9, (1, 1))),
    "dinat_s_large": (196_532_476, 34.5, (6, 12, 24, 48), 0.35, ((1, 8), (1, 4), (1, 2) * 9, (1, 1))),
    "nat_isotropic_small": (21_999_736, 4.3, (12,), 0.1, None),
    "nat_isotropic_base": (86_465_800, 16.9, (24,), 0.4, None),
    "dinat_isotropic_small": (21_999_736, 4.3, (12,), 0.1, ((1, 2) * 6,)),
    "dinat_isotropic_base": (86_465_800, 16.9, (24,), 0.4, ((1, 2) * 6,)),
    # Not in the table of counts: isotropic NAT's, with 27 * 27 instead of 13 * 13 bias entries for 12 blocks' heads.
    "vitrpb_small": (21_999_736 + 12 * 12 * (27**2 - 13**2), 4.6, (12,), 0.1, None),
    "vitrpb_base": (86_465_800 + 12 * 24 * (27**2 - 13**2), 17.5, (24,), 0.4, None),
}


def on_meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs_of(model: nn.Module, *image: int) -> int:
    """Multiply-adds of one image: linear layers and convolutions by their shapes, attention's two products by hand."""
    total = 0

    def count(module: nn.Module, inputs: tuple, out: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            total += out.numel() * module.weight[0].numel()
        else:
            # A bias table of 2k - 1 entries per axis belongs to k neighbours.
            neighbours = math.prod((entries + 1) // 2 for entries in module.rpb.shape[1:])
            total += 2 * neighbours * out.numel()

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, NeighborhoodAttention2d, GlobalAttention2d)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.empty(1, *image, device="meta"))
    return total


@functools.cache
def measured(name: str) -> tuple[nn.Module, int, int]:
    """The model on the meta device, its parameters, the multiply-adds of one image of its input size."""
    model = on_meta(name)
    return model, parameters_of(model), macs_of(model, *model.pretrained_cfg["input_size"])


def test_every_model_is_listed_once() -> None:
    assert natrain.models.list_models() == sorted([*PUBLISHED, "nat_digits", "nat_cifar"])
    assert natrain.models.list_models("dinat_s_*") == ["dinat_s_base", "dinat_s_large", "dinat_s_small", "dinat_s_tiny"]
    assert natrain.models.list_models("swin*") == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size(name: str) -> None:
    parameters, gmacs, heads, drop_path, plan = PUBLISHED[name]
    model, got_parameters, macs = measured(name)
    assert got_parameters == parameters
    assert macs == pytest.approx(gmacs * 1e9, rel=0.01) and model.pretrained_cfg["input_size"] == (3, 224, 224)
    units = [unit.blocks for unit in model.trunk] if len(heads) > 1 else [model.trunk]
    assert tuple(blocks[0].attn.num_heads for blocks in units) == heads
    assert {block.attn.head_dim for blocks in units for block in blocks} == {32}
    if not name.startswith("vitrpb"):
        dilations = tuple(tuple(block.attn.window.dilation[0] for block in blocks) for blocks in units)
        assert dilations == (plan or tuple((1,) * len(blocks) for blocks in units))
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for blocks in units for block in blocks]
    assert rates == pytest.approx(torch.linspace(0, drop_path, len(rates)).tolist(), abs=1e-6)


def test_dinat_large_with_kernel_11() -> None:
    assert parameters_of(on_meta("dinat_large", kernel_size=11, img_size=384)) == 201_144_250


@pytest.mark.parametrize("name", PUBLISHED)
def test_layer_scale_where_it_was_published(name: str) -> None:
    names = dict(measured(name)[0].named_parameters())
    scaled = name in ("nat_small", "nat_base", "dinat_base")
    assert any(key.endswith("gamma1") for key in names) == scaled


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("nat_small", ["patch_embed.proj.0.weight", "patch_embed.proj.1.bias", "patch_embed.norm.weight"]),
        ("nat_small", ["levels.2.blocks.17.attn.rpb", "levels.0.blocks.0.attn.qkv.bias", "levels.3.blocks.4.gamma2"]),
        (
            "nat_small",
            ["levels.2.downsample.reduction.weight", "levels.0.downsample.norm.bias", "norm.weight", "head.bias"],
        ),
        ("dinat_s_tiny", ["patch_embed.proj.weight", "patch_embed.norm.bias", "layers.3.blocks.1.mlp.fc2.bias"]),
        ("dinat_s_tiny", ["layers.2.downsample.reduction.weight", "layers.0.downsample.norm.weight"]),
        ("dinat_isotropic_small", ["patch_embed.norm.weight", "layers.11.attn.rpb", "layers.0.attn.proj.weight"]),
        ("vitrpb_small", ["layers.11.attn.rpb", "layers.0.attn.relative_position_index", "layers.3.mlp.fc1.weight"]),
    ],
)
def test_weights_are_named_as_published(name: str, keys: list[str]) -> None:
    names = measured(name)[0].state_dict()
    assert [key for key in keys if key not in names] == []


def test_initial_weights_are_truncated_normal_002() -> None:
    model = timm.create_model("nat_cifar")
    rpb = torch.cat([p.flatten() for n, p in model.named_parameters() if n.endswith("rpb")])
    linear = model.levels[2].blocks[0].mlp.fc1
    assert rpb.std().item() == pytest.approx(0.02, rel=0.1)
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05) and linear.bias.abs().max() == 0


def test_small_models_stay_small() -> None:
    digits, cifar = on_meta("nat_digits"), on_meta("nat_cifar")
    assert parameters_of(digits) < 100_000 and 1_000_000 < parameters_of(cifar) < 3_000_000
    assert digits.pretrained_cfg["input_size"] == (1, 8, 8) and cifar.pretrained_cfg["input_size"] == (3, 32, 32)
    assert digits(torch.empty(2, 1, 8, 8, device="meta")).shape == (2, 10)
    assert cifar(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
