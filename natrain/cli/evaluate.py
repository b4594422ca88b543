"""Accuracy of a checkpoint, or of a model with pretrained weights, on validation images.

The model, its classes and its preprocessing come out of the checkpoint, and so does the data set it was trained on
unless data=... names another:
  natrain eval checkpoint=runs/NAME/checkpoints/best.ckpt
  natrain eval checkpoint=runs/NAME/checkpoints/best.ckpt data=imagefolder data.root=DIR
  natrain eval checkpoint=hf-hub:shi-labs/dinat-mini-in1k-224 data=imagefolder data.root=DIR
  natrain eval model=NAME model.args.pretrained=true data=imagefolder data.root=DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from natrain.cli.train import add_composition
from natrain.errors import invalid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_composition(parser)


def run(arguments: argparse.Namespace) -> int:
    from natrain.training import evaluate
    from natrain.training.plan import global_rank

    result = evaluate(evaluation_config(arguments.overrides, arguments.config_dir))
    if global_rank() != 0:
        return 0
    for prefix, weights in (("", "raw weights"), ("ema_", "averaged weights")):
        if f"{prefix}top1" in result:
            top1, top5, loss = (result[f"{prefix}{key}"] for key in ("top1", "top5", "loss"))
            print(f"{weights}: top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f}")
    print(f"images: {result['images']}, each counted once")
    return 0


def evaluation_config(overrides: list[str], config_dir: Path | None) -> DictConfig:
    """The settings typed on top of the defaults, with model and data set from the checkpoint where they are not typed.

    Raises:
        ValueError: as ``compose_config``; a checkpoint that cannot be read, names no model or holds another one.
    """
    from natrain.cli.compose import compose_config, typed_keys
    from natrain.training.checkpoint import open_checkpoint

    typed = typed_keys(overrides)
    path = next((value for key, _, value in (word.partition("=") for word in overrides) if key == "checkpoint"), None)
    if path is None:
        return compose_config(overrides, config_dir)
    typed_model = next(
        (word.partition("=")[2] for word in overrides if word.startswith(("model=", "model.name="))), None
    )
    parameters = open_checkpoint(path, typed_model)["hyper_parameters"]
    stored = parameters.get("config")
    words = list(overrides)
    if "model.name" not in typed:
        words.append(f"model={parameters['model_name']}")
    is_other_data = "data.name" in typed or stored is None
    if not is_other_data:
        words.append(f"data={stored['data']['name']}")
    config = compose_config(words, config_dir)
    _check_arguments(config, typed, parameters["model_args"], path)
    if is_other_data:
        return config
    for key, value in stored["data"].items():
        if f"data.{key}" not in typed:
            OmegaConf.update(config, f"data.{key}", value, force_add=True)
    return config


def _check_arguments(config: DictConfig, typed: set[str], stored: dict[str, Any], path: str) -> None:
    """The model is made as its checkpoint says, so what is typed of it must not be something else."""
    told = OmegaConf.create({"model": {"args": stored}})
    for key in sorted(key for key in typed if key.startswith("model.args")):
        value, was = OmegaConf.select(config, key), OmegaConf.select(told, key)
        if value != was:
            allowed = f"{'nothing' if was is None else was}: the model is made as {path} says"
            raise invalid(key, value, allowed, f"leave {key} out, or another checkpoint")
