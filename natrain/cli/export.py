"""Write a trained model for other programs: a file that runs elsewhere, or weights in the layout of other code.

Files that run elsewhere are checked against the model before they get their name.
  natrain export --checkpoint runs/NAME/checkpoints/best.ckpt --to onnx --out model.onnx
  natrain export --checkpoint model.safetensors --to torch-export --decompose --out model.pt2
  natrain export --checkpoint model.safetensors --to hf --out FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

from natrain.errors import invalid, nearest

DEFAULTS = {"precision": "fp32", "device": "cpu", "decompose": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="of natrain, or of any code it imports")
    parser.add_argument("--to", required=True, help="onnx, torch-export, aoti; weights only: hf, official, timm")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="what to write")
    parser.add_argument("--precision", default="fp32", help="fp32 (default), fp16; bf16 for torch; int8 for onnx")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda: where torch-export and aoti will run")
    parser.add_argument("--decompose", action="store_true", help="torch-export that needs no natrain to run")
    parser.add_argument("--model", help="the variant, where the file leaves a choice (`natrain models`)")
    parser.add_argument("--weights", default="best", help="best (default), raw or ema")


def run(arguments: argparse.Namespace) -> int:
    """Export, then say what was written and how far it is from the model."""
    from natrain.export import TARGETS
    from natrain.models.weights import EXPORTS, export_weights, load_weights

    choices = [*TARGETS, *EXPORTS]
    if arguments.to not in choices:
        best = nearest(arguments.to, choices) or "onnx"
        raise invalid("--to", arguments.to, f"one of {', '.join(choices)}", f"--to {best}")
    weights = load_weights(arguments.checkpoint, model=arguments.model, weights=arguments.weights)
    if arguments.to in TARGETS:
        difference = _export_program(weights, arguments)
        print(f"written: {arguments.out}\nlargest difference from the model in float32: {difference:.2g}")
        return 0
    for name, default in DEFAULTS.items():
        if getattr(arguments, name) != default:
            value = getattr(arguments, name)
            raise invalid(f"--{name}", value, f"an option of {', '.join(TARGETS)}", f"without --{name}")
    for path in export_weights(weights, arguments.to, arguments.out):
        print(f"written: {path}")
    return 0


def _export_program(weights, arguments: argparse.Namespace) -> float:
    import timm

    from natrain.export import export
    from natrain.models.weights import load_into

    if not weights.num_classes:
        raise invalid("--checkpoint", arguments.checkpoint, "a classifier; this file has no head", "--to timm")
    model_args = {**weights.model_args, "num_classes": weights.num_classes, "in_chans": weights.input["in_chans"]}
    model = timm.create_model(weights.model_name, **{**model_args, "img_size": tuple(weights.input["img_size"])})
    load_into(model, weights, "--checkpoint")
    return export(
        model,
        weights.input,
        arguments.to,
        arguments.out,
        precision=arguments.precision,
        device=arguments.device,
        decompose=arguments.decompose,
        description=weights.description(),
    )
