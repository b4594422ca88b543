"""A guess of what a step of a model takes; it says beforehand how long a comparison runs and never enters a result."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from natrain.models.problems import attention_problems

# FLOPs a second that eager models reach (of a core; of an H200), and what a layer costs however small it is: measured
# roughly, forward. A training step takes about three forward passes.
_FLOPS_PER_S = {"cpu": 5e10, "cuda": 4e13}
_LAYER_S = {"cpu": 2e-5, "cuda": 1e-5}
_PASSES = {"inference": 1, "training": 3}


def step_seconds(model: nn.Module, images: tuple[int, ...], device: str, mode: str) -> float:
    """Seconds of one step.

    Args:
        model: on torch's meta device: nothing is computed.
        images: shape of the batch [B, C, H, W].
        device: "cpu" (as many threads as torch has now) or "cuda".
        mode: "inference" or "training".
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *images[1:], device="meta"))
    flops = counter.get_total_flops()
    for problem, count in attention_problems(model, (1, *images[1:]), torch.float32, "cpu", None).items():
        pairs = math.prod(problem.spatial) * problem.heads * problem.window.num_neighbors
        flops += 4 * pairs * problem.head_dim * count
    rate = _FLOPS_PER_S[device] * (torch.get_num_threads() if device == "cpu" else 1)
    return _PASSES[mode] * (images[0] * flops / rate + _LAYER_S[device] * sum(1 for _ in model.modules()))
