"""Classify images with a checkpoint. Class names and preprocessing come out of the checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from natrain.errors import invalid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoints/best.ckpt of a run folder")
    parser.add_argument("--topk", type=int, default=5, help="classes to show per image (default: 5)")


def run(arguments: argparse.Namespace) -> int:
    """Print the ``topk`` classes of every image; 1 where an image could not be read, which is said on stderr."""
    import torch

    from natrain.data import build_eval_transform
    from natrain.training import load_for_inference

    loaded = load_for_inference(arguments.checkpoint)
    if not 1 <= arguments.topk:
        raise invalid("--topk", arguments.topk, "a whole number >= 1", "--topk 5")
    topk = min(arguments.topk, len(loaded.class_names))
    transform = build_eval_transform(loaded.input)
    failed = False
    for path in arguments.images:
        try:
            image = transform(_open(path))
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


def _open(path: Path):
    """The decoded image.

    Raises:
        ValueError: a folder, no such file, or not an image that can be read to its end.
    """
    from PIL import Image, UnidentifiedImageError

    if path.is_dir():
        raise invalid("IMAGE", str(path), "a file; this is a folder", f"natrain predict {path}/*")
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except UnidentifiedImageError as error:
        raise invalid("IMAGE", str(path), "an image that Pillow can read", "a JPEG or PNG file") from error
    except OSError as error:
        raise invalid(
            "IMAGE", str(path), f"a file that can be read ({error.strerror or error})", "another file"
        ) from error
