"""From settings to a model and the description of its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import timm
from omegaconf import DictConfig, OmegaConf
from torch import nn

import natrain.models
from natrain.errors import invalid, nearest
from natrain.models.base import Backbone
from natrain.models.registry import check_tag
from natrain.models.surgery import resize_biases
from natrain.models.weights import load_into, load_weights
from natrain.training.checkpoint import load_state, model_state, read_checkpoint, says
from natrain.training.finetune import classifier_of, start_head


def is_ours(name: str) -> bool:
    """True for a model of this package, which takes ``kernel`` and ``img_size``."""
    return name.split(".")[0] in natrain.models.list_models()


def model_input(cfg: DictConfig) -> dict[str, Any]:
    """Size and normalisation of the images: what ``data`` sets, else what the model was made for.

    Returns:
        img_size ``(height, width)``, in_chans, mean, std, crop_pct, interpolation.

    Raises:
        ValueError: an unknown model, or sizes and channel counts that contradict each other.
    """
    name = cfg.model.name
    if not timm.is_model(name):
        best = nearest(name, timm.list_models())
        raise invalid(
            "model", name, "a model of natrain or timm (`natrain models` lists ours)", f"model={best or 'nat_tiny'}"
        )
    if is_ours(name) and "." in name:
        check_tag(*name.split(".", 1))
    preset = timm.models.get_pretrained_cfg(name)
    preset = preset.to_dict() if preset is not None else {}
    arguments = OmegaConf.to_container(cfg.model.args)
    default = preset.get("input_size") or (3, 224, 224)
    in_chans = _agreed("in_chans", cfg.data.in_chans, arguments, default[0])
    size = _agreed("img_size", OmegaConf.to_object(cfg.data).get("img_size"), arguments, default[1:])
    return {
        "img_size": (size, size) if isinstance(size, int) else tuple(size),
        "in_chans": in_chans,
        "mean": _per_channel("mean", cfg.data.mean, preset.get("mean", timm.data.IMAGENET_DEFAULT_MEAN), in_chans),
        "std": _per_channel("std", cfg.data.std, preset.get("std", timm.data.IMAGENET_DEFAULT_STD), in_chans),
        "crop_pct": cfg.data.crop_pct or preset.get("crop_pct") or timm.data.constants.DEFAULT_CROP_PCT,
        "interpolation": cfg.data.interpolation or preset.get("interpolation") or "bicubic",
    }


def build_model(
    name: str, arguments: Mapping[str, Any], *, num_classes: int, input: Mapping[str, Any], kernel: str | list[str]
) -> nn.Module:
    """Create a registered model for ``num_classes`` and the images that ``input`` describes.

    Raises:
        ValueError: ``model.args`` names another number of classes, or an argument the model does not take.
    """
    arguments = dict(arguments)
    wanted = arguments.pop("num_classes", num_classes)
    if wanted != num_classes:
        raise invalid(
            "model.args.num_classes",
            wanted,
            f"{num_classes}, the number of classes in the data",
            "leave model.args.num_classes out: it follows the data",
        )
    arguments["in_chans"] = input["in_chans"]
    size = (input["img_size"],) * 2 if isinstance(input["img_size"], int) else tuple(input["img_size"])
    if is_ours(name):
        arguments |= {"img_size": size, "kernel": kernel}
    try:
        model = timm.create_model(name, num_classes=num_classes, **arguments)
    except TypeError as error:
        raise invalid("model.args", arguments, f"arguments that {name} takes ({error})", "model.args={}") from error
    if not is_ours(name) and hasattr(model, "set_input_size") and "img_size" not in arguments:
        if size != tuple(model.pretrained_cfg.get("input_size", (3, *size)))[1:]:
            model.set_input_size(img_size=size)
    return model


def load_initial_weights(
    model: nn.Module,
    path: str,
    *,
    class_names: Sequence[str] | None = None,
    head: str = "auto",
    head_init_scale: float = 1.0,
    surgery: bool = False,
) -> list[str]:
    """Start ``model`` from the weights in ``path``; only those of the classifier may be of another size.

    Args:
        model: of natrain: ``path`` may be anything that ``natrain.models.weights.load_weights`` takes. Of timm: a file
            with the model's own names.
        path: the checkpoint.
        class_names: of the data; None where they do not matter.
        head: ``auto``: the classifier starts anew where the file names other classes or another number of them;
            ``new``: in any case; ``keep``: never.
        head_init_scale: of a classifier that starts anew; see ``natrain.training.finetune.start_head``.
        surgery: interpolate the relative position biases of other kernel sizes; otherwise they are an error.

    Returns:
        The names that start anew: those that the file lacks, and the classifier's.

    Raises:
        ValueError: the file holds another model, or other classes with ``head="keep"``.
    """
    fresh, stored = _load(model, path, surgery)
    names = {id(parameter) for layer in classifier_of(model) for parameter in layer.parameters()}
    classifier = [name for name, parameter in model.named_parameters() if id(parameter) in names]
    renamed = None not in (stored, class_names) and list(stored) != list(class_names)
    other = renamed or any(name in fresh for name in classifier)
    if other and head == "keep":
        raise invalid(
            "finetune.head", "keep", f"auto or new: {path} has other classes than the data", "finetune.head=auto"
        )
    if classifier and (other or head == "new"):
        if head_init_scale != 1 or not set(classifier) <= set(fresh):
            start_head(model, head_init_scale)
        fresh = [*fresh, *(name for name in classifier if name not in fresh)]
    return fresh


def _load(model: nn.Module, path: str, surgery: bool) -> tuple[list[str], list[str] | None]:
    """Copy what fits; the names that were not copied, and the classes that the file names."""
    if isinstance(model, Backbone):
        weights = load_weights(path, model=model.pretrained_cfg["architecture"], like=model)
        if surgery:
            weights = replace(weights, state=resize_biases(weights.state, model))
        return load_into(model, weights), weights.class_names
    checkpoint = read_checkpoint(path)
    state = model_state(checkpoint, "best")
    own = model.state_dict()
    head = tuple(f"{prefix}." for prefix in _classifier(model))
    fresh = [
        key for key in own if head and key.startswith(head) and key in state and state[key].shape != own[key].shape
    ]
    for key in fresh:
        state[key] = own[key]
    load_state(model, state, argument="checkpoint", path=path, says=says(checkpoint))
    return fresh, checkpoint.get("hyper_parameters", {}).get("class_names")


def _classifier(model: nn.Module) -> tuple[str, ...]:
    found = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (found,) if isinstance(found, str) else tuple(found)


def _agreed(key: str, from_data: Any, arguments: Mapping[str, Any], default: Any) -> Any:
    """One value from ``data.KEY`` and ``model.args.KEY``; both given must be equal."""
    from_model = arguments.get(key)
    if from_data is not None and from_model is not None and from_data != from_model:
        raise invalid(
            f"model.args.{key}", from_model, f"{from_data}, as data.{key} says", f"model.args.{key}={from_data}"
        )
    return next(value for value in (from_data, from_model, default) if value is not None)


def _per_channel(key: str, given: Any, default: tuple[float, ...], in_chans: int) -> tuple[float, ...]:
    if given is not None:
        values = tuple(given) if not isinstance(given, (int, float)) else (given,)
        if len(values) not in (1, in_chans):
            raise invalid(f"data.{key}", list(values), f"1 or {in_chans} numbers, one per channel", f"data.{key}=null")
        return values * in_chans if len(values) == 1 else values
    # A grey image of a model made for colour is normalised with the channels' mean.
    return tuple(default) if len(default) == in_chans else (sum(default) / len(default),) * in_chans
