"""Starting from other weights: which head starts anew, what is frozen, and which layer learns how fast."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

import natrain  # noqa: F401
from natrain.models.registry import default_input
from natrain.training import train
from natrain.training.build import load_initial_weights
from natrain.training.finetune import freeze, frozen_modules
from natrain.training.optim import create_optimizer
from natrain.training.task import ClassificationTask

SMALL = dict(dim=8, depths=(1, 2), heads=1, kernel_size=3, num_classes=3)


def nat(**changes) -> nn.Module:
    return timm.create_model("nat_mini", **{**SMALL, **changes})


@pytest.fixture
def checkpoint(tmp_path):
    """A file that says which classes its head knows."""
    torch.manual_seed(1)
    model = nat()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    told = {"model_name": "nat_mini", "model_args": {}, "class_names": ["a", "b", "c"], "kernel": "auto"}
    told["input"] = {**default_input("nat_mini"), "img_size": [32, 32]}
    told["model_args"] = {key: SMALL[key] for key in ("dim", "depths", "heads", "kernel_size")}
    path = tmp_path / "in.ckpt"
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": told}, path)
    return path, model.state_dict()


HEAD = ["head.bias", "head.weight"]


@pytest.mark.parametrize(
    ("classes", "head", "expected"),
    [
        (["a", "b", "c"], "auto", []),
        (["a", "b", "x"], "auto", HEAD),
        (["a", "c", "b"], "auto", HEAD),
        (["a", "b"], "auto", HEAD),
        (["a", "b", "c"], "new", HEAD),
        (["a", "b", "c"], "keep", []),
        (None, "auto", []),
    ],
)
def test_the_head_starts_anew_where_the_classes_are_others(checkpoint, classes, head, expected):
    path, stored = checkpoint
    model = nat(num_classes=len(classes or "abc"))
    fresh = load_initial_weights(model, str(path), class_names=classes, head=head, head_init_scale=0.001)
    assert sorted(fresh) == expected
    for name, tensor in model.state_dict().items():
        if name not in expected:
            assert torch.equal(tensor, stored[name]), name
    if expected:
        assert 0 < model.head.weight.abs().max() < 5 * 0.02 * 0.001
        assert not model.head.bias.any()


def test_a_head_to_keep_must_fit(checkpoint):
    with pytest.raises(ValueError, match="finetune.head='keep' .* Try: finetune.head=auto"):
        load_initial_weights(nat(), str(checkpoint[0]), class_names=["x", "y", "z"], head="keep")


def test_another_kernel_size_needs_surgery(checkpoint):
    path, stored = checkpoint
    with pytest.raises(ValueError, match="surgery"):
        load_initial_weights(nat(kernel_size=5), str(path))
    model = nat(kernel_size=5)
    load_initial_weights(model, str(path), surgery=True)
    for name, tensor in stored.items():
        expected = F.interpolate(tensor[None], (9, 9), mode="bicubic")[0] if name.endswith("rpb") else tensor
        assert torch.equal(model.state_dict()[name], expected), name


TRAINED = {
    0: ("patch_embed", "levels.0", "levels.1", "norm", "head"),
    1: ("levels.1", "norm", "head"),
    2: ("norm", "head"),
}


@pytest.mark.parametrize("stages", TRAINED)
def test_freezing_by_stage(stages):
    model = nat()
    freeze(model, stages, linear_probe=False)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(TRAINED[stages]), name
    names = {module: name for name, module in model.named_modules()}
    frozen = {names[module] for module in frozen_modules(model)}
    assert frozen == {0: set(), 1: {"patch_embed", "levels.0"}, 2: {"patch_embed", "levels"}}[stages]


def test_linear_probe_and_models_of_timm():
    for name in ("resnet18", "vit_tiny_patch16_224"):
        model = timm.create_model(name, num_classes=2)
        freeze(model, 0, linear_probe=True)
        trained = {key.split(".")[0] for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {"resnet18": {"fc"}, "vit_tiny_patch16_224": {"head"}}[name]
    freeze(model := timm.create_model("resnet18"), 2, linear_probe=False)
    trained = {key.split(".")[0] for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"layer3", "layer4", "fc"}


def test_more_stages_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="freeze_stages=3 .* 0 to 2, .*linear_probe"):
        freeze(nat(), 3, linear_probe=False)


def test_layer_decay_falls_block_by_block():
    model = nat(depths=(2, 3))
    optim = dict(name="adamw", betas=[0.9, 0.999], eps=1e-8, weight_decay=0.1, layer_decay=0.5)
    optimizer = create_optimizer(model, optim, lr=1.0, fused=False)
    depth = {"patch_embed": 0, "levels.0.blocks.0": 1, "levels.0.blocks.1": 2, "levels.0.downsample": 2}
    depth |= {"levels.1.blocks.0": 3, "levels.1.blocks.1": 4, "levels.1.blocks.2": 5, "norm": 5, "head": 6}
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        (layer,) = {layer for prefix, layer in depth.items() if name.startswith(prefix + ".")}
        group = found[id(parameter)]
        assert group["lr_scale"] == 0.5 ** (6 - layer), name
        assert group["weight_decay"] == (0.0 if parameter.dim() == 1 or name.endswith("rpb") else 0.1), name


def test_a_run_trains_only_what_it_should(make_config, tmp_path, monkeypatch):
    """Stem and stage 1 bit-equal after two epochs, in evaluation mode in every step; rates scale by layer."""
    torch.manual_seed(2)
    start = timm.create_model("nat_digits", num_classes=4)
    torch.save(start.state_dict(), tmp_path / "start.pth")
    modes, rates = [], []
    step = ClassificationTask.training_step

    def spied(self, batch, batch_idx):
        stages = self.model.levels
        modes.append((self.model.patch_embed.training, stages[0].training, stages[1].training))
        rates.append(sorted({group["lr"] / group["lr_scale"] for group in self.optimizers().param_groups}))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationTask, "training_step", spied)
    changes = {"checkpoint": str(tmp_path / "start.pth"), "finetune.freeze_stages": 1, "optim.layer_decay": 0.5}
    result = train(make_config({**changes, "model.args": {"drop_path_rate": 0.5}}))
    assert set(modes) == {(False, False, True)} and len(modes) == 6
    assert all(high - low < 1e-12 for low, *_, high in (rate * 2 for rate in rates[1:]))
    state = torch.load(result.checkpoint, weights_only=True)["state_dict"]
    for name, tensor in start.state_dict().items():
        if not name.startswith("head"):
            is_frozen = name.startswith(("patch_embed", "levels.0"))
            assert torch.equal(state[f"model.{name}"], tensor) == is_frozen, name


@pytest.mark.parametrize(
    ("key", "value"),
    [("optim.layer_decay", 0), ("finetune.head", "old"), ("finetune.freeze_stages", -1), ("data.val_share", 1)],
)
def test_settings_out_of_range(make_config, key, value):
    cfg = make_config()
    OmegaConf.update(cfg, key, value)
    with pytest.raises(ValueError, match=key):
        train(cfg)
