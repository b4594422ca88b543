"""A guess of what a step of a model takes; it says beforehand how long a comparison runs and never enters a result."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from natrain.models.problems import attention_problems

# FLOPs a second that eager models reach (of a core; of an H200), and what a layer costs however small it is: measured
# roughly, forward. A training step takes about three forward passes.
_FLOPS_PER_S = {"cpu": 5e10, "cuda": 4e13}
_LAYER_S = {"cpu": 2e-5, "cuda": 1e-5}
_PASSES = {"inference": 1, "training": 3}


@dataclass(frozen=True)
class Cost:
    """Of a forward pass: FLOPs of one image, and how many layers there are."""

    flops: float
    layers: int

    @staticmethod
    def of(model: nn.Module, image: tuple[int, ...]) -> Cost:
        """Of a model on torch's meta device, for images [C, H, W]: nothing is computed."""
        with FlopCounterMode(display=False) as counter:
            problems = attention_problems(model, (1, *image), torch.float32, "cpu", None)
        flops = counter.get_total_flops()
        for problem, count in problems.items():
            pairs = math.prod(problem.spatial) * problem.heads * problem.window.num_neighbors
            flops += 4 * pairs * problem.head_dim * count
        return Cost(flops, sum(1 for _ in model.modules()))

    def step_seconds(self, batch: int, device: str, mode: str) -> float:
        """Seconds of one step on "cpu" (as many threads as torch has now) or "cuda", in "inference" or "training"."""
        rate = _FLOPS_PER_S[device] * (torch.get_num_threads() if device == "cpu" else 1)
        return _PASSES[mode] * (batch * self.flops / rate + _LAYER_S[device] * self.layers)
