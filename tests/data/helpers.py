"""Small image folders and the settings that the data tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from natrain.data import ImageDataModule, build_datamodule

COLOUR = dict(
    img_size=(32, 32), in_chans=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25), crop_pct=0.875, interpolation="bicubic"
)
GREY = dict(img_size=(8, 8), in_chans=1, mean=(0.305,), std=(0.376,), crop_pct=1.0, interpolation="bicubic")
# Every random operation at once, so that a generator that is not seeded shows.
AUGMENT = dict(
    rand_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.4,
    hflip=0.5,
    scale=[0.2, 1.0],
    ratio=[0.75, 1.3333],
    train_interpolation="random",
    random_erasing=0.5,
)
PLAIN = dict(AUGMENT, rand_augment=None, color_jitter=None, hflip=0.0, scale=None, ratio=None, random_erasing=0.0)


def write_image(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    """A JPEG or PNG of noise over a gradient; ``size`` = (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 120, (size[1], size[0], 3))
    ramp = np.linspace(0, 120, size[0])[None, :, None]
    Image.fromarray((noise + ramp).astype(np.uint8)).save(path)
    return path


def write_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), train: int = 6, val: int = 3) -> Path:
    """``root/{train,val}/<class>/<number>.jpg``, every image another one."""
    seed = 0
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            for number in range(count):
                write_image(root / split / name / f"{number:03d}.jpg", seed, size=(33 + 3 * number, 30 + seed % 7))
                seed += 1
    return root


def truncate(path: Path) -> Path:
    """Cut a file in half, as a full disk or a broken download leaves it."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def build(
    name: str, root: Path | None = None, *, augment: dict[str, Any] = AUGMENT, **settings: Any
) -> ImageDataModule:
    """``build_datamodule`` with small defaults; data keys, ``input``, ``micro_batch``, ... can be overridden."""
    arguments = dict(input=GREY if name == "digits" else COLOUR, micro_batch=4, seed=7)
    arguments |= {key: settings.pop(key) for key in ("input", "micro_batch", "global_batch", "seed") if key in settings}
    data = dict(name=name, root=None if root is None else str(root), workers=0, bad_image_limit=0.001) | settings
    return build_datamodule(data, augment, **arguments)
