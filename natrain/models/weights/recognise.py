"""Which variant a state dict belongs to, judged by its names and shapes against every registered model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, partial
from itertools import chain
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from natrain.errors import invalid, nearest
from natrain.models.registry import list_models

SHOWN = 12  # names of one kind that an error lists before "and N more"
# Left out by backbones of detectors (their norms are norm0..3) and by models without a classifier; or a constant.
MAY_LACK = re.compile(r"(head|norm)\.(weight|bias)|.*\.relative_position_index")


class Fit(NamedTuple):
    """How a state dict compares with a variant.

    Attributes:
        variant: a registered name.
        args: arguments that make the variant's shapes those of the file (kernel_size, in_chans, num_classes, img_size).
        problems: what no argument explains, one line each: missing, unexpected and differently shaped names.
        missing: names the file may lack and does (head, norm, a constant table).
        extra: entries beside the model (a detector's norms), with their shapes.
    """

    variant: str
    args: dict[str, Any]
    problems: list[str]
    missing: list[str]
    extra: dict[str, tuple[int, ...]]


Shapes = Mapping[str, tuple[int, ...]]


@cache
def shapes_of(variant: str) -> Shapes:
    """Names and shapes of a registered variant with its default arguments; costs no memory."""
    return shapes_with(variant, {})


def shapes_with(variant: str, args: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a registered variant with other arguments.

    Raises:
        ValueError: an argument that the variant does not take.
    """
    with torch.device("meta"):
        return shapes_in(timm.create_model(variant, **args))


def shapes_in(model: nn.Module) -> Shapes:
    """Names and shapes of a model's state dict."""
    return {name: tuple(tensor.shape) for name, tensor in chain(model.named_parameters(), model.named_buffers())}


def has_plan(variant: str, args: Mapping[str, Any]) -> bool:
    """True where the dilations in ``args`` are those the variant has without them, block by block."""
    rest = {name: value for name, value in args.items() if name != "dilations"}
    with torch.device("meta"):
        own, other = timm.create_model(variant, **rest), timm.create_model(variant, **args)
    return repr(own.trunk) == repr(other.trunk)


def check_variant(name: str) -> str:
    """The registered variant in ``name``, which may carry a pretrained tag.

    Raises:
        ValueError: there is no such variant; the message names the nearest.
    """
    variant = name.split(".")[0]
    if variant not in list_models():
        close = nearest(variant, list_models())
        raise invalid("model", name, "a model of natrain (`natrain models` lists them)", f"model={close or 'nat_tiny'}")
    return variant


def compare(state: Mapping[str, Tensor], variant: str, own: Shapes | None = None) -> Fit:
    """Hold ``state`` against one variant, or against its shapes with other arguments (``own``)."""
    own = shapes_of(variant) if own is None else own
    trunk = {name.split(".")[0] for name in own if name.split(".")[0] not in ("norm", "head")}
    problems, extra = [], {}
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        if name in own:
            if shape != own[name] and not _explained(name, shape, own[name]):
                problems.append(f"{name} is {list(shape)}, {variant} has {list(own[name])}")
        elif name.split(".")[0] in trunk:
            problems.append(f"{name} {list(shape)} is not in {variant}")
        else:
            extra[name] = shape
    absent = [name for name in own if name not in state]
    missing = [name for name in absent if MAY_LACK.fullmatch(name)]
    problems += [f"{name} {list(own[name])} is missing" for name in absent if name not in missing]
    return Fit(variant, {} if problems else _arguments(state, own, variant), problems, missing, extra)


def _explained(name: str, shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
    """True where an argument of the model (in_chans, num_classes, kernel_size, img_size) changes that size."""
    if len(shape) != len(own):
        return False
    if name.endswith(".rpb"):
        return shape[0] == own[0] and all(size % 2 for size in shape[1:])
    if name.endswith("relative_position_index"):
        return shape[0] == shape[1]
    if name.startswith("head."):
        return shape[1:] == own[1:]
    if name in ("patch_embed.proj.weight", "patch_embed.proj.0.weight"):
        return shape[0] == own[0] and shape[2:] == own[2:]
    return False


def _arguments(state: Mapping[str, Tensor], own: Shapes, variant: str) -> dict[str, Any]:
    args: dict[str, Any] = {}
    stem = next(name for name in own if name.startswith("patch_embed.proj") and name.endswith("weight"))
    if state[stem].shape[1] != own[stem][1]:
        args["in_chans"] = state[stem].shape[1]
    classes = state["head.weight"].shape[0] if "head.weight" in state else 0
    if classes != own.get("head.weight", (0,))[0]:
        args["num_classes"] = classes
    biases = [name for name in own if name.endswith(".rpb")]
    if any(tuple(state[name].shape) != own[name] for name in biases):
        sizes = windows_of(state)
        if any(name.endswith("relative_position_index") for name in own):
            args["img_size"] = [16 * side for side in sizes[0]]
        elif any(height != width for height, width in sizes):
            raise invalid("checkpoint", variant, f"square kernel sizes; the biases have {sizes}", "another checkpoint")
        else:
            kernels = [height for height, _ in sizes]
            args["kernel_size"] = kernels[0] if len(set(kernels)) == 1 else kernels
    return args


def windows_of(state: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """Height and width of the windows of every stage (one entry of an isotropic model), from the biases' shapes.

    Raises:
        ValueError: blocks of one stage differ.
    """
    stages: dict[str, set[tuple[int, int]]] = {}
    for name, tensor in state.items():
        if name.endswith(".rpb"):
            _, rows, columns = tensor.shape
            stage = name.split(".")[1] if ".blocks." in name else ""
            stages.setdefault(stage, set()).add(((rows + 1) // 2, (columns + 1) // 2))
    if any(len(sizes) > 1 for sizes in stages.values()):
        listed = {stage: sorted(sizes) for stage, sizes in stages.items()}
        raise invalid("checkpoint", listed, "one kernel size per stage", "another checkpoint")
    return [next(iter(stages[stage])) for stage in sorted(stages)]


def named_in(text: str) -> str | None:
    """The registered variant whose name stands in ``text`` (a file name), the longest one; None if none does."""
    text = text.lower().replace("-", "_")
    found = [name for name in list_models() if re.search(rf"(?<![a-z]){re.escape(name)}(?![a-z])", text)]
    return max(found, key=len, default=None)


def recognise(
    state: Mapping[str, Tensor], path: str, told: str | None, hint: str | None, own: Shapes | None = None
) -> Fit:
    """The variant of ``state``.

    Args:
        state: under natrain's names.
        path: the file, for errors and, where NAT and DiNAT have the same tensors, for its name.
        told: the variant the caller or the file's metadata names; it must fit.
        hint: a variant to prefer where several fit.
        own: the shapes of ``told`` where they are not those of its default arguments.

    Raises:
        ValueError: no variant fits (what does not is listed), ``told`` is another, or the choice is ambiguous.
    """
    if told is not None:
        fit = compare(state, told, own)
        if not fit.problems:
            return fit
        others = [other.variant for other in map(partial(compare, state), list_models()) if not other.problems]
        if told in others:
            say, fix = f"; it fits {told} without them", "the arguments of the model that the file was trained with"
        else:
            say, fix = (f"; it fits {', '.join(others)}", f"model={others[0]}") if others else ("", None)
        raise _unfit(path, fit, say, fix, " with the model's arguments" if told in others else "")
    for name in (hint, named_in(path)):
        if name is not None and not (fit := compare(state, name)).problems and not _lacks_table(fit):
            return fit
    fits = [compare(state, name) for name in list_models()]
    whole = [fit for fit in fits if not fit.problems and not _lacks_table(fit)]
    if not whole:
        raise _unfit(path, min(fits, key=lambda fit: len(fit.problems)), "", None)
    if len(whole) > 1:
        names = [fit.variant for fit in whole]
        raise invalid(
            "checkpoint",
            path,
            f"to know which model it is: {' and '.join(names)} have the same tensors and differ in dilation only",
            f"--model {names[0]} (natrain import), or a file name that contains the model's",
        )
    return whole[0]


def _lacks_table(fit: Fit) -> bool:
    """ViT-rpb without its table has the tensors of an isotropic NAT; only a caller who names it means it."""
    return any(name.endswith("relative_position_index") for name in fit.missing)


def _unfit(path: str, fit: Fit, say: str, fix: str | None, how: str = "") -> ValueError:
    more = len(fit.problems) - SHOWN
    return invalid(
        "checkpoint",
        path,
        f"weights of a model of natrain; compared with {fit.variant}{how}: "
        + "; ".join(fit.problems[:SHOWN])
        + (f"; and {more} more" if more > 0 else "")
        + say,
        fix or "checkpoint=FILE of one of the models that `natrain models` lists",
    )
