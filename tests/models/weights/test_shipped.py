"""The weights that natrain ships: loaded without network, and as accurate as docs/checkpoints.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

from natrain.data import build_eval_transform
from natrain.data.digits import read_digits
from natrain.models.published import SHIPPED
from natrain.models.weights import load_weights

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
