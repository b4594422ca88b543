"""Every refusal names the argument and what to type, and leaves no file behind."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from natrain.cli import main
from natrain.export import TARGETS, export
from tests.export.helpers import INPUT, small_model


@pytest.mark.parametrize(
    ("to", "out", "options", "says"),
    [
        ("onxx", "model.onnx", {}, "--to onnx"),
        ("onnx", "model.pt2", {}, "--out .*model.onnx"),
        ("aoti", "model.so", {}, "ends in .pt2"),
        ("onnx", "model.onnx", {"precision": "bf16"}, "fp32, fp16, int8 for onnx"),
        ("torch-export", "model.pt2", {"precision": "int8"}, "--precision fp32"),
        ("onnx", "model.onnx", {"device": "cuda"}, "--device cpu"),
        ("aoti", "model.pt2", {"decompose": True}, "--decompose"),
    ],
)
def test_arguments(tmp_path, to, out, options, says):
    with pytest.raises(ValueError, match=says):
        export(small_model(), INPUT, to, tmp_path / out, **options)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.onnx").mkdir()
    for out in (tmp_path / "file" / "model.onnx", tmp_path / "folder.onnx"):
        with pytest.raises(ValueError, match="--out"):
            export(small_model(), INPUT, "onnx", out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no CUDA device")
def test_no_cuda_device(tmp_path):
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        export(small_model(), INPUT, "torch-export", tmp_path / "model.pt2", device="cuda")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "natrain.export.onnx.find_spec", lambda name: None if name == "onnxruntime" else find_spec(name)
    )
    with pytest.raises(ValueError, match=r"missing: onnxruntime.*natrain\[export\]"):
        export(small_model(), INPUT, "onnx", tmp_path / "model.onnx")


@pytest.mark.parametrize("wrong", [1.0, math.nan])
def test_a_file_that_disagrees_never_gets_its_name(tmp_path, monkeypatch, wrong):
    (tmp_path / "model.pt2").write_bytes(b"the file of before")
    target = TARGETS["torch-export"]
    load = target.load
    monkeypatch.setitem(
        TARGETS,
        "torch-export",
        type(target)(**{**vars(target), "load": lambda *args: lambda images: load(*args)(images) + wrong}),
    )
    with pytest.raises(ValueError, match="within 0.0001"):
        export(small_model(), INPUT, "torch-export", tmp_path / "model.pt2", decompose=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_bytes() == b"the file of before"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--checkpoint", "none.ckpt", "--to", "onnx", "--out", "a.onnx"], "none.ckpt"),
        (["--checkpoint", "none.ckpt", "--to", "onxx", "--out", "a.onnx"], "--to onnx"),
    ],
)
def test_command_line_errors_are_one_line(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *words]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and says in errors[0]
    assert not list(tmp_path.iterdir())
