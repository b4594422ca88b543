"""Turn a checkpoint of any origin into one safetensors file of natrain, with all that is known about it inside.

Read are the official files (.pth), Hugging Face's Nat and Dinat, timm and Lightning checkpoints, and natrain's own.
What does not belong to the model is listed, and kept in the file beside it.
  natrain import dinat_mini_in1k_224.pth --out dinat_mini.safetensors
  natrain import hf-hub:shi-labs/dinat-mini-in1k-224 --out dinat_mini.safetensors
  natrain import weights.pth --model dinat_base --classes names.txt --out mine.safetensors
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from natrain.errors import invalid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file, folder, https:// address or hf-hub:OWNER/NAME")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--model", help="the variant, where names and shapes leave a choice (`natrain models`)")
    parser.add_argument("--weights", default="best", help="best (default), raw or ema")
    parser.add_argument("--prefix", help="which of several models in the file, for example 'model.'")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="text file with one class name a line")
    parser.add_argument("--licence", help="licence of the weights, where the file does not say")


def run(arguments: argparse.Namespace) -> int:
    from natrain.models.weights import load_weights, save_weights

    weights = load_weights(
        arguments.checkpoint, model=arguments.model, weights=arguments.weights, prefix=arguments.prefix
    )
    if arguments.classes is not None:
        weights = replace(weights, class_names=_class_names(arguments.classes, weights.num_classes))
    if arguments.licence is not None:
        weights = replace(weights, licence=arguments.licence)
    save_weights(weights, arguments.out)
    print("\n".join(weights.report()))
    print(f"written: {arguments.out}")
    return 0


def _class_names(path: Path, count: int) -> list[str]:
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise invalid("--classes", str(path), "a text file with one class name a line", f"ls {path.parent}") from None
    if len(names) != count:
        raise invalid("--classes", str(path), f"{count} lines, one per class; it has {len(names)}", "another file")
    return names
