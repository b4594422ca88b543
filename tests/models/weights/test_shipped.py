"""The weights that natrain ships: loaded without network, and as accurate as docs/checkpoints.md says."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

from natrain.data import build_eval_transform
from natrain.data.digits import read_digits
from natrain.models.published import PUBLISHED, SHIPPED
from natrain.models.weights import load_weights, save_weights

RIGHT = 354  # of the 360 images of the fixed test split


@pytest.fixture(autouse=True)
def no_network(monkeypatch) -> None:
    def refuse(*arguments, **options):
        raise AssertionError("asked for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)


def digits_test() -> tuple[torch.Tensor, torch.Tensor]:
    """The test images as float tensors, normalised by hand: 16 grey levels to [0, 1], the training images' mean."""
    sklearn = pytest.importorskip("sklearn.datasets")
    from sklearn.model_selection import train_test_split

    digits = sklearn.load_digits()
    _, test = train_test_split(range(len(digits.target)), test_size=360, stratify=digits.target, random_state=0)
    images = torch.from_numpy(digits.images[test] / 16).float()
    return (images[:, None] - 0.305) / 0.376, torch.from_numpy(digits.target[test])


def test_pretrained_digits_reach_their_stated_accuracy(repository: Path) -> None:
    images, targets = digits_test()
    model = timm.create_model("nat_digits", pretrained=True, kernel="reference").eval()
    with torch.inference_mode():
        right = (model(images).argmax(1) == targets).sum().item()
    assert right >= RIGHT
    stated = re.search(r"(\d+) of 360", (repository / "docs" / "checkpoints.md").read_text(encoding="utf-8"))
    assert int(stated[1]) == RIGHT


def test_what_travels_with_them_is_what_prediction_uses() -> None:
    weights = load_weights(SHIPPED / "nat_digits.safetensors")
    assert weights.class_names == [str(number) for number in range(10)] and weights.licence == "mit"
    assert weights.input["mean"] == [0.305] and weights.input["img_size"] == [8, 8]
    images, targets = digits_test()
    split = read_digits().val
    transform = build_eval_transform(weights.input)
    with torch.inference_mode():
        logits = weights.create_model(kernel="reference")(
            torch.stack([transform(split.load(i, "L")) for i in range(40)])
        )
    assert (logits.argmax(1) == targets[:40]).sum() >= 38


def test_features_and_other_classes_start_from_them() -> None:
    state = load_weights(SHIPPED / "nat_digits.safetensors").state
    features = timm.create_model("nat_digits", pretrained=True, features_only=True)
    held = dict(features.named_parameters())
    name = next(name for name in held if name.endswith("levels.1.blocks.0.attn.rpb"))
    assert torch.equal(held[name], state["levels.1.blocks.0.attn.rpb"])
    five = timm.create_model("nat_digits.natrain", pretrained=True, num_classes=5, in_chans=3)
    assert five.head.weight.shape == (5, 64)
    assert torch.equal(five.levels[0].blocks[0].attn.rpb, state["levels.0.blocks.0.attn.rpb"])
    with pytest.raises(ValueError, match=r"pretrained=.*rpb.*natrain surgery"):
        timm.create_model("nat_digits", pretrained=True, kernel_size=3)


def test_the_preprocessing_of_a_file_reaches_timm(tmp_path: Path) -> None:
    """Of a file of another's training, also through timm's own door; what the caller says wins."""
    weights = load_weights(SHIPPED / "nat_digits.safetensors")
    told = {"mean": [0.25], "std": [0.125], "crop_pct": 0.75, "interpolation": "bilinear", "img_size": [10, 12]}
    changed = replace(weights, input={**weights.input, **told}, licence="cc0-1.0", class_names=list("abcdefghij"))
    save_weights(changed, tmp_path / "mine.safetensors")
    overlay = {"file": str(tmp_path / "mine.safetensors")}
    through_timm = timm.create_model("nat_digits", pretrained=True, pretrained_cfg_overlay=overlay)
    for model in (load_weights(tmp_path / "mine.safetensors").create_model(), through_timm):
        config = resolve_model_data_config(model)
        assert (config["mean"], config["std"], config["crop_pct"]) == ((0.25,), (0.125,), 0.75)
        assert config["interpolation"] == "bilinear" and model.pretrained_cfg["input_size"] == (1, 10, 12)
        assert model.pretrained_cfg["license"] == "cc0-1.0" and model.pretrained_cfg["label_names"][2] == "c"
    overlay["mean"] = (0.5,)
    assert timm.create_model("nat_digits", pretrained=True, pretrained_cfg_overlay=overlay).pretrained_cfg["mean"] == (
        0.5,
    )


def test_the_documentation(repository: Path, monkeypatch, capsys) -> None:
    """Its snippet runs, and its table has every published tag."""
    text = (repository / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(repository)
    exec(snippet, {})
    assert "nat_digits, layout natrain" in capsys.readouterr().out
    rows = {}
    for models, tags in re.findall(r"^\| (`[^|]*`) \| (`[^|]*`[^|]*) \|$", text, flags=re.MULTILINE):
        for pattern in re.findall(r"`([^`]+)`", models):
            for name in fnmatch.filter(PUBLISHED, pattern):
                rows[name] = set(re.findall(r"`([^`]+)`", tags))
    assert rows == {name: set(tags) for name, tags in PUBLISHED.items()}
