import logging

import pytest
import torch

from tests.data.helpers import build, truncate, write_folder


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path, train=20, val=3)


def read_epochs(datamodule, count):
    loader = datamodule.train_loader()
    batches = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        batches += list(loader)
    return batches


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_jpeg_is_named_once_counted_and_replaced(root, workers, caplog):
    bad = truncate(root / "train" / "dog" / "007.jpg")
    datamodule = build("imagefolder", root, workers=workers)
    with caplog.at_level(logging.WARNING, "natrain.data"):
        batches = read_epochs(datamodule, 3)
    assert len(batches) == 30
    assert all(images.shape == (4, 3, 32, 32) and images.isfinite().all() for images, _ in batches)
    named = [record.getMessage() for record in caplog.records if str(bad) in record.getMessage()]
    assert len(named) == 1
    assert "OSError" in named[0]
    assert datamodule.unreadable.names == {str(bad)}
    assert datamodule.unreadable.failed_reads >= 3
    assert datamodule.unreadable.reads == 120


def test_the_replacement_is_the_same_for_every_worker_count(root):
    truncate(root / "train" / "dog" / "007.jpg")
    first, second = (read_epochs(build("imagefolder", root, workers=workers), 2) for workers in (0, 2))
    for (images, targets), (other_images, other_targets) in zip(first, second, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets, other_targets)


def test_the_replacement_brings_its_own_target(root):
    for number in range(20):
        truncate(root / "train" / "dog" / f"{number:03d}.jpg")
    batches = read_epochs(build("imagefolder", root, bad_image_limit=1.0), 1)
    assert torch.cat([targets for _, targets in batches]).tolist() == [0] * 40


@pytest.mark.parametrize("workers", [0, 1])
def test_a_share_above_the_limit_stops_with_the_limit_and_the_file(root, workers):
    for number in range(6):
        truncate(root / "train" / "dog" / f"{number:03d}.jpg")
    with pytest.raises(
        ValueError,
        match=r"data.bad_image_limit=0.1 .* of \d+ reads failed .*00\d\.jpg \(OSError.*data.bad_image_limit=0\.\d+$",
    ):
        read_epochs(build("imagefolder", root, workers=workers, bad_image_limit=0.1), 1)
    assert len(read_epochs(build("imagefolder", root, workers=workers, bad_image_limit=0.5), 1)) == 10


def test_limit_zero_stops_at_the_first(root):
    truncate(root / "train" / "cat" / "000.jpg")
    with pytest.raises(ValueError, match=r"data.bad_image_limit=0 .*cat/000.jpg"):
        read_epochs(build("imagefolder", root, bad_image_limit=0), 1)


def test_nothing_readable_is_one_error_even_without_a_limit(root):
    for path in root.glob("train/*/*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"data.root=.*\.jpg.*readable images"):
        read_epochs(build("imagefolder", root, bad_image_limit=1.0), 1)


NO_IMAGES = {
    "empty": b"",
    "web page": b"<html>404</html>",
    "cut header": b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "zeros": b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
}


@pytest.mark.parametrize("content", NO_IMAGES.values(), ids=NO_IMAGES)
def test_files_that_are_no_images_inside_are_unreadable_not_fatal(root, content):
    (root / "train" / "cat" / "003.jpg").write_bytes(content)
    datamodule = build("imagefolder", root)
    assert len(read_epochs(datamodule, 1)) == 10
    assert datamodule.unreadable.names == {str(root / "train" / "cat" / "003.jpg")}


def test_a_file_that_vanished_is_unreadable_not_fatal(root):
    datamodule = build("imagefolder", root)
    (root / "train" / "cat" / "003.jpg").unlink()
    assert len(read_epochs(datamodule, 1)) == 10
    assert len(datamodule.unreadable.names) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_validation_image_is_an_error_that_names_it(root, workers):
    bad = truncate(root / "val" / "dog" / "001.jpg")
    with pytest.raises(ValueError, match=f"data.root='{bad}'.*readable validation image .OSError"):
        list(build("imagefolder", root, workers=workers).val_loader())
