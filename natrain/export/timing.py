"""How fast and how exact a model is in every form it can leave in, side by side on the CPU of this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from natrain.export.graph import set_kernel
from natrain.export.targets import TARGETS, export

WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class Timing:
    """One form: median milliseconds of a batch, largest difference of a logit from the reference, file size."""

    name: str
    median_ms: float
    difference: float
    size_mb: float | None

    def __str__(self) -> str:
        size = "" if self.size_mb is None else f"{self.size_mb:9.1f}"
        return f"{self.name:<22}{self.median_ms:10.1f}{self.difference:12.2g}{size}"


HEADER = f"{'form':<22}{'median ms':>10}{'difference':>12}{'size MB':>9}"


def compare(
    model: nn.Module, input: dict[str, Any], folder: Path, forms: list[tuple[str, str]], batch: int, rounds: int
) -> list[Timing]:
    """Time the model in torch (kernels reference and auto) and in each of ``forms`` on the same images.

    The forms take turns, round after round, so that a machine that slows down slows all of them.

    Args:
        forms: (target, precision) of ``TARGETS``.
        folder: where the files are written.
        batch: images a call.
        rounds: timed calls of each, after two that are not.
    """
    images = torch.randn(batch, input["in_chans"], *input["img_size"], generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[Tensor], Tensor]] = {
        f"torch {kernel}": set_kernel(model, kernel).cpu() for kernel in ("reference", "auto")
    }
    sizes: dict[str, float] = {}
    for to, precision in forms:
        name, path = f"{to} {precision}", folder / f"{to}-{precision}{TARGETS[to].suffix}"
        export(model, input, to, path, precision=precision)
        runs[name], sizes[name] = TARGETS[to].load(path, "cpu"), path.stat().st_size / 1e6
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    logits: dict[str, Tensor] = {}
    with torch.inference_mode():
        for _ in range(WARMUP_ROUNDS + rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                logits[name] = run(images)
                seconds[name].append(time.perf_counter() - start)
    truth = logits["torch reference"]
    return [
        Timing(
            name,
            1e3 * statistics.median(taken[WARMUP_ROUNDS:]),
            (logits[name] - truth).abs().max().item(),
            sizes.get(name),
        )
        for name, taken in seconds.items()
    ]
