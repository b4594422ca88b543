"""Weights for another image size or kernel size: biases interpolated, dilations planned anew.

Only relative position biases depend on the kernel size (and on the map, in ViT-rpb), and nothing else on the image.
Dilations are no weights, but a plan made for one map size wastes a larger one (DiNAT, 2209.15001, section 4.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.layers import resize_rel_pos_bias_table_simple
from torch import Tensor, nn

from natrain.errors import invalid
from natrain.layers import GlobalAttention2d
from natrain.models.plans import Dilations
from natrain.models.spec import image_size
from natrain.models.weights import Weights
from natrain.models.weights.recognise import has_plan


@dataclass(frozen=True)
class StagePlan:
    """The windows of one stage on a map.

    Attributes:
        tokens: of the map's shorter side.
        kernel_size: tokens per axis of a window; equal to ``tokens`` in global attention.
        dilations: one per block.
    """

    tokens: int
    kernel_size: int
    dilations: tuple[int, ...]


def resize_bias(rpb: Tensor, shape: Sequence[int]) -> Tensor:
    """A relative position bias ``[N, 2ky - 1, 2kx - 1]`` for other kernel sizes: bicubic, offset 0 stays in the middle.

    The published 22K weights went from kernel 7 to 11 this way (2209.15001, section 4.1). An equal shape returns the
    tensor itself.
    """
    if tuple(rpb.shape) == tuple(shape):
        return rpb
    window = tuple((side + 1) // 2 for side in shape[1:])
    return resize_rel_pos_bias_table_simple(rpb.float(), window, tuple(shape)).to(rpb.dtype)


def resize_biases(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state`` with every relative position bias, and ViT-rpb's table of offsets, in the shape that ``model`` has."""
    own = model.state_dict()
    fitted = dict(state)
    for name, tensor in state.items():
        if name.endswith("rpb") and name in own and own[name].dim() == tensor.dim():
            fitted[name] = resize_bias(tensor, own[name].shape)
        elif name.endswith("relative_position_index") and name in own and own[name].shape != tensor.shape:
            layer = model.get_submodule(name.rpartition(".")[0])
            fitted[name] = GlobalAttention2d.position_index(*layer.input_size)
    return fitted


def replan(
    old: Sequence[StagePlan], tokens: Sequence[int], kernel_sizes: Sequence[int], is_fitted: bool = True
) -> list[tuple[int, ...]]:
    """Dilations for other maps and kernel sizes that keep what each block was for.

    A block of dilation 1 stays local. One that used the largest dilation that fits uses the largest that fits now, so
    that it still sees the whole map; any other covers the same share of the map, rounded down. From the published plans
    at 224 pixels this gives those at 384 for kernel sizes 7 and 11.

    Args:
        old: the stages as they are.
        tokens: the new shorter side of each stage's map.
        kernel_sizes: the new kernel size of each stage.
        is_fitted: windows must fit into the maps; False where the model pads or shrinks them.

    Raises:
        ValueError: a kernel size larger than its map.
    """
    plan = []
    for number, (stage, length, kernel_size) in enumerate(zip(old, tokens, kernel_sizes, strict=True), 1):
        if kernel_size > length and is_fitted:
            raise invalid(
                "kernel_size",
                list(kernel_sizes),
                f"at most {length} in stage {number}, whose map has {length} tokens a side",
                f"kernel_size={list(map(min, kernel_sizes, tokens))}, or a larger img_size",
            )
        largest, limit = stage.tokens // stage.kernel_size, max(1, length // kernel_size)
        dilations = []
        for dilation in stage.dilations:
            share = dilation * length * stage.kernel_size // (stage.tokens * kernel_size)
            wanted = 1 if dilation == 1 else limit if dilation == largest else share
            dilations.append(max(1, min(wanted, limit) if is_fitted else wanted))
        plan.append(tuple(dilations))
    return plan


def stages_of(model: nn.Module) -> list[list[nn.Module]]:
    """The attention layers of every stage; an isotropic model has one stage."""
    if hasattr(model.trunk[0], "blocks"):
        return [[block.attn for block in stage.blocks] for stage in model.trunk]
    return [[block.attn for block in model.trunk]]


def stage_plans(model: nn.Module, img_size: Sequence[int]) -> list[StagePlan]:
    """What the windows of ``model`` are on images of ``img_size`` (height, width) pixels."""
    stages = stages_of(model)
    reductions = [model.feature_info[0]["reduction"] * 2**stage for stage in range(len(stages))]
    plans = []
    for layers, reduction in zip(stages, reductions, strict=True):
        tokens = -(-min(img_size) // reduction)
        if isinstance(layers[0], GlobalAttention2d):
            plans.append(StagePlan(tokens, tokens, (1,) * len(layers)))
        else:
            window = layers[0].window
            plans.append(StagePlan(tokens, window.kernel_size[0], tuple(layer.window.dilation[0] for layer in layers)))
    return plans


def new_arguments(
    model_name: str,
    model_args: Mapping[str, Any],
    old_size: Sequence[int],
    img_size: Sequence[int],
    kernel_size: int | Sequence[int] | None = None,
    dilations: Dilations | str | None = None,
) -> tuple[dict[str, Any], list[StagePlan], list[StagePlan]]:
    """Arguments of ``model_name`` at another size, with the stages before and after.

    Args:
        model_args: the arguments as they are.
        old_size, img_size: (height, width) in pixels before and after.
        kernel_size: the new one, or one per stage; None keeps it.
        dilations: the new ones or the name of a plan; None plans them anew.

    Raises:
        ValueError: a model without windows to change, an argument it does not take, a window larger than its map.
    """
    old = _on_meta(model_name, model_args)
    before = stage_plans(old, old_size)
    args = dict(model_args)
    if isinstance(stages_of(old)[0][0], GlobalAttention2d):
        for name, value in (("kernel_size", kernel_size), ("dilations", dilations)):
            if value is not None:
                raise invalid(name, value, f"None: {model_name} has global attention", "img_size=384 alone")
        args["img_size"] = list(img_size)
        return args, before, stage_plans(_on_meta(model_name, args), img_size)
    if kernel_size is not None:
        args["kernel_size"] = kernel_size
    args["dilations"] = 1  # any plan fits the check that reads the kernel sizes
    after = stage_plans(_on_meta(model_name, args), img_size)
    sizes = [stage.kernel_size for stage in after]
    if dilations is None and tuple(img_size) == tuple(old_size) and sizes == [stage.kernel_size for stage in before]:
        return dict(model_args), before, before
    if dilations is None:
        is_fitted = args.get("na_padding", "raise") == "raise"
        plan = replan(before, [stage.tokens for stage in after], sizes, is_fitted)
        args["dilations"] = [list(stage) for stage in plan] if len(plan) > 1 else list(plan[0])
    else:
        args["dilations"] = dilations
    model = _on_meta(model_name, {**args, "img_size": tuple(img_size)})
    if has_plan(model_name, args):
        del args["dilations"]
    return args, before, stage_plans(model, img_size)


def operate(
    weights: Weights,
    kernel_size: int | Sequence[int] | None = None,
    img_size: int | Sequence[int] | None = None,
    dilations: Dilations | str | None = None,
) -> tuple[Weights, str]:
    """``weights`` for another kernel size, image size or dilation plan, and a table of what changed.

    Raises:
        ValueError: as ``new_arguments``.
    """
    old_size = tuple(weights.input["img_size"])
    size = old_size if img_size is None else image_size(img_size)
    args, before, after = new_arguments(weights.model_name, weights.model_args, old_size, size, kernel_size, dilations)
    model = _on_meta(weights.model_name, args)
    state = resize_biases(weights.state, model)
    changed = replace(weights, state=state, model_args=args, input={**weights.input, "img_size": list(size)})
    return changed, surgery_table(before, after)


def surgery_table(before: Sequence[StagePlan], after: Sequence[StagePlan]) -> str:
    """One line a stage: map, kernel size, bias and dilations, before and after."""
    rows = [("stage", "map", "kernel", "bias per axis", "dilations")]
    for number, (old, new) in enumerate(zip(before, after, strict=True), 1):
        rows.append(
            (
                str(number),
                _change(old.tokens, new.tokens),
                _change(old.kernel_size, new.kernel_size),
                _change(2 * old.kernel_size - 1, 2 * new.kernel_size - 1),
                _change(_shown(old.dilations), _shown(new.dilations)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _shown(dilations: tuple[int, ...]) -> str:
    """The dilations of a stage, a pattern that repeats without remainder only once: ``(1,2)*9``."""
    count = len(dilations)
    length = next(n for n in range(1, count + 1) if dilations[:n] * (count // n) == dilations)
    pattern = ",".join(map(str, dilations[:length]))
    return pattern if length == count else f"({pattern})*{count // length}"


def _change(old: object, new: object) -> str:
    return f"{old}" if old == new else f"{old} -> {new}"


def _on_meta(model_name: str, args: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(model_name, **args)
