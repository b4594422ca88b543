"""Where the data brings no validation split, and where its labels are in a table."""

from __future__ import annotations

import csv
import logging
import shutil

import pyarrow
import pyarrow.parquet
import pytest

from natrain.data.imagefolder import read_imagefolder
from natrain.data.split import split_indices
from tests.data.helpers import build, write_folder, write_image
from tests.data.test_imagefolder import listing

TARGETS = [0] * 7 + [1] * 20 + [2] * 2 + [0] * 3
NAMES = ["a", "b", "c"]


def test_each_class_gives_its_share_and_nothing_is_in_both():
    train, val = split_indices(TARGETS, NAMES, 0.2, 0, "here")
    assert sorted(train + val) == list(range(len(TARGETS)))
    assert train == sorted(train) and val == sorted(val)
    assert [sum(TARGETS[i] == c for i in val) for c in range(3)] == [2, 4, 1]


def test_the_split_depends_on_its_seed_and_on_no_other_class():
    again, other = split_indices(TARGETS, NAMES, 0.2, 0, "x"), split_indices(TARGETS, NAMES, 0.2, 1, "x")
    first = split_indices(TARGETS, NAMES, 0.2, 0, "here")
    assert first == again and first != other
    longer = split_indices([*TARGETS, 2, 2, 2], NAMES, 0.2, 0, "here")[1]
    assert [i for i in longer if i < len(TARGETS) and TARGETS[i] < 2] == [i for i in first[1] if TARGETS[i] < 2]


@pytest.mark.parametrize("layout", ["train without val", "classes only"])
def test_a_folder_without_val_is_split_and_says_so(layout, tmp_path, caplog):
    root = write_folder(tmp_path / "set", train=10, val=1)
    shutil.rmtree(root / "val")
    if layout == "classes only":
        for child in (root / "train").iterdir():
            child.rename(root / child.name)
        (root / "train").rmdir()
    with caplog.at_level(logging.INFO, "natrain.data"):
        data = build("imagefolder", root, val_share=0.3, split_seed=5)
    assert (data.num_train, data.num_val, data.class_names) == (14, 6, ["cat", "dog"])
    assert "30 % of each class (data.val_share=0.3, data.split_seed=5) validate, 6 images; 14 train" in caplog.text
    assert not {name for name, _ in listing(data.splits.train)} & {name for name, _ in listing(data.splits.val)}


def rows_of(root):
    for name in ("cat", "dog"):
        for number in range(4):
            write_image(root / "images" / f"{name}{number}.jpg", number)
    return [(f"images/{name}{number}.jpg", name) for number in range(4) for name in ("dog", "cat")]


def write_table(path, header, rows):
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    else:
        columns = zip(*rows, strict=True)
        pyarrow.parquet.write_table(pyarrow.table(dict(zip(header, map(list, columns), strict=True))), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_labels_from_a_table_with_a_split(kind, tmp_path):
    rows = [(file, label, "val" if number < 2 else "train") for number, (file, label) in enumerate(rows_of(tmp_path))]
    table = write_table(tmp_path / f"labels.{kind}", ("file", "label", "split"), rows)
    splits = read_imagefolder(str(tmp_path), str(table))
    assert splits.class_names == ["cat", "dog"]
    assert listing(splits.val) == [(str(tmp_path / "images/dog0.jpg"), 1), (str(tmp_path / "images/cat0.jpg"), 0)]
    assert len(splits.train.targets) == 6
    assert splits.train.load(0, "RGB").size == (40, 30)


def test_blank_lines_in_a_table_are_no_rows(tmp_path):
    table = write_table(tmp_path / "labels.csv", ("file", "label"), rows_of(tmp_path))
    plain = read_imagefolder(str(tmp_path), str(table))
    table.write_text("\n" + table.read_text() + "\n\n")
    assert listing(read_imagefolder(str(tmp_path), str(table)).train) == listing(plain.train)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_labels_that_are_numbers_keep_their_order(kind, tmp_path):
    rows = [(file, 2 if label == "cat" else 10) for file, label in rows_of(tmp_path)]
    data = build("imagefolder", tmp_path, labels=str(write_table(tmp_path / f"l.{kind}", ("path", "class"), rows)))
    assert data.class_names == ["2", "10"]
    assert (data.num_train, data.num_val) == (6, 2)


@pytest.mark.parametrize(
    ("header", "change", "said"),
    [
        (("name", "label"), lambda rows: rows, "none of file, path, image"),
        (("file", "label"), lambda rows: [*rows, rows[0]], "images/dog0.jpg is there twice"),
        (("file", "label"), lambda rows: [*rows, ("gone.jpg", "cat")], "1 of 9 are not there, first gone.jpg"),
        (("file", "label"), lambda rows: [*rows, ("x.jpg", "")], "label has empty ones"),
        (("file", "label"), lambda rows: [*rows, ("x.jpg",)], "cannot be read"),
        (("file", "label", "split"), lambda rows: [(*row, "dev") for row in rows], "train or val in the column split"),
        (("file", "label", "split"), lambda rows: [(*row, "train") for row in rows], "val lacks cat, dog"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(header, change, said, tmp_path):
    table = write_table(tmp_path / "labels.csv", header, change(rows_of(tmp_path)))
    with pytest.raises(ValueError) as raised:
        read_imagefolder(str(tmp_path), str(table))
    assert said in str(raised.value)


def test_what_makes_no_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="b has 1"):
        split_indices([0, 0, 1], ["a", "b"], 0.5, 0, "here")
    with pytest.raises(ValueError, match="data.val_share=1"):
        split_indices([0, 0], ["a"], 1, 0, "here")
    with pytest.raises(ValueError, match="data.labels='missing.csv'"):
        read_imagefolder(str(tmp_path), "missing.csv")
    with pytest.raises(ValueError, match="data=digits brings its labels"):
        build("digits", labels="labels.csv")
