"""Names: from the layouts of other code to natrain's own, which are those of the official repository, and back.

A state dict comes wrapped (``model``, ``state_dict``, averages), prefixed (``module.``, a Lightning attribute, a
detector's ``backbone.``) and perhaps in Hugging Face's naming. ``normalise`` undoes all three and loses nothing:
what does not belong to the backbone is returned beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natrain.errors import invalid

AVERAGES = ("ema_state_dict", "state_dict_ema", "model_ema")
WRAPPERS = ("state_dict", "model", "module")
WEIGHTS = ("best", "raw", "ema")
# The one module that every family and every layout has; what stands before it is the prefix.
ANCHOR = "patch_embed.norm.weight"
ANCHOR_HF = "embeddings.norm.weight"

# Hugging Face's names inside a block and around the blocks, and natrain's.
HF_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.self.rpb": "attn.rpb",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
HF_OUTSIDE = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.norm": "patch_embed.norm",
    "layernorm": "norm",
    "classifier": "head",
}
HF_QKV = ("query", "key", "value")


class Normalised(NamedTuple):
    """A state dict under natrain's names.

    Attributes:
        state: the backbone and, where there is one, the head.
        outside: entries that belong to neither, under their names in the file.
        steps: what was undone, for the report, for example ``"prefix module."``.
        is_hf: True where the names were Hugging Face's.
    """

    state: dict[str, Tensor]
    outside: dict[str, Any]
    steps: list[str]
    is_hf: bool


def normalise(checkpoint: Mapping[str, Any], weights: str, prefix: str | None, path: str) -> Normalised:
    """Undo wrapping, prefix and naming.

    Args:
        checkpoint: what a file held.
        weights: ``raw``, ``ema``, or ``best`` (averaged weights where there are some).
        prefix: the model's prefix, where several models are in the file; None finds it.
        path: the file, for errors.

    Raises:
        ValueError: no model of these families, several, or no averaged weights where they are asked for.
    """
    steps: list[str] = []
    flat = {str(name): value for name, value in _unwrap(checkpoint, weights, path, steps).items()}
    outside = {name: value for name, value in flat.items() if not isinstance(value, Tensor)}
    # torch.compile puts its name between any two others.
    state = {name.replace("_orig_mod.", ""): value for name, value in flat.items() if isinstance(value, Tensor)}
    if any("_orig_mod." in name for name in flat):
        steps.append("names of torch.compile")
    prefix, is_hf = _find_prefix(state, prefix, path)
    if prefix:
        steps.append(f"prefix {prefix}")
    inside = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    outside |= {name: value for name, value in state.items() if not name.startswith(prefix)}
    if is_hf:
        # The classifier stands beside the backbone, not in it.
        beside = re.sub(r"(dinat|nat)\.$", "", prefix)
        for part in ("weight", "bias"):
            if (name := f"{beside}classifier.{part}") in outside:
                inside[f"classifier.{part}"] = outside.pop(name)
        inside = from_hf(inside)
    return Normalised(inside, outside, steps, is_hf)


def _unwrap(checkpoint: Mapping[str, Any], weights: str, path: str, steps: list[str]) -> Mapping[str, Any]:
    if weights not in WEIGHTS:
        raise invalid("weights", weights, f"one of {', '.join(WEIGHTS)}", "weights=best")
    if weights == "best":
        # natrain's files say which of their weights scored higher; elsewhere averaged weights are kept as the better.
        evaluation = checkpoint.get("evaluation")
        said = evaluation.get("weights") if isinstance(evaluation, Mapping) else None
        weights = said if said in ("raw", "ema") else "any"
    has_average = False
    while True:
        keys = {"raw": WRAPPERS, "ema": AVERAGES, "any": AVERAGES + WRAPPERS}[weights]
        if has_average:
            keys = WRAPPERS
        # An empty one was never filled.
        found = next((key for key in keys if isinstance(checkpoint.get(key), Mapping) and checkpoint[key]), None)
        if found is None:
            break
        has_average |= found in AVERAGES
        steps.append(f"wrapper {found!r}")
        checkpoint = checkpoint[found]
    if weights == "ema" and not has_average:
        raise invalid("weights", "ema", f"raw: {path} holds no averaged weights", "weights=raw")
    return checkpoint


def _find_prefix(state: Mapping[str, Tensor], prefix: str | None, path: str) -> tuple[str, bool]:
    """The prefix of the model in ``state``, and whether its names are Hugging Face's."""
    found = {
        (name[: -len(anchor)], anchor == ANCHOR_HF)
        for anchor in (ANCHOR, ANCHOR_HF)
        for name in state
        if name == anchor or name.endswith(f".{anchor}")
    }
    if prefix is not None:
        found = {(start, is_hf) for start, is_hf in found if start == prefix}
    if not found:
        some = ", ".join(f"{name} {list(state[name].shape)}" for name in list(state)[:6]) or "nothing"
        where = f" under the prefix {prefix!r}" if prefix is not None else ""
        raise invalid(
            "checkpoint",
            path,
            f"weights of a NAT, DiNAT, DiNATs, isotropic or ViT-rpb model{where}; this file holds {some}"
            + (f" and {len(state) - 6} more" if len(state) > 6 else ""),
            "checkpoint=FILE of such a model (`natrain models` lists them)",
        )
    if len(found) > 1:
        prefixes = sorted(start for start, _ in found)
        raise invalid(
            "checkpoint", path, f"one model; this file holds several, under {prefixes}", f"--prefix {prefixes[0]!r}"
        )
    return next(iter(found))


def from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's Nat/Dinat names and shapes to natrain's; names it does not know stay as they are."""
    renamed: dict[str, Tensor] = {}
    projections: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"encoder\.levels\.(\d+)\.(.+)", name)
        block = match and re.fullmatch(r"layers\.(\d+)\.(.+)", match[2])
        if block:
            start = f"levels.{match[1]}.blocks.{block[1]}."
            qkv = re.fullmatch(r"attention\.self\.(query|key|value)\.(weight|bias)", block[2])
            if qkv:
                projections.setdefault(f"{start}attn.qkv.{qkv[2]}", {})[qkv[1]] = tensor
                # Reserves the place in the order of the file.
                renamed[f"{start}attn.qkv.{qkv[2]}"] = tensor
            elif block[2] == "layer_scale_parameters":
                renamed[f"{start}gamma1"], renamed[f"{start}gamma2"] = tensor.unbind()
            else:
                renamed[start + _swap(block[2], HF_BLOCK)] = tensor
        elif match:
            renamed[f"levels.{match[1]}.{match[2]}"] = tensor
        elif norm := re.fullmatch(r"hidden_states_norms\.stage(\d+)\.(.+)", name):
            renamed[f"norm{int(norm[1]) - 1}.{norm[2]}"] = tensor
        else:
            renamed[_swap(name, HF_OUTSIDE)] = tensor
    for name, parts in projections.items():
        if len(parts) == len(HF_QKV):
            renamed[name] = torch.cat([parts[key] for key in HF_QKV])
        else:
            # An incomplete projection keeps its parts' names, so that the error shows them.
            del renamed[name]
            renamed |= {name.replace("qkv", key): tensor for key, tensor in parts.items()}
    return renamed


def to_hf(state: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """The inverse of ``from_hf`` for a classifier: backbone under ``nat.`` or ``dinat.``, head as ``classifier``."""
    block_names = {ours: theirs for theirs, ours in HF_BLOCK.items()}
    outside_names = {ours: theirs for theirs, ours in HF_OUTSIDE.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"levels\.(\d+)\.(.+)", name)
        block = match and re.fullmatch(r"blocks\.(\d+)\.(.+)", match[2])
        if block:
            start = f"{model_type}.encoder.levels.{match[1]}.layers.{block[1]}."
            if qkv := re.fullmatch(r"attn\.qkv\.(weight|bias)", block[2]):
                for key, part in zip(HF_QKV, tensor.chunk(3), strict=True):
                    renamed[f"{start}attention.self.{key}.{qkv[1]}"] = part
            elif block[2] == "gamma1":
                other = state[name[: -len("gamma1")] + "gamma2"]
                renamed[f"{start}layer_scale_parameters"] = torch.stack([tensor, other])
            elif block[2] != "gamma2":
                renamed[start + _swap(block[2], block_names)] = tensor
        elif match:
            renamed[f"{model_type}.encoder.levels.{match[1]}.{match[2]}"] = tensor
        else:
            swapped = _swap(name, outside_names)
            renamed[swapped if swapped.startswith("classifier.") else f"{model_type}.{swapped}"] = tensor
    return renamed


def _swap(name: str, table: Mapping[str, str]) -> str:
    """``name`` with the start that ``table`` knows replaced."""
    for start, other in table.items():
        if name == start or name.startswith(f"{start}."):
            return other + name[len(start) :]
    return name
