"""Starting from other weights: the head that starts anew, and what is not trained."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from timm.layers import trunc_normal_
from timm.models import group_parameters
from torch import nn

from natrain.errors import invalid


def classifier_of(model: nn.Module) -> list[nn.Module]:
    """The layers that make logits; a distilled model has two."""
    found = model.get_classifier()
    return list(found) if isinstance(found, (tuple, list)) else [found]


def start_head(model: nn.Module, scale: float) -> None:
    """Start the classifier anew: truncated normal of deviation ``0.02 * scale``, zero bias.

    A small one lets the gradient that reaches the pretrained layers grow from nothing (as in ConvNeXt's fine-tuning,
    2201.03545, appendix A.2: scale 0.001).
    """
    for head in classifier_of(model):
        for layer in head.modules():
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                with torch.no_grad():
                    layer.weight.mul_(scale)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def freeze(model: nn.Module, stages: int, linear_probe: bool) -> None:
    """Take parameters out of training.

    Args:
        stages: freeze the stem and this many of the units that follow it, in the order of the model's
            ``group_matcher(coarse=True)``: stages of a hierarchical model, blocks of an isotropic one. 0: none.
        linear_probe: train the classifier only.

    Raises:
        ValueError: ``stages`` that the model does not have.
    """
    if linear_probe:
        kept = {parameter for head in classifier_of(model) for parameter in head.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad = parameter in kept
        return
    if stages == 0:
        return
    groups = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    units = max(groups.values()) - 1  # the first group is the stem, the last one holds the classifier
    if stages > units:
        raise invalid(
            "finetune.freeze_stages",
            stages,
            f"0 to {units}, the units of this model after its stem",
            "finetune.linear_probe=true to train the classifier only",
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad = groups[name] > stages


def frozen_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The largest modules of which every parameter is frozen; they belong in evaluation mode while others train."""
    for child in model.children():
        parameters = list(child.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            yield child
        elif parameters:
            yield from frozen_modules(child)
