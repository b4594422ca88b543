"""Whole models: what their rows say of speed, drift and attention."""

from __future__ import annotations

import time

import pytest
import timm
import torch

from natrain.bench.models import COLUMNS, read_model_plan, run_models
from natrain.bench.options import Options
from natrain.bench.rows import read as read_rows
from natrain.cli import main
from natrain.cli.settings import config_folder
from natrain.layers.attention import NeighborhoodAttention2d
from natrain.ops import registry
from natrain.ops.cpu import CpuKernel

MODELS = config_folder() / "ablation" / "models.yaml"


def test_models_in_both_modes_with_their_drift(tmp_path, capsys):
    changes = {
        "model": "nat_digits",
        "kernels": ["cpu", "reference", "naive"],
        "precision": "fp32",
        "compile": False,
        "batch": 2,
        "runs": 3,
    }
    plan = read_model_plan(MODELS, changes)
    assert run_models(plan, tmp_path, "cpu") == 1  # naive has no CPU
    found = {(row["kernel"], row["mode"]): row for row in list(read_rows(tmp_path / "models.csv", COLUMNS))}
    assert len(found) == 6
    for mode in ("inference", "training"):
        assert found["naive", mode]["status"] == "failed" and "device cpu" in found["naive", mode]["reason"]
        row, other = found["cpu", mode], found["reference", mode]
        assert float(row["low"]) <= float(row["images_per_s"]) <= float(row["high"])
        assert float(row["step_ms"]) == pytest.approx(2e3 / float(row["images_per_s"]), rel=1e-3)
        assert 0 < float(row["attention_share"]) < 1
        assert 0 <= float(row["drift"]) < 1e-5 and float(other["drift"]) == 0
    assert tuple(row) == COLUMNS
    assert run_models(plan, tmp_path, "cpu") == 1
    assert "6 runs in all, 0 to measure" in capsys.readouterr().out


SMALL = {"model": "nat_digits", "precision": "fp32", "compile": False, "batch": 2, "runs": 3}


def measured(tmp_path, code=0, **changes) -> dict[tuple[str, str], dict[str, str]]:
    assert run_models(read_model_plan(MODELS, {**SMALL, **changes}), tmp_path, "cpu") == code
    return {(row["kernel"], row["mode"]): row for row in list(read_rows(tmp_path / "models.csv", COLUMNS))}


class _Off(CpuKernel):
    """An output by a factor too large, after a sleep; the gradients are right, after a sleep."""

    name, summary = "off", "wrong and slow"
    factor, sleep_s = 1.0, 0.0

    def forward(self, *arguments):
        out, lse = super().forward(*arguments)
        time.sleep(self.sleep_s)
        return out * self.factor, lse

    def backward(self, *arguments):
        time.sleep(self.sleep_s)
        return super().backward(*arguments)


@pytest.fixture
def off(monkeypatch) -> _Off:
    registry.kernels()
    monkeypatch.setattr(registry, "_KERNELS", dict(registry._KERNELS))
    yield registry.register(_Off())
    registry._choose_cached.cache_clear()


def by_hand(kernel: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the losses of ten steps, of the small model on the same two images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (2,), generator=generator)
    torch.manual_seed(0)
    model = timm.create_model("nat_digits", num_classes=10, kernel=kernel)
    with torch.no_grad():
        logits = model.eval()(images).double()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-4), []
    model.train()
    torch.manual_seed(1)
    for _ in range(10):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return logits, torch.tensor(losses, dtype=torch.float64)


def test_the_drift_of_a_wrong_kernel_is_that_found_by_hand(tmp_path, off):
    off.factor = 1.2
    found = measured(tmp_path, kernels=["off"])
    (logits, losses), (true_logits, true_losses) = by_hand("off"), by_hand("reference")
    expected = {
        "inference": ((logits - true_logits).norm() / true_logits.norm()).item(),
        "training": ((losses - true_losses).abs() / true_losses).max().item(),
    }
    for mode, drift in expected.items():
        assert drift > 1e-4 and float(found["off", mode]["drift"]) == pytest.approx(drift, rel=0.02)


def test_the_drift_of_a_compiled_model_is_that_of_its_compiled_code(tmp_path, monkeypatch):
    """A compiler that makes every output ten times as large."""

    class Compiled:
        def __init__(self, model, **_):
            self.model = model

        def __call__(self, images):
            return 10 * self.model(images)

    monkeypatch.setattr(torch, "compile", Compiled)
    found = measured(tmp_path, kernels=["cpu"], compile=True)
    assert float(found["cpu", "inference"]["drift"]) == pytest.approx(9, rel=1e-3)
    assert float(found["cpu", "training"]["drift"]) > 0.1


def test_the_share_of_attention_is_what_the_kernel_takes(tmp_path, off):
    """Every layer sleeps 20 ms forward and 20 ms backward; the rest of a step takes a few milliseconds."""
    off.sleep_s = 0.02
    found = measured(tmp_path, kernels=["off", "cpu"])
    layers = sum(isinstance(module, NeighborhoodAttention2d) for module in timm.create_model("nat_digits").modules())
    for mode, passes in (("inference", 1), ("training", 2)):
        row = found["off", mode]
        slept = passes * layers * 20 / float(row["step_ms"])
        assert slept > 0.6 and slept <= float(row["attention_share"]) < min(1.05, slept + 0.2)
        assert float(found["cpu", mode]["attention_share"]) < 0.7 * float(row["attention_share"])


def test_more_kernels_and_failed_ones_add_to_a_folder(tmp_path, capsys):
    assert set(measured(tmp_path, kernels=["cpu"])) == {("cpu", "inference"), ("cpu", "training")}
    assert len(measured(tmp_path, code=1, kernels=["cpu", "naive"])) == 4
    assert "4 runs in all, 2 to measure" in capsys.readouterr().out
    plan = read_model_plan(MODELS, {**SMALL, "kernels": ["naive"]})
    assert run_models(plan, tmp_path, "cpu") == 1 and run_models(plan, tmp_path, "cpu", Options(retry_failed=True)) == 1
    said = capsys.readouterr().out
    assert "2 runs in all, 0 to measure" in said and "2 runs in all, 2 to measure" in said
    with pytest.raises(ValueError, match="same batch, img_size and runs"):
        run_models(read_model_plan(MODELS, {**SMALL, "batch": 3}), tmp_path, "cpu")
    plan = read_model_plan(MODELS, {**SMALL, "kernels": ["reference"]})
    assert run_models(plan, tmp_path, "cpu", Options(time_limit_s=0.01)) == 3
    assert "1 settings are left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs=0"], "runs=0 is not allowed: expected a whole number >= 3"),
        (["batch=0"], "batch=64"),
        (["img_size=big"], "img_size=224"),
        (["compile=maybe"], "compile=[false,true]"),
        (["kernels=cpu", "baseline=naive"], "baseline=cpu"),
        (["--only", "model=nat_tiny"], "--only=['model=nat_tiny'] is not allowed"),
        (["--arms", "cpu"], "kernels=naive,fused"),
        (["--chunk", "1"], "--chunk=1 is not allowed"),
        (["--threads", "0"], "--threads 2"),
        (["devices=2"], "CUDA_VISIBLE_DEVICES=1"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, message, tmp_path, capsys):
    assert main(["ablate", "ablation=models", f"out={tmp_path}/out", "device=cpu", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nat_tyny"}, "model="),
        ({"kernels": "niave"}, "naive"),
        ({"precision": "tf32"}, "bf16"),
        ({"x": 1}, "x"),
        ({"model": None}, "model=None .* a list of names"),
        ({"kernels": []}, r"kernels=\[\] .* a list of names"),
        ({"kernels": [{"kernel": "cpu", "commit": "HEAD"}]}, "kernels=.*commit.* a list of names"),
        ({"precision": []}, r"precision=\[\] .* a list of names"),
        ({"compile": []}, r"compile=\[\] .* true, false or both"),
    ],
)
def test_bad_model_plans(changes, message):
    with pytest.raises(ValueError, match=message):
        read_model_plan(MODELS, changes)


@pytest.mark.parametrize("missing", ["model", "kernels", "precision", "compile", "batch"])
def test_a_model_plan_without_a_setting_says_which(tmp_path, missing):
    lines = ["kind: models", "model: nat_digits", "kernels: cpu", "precision: fp32", "compile: false", "batch: 4"]
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(line for line in lines if not line.startswith(missing)))
    with pytest.raises(ValueError, match=f"{missing}=None is not allowed"):
        read_model_plan(path, {})


def test_what_is_named_twice_is_measured_once():
    twice = {"model": ["nat_mini"] * 2, "kernels": ["cpu", "reference", "cpu"], "compile": [True, False, True]}
    plan = read_model_plan(MODELS, twice)
    assert (plan.models, plan.kernels, plan.compiles) == (("nat_mini",), ("cpu", "reference"), (True, False))
