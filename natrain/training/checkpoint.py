"""Checkpoint files: written in one step, read without running code, checked against the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from natrain.errors import Stopped, invalid
from natrain.models.weights import load_weights
from natrain.models.weights.describe import is_own_run
from natrain.models.weights.fetch import locate
from natrain.models.weights.files import read_checkpoint, write_atomically

SHOWN = 6  # names of one kind that an error lists before "and N more"
PREFIX = "model."  # what the training task puts before the model's own names


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's reader and writer with two promises: no half-written file under a final name, no code from a file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        try:
            write_atomically(Path(path), lambda file: torch.save(checkpoint, file))
        except (OSError, RuntimeError) as error:  # torch's writer hides why a write failed behind an error of its own
            reason = error
            while not isinstance(reason, OSError):
                if reason.__context__ is None:
                    raise
                reason = reason.__context__
            raise Stopped(
                f"{path} cannot be written ({reason.strerror or reason}); what was there before is whole. Try: room on "
                "that disk, then resume=auto"
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: Any = None) -> dict[str, Any]:
        return read_checkpoint(path)


def open_checkpoint(source: str | Path, model: str | None = None) -> dict[str, Any]:
    """A checkpoint of any origin in the form that runs of this package write.

    Args:
        source: what ``natrain.models.weights.load_weights`` takes: a file, a folder, an address, ``hf-hub:NAME``.
        model: the variant, where names and shapes leave a choice; a run's own file has to hold it.

    Returns:
        ``state_dict`` and ``hyper_parameters`` (model_name, model_args, kernel, class_names, input), and of a run's own
        file everything else in it. ``class_names`` is None where the file does not say.

    Raises:
        ValueError: as ``load_weights``; a run's file of another model.
    """
    path = locate(source)
    if path.is_file():
        checkpoint = read_checkpoint(path)
        if is_own_run(checkpoint):
            name = checkpoint["hyper_parameters"]["model_name"]
            if model is not None and model.split(".")[0] != name.split(".")[0]:
                raise invalid("model", model, f"{name}, which {source} holds", f"model={name}, or another checkpoint")
            return checkpoint
    weights = load_weights(source, model)
    weights.say_unused()
    return {"state_dict": weights.state, "hyper_parameters": {"kernel": "auto", **weights.description()}}


def model_state(checkpoint: Mapping[str, Any], weights: str = "raw") -> dict[str, Tensor]:
    """The model's own state dict out of a checkpoint of this package or a bare file of weights.

    Args:
        checkpoint: what ``read_checkpoint`` returned.
        weights: ``raw``, ``ema``, or ``best``: those that scored higher when the file was written.
    """
    if weights == "best":
        weights = checkpoint.get("evaluation", {}).get("weights", "raw")
    if weights == "ema":
        if "ema_state_dict" not in checkpoint:
            raise invalid("weights", "ema", "raw: this checkpoint holds no average", "weights=raw")
        return dict(checkpoint["ema_state_dict"])
    state = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    if state and all(name.startswith(PREFIX) for name in state):
        return {name[len(PREFIX) :]: tensor for name, tensor in state.items()}
    return dict(state)


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, argument: str, path: str | Path, says: str) -> None:
    """Copy ``state`` into ``model``; every name and shape must agree.

    Args:
        argument, path: the setting that named the file and the file, for the error.
        says: the model that the file says it holds.

    Raises:
        ValueError: missing, unexpected or differently shaped tensors, all listed in one error.
    """
    own = model.state_dict()
    problems = {
        "missing from the file": [name for name in own if name not in state],
        "not in the model": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {list(state[name].shape)}, model {list(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    if any(problems.values()):
        lines = [f"{len(names)} {kind}: {shorten(names)}" for kind, names in problems.items() if names]
        raise invalid(
            argument,
            str(path),
            f"a checkpoint of this model; the file says it holds {says}; " + "; ".join(lines),
            f"model={says.split()[0]} with the model.args it was trained with, or another {argument}",
        )
    model.load_state_dict(state)


def shorten(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def says(checkpoint: Mapping[str, Any]) -> str:
    """The model that a checkpoint says it holds, with its arguments."""
    parameters = checkpoint.get("hyper_parameters", {})
    if "model_name" not in parameters:
        return "an unnamed model"
    arguments = parameters.get("model_args") or {}
    listed = ", ".join(f"{key}={value}" for key, value in arguments.items())
    count = len(class_names_of(checkpoint))
    return f"{parameters['model_name']} ({count} classes{'; ' + listed if listed else ''})"


@dataclass(frozen=True)
class LoadedModel:
    """A trained model ready to predict.

    Attributes:
        model: in evaluation mode, on the CPU.
        class_names: one per output; their numbers where the file does not say.
        input: img_size, in_chans, mean, std, crop_pct, interpolation of its images.
        model_name: the name it is registered under.
        is_named: False where ``class_names`` are numbers only.
    """

    model: nn.Module
    class_names: list[str]
    input: dict[str, Any]
    model_name: str
    is_named: bool = True


def load_for_inference(
    path: str | Path,
    weights: str = "best",
    kernel: str | list[str] | None = None,
    input_changes: Mapping[str, Any] | None = None,
    model: str | None = None,
) -> LoadedModel:
    """Rebuild the model of a checkpoint, with its weights, class names and preprocessing.

    Args:
        path: ``run_dir/checkpoints/best.ckpt`` or ``last.ckpt``, or anything else that ``open_checkpoint`` takes.
        weights: ``best`` (the default: whichever of raw and averaged scored higher), ``raw`` or ``ema``.
        kernel: another attention kernel than the one it was trained with.
        input_changes: entries of ``input`` to use instead of the checkpoint's, for example ``img_size``.
        model: the variant, where names and shapes of a file of other code leave a choice.

    Raises:
        ValueError: not a checkpoint, one without a classifier, or one that does not fit its model.
    """
    from natrain.training.build import build_model

    checkpoint = open_checkpoint(path, model)
    parameters = checkpoint["hyper_parameters"]
    class_names = class_names_of(checkpoint)
    if not class_names:
        raise invalid(
            "checkpoint",
            str(path),
            "a checkpoint with a classifier; this one is a backbone",
            f"natrain train model={parameters['model_name']} checkpoint={path} ... to train one",
        )
    input = {**parameters["input"], **(input_changes or {})}
    built = build_model(
        parameters["model_name"],
        {key: value for key, value in parameters["model_args"].items() if not key.startswith("pretrained")},
        num_classes=len(class_names),
        input=input,
        kernel=kernel or parameters["kernel"],
    )
    load_state(built, model_state(checkpoint, weights), argument="checkpoint", path=path, says=says(checkpoint))
    is_named = parameters["class_names"] is not None
    return LoadedModel(built.eval(), class_names, input, parameters["model_name"], is_named)


def class_names_of(checkpoint: Mapping[str, Any]) -> list[str]:
    """Names of a checkpoint's outputs, their numbers where it does not say; empty without a classifier."""
    names = checkpoint["hyper_parameters"]["class_names"]
    if names is not None:
        return list(names)
    return [str(number) for number in range(len(model_state(checkpoint).get("head.bias", ())))]
