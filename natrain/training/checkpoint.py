"""Checkpoint files: written in one step, read without running code, checked against the model."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from natrain.errors import invalid

SHOWN = 6  # names of one kind that an error lists before "and N more"
PREFIX = "model."  # what the training task puts before the model's own names


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's reader and writer with two promises: no half-written file under a final name, no code from a file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: Any = None) -> dict[str, Any]:
        return read_checkpoint(path)


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write(file)`` on a temporary file beside ``path``, flush it to disk, then give it its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | Path, argument: str = "checkpoint") -> dict[str, Any]:
    """Load a checkpoint onto the CPU with ``weights_only``: tensors and plain values, never code.

    Args:
        path: a file of this package, of PyTorch, or a ``.safetensors`` file of weights.
        argument: the setting that named the file, for the error.

    Raises:
        ValueError: no such file, not a checkpoint, cut off, or a pickle that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise invalid(argument, str(path), "an existing checkpoint file", f"{argument}=runs/NAME/checkpoints/best.ckpt")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return {"state_dict": load_file(path)}
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise invalid(
            argument,
            str(path),
            f"a file of tensors and plain values; loading this one would run code it holds ({reason[:160]})",
            f"{argument}=FILE that natrain, or torch.save of a state_dict, wrote",
        ) from None
    except Exception as error:  # torch, zipfile and safetensors each raise their own for a damaged file
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
        raise invalid(
            argument, str(path), f"a whole checkpoint; this file cannot be read ({reason})", f"{argument}=FILE"
        ) from None
    if not isinstance(loaded, dict):
        raise invalid(
            argument, str(path), f"a checkpoint; this file holds a {type(loaded).__name__}", f"{argument}=FILE"
        )
    return loaded


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
    return f"{parameters['model_name']} ({len(parameters['class_names'])} classes{'; ' + listed if listed else ''})"


@dataclass(frozen=True)
class LoadedModel:
    """A trained model ready to predict.

    Attributes:
        model: in evaluation mode, on the CPU.
        class_names: one per output.
        input: img_size, in_chans, mean, std, crop_pct, interpolation of its images.
        model_name: the name it is registered under.
    """

    model: nn.Module
    class_names: list[str]
    input: dict[str, Any]
    model_name: str


def load_for_inference(
    path: str | Path,
    weights: str = "best",
    kernel: str | list[str] | None = None,
    input_changes: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Rebuild the model of a checkpoint of this package, with its weights, class names and preprocessing.

    Args:
        path: ``run_dir/checkpoints/best.ckpt`` or ``last.ckpt``.
        weights: ``best`` (the default: whichever of raw and averaged scored higher), ``raw`` or ``ema``.
        kernel: another attention kernel than the one it was trained with.
        input_changes: entries of ``input`` to use instead of the checkpoint's, for example ``img_size``.

    Raises:
        ValueError: not a checkpoint of this package, or one that does not fit its model.
    """
    from natrain.training.build import build_model

    checkpoint = read_checkpoint(path)
    parameters = checkpoint.get("hyper_parameters", {})
    if "model_name" not in parameters:
        raise invalid(
            "checkpoint",
            str(path),
            "a checkpoint that natrain wrote (this one names no model and no classes)",
            "checkpoint=runs/NAME/checkpoints/best.ckpt",
        )
    input = {**parameters["input"], **(input_changes or {})}
    model = build_model(
        parameters["model_name"],
        {key: value for key, value in parameters["model_args"].items() if not key.startswith("pretrained")},
        num_classes=len(parameters["class_names"]),
        input=input,
        kernel=kernel or parameters["kernel"],
    )
    load_state(model, model_state(checkpoint, weights), argument="checkpoint", path=path, says=says(checkpoint))
    return LoadedModel(model.eval(), list(parameters["class_names"]), input, parameters["model_name"])
