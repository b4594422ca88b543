"""natrain predict on handwritten digits whose labels are known: files, folders, lists; text, csv, json."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys

import pytest

from natrain.cli import main
from natrain.cli.predict import image_files
from natrain.data.digits import read_digits
from natrain.models.published import SHIPPED

CHECKPOINT = ["--checkpoint", str(SHIPPED / "nat_digits.safetensors")]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Seven test digits in a folder with folders inside, and their labels by path."""
    folder = tmp_path_factory.mktemp("digits")
    split, labels = read_digits().val, {}
    for index in range(7):
        path = folder / ("deep" if index % 2 else "") / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        split.load(index, "L").save(path)
        labels[str(path)] = str(split.targets[index])
    (folder / "notes.txt").write_text("no image")
    return folder, labels


def predicted(capsys, *words: str) -> str:
    assert main(["predict", *map(str, words), *CHECKPOINT]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("batch", ["1", "3", "32"])
def test_json_of_a_folder(digits, capsys, batch):
    folder, labels = digits
    rows = json.loads(predicted(capsys, folder, "--format", "json", "--batch", batch, "--topk", "3"))
    assert [row["file"] for row in rows] == sorted(labels)
    for row in rows:
        assert row["classes"][0]["name"] == labels[row["file"]]
        shares = [one["probability"] for one in row["classes"]]
        assert len(shares) == 3 and shares == sorted(shares, reverse=True) and sum(shares) <= 1 + 1e-6


def test_the_batch_changes_no_number(digits, capsys):
    folder, _ = digits
    one, all_ = (
        json.loads(predicted(capsys, folder, "--format", "json", "--batch", batch, "--topk", "10"))
        for batch in ("1", "7")
    )
    for single, joint in zip(one, all_, strict=True):
        for a, b in zip(single["classes"], joint["classes"], strict=True):
            assert a["probability"] == pytest.approx(b["probability"], abs=1e-5)


def test_csv_of_a_list_on_standard_input(digits, capsys, monkeypatch, tmp_path):
    folder, labels = digits
    paths = sorted(labels, reverse=True)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*paths[:3], "", *paths[3:]]) + "\n"))
    out = tmp_path / "made" / "predictions.csv"
    assert predicted(capsys, "-", "--topk", "2", "--out", out) == ""
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "class1", "prob1", "class2", "prob2"]
    assert {row["file"]: row["class1"] for row in rows} == labels
    assert [row["file"] for row in rows] == paths
    assert list(out.parent.iterdir()) == [out]


def test_a_bad_image_leaves_the_others(digits, capsys, tmp_path):
    folder, labels = digits
    bad, out = tmp_path / "bad,name.png", tmp_path / "out.json"
    bad.write_bytes(b"no image")
    good = sorted(labels)[:2]
    assert main(["predict", good[0], str(bad), good[1], *CHECKPOINT, "--out", str(out)]) == 1
    assert [row["file"] for row in json.loads(out.read_text())] == good
    assert str(bad) in capsys.readouterr().err


def test_words_are_expanded_in_order(digits, monkeypatch):
    folder, labels = digits
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{folder / 'deep'}\nlast.png\n"))
    problems: list[str] = []
    found = [str(path) for path in image_files(["first.png", "-"], problems)]
    assert found == ["first.png", *sorted(path for path in labels if "deep" in path), "last.png"]
    assert not problems


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "jsn"], "Try: --format json"),
        (["--batch", "0"], "--batch"),
    ],
)
def test_mistakes(words, said, capsys):
    assert main(["predict", "x.png", *CHECKPOINT, *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("place", ["folder", "file/below.csv"])
def test_a_place_that_cannot_be_written_is_one_error(place, digits, capsys, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert main(["predict", str(digits[0]), *CHECKPOINT, "--out", str(tmp_path / place)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("natrain: error: --out=") and error.count("\n") == 1


def test_a_name_that_is_no_utf_8_is_written_as_it_is(digits, tmp_path):
    path = os.fsdecode(bytes(tmp_path) + b"/\xff.png")
    shutil.copyfile(digits[0] / "0.png", path)
    assert main(["predict", path, *CHECKPOINT, "--out", str(tmp_path / "out.csv")]) == 0
    assert b"/\xff.png," in (tmp_path / "out.csv").read_bytes()


def test_a_reader_that_leaves_is_no_traceback(repository):
    """As ``natrain kernels | head -1`` leaves, here before the first line."""
    with subprocess.Popen(
        [sys.executable, "-m", "natrain", "kernels"],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (141, "")
