"""Train a pretrained model on, on your own classes, another image size or another kernel size.

It is `natrain train` with checkpoint=, and with three differences: recipe=finetune is taken where no recipe is typed;
the model, its arguments and its preprocessing come out of the checkpoint where they are not typed; and where the image
size or the kernel size is another, position biases are interpolated and dilations planned anew, which a table says.
epochs=30 is short for schedule.epochs=30, lr=1e-4 for optim.lr=1e-4.
"""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

from natrain.cli.train import add_composition, epilog
from natrain.errors import invalid

if TYPE_CHECKING:
    from omegaconf import DictConfig

SHORT = {"epochs": "schedule.epochs", "lr": "optim.lr"}
WINDOWS = ("kernel_size", "dilations")
INPUT = ("in_chans", "mean", "std", "crop_pct", "interpolation")

__all__ = ["add_arguments", "epilog", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_composition(parser)


def run(arguments: argparse.Namespace) -> int:
    from natrain.cli.compose import compose_config
    from natrain.cli.frozen import requeued
    from natrain.cli.train import train_and_report

    words = complete_words(arguments.overrides)
    config = compose_config(words, arguments.config_dir)
    table = fit_to_checkpoint(config, words)
    if table is not None:
        print(table)
    return train_and_report(requeued(config, words))


def complete_words(overrides: list[str]) -> list[str]:
    """The settings typed, in full, with the recipe and the model that are not typed.

    Raises:
        ValueError: no checkpoint, or one that cannot be read.
    """
    from natrain.training.checkpoint import open_checkpoint

    words = []
    for word in overrides:
        key, equals, value = word.partition("=")
        words.append(f"{SHORT.get(key, key)}{equals}{value}")
    typed = {key: value for key, _, value in (word.partition("=") for word in words)}
    if "checkpoint" not in typed:
        raise invalid(
            "checkpoint",
            None,
            "the weights to start from: a file, an address, hf-hub:OWNER/NAME (`natrain train` starts from none)",
            shlex.join(["natrain", "finetune", *overrides, "checkpoint=FILE"]),
        )
    if not {"model", "model.name"} & typed.keys():
        words.append(f"model={open_checkpoint(typed['checkpoint'])['hyper_parameters']['model_name']}")
    if "recipe" not in typed:
        words.append("recipe=finetune")
    return words


def fit_to_checkpoint(config: DictConfig, words: list[str]) -> str | None:
    """Complete ``config`` by what its checkpoint says and by surgery; the table of the surgery, if any.

    What is typed, and what a recipe or the data sets, wins over the checkpoint. Models of timm stay as they are.

    Raises:
        ValueError: a checkpoint that cannot be read, of another model, or windows larger than their maps.
    """
    from omegaconf import OmegaConf
    from timm.layers import to_2tuple

    from natrain.models.surgery import new_arguments, surgery_table
    from natrain.models.weights import load_weights
    from natrain.training.build import is_ours

    if not any(word.startswith("finetune.surgery=") for word in words):
        config.finetune.surgery = True
    if not is_ours(config.model.name):
        return None
    asked = OmegaConf.to_container(config.model.args)
    weights = load_weights(config.checkpoint, model=config.model.name)
    for key in INPUT:
        if config.data[key] is None:
            config.data[key] = weights.input[key]
    typed_size = OmegaConf.to_object(config.data)["img_size"] or asked.pop("img_size", None)
    size = typed_size or weights.input["img_size"]
    args, before, after = new_arguments(
        weights.model_name,
        {**weights.model_args, **{key: asked[key] for key in asked if key not in WINDOWS}},
        tuple(weights.input["img_size"]),
        to_2tuple(size if isinstance(size, int) else tuple(size)),
        **{key: asked.get(key) for key in WINDOWS},
    )
    args.pop("img_size", None)
    config.data.img_size, config.model.args = size, args
    return surgery_table(before, after) if before != after else None
