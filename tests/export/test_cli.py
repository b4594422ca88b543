"""``natrain export`` from a checkpoint file to a program that another tool runs."""

from __future__ import annotations

import json

import pytest
import torch

from natrain.cli import main
from natrain.models.weights import load_weights, save_weights
from tests.export.helpers import INPUT, images_of, logits_of, small_model


@pytest.fixture
def checkpoint(tmp_path):
    """(model, its safetensors file)."""
    from natrain.models.weights import Weights

    model = small_model()
    arguments = dict(depths=(1,), kernel_size=3, dilations=2, num_classes=4)
    weights = Weights(
        state=model.state_dict(),
        model_name="nat_digits",
        model_args=arguments,
        class_names=["a", "b", "c", "d"],
        input={**INPUT, "img_size": [9, 7], "interpolation": "bicubic"},
        licence=None,
        source="test",
        layout="natrain",
    )
    path = tmp_path / "model.safetensors"
    save_weights(weights, path)
    return model, path


def test_program(checkpoint, tmp_path, capsys):
    model, path = checkpoint
    out = tmp_path / "out" / "model.pt2"
    assert main(["export", "--checkpoint", str(path), "--to", "torch-export", "--decompose", "--out", str(out)]) == 0
    assert "largest difference" in capsys.readouterr().out
    program = torch.export.load(out)
    torch.testing.assert_close(program.module()(images_of(3)), logits_of(model, images_of(3)), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_the_checkpoint_of_a_run(tmp_path):
    pytest.importorskip("sklearn", reason="needs scikit-learn's digits")
    run = ["train", "model=nat_digits", "data=digits", f"run_dir={tmp_path}/run", "trainer.max_steps=2"]
    quick = ["global_batch=8", "data.workers=0", "trainer.accelerator=cpu", "schedule.warmup_epochs=0"]
    assert main([*run, *quick, "trainer.progress_bar=false"]) == 0
    last, out = tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "model.pt2"
    assert main(["export", "--checkpoint", str(last), "--to", "torch-export", "--decompose", "--out", str(out)]) == 0
    extra = {"natrain.json": ""}
    program = torch.export.load(out, extra_files=extra)
    assert program.module()(torch.zeros(5, 1, 8, 8)).shape == (5, 10)
    assert json.loads(extra["natrain.json"])["class_names"] == [str(digit) for digit in range(10)]


def test_weights_in_another_layout(checkpoint, tmp_path):
    model, path = checkpoint
    out = tmp_path / "model.pth"
    assert main(["export", "--checkpoint", str(path), "--to", "official", "--out", str(out)]) == 0
    state = torch.load(out, weights_only=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert load_weights(path).model_name == "nat_digits"


def test_options_of_programs_are_refused_for_weights(checkpoint, tmp_path, capsys):
    words = ["export", "--checkpoint", str(checkpoint[1]), "--to", "timm", "--out", str(tmp_path / "timm")]
    assert main([*words, "--precision", "fp16"]) == 2
    assert "--precision" in capsys.readouterr().err and not (tmp_path / "timm").exists()
