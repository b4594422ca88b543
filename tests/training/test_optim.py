"""Parameter groups and the learning rate for a global batch."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import natrain.models  # noqa: F401  registers the models
from natrain.training.optim import create_optimizer, scaled_lr

ADAMW = {"name": "adamw", "weight_decay": 0.05, "betas": (0.9, 0.999), "eps": 1e-8}


def decayed_names(model: nn.Module, optim: dict | None = None) -> set[str]:
    """Names by identity of the tensors, whatever groups the optimiser was given."""
    optimizer = create_optimizer(model, optim or ADAMW, lr=1e-3, fused=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(seen) == sorted(names), "each parameter exactly once"
    return {
        names[id(parameter)]
        for group in optimizer.param_groups
        if group["weight_decay"] == 0.05
        for parameter in group["params"]
    }


@pytest.mark.parametrize("name", ["nat_digits", "nat_cifar", "dinat_s_tiny", "nat_isotropic_small", "vitrpb_small"])
def test_decay_reaches_matrices_and_convolutions_only(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    decayed = decayed_names(model)
    for key, parameter in model.named_parameters():
        # Independent of the model's own no_weight_decay(): biases, norms and layer scales have one axis, rpb by name.
        is_weight = parameter.ndim >= 2 and not key.endswith("rpb")
        assert (key in decayed) == is_weight, key
    assert any(key.endswith("rpb") for key, _ in model.named_parameters())


def test_foreign_model_keeps_its_own_exceptions() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32)
    decayed = decayed_names(model)
    assert not decayed & {"cls_token", "pos_embed"}
    assert "blocks.0.attn.qkv.weight" in decayed


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = create_optimizer(model, ADAMW, lr=1e-3, fused=False)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_one_step_is_adamw_by_hand() -> None:
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = create_optimizer(model, ADAMW, lr=0.1, fused=False)
    gradient = torch.tensor([[3.0, -0.5]])
    model.weight.grad = gradient.clone()
    optimizer.step()
    # First step: both moments are unbiased to g and g^2.
    expected = before * (1 - 0.1 * 0.05) - 0.1 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(model.weight.detach(), expected)


@pytest.mark.parametrize(("scaling", "expected"), [("none", 1e-3), ("linear", 4e-3), ("sqrt", 2e-3)])
def test_lr_for_a_global_batch(scaling: str, expected: float) -> None:
    assert scaled_lr(1e-3, 4096, scaling, 1024) == pytest.approx(expected, rel=1e-12)


def test_unknown_optimiser_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="optim.name='adamv'.*optim.name=adam"):
        create_optimizer(nn.Linear(2, 2), {**ADAMW, "name": "adamv"}, lr=1e-3, fused=False)


def test_optimiser_without_betas_is_created() -> None:
    optimizer = create_optimizer(nn.Linear(2, 2), {**ADAMW, "name": "sgd"}, lr=1e-3, fused=False)
    assert isinstance(optimizer, torch.optim.SGD)
