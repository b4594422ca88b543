import random

import numpy as np
import torch

from natrain.data.rng import derive_seed, preserved_rng, seed_augmentation


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_seeds_depend_on_every_counter_and_its_place():
    seeds = {derive_seed(*counters) for counters in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0), (0, 0, -1)]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({derive_seed(3, 5, index) for index in range(10_000)}) == 10_000


def test_seeding_covers_the_generators_transforms_draw_from():
    seed_augmentation(5)
    first = draws()
    seed_augmentation(5)
    assert draws() == first
    seed_augmentation(6)
    assert all(other != value for other, value in zip(draws(), first, strict=True))


def test_generators_come_back_as_they_were_also_after_an_error():
    with preserved_rng():
        expected = draws()
    try:
        with preserved_rng():
            seed_augmentation(1)
            raise KeyError
    except KeyError:
        pass
    assert draws() == expected
