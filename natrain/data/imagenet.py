"""The official ImageNet validation set: 50,000 files in one folder, their classes in the devkit.

Layout as unpacked from ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz (O. Russakovsky et al., "ImageNet Large
Scale Visual Recognition Challenge", 2015; the devkit's readme.txt describes both of its files)::

    root/val/ILSVRC2012_val_00000001.JPEG ...
    root/ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt   line k: the ILSVRC2012_ID of image k
    root/ILSVRC2012_devkit_t12/data/meta.mat                                 ILSVRC2012_ID -> WordNet id
"""

from __future__ import annotations

import re
from pathlib import Path

from natrain.errors import invalid

DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_FILE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)


def read_flat_val(root: Path, files: list[str]) -> tuple[list[str], list[str]]:
    """The sorted file names in ``root/val`` and the WordNet id of each.

    Raises:
        ValueError: no images, no devkit, a file the ground truth does not know.
        ModuleNotFoundError: SciPy, which reads meta.mat, is missing.
    """
    val, data = root / "val", root / DEVKIT / "data"
    if not files:
        raise invalid("data.root", str(root), "images in val/; it is empty", f"fill {val}/<class>/")
    if not (data / GROUND_TRUTH).is_file() or not (data / "meta.mat").is_file():
        raise invalid(
            "data.root",
            str(root),
            f"class folders in val/, or ImageNet's flat val/ and {DEVKIT}/data/{{{GROUND_TRUTH},meta.mat}}",
            f"tar -xzf {DEVKIT}.tar.gz -C {root}",
        )
    wnids = read_synsets(data / "meta.mat")
    truth = [int(line) for line in (data / GROUND_TRUTH).read_text().split()]
    files = sorted(files)
    classes = []
    for file in files:
        match = _FILE.fullmatch(file)
        if match is None or not 1 <= int(match[1]) <= len(truth):
            raise invalid(
                "data.root",
                str(val / file),
                f"ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_{len(truth):08d}.JPEG in a flat val/",
                "remove the file, or sort val/ into class folders",
            )
        classes.append(wnids[truth[int(match[1]) - 1]])
    return files, classes


def read_synsets(meta: Path) -> dict[int, str]:
    """ILSVRC2012_ID -> WordNet id of the devkit's leaf classes (``num_children == 0``)."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{meta} is a MATLAB file, which SciPy reads. Try: pip install scipy (or sort val/ into class folders)"
        ) from error
    synsets = loadmat(str(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
    return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
