"""Classify images with a checkpoint. Class names and preprocessing come out of the checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from natrain.errors import invalid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="checkpoints/best.ckpt of a run folder, any file, address or hf-hub:NAME that natrain imports",
    )
    parser.add_argument("--topk", type=int, default=5, help="classes to show per image (default: 5)")


def run(arguments: argparse.Namespace) -> int:
    """Print the ``topk`` classes of every image; 1 where an image could not be read, which is said on stderr."""
    import torch

    from natrain.data import build_eval_transform
    from natrain.training import load_for_inference

    if arguments.topk < 1:
        raise invalid("--topk", arguments.topk, "a whole number >= 1", "--topk 5")
    loaded = load_for_inference(arguments.checkpoint)
    topk = min(arguments.topk, len(loaded.class_names))
    transform = build_eval_transform(loaded.input)
    failed = False
    for path in arguments.images:
        try:
            image = transform(_read(path))
        except ValueError as error:
            print(f"natrain: error: {error}", file=sys.stderr)
            failed = True
            continue
        with torch.inference_mode():
            probabilities = loaded.model(image[None]).softmax(-1)[0]
        print(path)
        for probability, index in zip(*probabilities.topk(topk), strict=True):
            print(f"  {100 * probability.item():6.2f} %  {loaded.class_names[index]}")
    return int(failed)


def _read(path: Path):
    """The decoded image.

    Raises:
        ValueError: a folder, no such file, or not an image that can be read to its end.
    """
    from natrain.data.images import UnreadableImage, decode

    if path.is_dir():
        raise invalid("IMAGE", str(path), "a file; this is a folder", f"natrain predict {path}/*.jpg")
    if not path.is_file():
        raise invalid("IMAGE", str(path), "a file; there is none", f"ls {path.parent}")
    try:
        return decode(path, "RGB")
    except UnreadableImage as error:
        raise invalid(
            "IMAGE", str(path), f"an image that Pillow can read ({error})", "a whole JPEG or PNG file"
        ) from error
