"""Models with rotations or without positions; weights of one kind are not read into another."""

from __future__ import annotations

import pytest
import timm
import torch

import natrain  # noqa: F401
from natrain.models.weights import Weights, load_weights, save_weights

SMALL = dict(dim=16, depths=(1, 1), heads=1, kernel_size=3, num_classes=2)
INPUT = dict(img_size=[32, 32], in_chans=3, mean=[0.5] * 3, std=[0.5] * 3, crop_pct=0.9, interpolation="bicubic")


def write(path, pos: str):
    torch.manual_seed(0)
    args = {key: value for key, value in SMALL.items() if key != "num_classes"} | ({} if pos == "rpb" else {"pos": pos})
    state = timm.create_model("nat_mini", **SMALL, pos=pos).state_dict()
    save_weights(Weights(state, "nat_mini", args, ["a", "b"], INPUT, None, "test", "natrain"), path)
    return path


@pytest.mark.parametrize("name", ["nat_mini", "dinat_s_tiny", "dinat_isotropic_small", "nat_cifar"])
@pytest.mark.parametrize("pos", ["rope", "none"])
def test_only_the_biases_go(name, pos):
    with torch.device("meta"):
        published, other = timm.create_model(name), timm.create_model(name, pos=pos)
    names = {key for key in published.state_dict() if not key.endswith("rpb")}
    assert set(other.state_dict()) == names and len(names) < len(published.state_dict())
    assert not other.no_weight_decay()


def test_a_rotating_model_runs_at_any_size_and_reads_its_own_weights(tmp_path):
    weights = load_weights(write(tmp_path / "rope.safetensors", "rope"))
    model = weights.create_model()
    assert model.levels[0].blocks[0].attn.pos == "rope"
    assert model(torch.randn(1, 3, 40, 27)).isfinite().all()


@pytest.mark.parametrize("wanted", ["rpb", "rope", "none"])
@pytest.mark.parametrize("stored", ["rpb", "rope", "none"])
def test_conversions_are_refused_with_a_reason(stored, wanted, tmp_path):
    path = write(tmp_path / "in.safetensors", stored)
    model = timm.create_model("nat_mini", **SMALL, pos=wanted)
    if stored == wanted:
        load_weights(path, like=model).create_model()
        return
    for attempt in (
        lambda: load_weights(path, model="nat_mini", like=model),
        lambda: load_weights(path).create_model(pos=wanted),
    ):
        with pytest.raises(ValueError, match=f"model.args.pos='{wanted}' .* expected {stored}, as in .*: .*Try: ") as e:
            attempt()
        assert str(e.value).endswith(f"model.args.pos={stored}")


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="Try: pos='rope'"):
        timm.create_model("nat_cifar", pos="ropee")
    with pytest.raises(ValueError, match="pos"):
        timm.create_model("vitrpb_small", pos="rope")
