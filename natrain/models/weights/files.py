"""Reading and writing of single files: no code runs from a file, no half-written file keeps a final name."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from natrain.errors import invalid

# Indices of sharded weights, then weights, in the order in which a folder is searched.
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", *INDICES)


def write_atomically(path: Path, write: Callable[[BinaryIO], Any], argument: str | None = None) -> None:
    """Call ``write(file)`` on a temporary file beside ``path``, flush it to disk, then give it its name.

    Args:
        argument: the option that named ``path``, where one did.

    Raises:
        ValueError: ``argument`` names a file that cannot be written; without it, the OSError itself.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if argument is None:
            raise
        allowed = f"a file that can be written ({error.strerror or error})"
        raise invalid(argument, str(path), allowed, f"{argument} in a folder of your own") from error


def write_safetensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and string metadata as one safetensors file, the ``--out`` of a command."""
    tensors, storages = {}, set()
    for name, tensor in state.items():
        tensors[name] = tensor.detach().contiguous()
        # The format refuses tensors that share memory, as the heads of a detector may: each gets its own.
        storage = tensors[name].untyped_storage().data_ptr()
        if storage in storages:
            tensors[name] = tensors[name].clone()
        storages.add(storage)
    content = safetensors.torch.save(tensors, metadata={"format": "pt", **metadata})
    write_atomically(path, lambda file: file.write(content), "--out")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON into the ``--out`` of a command."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()), "--out")


def read_json(path: Path, argument: str) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        ValueError: not JSON, or no mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise invalid(argument, str(path), f"a JSON file that can be read ({error})", f"{argument}=FILE") from None
    if not isinstance(content, dict):
        raise invalid(argument, str(path), "a JSON file that holds a mapping", f"{argument}=FILE")
    return content


def read_checkpoint(path: str | Path, argument: str = "checkpoint") -> dict[str, Any]:
    """Load a checkpoint onto the CPU: tensors and plain values, never code.

    Args:
        path: a file of this package, of PyTorch, or a ``.safetensors`` file of weights; its tensors are then under
            ``state_dict`` and its string metadata under ``metadata``.
        argument: the setting that named the file, for the error.

    Raises:
        ValueError: no such file, not a checkpoint, cut off, or a pickle that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise invalid(argument, str(path), "an existing checkpoint file", f"{argument}=runs/NAME/checkpoints/best.ckpt")
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                return {"state_dict": state, "metadata": dict(file.metadata() or {})}
        loaded = _unpickle(path)
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


def _unpickle(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about versions of pickle; what matters raises
        # Training scripts of timm's kind store their arguments as a Namespace: attributes, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)


def read_folder(folder: Path, argument: str = "checkpoint") -> dict[str, Any]:
    """The checkpoint in a folder as Hugging Face writes it: one file of weights or an index of several.

    Raises:
        ValueError: no weights in it; an index that names a missing file, or one outside the folder.
    """
    found = next((folder / name for name in FOLDER_FILES if (folder / name).is_file()), None)
    if found is None:
        raise invalid(argument, str(folder), f"a folder with {' or '.join(FOLDER_FILES)}", f"{argument}=FILE")
    if found.name not in INDICES:
        return read_checkpoint(found, argument)
    names = sorted(set(read_json(found, argument).get("weight_map", {}).values()))
    strange = [name for name in names if Path(name).name != name]
    if not names or strange:
        raise invalid(argument, str(found), "an index that names files beside it", f"{argument}=FILE")
    state: dict[str, Tensor] = {}
    for name in names:
        part = read_checkpoint(folder / name, argument)
        state |= part.get("state_dict", part)
    return {"state_dict": state}
