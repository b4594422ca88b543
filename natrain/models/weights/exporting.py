"""Weights in the layouts of other code; ``load_weights`` reads each of them back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from natrain.errors import invalid, nearest
from natrain.models.nat import NAT
from natrain.models.weights.describe import PILLOW_FILTERS
from natrain.models.weights.files import write_atomically, write_json, write_safetensors
from natrain.models.weights.layouts import to_hf
from natrain.models.weights.loading import Weights


def export_weights(weights: Weights, to: str, out: Path) -> list[Path]:
    """Write ``weights`` in the layout ``to``.

    Args:
        weights: what ``load_weights`` returned.
        to: one of EXPORTS: ``official`` (a ``.pth`` state dict that the official code loads), ``hf`` (a folder for
            transformers' Nat and Dinat), ``timm`` (a folder for ``timm.create_model("local-dir:FOLDER")`` and the hub).
        out: the file, or the folder.

    Returns:
        The files written.

    Raises:
        ValueError: an unknown layout, one that cannot hold this model.
    """
    if to not in EXPORTS:
        raise invalid("--to", to, f"one of {', '.join(EXPORTS)}", f"--to {nearest(to, EXPORTS) or 'official'}")
    return EXPORTS[to](weights, out)


def _official(weights: Weights, out: Path) -> list[Path]:
    if out.suffix not in (".pth", ".pt"):
        raise invalid("--out", str(out), "a file that ends in .pth", f"--out {out.with_suffix('.pth')}")
    state = {**weights.state, **weights.beside}
    write_atomically(out, lambda file: torch.save(state, file), "--out")
    return [out]


def _hf(weights: Weights, out: Path) -> list[Path]:
    model = _as_hf_holds_it(weights)
    plan = [[block.attn.window.dilation[0] for block in stage.blocks] for stage in model.levels]
    is_dilated = any(dilation > 1 for stage in plan for dilation in stage)
    model_type = "dinat" if is_dilated or weights.model_name.startswith("dinat") else "nat"
    first = model.levels[0].blocks[0]
    names = weights.class_names or [f"LABEL_{index}" for index in range(weights.num_classes)]
    config: dict[str, Any] = {
        "architectures": [f"{model_type.capitalize()}ForImageClassification"],
        "model_type": model_type,
        "patch_size": 4,
        "num_channels": weights.input["in_chans"],
        "embed_dim": first.norm1.normalized_shape[0],
        "depths": [len(stage.blocks) for stage in model.levels],
        "num_heads": [stage.blocks[0].attn.num_heads for stage in model.levels],
        "kernel_size": first.attn.window.kernel_size[0],
        "mlp_ratio": first.mlp.fc1.out_features / first.mlp.fc1.in_features,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": first.norm1.eps,
        # Only its being above zero matters: it makes the parameters that the file then fills.
        "layer_scale_init_value": 1e-5 if first.gamma1 is not None else 0.0,
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }
    if model_type == "dinat":
        config["dilations"] = plan
    if weights.licence:
        config["license"] = weights.licence
    files = [out / name for name in ("model.safetensors", "config.json", "preprocessor_config.json")]
    write_safetensors(files[0], to_hf(weights.state, model_type), {})
    write_json(files[2], _processor(weights.input))
    write_json(files[1], config)
    return files


def _as_hf_holds_it(weights: Weights) -> NAT:
    """The model, without memory, if transformers' classes describe such a one."""
    with torch.device("meta"):
        import timm

        model = timm.create_model(weights.model_name, **weights.model_args)
    is_plain = type(model) is NAT and len({b.attn.window.kernel_size for s in model.levels for b in s.blocks}) == 1
    needed = ("levels.0.blocks.0.attn.rpb", "head.weight", "norm.weight")
    if not is_plain or weights.beside or not all(name in weights.state for name in needed):
        raise invalid(
            "--to",
            "hf",
            "official or timm: transformers has classes for classifiers of NAT and DiNAT with one kernel size and "
            f"relative position biases, not for {weights.model_name}"
            + (" with tensors beside it" if weights.beside else ""),
            "--to timm",
        )
    return model


def _processor(input: dict[str, Any]) -> dict[str, Any]:
    height, width = input["img_size"]
    filters = {name: number for number, name in PILLOW_FILTERS.items()}
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": round(height / input["crop_pct"]), "width": round(width / input["crop_pct"])},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "crop_pct": input["crop_pct"],
        "resample": filters[input["interpolation"]],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(input["mean"]),
        "image_std": list(input["std"]),
    }


def _timm(weights: Weights, out: Path) -> list[Path]:
    import timm

    cfg = timm.models.get_pretrained_cfg(weights.model_name).to_dict(remove_source=True)
    size = [weights.input["in_chans"], *weights.input["img_size"]]
    cfg |= {key: weights.input[key] for key in ("mean", "std", "crop_pct", "interpolation")}
    cfg |= {"input_size": size, "num_classes": weights.num_classes}
    for stale in ("architecture", "pool_size", "tag", "license"):
        cfg.pop(stale, None)
    config: dict[str, Any] = {
        "architecture": weights.model_name,
        "num_classes": weights.num_classes,
        "model_args": weights.model_args,
        "pretrained_cfg": {**cfg, "custom_load": False, **({"license": weights.licence} if weights.licence else {})},
    }
    if weights.class_names:
        config["label_names"] = weights.class_names
    files = [out / "model.safetensors", out / "config.json"]
    write_safetensors(files[0], {**weights.state, **weights.beside}, {})
    write_json(files[1], config)
    return files


EXPORTS: dict[str, Callable[[Weights, Path], list[Path]]] = {"official": _official, "hf": _hf, "timm": _timm}
