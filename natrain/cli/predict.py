"""Classify images with a checkpoint. Class names and preprocessing come out of the checkpoint.

Images are files, folders (searched to the bottom), or with `-` a list on standard input, one path a line:
  natrain predict cat.jpg dog.jpg --checkpoint runs/NAME/checkpoints/best.ckpt
  natrain predict DIR --checkpoint FILE --out predictions.csv
  find . -name '*.png' | natrain predict - --checkpoint FILE --format json
An image that cannot be read is said on standard error; the others are predicted, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from natrain.errors import invalid, nearest

if TYPE_CHECKING:
    from PIL import Image

    from natrain.training import LoadedModel

FORMATS = ("text", "csv", "json")


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first."""

    file: str
    classes: list[tuple[str, float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders, or - for a list on standard input")
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="checkpoints/best.ckpt of a run folder, any file, address or hf-hub:NAME that natrain imports",
    )
    parser.add_argument("--topk", type=int, default=5, help="classes to show per image (default: 5)")
    parser.add_argument("--batch", type=int, default=32, help="images per forward pass (default: 32)")
    parser.add_argument("--format", help="text, csv or json (default: what --out ends in, else text)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there, not to standard output")


def run(arguments: argparse.Namespace) -> int:
    """Print or write the ``topk`` classes of every image; 1 where an image could not be read."""
    for name in ("topk", "batch"):
        if getattr(arguments, name) < 1:
            raise invalid(f"--{name}", getattr(arguments, name), "a whole number >= 1", f"--{name} 5")
    form = _format(arguments)
    if arguments.out is not None and arguments.out.is_dir():
        fix = f"--out {arguments.out / 'predictions.csv'}"
        raise invalid("--out", str(arguments.out), "a file, not a folder", fix)

    from natrain.training import load_for_inference

    loaded = load_for_inference(arguments.checkpoint)
    problems: list[str] = []
    found = predict(loaded, image_files(arguments.images, problems), arguments.topk, arguments.batch, problems)
    text = _written(found, form, min(arguments.topk, len(loaded.class_names)))
    if arguments.out is None:
        for line in text:
            print(line, end="")
    else:
        from natrain.models.weights.files import write_atomically

        # A name of a file may be no UTF-8; it goes out as it came in.
        encoded = (line.encode(errors="surrogateescape") for line in text)
        write_atomically(arguments.out, lambda file: file.writelines(encoded), "--out")
    return int(bool(problems))


def _format(arguments: argparse.Namespace) -> str:
    suffix = arguments.out.suffix.lstrip(".") if arguments.out is not None else ""
    form = arguments.format or (suffix if suffix in FORMATS else "text")
    if form not in FORMATS:
        best = nearest(form, FORMATS) or "csv"
        raise invalid("--format", form, f"one of {', '.join(FORMATS)}", f"--format {best}")
    return form


def image_files(words: Iterable[str], problems: list[str]) -> Iterator[Path]:
    """The files that ``words`` name, folders and lists expanded, each folder in sorted order."""
    from natrain.data.imagefolder import image_paths

    for word in words:
        if word == "-":
            yield from image_files((line.rstrip("\n") for line in sys.stdin if line.strip()), problems)
            continue
        path = Path(word)
        if not path.is_dir():
            yield path
            continue
        inside = sorted(image_paths(path, recursive=True))
        if not inside:
            _complain(invalid("IMAGE", word, "a folder with images; there are none in it", f"ls {word}"), problems)
        yield from (path / name for name in inside)


def predict(
    loaded: LoadedModel, paths: Iterable[Path], topk: int, batch: int, problems: list[str]
) -> Iterator[Prediction]:
    """Predictions in the order of ``paths``; what cannot be read is said, added to ``problems`` and left out."""
    import torch

    from natrain.data import build_eval_transform

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, transform = loaded.model.to(device), build_eval_transform(loaded.input)
    images = _readable(paths, problems)
    while chunk := list(islice(images, batch)):
        pixels = torch.stack([transform(image) for _, image in chunk]).to(device)
        with torch.inference_mode():
            probabilities = model(pixels).float().softmax(-1).cpu()
        best = probabilities.topk(min(topk, len(loaded.class_names)), dim=-1)
        for (path, _), values, indices in zip(chunk, best.values.tolist(), best.indices.tolist(), strict=True):
            names = [loaded.class_names[index] for index in indices]
            yield Prediction(str(path), list(zip(names, values, strict=True)))


def _readable(paths: Iterable[Path], problems: list[str]) -> Iterator[tuple[Path, Image.Image]]:
    for path in paths:
        try:
            yield path, read_image(path)
        except ValueError as error:
            _complain(error, problems)


def _complain(error: ValueError, problems: list[str]) -> None:
    problems.append(str(error))
    print(f"natrain: error: {error}", file=sys.stderr)


def _written(found: Iterable[Prediction], form: str, topk: int) -> Iterator[str]:
    """The predictions as text, csv or json, in pieces that are ready to be written."""
    if form == "json":
        rows = [
            {"file": one.file, "classes": [{"name": name, "probability": share} for name, share in one.classes]}
            for one in found
        ]
        yield json.dumps(rows, indent=1) + "\n"
        return
    if form == "csv":
        yield _csv_line(["file", *(f"{column}{rank}" for rank in range(1, topk + 1) for column in ("class", "prob"))])
    for one in found:
        if form == "csv":
            yield _csv_line([one.file, *(cell for name, share in one.classes for cell in (name, f"{share:.6f}"))])
        else:
            lines = [one.file, *(f"  {100 * share:6.2f} %  {name}" for name, share in one.classes)]
            yield "\n".join(lines) + "\n"


def _csv_line(cells: list[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def read_image(path: Path) -> Image.Image:
    """The decoded image.

    Raises:
        ValueError: no such file, or not an image that can be read to its end.
    """
    from natrain.data.images import UnreadableImage, decode

    if not path.is_file():
        raise invalid("IMAGE", str(path), "a file; there is none", f"ls {path.parent}")
    try:
        return decode(path, "RGB")
    except UnreadableImage as error:
        raise invalid(
            "IMAGE", str(path), f"an image that Pillow can read ({error})", "a whole JPEG or PNG file"
        ) from error
