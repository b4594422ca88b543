"""The optimiser: parameter groups, learning rate for the global batch, timm's factory."""

from __future__ import annotations

import math
from collections.abc import Mapping

import timm.optim
import torch
from torch import nn

from natrain.errors import invalid, nearest


def scaled_lr(lr: float, global_batch: int, scaling: str, base_batch: int) -> float:
    """The learning rate for ``global_batch`` images per step, given one that holds for ``base_batch``.

    ``linear`` follows Goyal et al. 2017 (arXiv 1706.02677, section 2.1), ``sqrt`` Krizhevsky 2014 (arXiv 1404.5997,
    section 5).
    """
    ratio = global_batch / base_batch
    return lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[scaling]


def create_optimizer(model: nn.Module, optim: Mapping, lr: float, *, fused: bool) -> torch.optim.Optimizer:
    """Build the optimiser ``optim.name`` over the trainable parameters of ``model``.

    Biases, all one-dimensional parameters (norms, layer scale) and what ``model.no_weight_decay()`` names are not
    decayed; each trainable parameter is in exactly one group.

    Args:
        model: the bare model, before any wrapping, so that its names match ``no_weight_decay()``.
        optim: name, weight_decay, betas (for optimisers that have two), eps (for those that have one), layer_decay:
            None, or a factor on the learning rate from each layer of ``model.group_matcher()`` to the one before it,
            where the last has ``lr`` (BEiT, 2106.08254, appendix; timm's ``param_groups_layer_decay``).
        lr: peak learning rate, already scaled.
        fused: use torch's fused AdamW (one kernel for all tensors; it cannot be clipped under fp16's loss scaling).

    Raises:
        ValueError: no optimiser of that name.
    """
    known = timm.optim.list_optimizers()
    if optim["name"] not in known:
        best = nearest(optim["name"], known) or "adamw"
        raise invalid(
            "optim.name", optim["name"], "an optimiser of timm (timm.optim.list_optimizers())", f"optim.name={best}"
        )
    arguments: dict[str, object] = {}
    if timm.optim.get_optimizer_info(optim["name"]).num_betas == 2:
        arguments["betas"] = tuple(optim["betas"])
    if fused and optim["name"] == "adamw":
        arguments["fused"] = True
    # Grouped as for some decay even where there is none: a run resumed with another decay finds the same groups.
    exempt = getattr(model, "no_weight_decay", set)()
    if optim.get("layer_decay") is None:
        groups = timm.optim.param_groups_weight_decay(model, weight_decay=1.0, no_weight_decay_list=exempt)
    else:
        groups = timm.optim.param_groups_layer_decay(
            model, weight_decay=1.0, no_weight_decay_list=exempt, layer_decay=optim["layer_decay"]
        )
    for group in groups:
        group["weight_decay"] *= optim["weight_decay"]
    return timm.optim.create_optimizer_v2(groups, opt=optim["name"], lr=lr, eps=optim["eps"], **arguments)
