"""A validation split where the data brings none: stated in the log, seeded, the same on every machine."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from natrain.data.rng import derive_seed
from natrain.errors import invalid

logger = logging.getLogger("natrain.data")


def split_indices(
    targets: Sequence[int], class_names: Sequence[str], share: float, seed: int, root: object
) -> tuple[list[int], list[int]]:
    """Indices of training and validation images, both in their given order.

    Of every class ``share`` of the images validate, rounded, and at least one where the class has two or more; which
    ones depends on ``seed``, the class's number and its number of images alone.

    Args:
        targets: class index of each image.
        class_names: of the data set, for messages.
        share: above 0 and below 1 (``data.val_share``).
        seed: ``data.split_seed``; another than the run's, so that runs with other seeds are scored on the same images.
        root: names the data set in messages.

    Raises:
        ValueError: a share out of range, a class of a single image.
    """
    if not 0 < share < 1:
        raise invalid("data.val_share", share, "a share above 0 and below 1", "data.val_share=0.1")
    targets = np.asarray(targets)
    chosen = np.zeros(len(targets), dtype=bool)
    for number, name in enumerate(class_names):
        members = np.flatnonzero(targets == number)
        if len(members) < 2:
            raise invalid(
                "data.root",
                str(root),
                f"two images of a class at least, to train on one and validate on the other; {name} has {len(members)}",
                "more images, or a val/ folder of your own",
            )
        count = min(len(members) - 1, max(1, round(share * len(members))))
        generator = np.random.Generator(np.random.PCG64(derive_seed(seed, number, len(members))))
        chosen[generator.permutation(members)[:count]] = True
    logger.info(
        "%s has no validation split: %g %% of each class (data.val_share=%g, data.split_seed=%d) validate, "
        "%d images; %d train",
        *(root, 100 * share, share, seed, chosen.sum(), len(targets) - chosen.sum()),
    )
    return np.flatnonzero(~chosen).tolist(), np.flatnonzero(chosen).tolist()
