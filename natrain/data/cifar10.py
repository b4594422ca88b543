"""CIFAR-10 (A. Krizhevsky, 2009): 50,000 training and 10,000 test images of 32x32 in 10 classes.

Two layouts are read: Hugging Face's parquet files and the pickled batches of cifar-10-python.tar.gz that torchvision
uses. The pickles are read without running any code they might hold.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
from PIL import Image

from natrain.data.images import ArrayImages, Splits, UnreadableImage, decode
from natrain.errors import invalid

CLASS_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SIDE = 32
BATCH_FOLDER = "cifar-10-batches-py"
LAYOUTS = f"a folder with train*.parquet and test*.parquet, or with {BATCH_FOLDER}/data_batch_1 ... test_batch"


def read_cifar10(root: str | None) -> Splits:
    """Find either layout below ``root``. Parquet files are decoded when the images are first needed.

    Raises:
        ValueError: no such folder or files, an unexpected table, an unreadable image, a pickle that would run code.
    """
    if root is None:
        raise invalid("data.root", root, LAYOUTS, "data.root=DIR")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise invalid("data.root", root, f"an existing folder: {LAYOUTS}", "data.root=DIR")
    batches = folder if folder.name == BATCH_FOLDER else folder / BATCH_FOLDER
    train_files, test_files = sorted(folder.rglob("train*.parquet")), sorted(folder.rglob("test*.parquet"))
    if batches.is_dir():
        train = read_batches([batches / f"data_batch_{i}" for i in range(1, 6)])
        test = read_batches([batches / "test_batch"])
    elif train_files and test_files:
        train, test = ParquetImages(train_files), ParquetImages(test_files)
    else:
        archive = folder / "cifar-10-python.tar.gz"
        fix = f"tar -xzf {archive} -C {folder}" if archive.is_file() else "data.root=DIR"
        raise invalid("data.root", root, LAYOUTS, fix)
    return Splits(train=train, val=test, class_names=CLASS_NAMES, small_side=SIDE, hflip=0.5)


class ParquetImages:
    """One split in the Hugging Face layout: a column ``image`` (or ``img``) = struct {bytes, path}, a column ``label``.

    All images are decoded by ``prepare`` into one uint8 array [N, 32, 32, 3] (150 MB for 50,000 images).
    """

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._decoded: ArrayImages | None = None
        names = parquet.read_schema(files[0]).names
        self._column = next((name for name in ("image", "img") if name in names), None)
        if self._column is None or "label" not in names:
            raise invalid(
                "data.root",
                str(files[0]),
                f"columns image (or img) and label, not {names}",
                "data.root=DIR with CIFAR-10",
            )
        self.targets = _checked(np.concatenate([self._read(file, "label").to_numpy() for file in files]), files[0])

    @staticmethod
    def _read(file: Path, column: str):
        return parquet.read_table(file, columns=[column]).column(column)

    def prepare(self) -> None:
        if self._decoded is not None:
            return
        pixels = np.empty((len(self.targets), SIDE, SIDE, 3), dtype=np.uint8)
        row = 0
        for file in self._files:
            for chunk in self._read(file, self._column).chunks:
                for encoded in chunk.field("bytes"):
                    try:
                        pixels[row] = np.asarray(decode(io.BytesIO(encoded.as_buffer()), "RGB"))
                    except (UnreadableImage, ValueError) as error:
                        raise invalid(
                            "data.root", str(file), f"{SIDE}x{SIDE} images, but row {row}: {error}", "download it again"
                        ) from error
                    row += 1
        self._decoded = ArrayImages(pixels, self.targets, str(self._files[0]))

    def load(self, index: int, mode: str) -> Image.Image:
        self.prepare()
        return self._decoded.load(index, mode)

    def name(self, index: int) -> str:
        return f"image {index} of {self._files[0]}"


class _ArraysOnly(pickle.Unpickler):
    """Builds dicts, lists, numbers, strings and numpy arrays; any other name in the stream is refused unread."""

    _RECONSTRUCT = np.empty(0).__reduce__()[0]

    def find_class(self, module: str, name: str):
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return self._RECONSTRUCT
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        raise pickle.UnpicklingError(f"it would call {module}.{name}")


def read_batches(files: list[Path]) -> ArrayImages:
    """Pickled batches: a dict with ``data`` uint8 [N, 3072] (planes R, G, B, row by row) and ``labels``, N ints."""
    pixels, targets = [], []
    for file in files:
        try:
            with open(file, "rb") as stream:
                batch = _ArraysOnly(stream, encoding="latin1").load()
            pixels.append(batch["data"].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
            targets.append(np.asarray(batch["labels"], dtype=np.int64))
        except FileNotFoundError as error:
            raise invalid("data.root", str(file.parent), f"a folder with {file.name}", "unpack it again") from error
        except Exception as error:  # a damaged pickle can raise about any type
            raise invalid(
                "data.root", str(file), f"a pickled CIFAR-10 batch of plain arrays, but {error}", "download it again"
            ) from error
    return ArrayImages(np.concatenate(pixels), _checked(np.concatenate(targets), files[0]), str(files[0]))


def _checked(targets: np.ndarray, file: Path) -> np.ndarray:
    if len(targets) == 0 or targets.min() < 0 or targets.max() >= len(CLASS_NAMES):
        raise invalid("data.root", str(file), f"labels from 0 to {len(CLASS_NAMES) - 1}", "data.root=DIR with CIFAR-10")
    return targets
