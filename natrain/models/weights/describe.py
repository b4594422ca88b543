"""What a file says about its weights beside the tensors: variant, arguments, classes, preprocessing, licence."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from natrain.errors import invalid
from natrain.models.published import LICENCE, PUBLISHED, find_published
from natrain.models.registry import default_input, list_models
from natrain.models.weights.files import read_json

METADATA = "natrain"  # key of natrain's description in the metadata of a safetensors file
INPUT = ("img_size", "in_chans", "mean", "std", "crop_pct", "interpolation")
HF_TYPES = ("nat", "dinat")  # ``model_type`` in Hugging Face's ``config.json``
PILLOW_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
ALIKE = 0.9  # share of labels that must be ImageNet's: spellings of a few differ between lists
IMAGENETS = {1000: "imagenet-1k", 21841: "imagenet-22k"}


@dataclass
class Description:
    """What is known so far; None or empty where the file says nothing.

    Attributes:
        model_name: a registered variant.
        hint: a variant to prefer where several have the same tensors.
        model_args: keyword arguments of the variant.
        class_names: one per output.
        input: any of INPUT.
        licence: as the file says it.
        layout: whose layout the file has: official, hf, timm, lightning or natrain.
    """

    model_name: str | None = None
    hint: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None
    input: dict[str, Any] = field(default_factory=dict)
    licence: str | None = None
    layout: str = "official"


def is_own_run(checkpoint: Mapping[str, Any]) -> bool:
    """True for the file of a natrain run; other Lightning modules have hyperparameters too."""
    parameters = checkpoint.get("hyper_parameters")
    return isinstance(parameters, Mapping) and {"model_name", "model_args", "class_names", "input"} <= parameters.keys()


def describe(checkpoint: Mapping[str, Any], path: Path, source: str) -> Description:
    """Collect what ``checkpoint`` and the files beside it say.

    Args:
        checkpoint: what ``read_checkpoint`` or ``read_folder`` returned.
        path: the file or folder it came from.
        source: what the user named; its file name may be a published one.

    Raises:
        ValueError: a ``config.json`` or metadata that cannot be read.
    """
    metadata = checkpoint.get("metadata")
    if isinstance(metadata, Mapping) and isinstance(metadata.get(METADATA), str):
        return _from_natrain(_parsed(metadata[METADATA], path))
    if is_own_run(checkpoint):
        return _from_natrain(checkpoint["hyper_parameters"])
    config = _config_of(path)
    if config.get("model_type") in HF_TYPES:
        return _from_hf(config, path if path.is_dir() else path.parent)
    if "architecture" in config:
        return _from_timm_folder(config)
    if "pytorch-lightning_version" in checkpoint:
        return Description(layout="lightning")
    if "arch" in checkpoint or isinstance(checkpoint.get("args"), Namespace):
        arch = checkpoint.get("arch") or getattr(checkpoint.get("args"), "model", None)
        return Description(model_name=arch if arch in list_models() else None, layout="timm")
    return _from_name(source)


def _config_of(path: Path) -> dict[str, Any]:
    """What ``config.json`` says of a folder, or of the file beside it; empty where there is none.

    A name as common as that may be anything beside a file: there it counts only where it is of one of our models.
    """
    config_path = (path if path.is_dir() else path.parent) / "config.json"
    if not config_path.is_file():
        return {}
    if path.is_dir():
        return read_json(config_path, "checkpoint")
    try:
        config = read_json(config_path, "checkpoint")
    except ValueError:
        return {}
    is_ours = config.get("model_type") in HF_TYPES or config.get("architecture") in list_models()
    return config if is_ours else {}


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise invalid("checkpoint", str(path), f"metadata in JSON ({error})", "checkpoint=FILE") from None
    if not isinstance(found, dict) or "model_name" not in found:
        raise invalid("checkpoint", str(path), "metadata that names a model", "checkpoint=FILE")
    return found


def _from_natrain(told: Mapping[str, Any]) -> Description:
    return Description(
        model_name=told["model_name"],
        # Where the weights came from no longer matters.
        model_args={
            key: value for key, value in told.get("model_args", {}).items() if not key.startswith("pretrained")
        },
        class_names=told.get("class_names"),
        input={key: value for key, value in told.get("input", {}).items() if key in INPUT},
        licence=told.get("licence"),
        layout="natrain",
    )


def _from_name(source: str) -> Description:
    """A published file is known by its name; of another, only the bare tensors are known."""
    known = find_published(source)
    if known is None:
        return Description()
    variant, tag = known
    file = PUBLISHED[variant][tag]
    return Description(
        hint=variant,
        model_args=dict(file.args),
        input=default_input(f"{variant}.{tag}"),
        licence=LICENCE,
        class_names=imagenet_classes(file.cfg.get("num_classes", 1000)),
    )


def imagenet_classes(count: int) -> list[str]:
    """WordNet identifiers of ImageNet's classes in the order of the published heads: what its folders are called."""
    from timm.data import ImageNetInfo

    return list(ImageNetInfo(IMAGENETS[count]).label_names())


def _from_timm_folder(config: Mapping[str, Any]) -> Description:
    cfg = {**config, **config.get("pretrained_cfg", {})}
    size = cfg.get("input_size")
    found = {key: cfg[key] for key in ("mean", "std", "crop_pct", "interpolation") if key in cfg}
    if size:
        found |= {"in_chans": size[0], "img_size": list(size[1:])}
    names = config.get("label_names")
    return Description(
        model_name=config["architecture"],
        model_args=dict(config.get("model_args", {})),
        class_names=list(names) if names else None,
        input=found,
        licence=cfg.get("license"),
        layout="timm",
    )


def _from_hf(config: Mapping[str, Any], folder: Path) -> Description:
    found: dict[str, Any] = {}
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        found = _from_processor(read_json(processor, "checkpoint"))
    if "num_channels" in config:
        found["in_chans"] = config["num_channels"]
    names = config.get("id2label")
    args: dict[str, Any] = {}
    if config["model_type"] == "dinat" and config.get("dilations"):
        args["dilations"] = config["dilations"]
    prefix = f"{config['model_type']}_"
    depth, width = sum(config.get("depths", ())), config.get("embed_dim")
    return Description(
        hint=next((name for name in _of_hf(prefix) if _has_size(name, depth, width)), None),
        model_args=args,
        class_names=_from_labels([names[key] for key in sorted(names, key=int)]) if names else None,
        input=found,
        licence=config.get("license"),
        layout="hf",
    )


def _from_labels(labels: list[str]) -> list[str] | None:
    """Class names of Hugging Face's labels: None for its placeholders, WordNet identifiers for ImageNet's.

    A data set's classes are compared with these names, and ImageNet's folders have the identifiers.
    """
    if labels == [f"LABEL_{index}" for index in range(len(labels))]:
        return None
    if len(labels) in IMAGENETS:
        from timm.data import ImageNetInfo

        known = ImageNetInfo(IMAGENETS[len(labels)])
        alike = sum(label == known.index_to_description(index) for index, label in enumerate(labels))
        if alike > ALIKE * len(labels):
            return imagenet_classes(len(labels))
    return labels


def _of_hf(prefix: str) -> list[str]:
    """Hugging Face's classes hold the hierarchical models with convolutions only."""
    return [name for name in list_models(f"{prefix}*") if name.count("_") == 1]


def _has_size(variant: str, depth: int, width: int | None) -> bool:
    from natrain.models.weights.recognise import shapes_of

    shapes = shapes_of(variant)
    return shapes["patch_embed.norm.weight"] == (width,) and depth == sum(
        name.endswith(".attn.qkv.weight") for name in shapes
    )


def _from_processor(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a ``preprocessor_config.json``: sizes are numbers, or height and width, or the shortest edge."""

    def sides(value: Any) -> list[int] | None:
        if isinstance(value, int):
            return [value, value]
        if isinstance(value, Mapping):
            both = [value.get("height"), value.get("width")]
            return both if None not in both else [value["shortest_edge"]] * 2 if "shortest_edge" in value else None
        return None

    found: dict[str, Any] = {}
    for theirs, ours in (("image_mean", "mean"), ("image_std", "std"), ("crop_pct", "crop_pct")):
        if config.get(theirs) is not None:
            found[ours] = config[theirs]
    size, crop = sides(config.get("size")), sides(config.get("crop_size"))
    if crop is not None and config.get("do_center_crop", True):
        found["img_size"] = crop
        if size is not None:
            found.setdefault("crop_pct", crop[0] / size[0])
    elif size is not None:
        found["img_size"] = size
    if config.get("resample") in PILLOW_FILTERS:
        found["interpolation"] = PILLOW_FILTERS[config["resample"]]
    return found
