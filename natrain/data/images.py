"""Where images come from: files in folders, or one array in memory."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message gives the decoder's reason."""


class Images(Protocol):
    """A set of labelled images.

    ``targets`` is an int64 array [N] of class indices. ``prepare`` is called once in the training process before
    workers start; ``load`` returns image ``index`` in PIL's ``mode`` and raises :class:`UnreadableImage`; ``name``
    says which image that is, for people.
    """

    targets: np.ndarray

    def prepare(self) -> None: ...

    def load(self, index: int, mode: str) -> Image.Image: ...

    def name(self, index: int) -> str: ...


@dataclass(frozen=True)
class Splits:
    """A data set as read from disk.

    Attributes:
        train, val: the images.
        class_names: ``class_names[target]`` names a target.
        small_side: side in pixels where all images are small squares, else None; small images are padded and cropped
            rather than zoomed into, which would leave too few pixels.
        hflip: the probability of a horizontal flip that suits the images.
    """

    train: Images
    val: Images
    class_names: list[str]
    small_side: int | None
    hflip: float


def convert_mode(image: Image.Image, mode: str) -> Image.Image:
    """``image`` in mode "RGB" or "L", whatever it was: palette, CMYK, alpha (dropped), 16-bit grey (scaled)."""
    if image.mode == mode:
        return image
    if image.mode.startswith("I"):
        # PIL clips 16-bit grey at 255 instead of scaling it: the image would turn white.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    return image.convert(mode)


def decode(file: str | Path | io.BytesIO, mode: str) -> Image.Image:
    """Read and convert one encoded image. EXIF orientation is not applied, as in timm and torchvision.

    Raises:
        UnreadableImage: whatever the reason.
    """
    try:
        with warnings.catch_warnings():
            # Odd EXIF blocks and transparent palettes are no news for a reader of millions of images.
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                image.load()
                return convert_mode(image, mode)
    except MemoryError:
        raise
    except Exception as error:  # PIL's plugins raise about every type on damaged data
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


class FileImages:
    """Images in files below one folder.

    Args:
        root: the folder.
        paths: relative to ``root``.
        targets: one class index per path.
    """

    def __init__(self, root: Path, paths: Sequence[str], targets: Sequence[int]) -> None:
        self.root = root
        # One array of bytes: a list of a million str is copied into every worker as reference counts touch its pages.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.targets = np.asarray(targets, dtype=np.int64)

    def prepare(self) -> None:
        pass

    def load(self, index: int, mode: str) -> Image.Image:
        return decode(self.name(index), mode)

    def path(self, index: int) -> str:
        """Relative to the folder."""
        return os.fsdecode(bytes(self._paths[index]))

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.path(index))


class ArrayImages:
    """Small images that fit in memory.

    Args:
        pixels: uint8 [N, H, W] (grey) or [N, H, W, 3].
        targets: int64 [N].
        origin: names the data set in messages.
    """

    def __init__(self, pixels: np.ndarray, targets: np.ndarray, origin: str) -> None:
        # A tensor travels to spawned workers through shared memory, an array as a copy.
        self._pixels = torch.from_numpy(np.ascontiguousarray(pixels))
        self.targets = np.asarray(targets, dtype=np.int64)
        self.origin = origin

    def prepare(self) -> None:
        pass

    def load(self, index: int, mode: str) -> Image.Image:
        return convert_mode(Image.fromarray(self._pixels[index].numpy()), mode)

    def name(self, index: int) -> str:
        return f"image {index} of {self.origin}"
