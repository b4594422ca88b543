"""One door for every checkpoint: a path, an address or a name on the hub in, weights and all that is known out."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
from timm.models import adapt_input_conv
from torch import Tensor, nn

from natrain.errors import invalid
from natrain.models.registry import default_input
from natrain.models.weights.describe import METADATA, describe
from natrain.models.weights.fetch import locate
from natrain.models.weights.files import read_checkpoint, read_folder, write_safetensors
from natrain.models.weights.layouts import normalise
from natrain.models.weights.recognise import check_variant, has_plan, recognise, shapes_in, shapes_with, windows_of

logger = logging.getLogger("natrain.models")


@dataclass(frozen=True)
class Weights:
    """A checkpoint of a natrain model, whatever it was read from.

    Attributes:
        state: tensors under the names of ``model_name``'s own state dict.
        model_name: a registered variant.
        model_args: keyword arguments that the weights need (kernel_size, dilations, num_classes, ...).
        class_names: one per output; None where the file does not say.
        input: img_size ``[height, width]``, in_chans, mean, std, crop_pct, interpolation of its images.
        licence: of the weights; None where the file does not say.
        source: what the user named.
        layout: official, hf, timm, lightning or natrain.
        beside: tensors of the file that are not the model's (norms of a detector, other networks), by their names;
            ``beside.`` stands before one that would pass for the model's.
        not_tensors: names of what else stood among the tensors.
        missing: names of the model that the file lacks (a backbone's head and norm).
        steps: what was undone to get at the names.
    """

    state: dict[str, Tensor]
    model_name: str
    model_args: dict[str, Any]
    class_names: list[str] | None
    input: dict[str, Any]
    licence: str | None
    source: str
    layout: str
    beside: dict[str, Tensor] = field(default_factory=dict)
    not_tensors: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        return self.state["head.weight"].shape[0] if "head.weight" in self.state else 0

    def description(self) -> dict[str, Any]:
        """What travels with the tensors, as plain values."""
        return {
            "model_name": self.model_name,
            "model_args": self.model_args,
            "class_names": self.class_names,
            "input": self.input,
            "licence": self.licence,
            "source": self.source,
        }

    def report(self) -> list[str]:
        """Lines that say what was found, undone, kept aside and missing."""
        args = ", ".join(f"{key}={value}" for key, value in self.model_args.items())
        lines = [
            f"{self.model_name}{f' ({args})' if args else ''}, layout {self.layout}"
            + (f": {', '.join(self.steps)}" if self.steps else ""),
            f"{len(self.state)} tensors, {self.num_classes} classes"
            + ("" if self.class_names else " (without names)")
            + f", images of {'x'.join(map(str, self.input['img_size']))}, licence {self.licence or 'unknown'}",
        ]
        if self.missing:
            lines.append(f"not in the file: {', '.join(self.missing)}")
        lines += [f"not in the model, kept aside: {name} {list(t.shape)}" for name, t in self.beside.items()]
        lines += [f"not in the model, no tensor: {name}" for name in self.not_tensors]
        return lines

    def say_unused(self, names: Sequence[str] = ()) -> None:
        """Log what of the file a model does not use: its tensors ``names``, those beside it, and what is no tensor."""
        unused = [f"{name} {list(self.state[name].shape)}" for name in names]
        unused += [f"{name} {list(tensor.shape)}" for name, tensor in self.beside.items()] + self.not_tensors
        if unused:
            logger.warning("%s: not in the model, left out: %s", self.source, ", ".join(unused))

    def create_model(self, **changes: Any) -> nn.Module:
        """The model with these weights, in evaluation mode; ``changes`` are arguments to use instead.

        A model whose file has no final norm gets one that scales by one: it keeps its start.
        """
        size = {} if self.model_name.startswith("vitrpb") else {"img_size": tuple(self.input["img_size"])}
        arguments = {"num_classes": self.num_classes, "in_chans": self.input["in_chans"], **size, **self.model_args}
        model = timm.create_model(self.model_name, **{**arguments, **changes})
        load_into(model, self)
        model.pretrained_cfg.update(self.pretrained_cfg())
        return model.eval()

    def pretrained_cfg(self) -> dict[str, Any]:
        """Preprocessing, classes and licence under timm's names."""
        cfg = {key: tuple(self.input[key]) for key in ("mean", "std")}
        cfg |= {key: self.input[key] for key in ("crop_pct", "interpolation")}
        cfg |= {"input_size": (self.input["in_chans"], *self.input["img_size"]), "num_classes": self.num_classes}
        cfg |= {"label_names": tuple(self.class_names)} if self.class_names else {}
        return cfg | ({"license": self.licence} if self.licence else {})


def load_weights(
    source: str | Path,
    model: str | None = None,
    weights: str = "best",
    prefix: str | None = None,
    like: nn.Module | None = None,
    argument: str = "checkpoint",
) -> Weights:
    """Read any checkpoint of these families.

    Args:
        source: a file or folder, an ``https://`` address, or ``hf-hub:OWNER/NAME``. Official ``.pth`` (in any wrapper,
            with any prefix), Hugging Face Nat and Dinat, timm and Lightning checkpoints, natrain's own.
        model: the variant, where the caller knows it; checked against names and shapes. NAT and DiNAT of one size have
            the same tensors: without ``model`` the file's metadata or its name must tell.
        weights: ``raw``, ``ema``, or ``best``: natrain's files say which; of others, averaged weights where there are.
        prefix: which of several models in the file.
        like: the model that the weights are for, where its arguments may not be the variant's.
        argument: the setting that named the source, for errors.

    Raises:
        ValueError: no such source, a damaged or foreign file, code in it, another variant; tensors that do not fit are
            listed by name and shape.
    """
    path = locate(source, argument)
    checkpoint = read_folder(path, argument) if path.is_dir() else read_checkpoint(path, argument)
    told = describe(checkpoint, path, str(source))
    found = normalise(checkpoint, weights, prefix, str(source))
    if found.is_hf:
        told.layout = "hf"
    if model is not None and (told.model_name or told.hint) not in (None, model.split(".")[0]):
        # Arguments of the variant that the file names are not those of the caller's.
        told = replace(told, model_args={})
    name, own = model or told.model_name, None
    if name is not None:
        name = check_variant(name)
    if like is not None:
        refuse_pos_conversion(stored_pos(found.state, told.model_args), like.pos, str(source))
        own = shapes_in(like)
    elif name is not None and told.model_args:
        own = shapes_with(name, told.model_args)
    fit = recognise(found.state, str(source), name, told.hint, own)
    args = {**told.model_args, **fit.args}
    beside = {name: found.state.pop(name) for name in fit.extra}
    roots = {name.split(".")[0] for name in found.state} | {"head", "norm"}
    for name, value in found.outside.items():
        if isinstance(value, Tensor):
            # A head beside the network is not the network's: under its own name it would be, once saved.
            beside[f"beside.{name}" if name.split(".")[0] in roots else name] = value
    input = {**default_input(fit.variant), **told.input}
    if "in_chans" in args:
        input["in_chans"] = args.pop("in_chans")
    if "img_size" in args:
        input["img_size"] = list(args["img_size"])
    names = told.class_names
    if names is not None and len(names) != fit.args.get("num_classes", len(names)):
        names = None
    args.pop("num_classes", None)
    if "dilations" in args and has_plan(fit.variant, args):
        del args["dilations"]
    return Weights(
        state=found.state,
        model_name=fit.variant,
        model_args=args,
        class_names=names,
        input=input,
        licence=told.licence,
        source=str(source),
        layout=told.layout,
        beside=beside,
        not_tensors=[name for name, value in found.outside.items() if not isinstance(value, Tensor)],
        missing=[name for name in fit.missing if not name.endswith("relative_position_index")],
        steps=found.steps,
    )


def save_weights(weights: Weights, path: Path) -> None:
    """Write one safetensors file that ``load_weights`` reads back with everything it says, and what was kept aside."""
    if path.suffix != ".safetensors":
        raise invalid(
            "--out", str(path), "a file that ends in .safetensors", f"--out {path.with_suffix('.safetensors')}"
        )
    clash = sorted(set(weights.beside) & set(weights.state))
    assert not clash, clash
    write_safetensors(
        path, {**weights.state, **weights.beside}, {METADATA: json.dumps(weights.description(), default=list)}
    )


def load_into(model: nn.Module, weights: Weights, argument: str = "checkpoint") -> list[str]:
    """Copy ``weights`` into a model of their variant.

    The classifier may have another number of classes and the first convolution other channels (timm's rule converts
    it: grey is the sum of the colours); nothing else may differ.

    Returns:
        The names that keep their start: those the file lacks, and a classifier of another size.

    Raises:
        ValueError: another kernel size or shape; all that differs is listed.
    """
    refuse_pos_conversion(stored_pos(weights.state, weights.model_args), model.pos, weights.source)
    own = model.state_dict()
    state = {name: tensor for name, tensor in weights.state.items() if name in own}
    dropped = [name for name in weights.state if name not in own and not name.startswith(("head.", "norm."))]
    fresh = [name for name in own if name not in state and not name.endswith("relative_position_index")]
    for name in ("head.weight", "head.bias"):
        if name in state and state[name].shape != own[name].shape:
            fresh.append(name)
            del state[name]
    stem = next(name for name in own if name.startswith("patch_embed.proj") and name.endswith("weight"))
    if state[stem].shape[1] != own[stem].shape[1]:
        state[stem] = adapt_input_conv(own[stem].shape[1], state[stem], base_chans=state[stem].shape[1])
    _check(own, state, dropped, weights, argument)
    model.load_state_dict(state, strict=False)
    weights.say_unused([name for name in weights.state if name not in own])
    return fresh


def stored_pos(state: Mapping[str, Tensor], args: Mapping[str, Any]) -> str | None:
    """How the attention of these weights knows positions (``natrain.layers.position``); None where nothing tells."""
    return args.get("pos", "rpb" if any(name.endswith(".rpb") for name in state) else None)


def refuse_pos_conversion(stored: str | None, wanted: str, source: str) -> None:
    """Raise ValueError unless weights trained with positions ``stored`` (None: unknown) go into such a model.

    The tensors of ``rope`` and ``none`` have the same names and shapes, so that nothing else would notice.
    """
    if stored in (None, wanted):
        return
    reasons = {
        "rpb": "a learned bias per offset is no rotation of q and k, and without it every attention map is another",
        "rope": "q and k were trained to be rotated, and no table of biases gives the same scores",
        "none": "they were trained to attend without positions",
    }
    raise invalid("model.args.pos", wanted, f"{stored}, as in {source}: {reasons[stored]}", f"model.args.pos={stored}")


def _check(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], dropped: list[str], weights: Weights, argument: str
) -> None:
    wrong = [
        f"{name} is {list(tensor.shape)}, the model has {list(own[name].shape)}"
        for name, tensor in state.items()
        if tensor.shape != own[name].shape
    ] + [f"{name} is not in the model" for name in dropped]
    if not wrong:
        return
    more = f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""
    raise invalid(
        argument,
        weights.source,
        f"weights of the model's own shapes ({weights.model_name}): {'; '.join(wrong[:6])}{more}",
        _fix(own, weights, wrong, argument),
    )


def _fix(own: Mapping[str, Tensor], weights: Weights, wrong: list[str], argument: str) -> str:
    """What to type where only the windows differ: surgery, or the file's own windows."""
    if not all(line.split()[0].endswith((".rpb", ".relative_position_index")) for line in wrong):
        return f"another {argument}, or the model.args that the file was trained with"
    given = windows_of(weights.state)
    if any(name.endswith(".relative_position_index") for name in own):
        return f"model.args.img_size={[16 * side for side in given[0]]}"
    wanted, had = ([height for height, _ in sizes] for sizes in (windows_of(own), given))
    wanted, had = (sizes[0] if len(set(sizes)) == 1 else str(sizes).replace(" ", "") for sizes in (wanted, had))
    return (
        f"natrain surgery {weights.source} OUT.safetensors kernel_size={wanted}, or model.args.kernel_size={had} "
        "for the file's own windows"
    )
