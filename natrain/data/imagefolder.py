"""Images in class folders, ``root/{train,val}/<class>/*`` or ``root/<class>/*``, and ImageNet as it is downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from natrain.data.imagenet import read_flat_val
from natrain.data.images import FileImages, Splits
from natrain.data.labels import read_labelled
from natrain.data.split import split_indices
from natrain.errors import invalid

LAYOUT = "a folder that holds train/<class>/*.jpg and val/<class>/*.jpg, or <class>/*.jpg"
_SHOWN = 5


def read_imagefolder(
    root: str | None, labels: str | None = None, val_share: float = 0.1, split_seed: int = 0
) -> Splits:
    """List the images; none is opened. Classes are numbered in the sorted order of their folders.

    Files that are no images by their extension are passed over, and so are hidden files and folders. Where there is no
    val/, a seeded share of each class validates (``natrain.data.split``).

    Args:
        root: the folder.
        labels: a table of files and labels (``natrain.data.labels``) in place of class folders.
        val_share, split_seed: of the split that the data does not bring.

    Raises:
        ValueError: a missing folder, an empty class folder, other classes in val than in train.
    """
    if root is None:
        raise invalid("data.root", root, LAYOUT, "data.root=DIR")
    folder = Path(root).expanduser()
    if labels is not None:
        return read_labelled(folder, Path(labels).expanduser(), val_share, split_seed)
    if not (folder / "train").is_dir():
        if not (folder / "val").is_dir() and any(any(image_paths(child)) for child in _folders(folder)):
            return _split_folder(folder, folder, val_share, split_seed)
        nested = next((child for child in _folders(folder) if (child / "train").is_dir()), None)
        raise invalid("data.root", root, LAYOUT, f"data.root={nested or 'DIR'}")
    if not (folder / "val").is_dir():
        return _split_folder(folder, folder / "train", val_share, split_seed)
    class_names = [child.name for child in _folders(folder / "train")]
    if not class_names:
        raise invalid("data.root", root, f"{LAYOUT}; train/ holds no class folders", "one folder per class in train/")
    train = _read_classes(folder / "train", class_names)
    val_folders = [child.name for child in _folders(folder / "val")]
    if val_folders:
        check_same_classes(class_names, val_folders, folder)
        val = _read_classes(folder / "val", class_names)
    else:
        paths, val_classes = read_flat_val(folder, list(image_paths(folder / "val")))
        check_same_classes(class_names, val_classes, folder)
        number = {name: target for target, name in enumerate(class_names)}
        val = FileImages(folder / "val", paths, [number[name] for name in val_classes])
    return Splits(train=train, val=val, class_names=class_names, small_side=None, hflip=0.5)


def _split_folder(root: Path, folder: Path, val_share: float, split_seed: int) -> Splits:
    """All images are below ``folder``, one folder a class; a share of each class validates."""
    class_names = [child.name for child in _folders(folder)]
    if not class_names:
        raise invalid("data.root", str(root), f"{LAYOUT}; {folder} holds no class folders", "one folder per class")
    images = _read_classes(folder, class_names)
    chosen = split_indices(images.targets, class_names, val_share, split_seed, root)
    train, val = (
        FileImages(folder, [images.path(index) for index in indices], images.targets[indices]) for indices in chosen
    )
    return Splits(train=train, val=val, class_names=class_names, small_side=None, hflip=0.5)


def check_same_classes(train: Iterable[str], val: Iterable[str], root: Path) -> None:
    """Raise one error that lists what is missing on either side."""
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    if only_train or only_val:
        parts = [
            f"{len(names)} only in {split}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
            for split, names in (("train", only_train), ("val", only_val))
            if names
        ]
        raise invalid(
            "data.root", str(root), f"the same classes in train and val, but {'; '.join(parts)}", "add or remove them"
        )


def _read_classes(split: Path, class_names: list[str]) -> FileImages:
    paths: list[str] = []
    targets: list[int] = []
    empty: list[str] = []
    for target, name in enumerate(class_names):
        found = sorted(os.path.join(name, path) for path in image_paths(split / name, recursive=True))
        if not found:
            empty.append(name)
        paths += found
        targets += [target] * len(found)
    if empty:
        listed = ", ".join(empty[:_SHOWN]) + (", ..." if len(empty) > _SHOWN else "")
        raise invalid(
            "data.root",
            str(split),
            f"an image ({' '.join(IMG_EXTENSIONS)}) in every class folder; {len(empty)} without: {listed}",
            f"rmdir {split / empty[0]} or fill it",
        )
    return FileImages(split, paths, targets)


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def image_paths(folder: Path, recursive: bool = False) -> Iterator[str]:
    """Paths relative to ``folder``; hidden files (macOS writes ``._name.jpg`` beside ``name.jpg``) are no images."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        inside = os.path.relpath(parent, folder)
        for name in files:
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith("."):
                yield name if inside == "." else os.path.join(inside, name)
