"""Labels in a table beside the images: a CSV or parquet file with one row per image."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from natrain.data.images import FileImages, Splits
from natrain.data.split import split_indices
from natrain.errors import invalid

FILE_COLUMNS = ("file", "path", "image", "filename", "file_name")
LABEL_COLUMNS = ("label", "class", "target", "category")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}
TABLE = (
    "a .csv or .parquet file with a column file (paths below data.root), a column label and, if you like, a column "
    "split (train or val)"
)


def read_labelled(root: Path, table: Path, val_share: float, split_seed: int) -> Splits:
    """The images that ``table`` lists, in its order; classes are numbered in sorted order (numbers by value).

    Without a column ``split`` a seeded share of each class validates.

    Raises:
        ValueError: no such table or columns, an empty cell, a file listed twice or missing, classes that differ between
            the splits.
    """
    columns = _read(table)
    files = _column(columns, FILE_COLUMNS, table)
    labels = _column(columns, LABEL_COLUMNS, table)
    twice = [file for file, count in Counter(files).items() if count > 1]
    if twice:
        raise invalid("data.labels", str(table), f"each file once; {twice[0]} is there twice", "removing a row")
    missing = [file for file in files if not os.path.isfile(root / file)]
    if missing:
        raise invalid(
            "data.labels",
            str(table),
            f"files below data.root={root}; {len(missing)} of {len(files)} are not there, first {missing[0]}",
            "data.root=DIR to which the paths are relative",
        )
    names = _sorted(set(labels))
    number = {name: target for target, name in enumerate(names)}
    targets = [number[label] for label in labels]
    if "split" in columns:
        parts = [_split(value, table) for value in columns["split"]]
        chosen = [[index for index, part in enumerate(parts) if part == name] for name in ("train", "val")]
        _check_classes(names, targets, chosen, table)
    else:
        chosen = split_indices(targets, names, val_share, split_seed, table)
    train, val = (
        FileImages(root, [files[index] for index in indices], [targets[index] for index in indices])
        for indices in chosen
    )
    return Splits(train=train, val=val, class_names=names, small_side=None, hflip=0.5)


def _read(table: Path) -> Mapping[str, list[str]]:
    """The table's columns as text."""
    if not table.is_file() or table.suffix not in (".csv", ".parquet"):
        raise invalid("data.labels", str(table), TABLE, "data.labels=DIR/labels.csv")
    try:
        if table.suffix == ".parquet":
            import pyarrow.parquet as parquet

            columns = parquet.read_table(table).to_pydict()
        else:
            with open(table, newline="", encoding="utf-8-sig") as file:
                header, *rows = filter(None, csv.reader(file))  # a blank line is no row
            columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
    except Exception as error:  # csv, pyarrow and zip each raise their own for a damaged table
        raise invalid(
            "data.labels", str(table), f"{TABLE}; this one cannot be read ({error})", "another file"
        ) from None
    empty = [name for name, values in columns.items() if any(value is None or value == "" for value in values)]
    wanted = [name for name in empty if name in (*FILE_COLUMNS, *LABEL_COLUMNS, "split")]
    if wanted:
        raise invalid("data.labels", str(table), f"a value in every row; {wanted[0]} has empty ones", "filling them")
    return {name: [str(value) for value in values] for name, values in columns.items()}


def _column(columns: Mapping[str, list[str]], names: tuple[str, ...], table: Path) -> list[str]:
    found = next((name for name in names if name in columns), None)
    if found is None or not columns[found]:
        raise invalid(
            "data.labels",
            str(table),
            f"{TABLE}; none of {', '.join(names)} is among its columns {', '.join(columns)}",
            f"naming that column {names[0]}",
        )
    return columns[found]


def _split(value: str, table: Path) -> str:
    if value.lower() not in SPLITS:
        raise invalid("data.labels", str(table), f"train or val in the column split, not {value!r}", "train or val")
    return SPLITS[value.lower()]


def _sorted(names: set[str]) -> list[str]:
    if all(name.lstrip("-").isdigit() for name in names):
        return sorted(names, key=int)
    return sorted(names)


def _check_classes(names: list[str], targets: list[int], chosen: list[list[int]], table: Path) -> None:
    for split, indices in zip(("train", "val"), chosen, strict=True):
        lacking = [name for target, name in enumerate(names) if target not in {targets[index] for index in indices}]
        if lacking:
            raise invalid(
                "data.labels",
                str(table),
                f"every class in both splits; {split} lacks {', '.join(lacking[:5])}",
                "adding rows, or leaving the column split out",
            )
