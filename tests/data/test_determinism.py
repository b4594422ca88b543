"""One sample is a function of (seed, epoch, index): whatever reads it, and however the work is shared."""

import pickle
import random

import numpy as np
import pytest
import torch

from tests.data.helpers import AUGMENT, GREY, build, write_folder


def epochs(loader, count):
    """All images and targets of each epoch, in order."""
    collected = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        collected.append((torch.cat([images for images, _ in batches]), torch.cat([targets for _, targets in batches])))
    return collected


def assert_equal(first, second):
    assert len(first) == len(second)
    for (images, targets), (other_images, other_targets) in zip(first, second, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets, other_targets)


@pytest.mark.parametrize("name", ["digits", "imagefolder"])
def test_workers_change_nothing_over_two_epochs(name, tmp_path):
    root = write_folder(tmp_path) if name == "imagefolder" else None
    micro_batch = 4 if root else 359
    without = epochs(build(name, root, micro_batch=micro_batch).train_loader(), 2)
    for workers in (1, 2):
        loader = build(name, root, micro_batch=micro_batch, workers=workers).train_loader()
        assert_equal(epochs(loader, 2), without)


def test_epochs_and_seeds_augment_one_image_differently(tmp_path):
    root = write_folder(tmp_path)
    train = build("imagefolder", root).train_loader().dataset
    first = train[(0, 5)].image
    assert torch.equal(train[(0, 5)].image, first)
    assert not torch.equal(train[(1, 5)].image, first)
    assert not torch.equal(build("imagefolder", root, seed=8).train_loader().dataset[(0, 5)].image, first)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_see_together_the_augmented_images_one_process_sees(world_size):
    one = build("digits", micro_batch=12, workers=0).train_loader()
    ranks = [
        build("digits", micro_batch=12 // world_size, workers=0).train_loader(rank, world_size)
        for rank in range(world_size)
    ]
    for loader in (one, *ranks):
        loader.sampler.set_epoch(2)
    for step, ((images, targets), *shares) in enumerate(zip(one, *ranks, strict=True)):
        assert torch.equal(torch.cat([share[0] for share in shares]), images)
        assert torch.equal(torch.cat([share[1] for share in shares]), targets)
        if step == 5:
            break


def test_accumulation_reads_the_same_global_batches():
    whole = build("digits", micro_batch=12).train_loader()
    parts = iter(build("digits", micro_batch=3, global_batch=12).train_loader())
    assert len(whole) * 4 == len(build("digits", micro_batch=3, global_batch=12).train_loader())
    for step, (images, _) in enumerate(whole):
        assert torch.equal(torch.cat([next(parts)[0] for _ in range(4)]), images)
        if step == 3:
            break


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_training_process_generators_alone(workers):
    datamodule = build("digits", micro_batch=100, workers=workers)

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(0)
    expected = [draw(), draw()]
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(0)
    loader = datamodule.train_loader()
    next(iter(loader))
    first = draw()
    next(iter(loader))
    next(iter(datamodule.val_loader()))
    assert [first, draw()] == expected


def test_a_data_set_survives_the_way_to_a_spawned_worker(tmp_path):
    for name, root in (("imagefolder", write_folder(tmp_path)), ("digits", None)):
        train = build(name, root).train_loader().dataset
        assert torch.equal(pickle.loads(pickle.dumps(train))[(3, 1)].image, train[(3, 1)].image)


def test_augmented_grey_images_keep_one_channel():
    images, _ = next(iter(build("digits", augment=dict(AUGMENT, color_jitter=None), micro_batch=300).train_loader()))
    assert images.shape == (300, 1, *GREY["img_size"])
    assert images.isfinite().all()
