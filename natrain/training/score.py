"""Accuracy that counts each image exactly once, on one process or many."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Score:
    """Accuracy in percent and mean cross-entropy of ``images`` images."""

    top1: float
    top5: float
    loss: float
    images: int


def score(
    models: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    expected: int | None,
) -> dict[str, Score]:
    """Score several models on the same images, read once.

    Ranks may hold different numbers of batches: the only collectives come after the last batch.

    Args:
        models: by name; each maps ``[B, C, H, W]`` to logits ``[B, classes]``.
        batches: this rank's (images, targets ``[B]``, index ``[B]`` of each image in the data set).
        device: where the models are.
        autocast: the context of the forward pass.
        expected: images over all ranks; None where evaluation was cut short.

    Raises:
        RuntimeError: an image was counted twice, or the number of images is not the expected one.
    """
    # correct at 1, correct at 5, sum of losses, images
    totals = {name: torch.zeros(4, dtype=torch.float64, device=device) for name in models}
    seen: list[Tensor] = []
    was_training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    with torch.inference_mode():
        for images, targets, index in batches:
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            seen.append(index.cpu())
            for name, model in models.items():
                with autocast():
                    logits = model(images)
                totals[name] += _count(logits.float(), targets)
    for name, model in models.items():
        model.train(was_training[name])
    indices = torch.cat(seen) if seen else torch.empty(0, dtype=torch.int64)
    _check_each_once(indices, expected)
    if _is_distributed():
        for total in totals.values():
            dist.all_reduce(total)
    return {name: _score(total.tolist()) for name, total in totals.items()}


def cut(batches: Iterable, limit: int | None) -> Iterable:
    """The first ``limit`` batches, all where it is None."""
    return batches if limit is None else itertools.islice(batches, limit)


def _count(logits: Tensor, targets: Tensor) -> Tensor:
    top = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    hits = top.eq(targets[:, None])
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return torch.stack([hits[:, 0].sum(), hits.sum(), loss, torch.full_like(loss, len(targets))]).double()


def _score(total: list[float]) -> Score:
    correct1, correct5, loss, images = total
    return Score(100 * correct1 / images, 100 * correct5 / images, loss / images, int(images))


def _check_each_once(indices: Tensor, expected: int | None) -> None:
    if _is_distributed():
        gathered: list[Tensor | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, indices)
        indices = torch.cat(gathered)
    unique = indices.unique().numel()
    if unique != indices.numel():
        raise RuntimeError(
            f"evaluation counted {indices.numel() - unique} images more than once ({unique} different ones): the "
            "validation loader gives several ranks the same image"
        )
    if not unique or (expected is not None and unique != expected):
        raise RuntimeError(f"evaluation counted {unique} images, the validation set has {expected}")


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
