"""Counter-based randomness: what a sample draws depends on (seed, epoch, sample) alone.

Nothing depends on which process, worker or step reads the sample, so that 0 or 8 workers and 1 or 8 devices see the
same augmented images, and a run that resumes sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
from collections.abc import Iterator

import numpy as np
import torch


def derive_seed(*counters: int) -> int:
    """A 63-bit seed that is a fixed function of the counters; neighbouring counters give unrelated seeds."""
    digest = hashlib.blake2b(struct.pack(f"<{len(counters)}q", *counters), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_augmentation(seed: int) -> None:
    """Seed the three CPU generators that timm's and torchvision's transforms draw from."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # torch.manual_seed would also reset the generators of the devices, which belong to the model.
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Give the process its CPU generators back as they were.

    Without workers the samples are drawn in the training process, where dropout and mixup use the same generators.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
