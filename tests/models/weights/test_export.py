"""Out to another layout and back: every bit, and what travels with the tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from natrain.models.weights import Weights, export_weights, load_weights, save_weights
from tests.models.weights.cases import original

NAMES = [f"class of {number}" for number in range(11)]
INPUT = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.8, "interpolation": "bilinear"}
OUT = {"official": "{}.pth", "hf": "hf", "timm": "timm"}
VARIANTS = ["nat_mini", "dinat_mini", "nat_small", "dinat_s_tiny", "dinat_isotropic_small", "vitrpb_small"]
QUICK = ("nat_mini", "vitrpb_small")


def weights_of(variant: str, folder: Path) -> Weights:
    torch.save(original(variant).state_dict(), folder / f"{variant}.pth")
    weights = load_weights(folder / f"{variant}.pth")
    return replace(weights, class_names=NAMES, input={**weights.input, **INPUT}, licence="mit")


def assert_same(one: Weights, other: Weights, travels: bool) -> None:
    assert one.model_name == other.model_name and one.state.keys() == other.state.keys()
    for name, tensor in one.state.items():
        assert torch.equal(tensor, other.state[name]) and tensor.dtype == other.state[name].dtype, name
    if travels:
        assert other.class_names == one.class_names and other.licence == one.licence
        assert other.input == one.input


@pytest.mark.parametrize(
    ("variant", "to"),
    [
        pytest.param(variant, to, marks=[] if variant in QUICK else pytest.mark.slow)
        for variant in VARIANTS
        for to in OUT
        if to != "hf" or variant in VARIANTS[:3]
    ],
)
def test_round_trips_keep_every_bit(variant: str, to: str, tmp_path: Path) -> None:
    weights = weights_of(variant, tmp_path)
    out = tmp_path / OUT[to].format(f"{variant}_again")
    written = export_weights(weights, to, out)
    assert all(path.is_file() for path in written)
    again = load_weights(out)
    assert_same(weights, again, travels=to != "official")
    save_weights(again, tmp_path / "own.safetensors")
    assert_same(again, load_weights(tmp_path / "own.safetensors"), travels=True)


@pytest.mark.parametrize("variant", ["nat_mini", "nat_small"])
def test_the_originals_load_what_is_exported(variant: str, tmp_path: Path) -> None:
    weights = weights_of(variant, tmp_path)
    export_weights(weights, "official", tmp_path / "o.pth")
    tree = original(variant)
    tree.load_state_dict(torch.load(tmp_path / "o.pth", weights_only=True))
    _, config, _ = export_weights(weights, "hf", tmp_path / "hf")
    told = json.loads(config.read_text())
    tree = original(variant, "hf")
    from safetensors.torch import load_file

    tree.load_state_dict(load_file(tmp_path / "hf" / "model.safetensors"))
    assert told["model_type"] == "nat" and told["id2label"]["3"] == NAMES[3]
    assert (told["layer_scale_init_value"] > 0) is (variant == "nat_small")
    assert told["num_heads"][0] == told["embed_dim"] // 32 and told["mlp_ratio"] == (3 if variant == "nat_mini" else 2)


def test_timm_builds_the_exported_folder(tmp_path: Path) -> None:
    weights = weights_of("nat_mini", tmp_path)
    export_weights(weights, "timm", tmp_path / "folder")
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    assert model.num_classes == 11 and tuple(model.pretrained_cfg["mean"]) == tuple(INPUT["mean"])
    assert all(torch.equal(tensor, weights.state[name]) for name, tensor in model.state_dict().items())


def test_other_kernel_sizes_and_dilations_travel(tmp_path: Path) -> None:
    plan = [1, 1, [1, 2], 1]
    model = timm.create_model("dinat_mini", kernel_size=5, dilations=plan, num_classes=3, in_chans=1)
    torch.save(model.state_dict(), tmp_path / "dinat_mini.pth")
    weights = load_weights(tmp_path / "dinat_mini.pth")
    assert weights.model_args == {"kernel_size": 5} and weights.input["in_chans"] == 1
    weights = replace(weights, model_args={**weights.model_args, "dilations": plan})
    for to in ("hf", "timm"):
        export_weights(weights, to, tmp_path / to)
        again = load_weights(tmp_path / to)
        built = again.create_model()
        assert again.num_classes == 3 and again.input["in_chans"] == 1
        assert repr(built.levels[2].blocks[1].attn) == repr(model.levels[2].blocks[1].attn)
        assert repr(built.levels[0].blocks[1].attn) == repr(model.levels[0].blocks[1].attn)


@pytest.mark.parametrize("variant", ["dinat_s_tiny", "vitrpb_small", "nat_digits"])
def test_what_a_layout_cannot_hold_is_an_error(variant: str, tmp_path: Path) -> None:
    torch.save(timm.create_model(variant).state_dict(), tmp_path / f"{variant}.pth")
    with pytest.raises(ValueError, match=rf"--to='hf'.*not for {variant}.*--to timm"):
        export_weights(load_weights(tmp_path / f"{variant}.pth"), "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_layout_suggests_the_nearest(tmp_path: Path) -> None:
    torch.save(timm.create_model("nat_digits").state_dict(), tmp_path / "nat_digits.pth")
    weights = load_weights(tmp_path / "nat_digits.pth")
    with pytest.raises(ValueError, match="--to='oficial'.*Try: --to official"):
        export_weights(weights, "oficial", tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"ends in \.pth"):
        export_weights(weights, "official", tmp_path / "x.bin")
