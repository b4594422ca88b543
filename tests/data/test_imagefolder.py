import tarfile

import numpy as np
import pytest
from scipy.io import savemat

from natrain.data.imagefolder import read_imagefolder
from natrain.data.imagenet import DEVKIT, GROUND_TRUTH
from tests.data.helpers import build, write_folder, write_image


def listing(images):
    return [(images.name(index), int(target)) for index, target in enumerate(images.targets)]


def test_classes_are_numbered_in_sorted_order_and_paths_kept(tmp_path):
    root = write_folder(tmp_path, classes=("zebra", "10", "9", "ant"), train=2, val=1)
    splits = read_imagefolder(str(root))
    assert splits.class_names == ["10", "9", "ant", "zebra"]
    expected = [(str(root / "train" / n / f"00{i}.jpg"), t) for t, n in enumerate(splits.class_names) for i in range(2)]
    assert listing(splits.train) == expected
    assert listing(splits.val) == [(str(root / "val" / n / "000.jpg"), t) for t, n in enumerate(splits.class_names)]


def test_other_files_hidden_files_and_hidden_folders_are_passed_over(tmp_path):
    root = write_folder(tmp_path, train=1, val=1)
    for name in ("notes.txt", "._000.jpg", "000.jpg.tmp", "Thumbs.db"):
        (root / "train" / "cat" / name).write_text("no image")
    write_image(root / "train" / ".ipynb_checkpoints" / "000.jpg", 0)
    write_image(root / "train" / "cat" / ".cache" / "000.jpg", 0)
    (root / "train" / "labels.csv").touch()
    assert len(read_imagefolder(str(root)).train.targets) == 2


def test_extensions_in_any_case_formats_and_nested_folders_count(tmp_path):
    root = write_folder(tmp_path, train=1, val=1)
    write_image(root / "train" / "cat" / "upper.JPEG", 1)
    write_image(root / "train" / "cat" / "day 1" / "käse.PNG", 2)
    write_image(root / "train" / "cat" / "modern.webp", 3)
    splits = read_imagefolder(str(root))
    assert [target for _, target in listing(splits.train)] == [0, 0, 0, 0, 1]
    assert {splits.train.load(index, "RGB").size for index in range(1, 4)} >= {(40, 30)}


def test_a_missing_folder_says_what_to_type(tmp_path):
    with pytest.raises(ValueError, match="data.root=None.*train/<class>.*Try: data.root=DIR"):
        read_imagefolder(None)
    with pytest.raises(ValueError, match="data.root='/nowhere'.*train/<class>.*Try: data.root=DIR"):
        read_imagefolder("/nowhere")
    write_folder(tmp_path / "unpacked")
    with pytest.raises(ValueError, match=f"Try: data.root={tmp_path}/unpacked"):
        read_imagefolder(str(tmp_path))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="train holds no class folders"):
        read_imagefolder(str(tmp_path / "empty"))
    (tmp_path / "empty" / "val").mkdir()
    with pytest.raises(ValueError, match="train/ holds no class folders"):
        read_imagefolder(str(tmp_path / "empty"))
    write_image(tmp_path / "empty" / "train" / "cat" / "0.jpg", 0)
    with pytest.raises(ValueError, match="images in val/; it is empty"):
        read_imagefolder(str(tmp_path / "empty"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class_folders_are_listed_in_one_error(tmp_path, split):
    root = write_folder(tmp_path, classes=("ant", "bee", "cat"))
    for name in ("bee", "cat"):
        for path in (root / split / name).iterdir():
            path.rename(path.with_suffix(".txt"))
    with pytest.raises(ValueError, match=rf"data.root='.*{split}'.* 2 without: bee, cat\. Try: rmdir .*bee or fill it"):
        read_imagefolder(str(root))


def test_classes_that_differ_are_listed_in_one_error(tmp_path):
    write_folder(tmp_path, classes=("ant", "bee", "cat"))
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "wasp")
    with pytest.raises(ValueError, match="but 1 only in train: bee; 1 only in val: wasp"):
        read_imagefolder(str(tmp_path))


# The devkit numbers its classes in an order of its own, and inner nodes of the WordNet tree come after the leaves.
SYNSETS = [(1, "n03", "cat", 0), (2, "n01", "ant", 0), (3, "n02", "bee", 0), (4, "n00", "animal", 3)]


def write_official(root, truth=(2, 3, 1, 1, 3)):
    for name in ("n01", "n02", "n03"):
        write_image(root / "train" / name / f"{name}_1.JPEG", 0)
    for number in range(len(truth)):
        write_image(root / "val" / f"ILSVRC2012_val_{number + 1:08d}.JPEG", number)
    data = root / DEVKIT / "data"
    data.mkdir(parents=True)
    (data / GROUND_TRUTH).write_text("".join(f"{identifier}\n" for identifier in truth))
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    savemat(data / "meta.mat", {"synsets": np.array(SYNSETS, dtype=kind).reshape(-1, 1)})
    return root


def test_imagenets_flat_val_takes_its_classes_from_the_devkit(tmp_path):
    splits = read_imagefolder(str(write_official(tmp_path)))
    assert splits.class_names == ["n01", "n02", "n03"]
    names = [str(tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG") for number in range(1, 6)]
    assert listing(splits.val) == list(zip(names, [0, 1, 2, 2, 1], strict=True))


def test_a_flat_val_without_the_devkit_says_how_to_unpack_it(tmp_path):
    write_official(tmp_path)
    (tmp_path / DEVKIT / "data" / "meta.mat").unlink()
    with pytest.raises(ValueError, match=f"flat val/ and {DEVKIT}/data/.*Try: tar -xzf {DEVKIT}.tar.gz -C {tmp_path}"):
        read_imagefolder(str(tmp_path))


@pytest.mark.parametrize("name", ["ILSVRC2012_val_00000006.JPEG", "mine.jpg"])
def test_a_file_the_ground_truth_does_not_know_is_an_error(tmp_path, name):
    write_official(tmp_path)
    write_image(tmp_path / "val" / name, 0)
    with pytest.raises(ValueError, match=f"{name}.*ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_00000005.JPEG"):
        read_imagefolder(str(tmp_path))


def test_classes_of_a_flat_val_are_compared_with_train(tmp_path):
    write_official(tmp_path, truth=(2, 3, 3))
    with pytest.raises(ValueError, match="1 only in train: n03"):
        read_imagefolder(str(tmp_path))


def test_missing_scipy_says_what_to_install(tmp_path, monkeypatch):
    write_official(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scipy"):
        read_imagefolder(str(tmp_path))


def test_real_photographs(shared_data, tmp_path):
    with tarfile.open(shared_data / "imagenet-sample.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    root = tmp_path / "imagenet-sample"
    with pytest.raises(ValueError, match="200 only in train: n01440764.*; 50 only in val: n01560419"):
        read_imagefolder(str(root))  # the sample holds one image of each class
    for split in ("train", "val"):
        (root / split).rename(root / f"{split}-all")
        (root / split).mkdir()
        (root / f"{split}-all").rename(root / split / "photograph")
    datamodule = build("imagefolder", root, micro_batch=50)
    assert (datamodule.num_train, datamodule.num_val, datamodule.class_names) == (200, 50, ["photograph"])
    assert [images.shape for images, *_ in datamodule.val_loader()] == [(50, 3, 32, 32)]
    assert sum(len(images) for images, _ in datamodule.train_loader()) == 200
    assert not datamodule.unreadable.names
