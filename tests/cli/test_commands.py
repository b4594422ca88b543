"""The commands as a user types them: what they print, and what they answer to mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from natrain import env
from natrain.cli import COMMANDS, main
from natrain.jit import host
from natrain.ops import cpu, list_kernels
from natrain.training.memory import OutOfMemory
from natrain.training.report import NonFiniteLoss
from tests.data.helpers import truncate, write_folder, write_image

QUICK = ["global_batch=4", "data.workers=0", "trainer.accelerator=cpu", "schedule.warmup_epochs=0"]
QUICK += ["trainer.progress_bar=false"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Images of two classes, and the run folder of a model that saw eight of them."""
    folder = tmp_path_factory.mktemp("trained")
    images = write_folder(folder / "images")
    words = ["model=nat_cifar", "data=imagefolder", f"data.root={images}", "data.img_size=32", "ema.enabled=true"]
    assert main(["train", *words, *QUICK, f"run_dir={folder}/run", "trainer.max_steps=2"]) == 0
    return folder


def failing(capsys, *words: object) -> str:
    """The one line of a command that must fail by the caller's fault."""
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("natrain: error: ")
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"natrain {command}" in capsys.readouterr().out


def test_train_help_lists_groups_and_settings(capsys):
    with pytest.raises(SystemExit):
        main(["train", "-h"])
    said = capsys.readouterr().out
    for expected in ("imagefolder", "optim.lr=0.001", "learning rate after warm-up", "fp32 | bf16 | fp16"):
        assert expected in said


def test_without_a_command_the_commands_are_listed(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert all(command in capsys.readouterr().out for command in ["train"])


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["tran"], "did you mean 'train'"),
        (["train", "--resume=auto"], "resume=auto"),
        (["train", "--confg", "x"], "--help"),
        (["train", "modle=nat_tiny"], "model"),
        (["train", "model=nat_tny", "data=digits"], "model=nat_tiny"),
        (["train", "model=nat_digits", "data=digits", "kernel=refernce", *QUICK], 'kernel="reference"'),
        (["train", "model=nat_digits", "data=digits", "optim.lr=nan", *QUICK], "finite"),
        (["train", "model=nat_digits", "data=digits", "model.args.drop_path=nan", *QUICK], "finite"),
        (["train", "model=nat_digits", "data=digits", "model.args.drop_path_rat=0.1", *QUICK], "drop_path_rate"),
        (["train", "model=nat_cifar", "data=cifar10"], "data.root"),
        (["train", "model=nat_cifar", "data=imagefolder", "data.root=absent"], "data.root"),
        (["train", "--config", "absent.yaml"], "config.yaml"),
        (["eval", "checkpoint=absent.ckpt"], "checkpoint"),
        (["eval", "data=digits"], "model="),
        (["models", "dinta*"], "dinat"),
        (["predict", "x.png", "--checkpoint", "absent.ckpt"], "checkpoint"),
        (["predict", "x.png", "--checkpoint", "absent.ckpt", "--topk", "0"], "--topk"),
    ],
)
def test_a_mistake_gets_one_line_that_says_what_to_type(words, suggestion, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert suggestion in failing(capsys, *words)


def test_a_traceback_is_shown_when_asked_for(monkeypatch):
    with pytest.raises(ValueError, match="modle"):
        main(["train", "modle=x", "--traceback"])
    monkeypatch.setenv("NATRAIN_DEBUG", "1")
    with pytest.raises(ValueError, match="modle"):
        main(["train", "modle=x"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NonFiniteLoss("the loss. Try: optim.lr=1e-4"), 1),
        (OutOfMemory("out of memory. Try: micro_batch=2"), 1),
        (ModuleNotFoundError("data=digits needs scikit-learn. Try: pip install 'natrain[digits]'"), 2),
    ],
)
def test_an_error_that_says_what_to_do_is_one_line(error, code, monkeypatch, capsys):
    def fail(_):
        raise error

    monkeypatch.setattr("natrain.cli.train.run", fail)
    assert main(["train", "model=nat_digits", "data=digits"]) == code
    assert capsys.readouterr().err == f"natrain: error: {error}\n"


def test_a_run_that_is_there_is_neither_lost_nor_mixed(trained, capsys):
    words = ["model=nat_cifar", "data=imagefolder", f"data.root={trained}/images", "data.img_size=32", *QUICK]
    assert "resume=auto" in failing(capsys, "train", *words, f"run_dir={trained}/run", "trainer.max_steps=2")


def test_eval_takes_data_and_model_from_the_checkpoint(trained, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", f"checkpoint={trained}/run/checkpoints/best.ckpt", "data.workers=0"]) == 0
    said = capsys.readouterr().out
    assert "raw weights: top-1" in said
    assert "averaged weights: top-1" in said
    assert "images: 6, each counted once" in said


def test_eval_on_other_data(trained, capsys, tmp_path):
    checkpoint = f"checkpoint={trained}/run/checkpoints/best.ckpt"
    other = write_folder(tmp_path / "other", train=2, val=5)
    assert main(["eval", checkpoint, "data=imagefolder", f"data.root={other}", "data.workers=0"]) == 0
    assert "images: 10" in capsys.readouterr().out
    three = write_folder(tmp_path / "three", classes=("cat", "dog", "emu"))
    assert "class" in failing(capsys, "eval", checkpoint, "data=imagefolder", f"data.root={three}", "data.workers=0")


@pytest.mark.parametrize("typed", ["model=nat_digits", "model.args.kernel_size=5", "data.in_chans=1"])
def test_eval_of_a_model_that_the_checkpoint_does_not_hold(typed, trained, capsys):
    said = failing(capsys, "eval", f"checkpoint={trained}/run/checkpoints/best.ckpt", "data.workers=0", typed)
    assert typed.partition("=")[0] in said


def test_predict_names_classes_and_every_bad_image(trained, capsys, tmp_path):
    good = write_image(tmp_path / "good.png", seed=1)
    grey = tmp_path / "grey.png"
    Image.new("L", (50, 20), 200).save(grey)
    cut = truncate(write_image(tmp_path / "cut.jpg", seed=2))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    bad = [cut, tmp_path / "empty", tmp_path / "absent.png", tmp_path / "text.png"]
    checkpoint = trained / "run" / "checkpoints" / "best.ckpt"
    words = [good, *bad, grey, "--checkpoint", checkpoint, "--topk", "5"]
    assert main(["predict", *map(str, words)]) == 1
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [lines[0], lines[3]] == [str(good), str(grey)]
    for first in (1, 4):
        shares = [float(line.split()[0]) for line in lines[first : first + 2]]
        assert {line.split()[2] for line in lines[first : first + 2]} == {"cat", "dog"}
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(100, abs=0.02)
    errors = said.err.strip().splitlines()
    assert len(errors) == len(bad)
    assert all(str(path) in line for path, line in zip(bad, errors, strict=True))


def test_predict_agrees_with_the_model(trained, capsys):
    """The first class printed is the argmax of the model on the image as evaluation prepares it."""
    from natrain.data import build_eval_transform
    from natrain.training import load_for_inference

    checkpoint = trained / "run" / "checkpoints" / "best.ckpt"
    path = next((trained / "images" / "val").rglob("*.jpg"))
    loaded = load_for_inference(checkpoint)
    with torch.inference_mode(), Image.open(path) as image:
        probabilities = loaded.model(build_eval_transform(loaded.input)(image)[None]).softmax(-1)[0]
    assert main(["predict", str(path), "--checkpoint", str(checkpoint), "--topk", "1"]) == 0
    share, _, name = capsys.readouterr().out.splitlines()[1].split()
    assert name == loaded.class_names[int(probabilities.argmax())]
    assert float(share) == pytest.approx(100 * float(probabilities.max()), abs=0.01)


def test_models_lists_parameters_and_input(capsys):
    assert main(["models", "nat_mini"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["nat_mini", "19,984,174", "3x224x224"]


def test_doctor_gives_every_kernel_a_verdict(capsys, monkeypatch):
    monkeypatch.setenv("NATRAIN_CPU_LEVL", "avx2")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in said
    assert "did you mean NATRAIN_CPU_LEVEL" in said
    verdicts = said[said.index("kernels") :]
    assert all(f"  {name} " in verdicts for name in list_kernels())
    assert "chosen" in verdicts


def test_doctor_goes_on_where_the_cache_cannot_be_made(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NATRAIN_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(host, "find_compiler", lambda: None)
    monkeypatch.setattr(cpu, "_reasons", cpu._reasons.__wrapped__)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"\nNATRAIN_CACHE {tmp_path}/file/cache  (" in said and "no C++ compiler (" in said
    assert f"cache        NATRAIN_CACHE='{tmp_path}/file/cache' is not allowed" in said and "  reference " in said


def test_module_and_script_are_the_command(repository, tmp_path):
    for program in (["-m", "natrain"], [str(repository / "scripts" / "train.py")]):
        words = ["train"] if program[0] == "-m" else []
        done = subprocess.run(
            [sys.executable, *program, *words, "modle=x"],
            cwd=tmp_path,
            env={"PATH": "", "PYTHONPATH": str(repository)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert "unknown setting 'modle'" in done.stderr


def test_every_environment_variable_is_read_somewhere(repository):
    sources = [
        *(repository / "natrain").rglob("*.py"),
        *(path for path in (repository / "scripts").rglob("*") if path.suffix in (".py", ".sh")),
        *(repository / "tests").glob("*.py"),
    ]
    text = "".join(path.read_text() for path in sources if path != Path(env.__file__))
    assert all(variable.name in text for variable in env.VARIABLES)
