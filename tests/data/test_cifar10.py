import io
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from natrain.data.cifar10 import CLASS_NAMES, read_batches, read_cifar10


class Python2Pickler(pickle._Pickler):
    """Writes str and bytes alike as Python 2's str, as the published batches hold them."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_text(self, value):
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)

    dispatch[str] = dispatch[bytes] = save_text


def write_batch(path: Path, images: np.ndarray, labels: list[int]) -> None:
    stream = io.BytesIO()
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), 3072)
    Python2Pickler(stream, protocol=2).dump({"data": planes, "labels": labels, "batch_label": "batch"})
    path.write_bytes(stream.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


@pytest.fixture
def batches(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (6, 3, 32, 32, 3)).astype(np.uint8), rng.integers(0, 10, (6, 3))
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        write_batch(folder / name, images[number], labels[number].tolist())
    return folder, images, labels


def write_parquet(path, images, labels, column="image"):
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = []
    for image in images:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        encoded.append({"bytes": stream.getvalue(), "path": None})
    parquet.write_table(pa.table({column: encoded, "label": pa.array(labels, pa.int64())}), path)


def loaded(images, index):
    return np.asarray(images.load(index, "RGB"))


@pytest.mark.parametrize("inside", [False, True])
def test_torchvisions_batches(batches, inside):
    folder, images, labels = batches
    splits = read_cifar10(str(folder if inside else folder.parent))
    assert splits.train.targets.tolist() == labels[:5].ravel().tolist()
    assert splits.val.targets.tolist() == labels[5].tolist()
    assert splits.class_names == CLASS_NAMES
    for index in range(15):
        assert np.array_equal(loaded(splits.train, index), images[index // 3, index % 3])
    assert np.array_equal(loaded(splits.val, 2), images[5, 2])


@pytest.mark.parametrize("protocol", [3, 4])
def test_batches_pickled_again_by_python_3(tmp_path, protocol):
    pixels = np.arange(2 * 3072, dtype=np.uint64).astype(np.uint8).reshape(2, 3072)
    (tmp_path / "batch").write_bytes(pickle.dumps({"data": pixels, "labels": [1, 9]}, protocol=protocol))
    images = read_batches([tmp_path / "batch"])
    assert np.array_equal(loaded(images, 1)[:, :, 2].ravel(), pixels[1, 2048:])


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_would_run_code_is_refused_unrun(batches, tmp_path, protocol):
    folder, *_ = batches
    target = tmp_path / "made-by-the-pickle"
    (folder / "data_batch_3").write_bytes(pickle.dumps({"data": Attack(target), "labels": []}, protocol=protocol))
    with pytest.raises(ValueError, match=r"data_batch_3.*plain arrays, but it would call (os|posix|nt).mkdir"):
        read_cifar10(str(folder))
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"data": [1, 2]}), pickle.dumps([])])
def test_a_damaged_batch_is_named(batches, content):
    folder, *_ = batches
    (folder / "data_batch_2").write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.root='.*data_batch_2' is not allowed: expected a pickled CIFAR-10"):
        read_cifar10(str(folder))


def test_a_missing_batch_is_named(batches):
    folder, *_ = batches
    (folder / "data_batch_4").unlink()
    with pytest.raises(ValueError, match="a folder with data_batch_4"):
        read_cifar10(str(folder))


PARTS = [f"plain_text/train-0000{part}-of-00002.parquet" for part in range(2)]


@pytest.mark.parametrize(
    ("column", "train", "test"),
    [("image", ["train.parquet"], ["test.parquet"]), ("img", PARTS, ["plain_text/test-00000-of-00001.parquet"])],
)
def test_hugging_faces_layouts(tmp_path, column, train, test):
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (3, 2, 32, 32, 3)).astype(np.uint8), [[3, 4], [9, 0], [5, 5]]
    for number, name in enumerate([*train, *test]):
        write_parquet(tmp_path / name, images[number], labels[number], column)
    splits = read_cifar10(str(tmp_path))
    assert splits.train.targets.tolist() == sum(labels[: len(train)], [])
    assert splits.val.targets.tolist() == labels[len(train)]
    assert np.array_equal(loaded(splits.train, 2 * len(train) - 1), images[len(train) - 1, 1])
    assert np.array_equal(loaded(splits.val, 0), images[len(train), 0])


def test_a_table_of_something_else_lists_its_columns(tmp_path):
    for name in ("train.parquet", "test.parquet"):
        parquet.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / name)
    with pytest.raises(ValueError, match=r"columns image \(or img\) and label, not \['text', 'label'\]"):
        read_cifar10(str(tmp_path))


def test_labels_out_of_range_and_images_of_another_size_are_errors(tmp_path):
    image = np.zeros((1, 32, 32, 3), np.uint8)
    write_parquet(tmp_path / "train.parquet", image, [10])
    write_parquet(tmp_path / "test.parquet", image, [0])
    with pytest.raises(ValueError, match="labels from 0 to 9"):
        read_cifar10(str(tmp_path))
    write_parquet(tmp_path / "train.parquet", np.concatenate([image, image])[:, :20], [1, 2])
    with pytest.raises(ValueError, match=r"train.parquet.*32x32 images, but row 0"):
        read_cifar10(str(tmp_path)).train.prepare()


def test_missing_data_says_what_to_type(tmp_path):
    with pytest.raises(ValueError, match="data.root=None.*Try: data.root=DIR"):
        read_cifar10(None)
    with pytest.raises(ValueError, match="data.root='/nowhere'.*an existing folder.*Try: data.root=DIR"):
        read_cifar10("/nowhere")
    with pytest.raises(ValueError, match="train.*parquet.*data_batch_1.*Try: data.root=DIR"):
        read_cifar10(str(tmp_path))
    (tmp_path / "cifar-10-python.tar.gz").touch()
    with pytest.raises(ValueError, match="Try: tar -xzf .*cifar-10-python.tar.gz"):
        read_cifar10(str(tmp_path))


def test_the_real_data_set(shared_data):
    splits = read_cifar10(str(shared_data / "cifar10"))
    assert np.bincount(splits.train.targets).tolist() == [5000] * 10
    assert np.bincount(splits.val.targets).tolist() == [1000] * 10
    table = parquet.read_table(shared_data / "cifar10" / "test.parquet").slice(1234, 3).to_pylist()
    for row, index in zip(table, range(1234, 1237), strict=True):
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        assert np.array_equal(loaded(splits.val, index), np.asarray(image))
        assert splits.val.targets[index] == row["label"]
