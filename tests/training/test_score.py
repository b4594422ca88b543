"""Accuracy against counting by hand."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from natrain.training.score import cut, score

IMAGES, CLASSES = 53, 7


class Fixed(nn.Module):
    """Looks its logits up, so that the truth is known; counts calls in training mode."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.calls_in_training = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls_in_training += self.training
        return self.logits[images[:, 0, 0, 0].long()]


def batches(order: torch.Tensor, size: int, targets: torch.Tensor):
    for index in order.split(size):
        yield index[:, None, None, None].float().expand(-1, 3, 2, 2), targets[index], index


def run(models: dict[str, nn.Module], loader, expected: int | None = IMAGES):
    return score(models, loader, device=torch.device("cpu"), autocast=nullcontext, expected=expected)


@pytest.fixture
def truth() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(IMAGES, CLASSES, generator=generator), torch.randint(CLASSES, (IMAGES,), generator=generator)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_counts_as_a_loop_over_images_does(truth, size: int) -> None:
    logits, targets = truth
    at1 = sum(int(row.argmax()) == int(target) for row, target in zip(logits, targets, strict=True))
    at5 = sum(int(target) in row.sort(descending=True).indices[:5] for row, target in zip(logits, targets, strict=True))
    found = run({"raw": Fixed(logits)}, batches(torch.randperm(IMAGES), size, targets))["raw"]
    assert found.images == IMAGES
    assert found.top1 == pytest.approx(100 * at1 / IMAGES)
    assert found.top5 == pytest.approx(100 * at5 / IMAGES)
    assert found.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)


def test_two_models_see_the_same_images_and_keep_their_mode(truth) -> None:
    logits, targets = truth
    first, second = Fixed(logits).train(), Fixed(F.one_hot(targets, CLASSES).float()).eval()
    found = run({"raw": first, "ema": second}, batches(torch.arange(IMAGES), 10, targets))
    assert found["ema"].top1 == 100.0 and found["raw"].top1 < 100.0
    assert first.calls_in_training == 0 and first.training and not second.training


def test_fewer_than_five_classes() -> None:
    targets = torch.tensor([0, 1, 2])
    found = run({"raw": Fixed(torch.eye(3))}, batches(torch.arange(3), 2, targets), expected=3)["raw"]
    assert (found.top1, found.top5) == (100.0, 100.0)


def test_an_image_counted_twice_is_an_error(truth) -> None:
    logits, targets = truth
    order = torch.cat([torch.arange(IMAGES), torch.tensor([0, 5])])
    with pytest.raises(RuntimeError, match=f"2 images more than once \\({IMAGES} different"):
        run({"raw": Fixed(logits)}, batches(order, 10, targets))


def test_a_missing_image_is_an_error(truth) -> None:
    logits, targets = truth
    with pytest.raises(RuntimeError, match=f"counted {IMAGES - 1} images, the validation set has {IMAGES}"):
        run({"raw": Fixed(logits)}, batches(torch.arange(IMAGES - 1), 10, targets))


def test_cut_short_on_request(truth) -> None:
    logits, targets = truth
    loader = cut(batches(torch.arange(IMAGES), 10, targets), 2)
    assert run({"raw": Fixed(logits)}, loader, expected=None)["raw"].images == 20
