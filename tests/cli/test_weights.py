"""Weights of other code in the commands: import, train, eval and predict."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

from natrain.cli import main
from natrain.models.published import SHIPPED
from natrain.models.weights import load_weights
from natrain.training import load_for_inference

DIGITS = str(SHIPPED / "nat_digits.safetensors")
CPU = ["trainer.accelerator=cpu", "trainer.progress_bar=false"]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """The shipped digits weights as a distributed training run of the official code would have left them."""
    state = {
        f"module.{name}": tensor for name, tensor in load_weights(SHIPPED / "nat_digits.safetensors").state.items()
    }
    torch.save({"model": state}, tmp_path / "digits.pth.tar")
    return tmp_path / "digits.pth.tar"


@pytest.fixture(params=["file", "address"])
def place(request, foreign: Path, tmp_path: Path) -> Iterator[str]:
    """The foreign weights as ``checkpoint=`` names them: a file, and an address on this machine."""
    if request.param == "file":
        yield str(foreign)
        return
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    handler = partial(SimpleHTTPRequestHandler, directory=str(foreign.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{foreign.name}"
        server.shutdown()
    torch.hub.set_dir(before)


def test_import_writes_one_file_with_everything_inside(foreign: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "names.txt").write_text("\n".join("zero one two three four five six seven eight nine".split()))
    out = tmp_path / "out" / "digits.safetensors"
    words = ["--classes", tmp_path / "names.txt", "--licence", "cc0-1.0"]
    assert main(["import", str(foreign), "--out", str(out), *map(str, words)]) == 0
    said = capsys.readouterr().out
    assert "nat_digits, layout official: wrapper 'model', prefix module." in said and f"written: {out}" in said
    with safe_open(out, "pt") as file:
        told = json.loads(file.metadata()["natrain"])
    assert told["model_name"] == "nat_digits" and told["class_names"][3] == "three" and told["licence"] == "cc0-1.0"
    assert load_for_inference(out).class_names[9] == "nine"


def test_import_of_a_run(tmp_path: Path, capsys) -> None:
    run = ["model=nat_digits", "data=digits", "recipe=digits", f"run_dir={tmp_path}/run", "trainer.max_steps=2", *CPU]
    assert main(["train", *run]) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    stored = torch.load(checkpoint, weights_only=True)
    for weights, key in (("raw", "state_dict"), ("ema", "ema_state_dict")):
        out = tmp_path / f"{weights}.safetensors"
        assert main(["import", str(checkpoint), "--weights", weights, "--out", str(out)]) == 0
        loaded = load_for_inference(out)
        assert loaded.class_names == [str(number) for number in range(10)] and loaded.input["crop_pct"] == 1.0
        name = "head.weight"
        prefix = "model." if key == "state_dict" else ""
        assert torch.equal(loaded.model.state_dict()[name], stored[key][prefix + name])


def test_eval_of_foreign_weights(place: str, capsys) -> None:
    assert main(["eval", f"checkpoint={place}", "data=digits", *CPU]) == 0
    assert "top-1 98.33 %" in capsys.readouterr().out


def test_eval_of_published_weights(capsys) -> None:
    assert main(["eval", "model=nat_digits", "model.args.pretrained=true", "data=digits", *CPU]) == 0
    assert "top-1 98.33 %" in capsys.readouterr().out


def test_training_starts_from_foreign_weights(place: str, tmp_path: Path, capsys) -> None:
    run = ["model=nat_digits", "data=digits", "recipe=digits", f"run_dir={tmp_path}/run", "trainer.max_steps=1", *CPU]
    frozen = ["optim.lr=0", "schedule.warmup_lr=0", "schedule.min_lr=0"]
    assert main(["train", f"checkpoint={place}", *run, *frozen]) == 0
    assert "top-1 98.33 %" in capsys.readouterr().out


def test_predict_with_foreign_weights(place: str, tmp_path: Path, capsys) -> None:
    from natrain.data.digits import read_digits

    split = read_digits().val
    image, target = split.load(0, "L"), int(split.targets[0])
    image.save(tmp_path / "digit.png")
    assert main(["predict", str(tmp_path / "digit.png"), "--checkpoint", place, "--topk", "1"]) == 0
    assert capsys.readouterr().out.split()[-1] == str(target)


def test_a_backbone_cannot_predict_but_train(tmp_path: Path, capsys) -> None:
    state = timm.create_model("nat_digits", num_classes=0).state_dict()
    torch.save(state, tmp_path / "backbone.pth")
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    assert main(["predict", str(tmp_path / "x.png"), "--checkpoint", str(tmp_path / "backbone.pth")]) == 2
    assert "with a classifier; this one is a backbone" in capsys.readouterr().err
    run = ["model=nat_digits", "data=digits", "recipe=digits", f"run_dir={tmp_path}/run", "trainer.max_steps=1", *CPU]
    assert main(["train", f"checkpoint={tmp_path}/backbone.pth", *run]) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "head.weight" in log


@pytest.mark.parametrize("to", ["official", "hf", "timm"])
def test_export_and_import_again(to: str, tmp_path: Path, capsys) -> None:
    state = timm.create_model("nat_mini", num_classes=3).state_dict()
    torch.save(state, tmp_path / "nat_mini.pth")
    out = tmp_path / ("nat_mini_again.pth" if to == "official" else "folder")
    assert main(["export", "--checkpoint", str(tmp_path / "nat_mini.pth"), "--to", to, "--out", str(out)]) == 0
    assert "written: " in capsys.readouterr().out
    assert main(["import", str(out), "--out", str(tmp_path / "again.safetensors")]) == 0
    again = load_weights(tmp_path / "again.safetensors")
    assert again.model_name == "nat_mini" and again.state.keys() == state.keys()
    assert all(torch.equal(again.state[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x.pth"], "--out='x.pth' is not allowed: expected a file that ends in .safetensors"),
        (["--out", "x.safetensors", "--classes", "none.txt"], "--classes='none.txt'"),
        (["--out", "x.safetensors", "--classes", "short.txt"], "10 lines, one per class; it has 1"),
        (["--out", "x.safetensors", "--model", "nat_digit"], "Try: model=nat_digits"),
        (["--out", "x.safetensors", "--model", "nat_cifar"], "it fits nat_digits"),
    ],
)
def test_import_answers_mistakes(words, message, foreign: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("one\n")
    assert main(["import", str(foreign), *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize(
    "words",
    [
        ["import", DIGITS, "--out", "taken/w.safetensors"],
        ["export", "--checkpoint", DIGITS, "--to", "official", "--out", "taken/w.pth"],
        ["export", "--checkpoint", DIGITS, "--to", "timm", "--out", "taken"],
        ["viz", "rpb", DIGITS, "--out", "taken/rpb.png"],
    ],
)
def test_a_file_that_cannot_be_written_is_one_error(words: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file, no folder")
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("natrain: error: --out='taken") and "a file that can be written" in said
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_mistakes_of_import_and_export(tmp_path: Path, capsys) -> None:
    out = tmp_path / "w.safetensors"
    assert main(["import", DIGITS, "--classes", DIGITS, "--out", str(out)]) == 2
    assert "--classes='" in (said := capsys.readouterr().err) and "a text file with one class name a line" in said
    assert main(["export", "--checkpoint", DIGITS, "--to", "zzz", "--out", str(out)]) == 2
    assert "--to='zzz'" in (said := capsys.readouterr().err) and "Try: --to onnx" in said
    assert not out.exists()
