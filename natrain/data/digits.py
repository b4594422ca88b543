"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 that come with the library, so nothing is downloaded."""

from __future__ import annotations

import numpy as np

from natrain.data.images import ArrayImages, Splits
from natrain.errors import invalid

TEST_IMAGES = 360


def read_digits(root: str | None = None) -> Splits:
    """1,437 training and 360 test images (E. Alpaydin and C. Kaynak, UCI 1998); the split is fixed and stratified.

    Args:
        root: must be None: there is no folder.

    Raises:
        ValueError: a ``root``.
        ModuleNotFoundError: scikit-learn is missing.
    """
    if root is not None:
        raise invalid("data.root", root, "null for data=digits, which comes with scikit-learn", "data.root=null")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "data=digits needs scikit-learn, which bundles the images. Try: pip install 'natrain[digits]'"
        ) from error
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(pixels)), test_size=TEST_IMAGES, stratify=digits.target, random_state=0
    )
    return Splits(
        train=ArrayImages(pixels[train], digits.target[train], "the digits' training split"),
        val=ArrayImages(pixels[test], digits.target[test], "the digits' test split"),
        class_names=[str(name) for name in digits.target_names],
        small_side=8,
        hflip=0.0,  # a mirrored digit is no digit
    )
