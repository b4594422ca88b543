"""How a variant becomes a timm model: registration, metadata, one error for weights and arguments that do not exist."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, build_model_with_cfg, get_pretrained_cfg, register_model
from timm.models._builder import resolve_pretrained_cfg
from torch import nn

from natrain.errors import invalid, nearest
from natrain.models.base import Backbone
from natrain.models.published import published_args

_names: list[str] = []
# Arguments that timm's builder takes out before the model sees the rest.
_BUILDER = {*inspect.signature(build_model_with_cfg).parameters, "features_only", "out_indices", "feature_cls"}


def register(entry: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register ``entry`` with timm under its name, with its module's ``default_cfgs``, and list it as ours."""
    _names.append(entry.__name__)
    return register_model(entry)


def list_models(pattern: str = "*") -> list[str]:
    """Names of natrain's models that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(_names, pattern))


def imagenet_cfg(first_conv: str, **changes: Any) -> dict[str, Any]:
    """timm's ``pretrained_cfg`` of an ImageNet variant at 224 pixels, without weights (natrain.models.published)."""
    return {
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "num_classes": 1000,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "head",
        **changes,
    }


def build(
    cls: type[Backbone], variant: str, pretrained: bool, architecture: dict[str, Any], kwargs: dict[str, Any]
) -> Backbone:
    """The model ``variant``: its architecture numbers, changed by the caller's ``kwargs``, through timm's builder.

    A pretrained tag (``dinat_large.in22k_ft_in1k_384``) also brings the arguments its weights were trained with.

    Raises:
        ValueError: an argument neither the model nor timm knows, an unknown tag; ``pretrained`` where no weight file is
            named, or one that cannot be had or does not fit.
    """
    known = {name for name in inspect.signature(cls).parameters} | _BUILDER
    for name, value in kwargs.items():
        if name not in known:
            close = nearest(name, known)
            raise invalid(
                name, value, f"an argument of {cls.__name__} or of timm.create_model", close or "help(type(model))"
            )
    tag = kwargs.get("pretrained_cfg")
    if isinstance(tag, str):
        check_tag(variant, tag)
    if pretrained:
        kwargs = {**kwargs, "pretrained_cfg_overlay": _with_local_file(variant, kwargs)}
    architecture = {**architecture, **published_args(variant, tag)}
    feature_cfg = {"feature_cls": "getter", "out_indices": cls.default_out_indices}
    return build_model_with_cfg(cls, variant, pretrained, feature_cfg=feature_cfg, **{**architecture, **kwargs})


def _with_local_file(variant: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The overlay that makes timm load a file on this machine through ``Backbone.load_pretrained``."""
    from natrain.models.weights.fetch import locate

    overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
    if cfg.state_dict:
        return overlay
    file = locate(_source_of(cfg, variant), "pretrained")
    return {**overlay, "file": str(file), "custom_load": True, "source": None}


def check_tag(variant: str, tag: str) -> None:
    """Raise ValueError, with the nearest one, where ``variant`` has no such pretrained tag."""
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{variant}.*")]
    if tag not in tags:
        allowed = f"one of {', '.join(tags)}" if tags else "none: no weights are published"
        fix = f"{variant}.{nearest(tag, tags) or tags[0]}" if tags else variant
        raise invalid("model", f"{variant}.{tag}", f"a pretrained tag of {variant}: {allowed}", f"model={fix}")


def pretrained_source(name: str) -> str:
    """Where the weights of a variant (and tag) come from: a path, an address, or ``hf-hub:NAME``.

    Raises:
        ValueError: none are published, or the tag is unknown.
    """
    variant, _, tag = name.partition(".")
    if tag:
        check_tag(variant, tag)
    return _source_of(resolve_pretrained_cfg(variant, tag or None), variant)


def _source_of(cfg: PretrainedCfg, variant: str) -> str:
    if not cfg.has_weights:
        raise invalid(
            "pretrained",
            True,
            f"False, as no weights are published for {variant}, or True with a local file",
            "pretrained=False, or pretrained_cfg_overlay={'file': 'PATH of a checkpoint'}",
        )
    return cfg.file or cfg.url or f"hf-hub:{cfg.hf_hub_id}"


def default_input(name: str) -> dict[str, Any]:
    """Images that a variant (and tag) is meant for: img_size, in_chans, mean, std, crop_pct, interpolation."""
    cfg = get_pretrained_cfg(name)
    return {
        "img_size": list(cfg.input_size[1:]),
        "in_chans": cfg.input_size[0],
        "mean": list(cfg.mean),
        "std": list(cfg.std),
        "crop_pct": cfg.crop_pct,
        "interpolation": cfg.interpolation,
    }
