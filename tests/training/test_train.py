"""Runs in this process: equal seeds, equal batches, each switch, and what stops a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from natrain.training import evaluate, train
from natrain.training.metrics import COLUMNS, read_metrics
from natrain.training.report import NON_FINITE_LIMIT, NonFiniteLoss
from natrain.training.task import make_mixup
from tests.training.helpers import assert_same, last

MakeConfig = Callable[..., DictConfig]
QUICK = {"trainer.max_steps": 2, "trainer.limit_val_batches": 1}


def test_a_run_leaves_what_it_promises(make_config: MakeConfig) -> None:
    cfg = make_config({"ema.enabled": True})
    result = train(cfg)
    folder = Path(result.run_dir)
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "metrics.csv",
        "curves.png",
        "log.txt",
        "checkpoints",
    }
    assert OmegaConf.load(folder / "config.yaml").optim.lr == cfg.optim.lr
    rows = read_metrics(folder / "metrics.csv")
    assert [row["step"] for row in rows] == [2, 3, 3, 4, 6, 6]
    training, scored = [row for row in rows if "loss" in row], [row for row in rows if "top1" in row]
    assert all(row.keys() == set(COLUMNS[:7]) for row in training)
    assert all(row.keys() == {"step", "epoch", *COLUMNS[7:]} for row in scored)
    # Warm-up of one epoch of 3 steps from 1e-6 to 1e-3; then cosine over 6 steps to 5e-6.
    assert training[0]["lr"] == pytest.approx(1e-6 + (1e-3 - 1e-6) / 3, rel=1e-6)
    assert training[-1]["lr"] == pytest.approx(5e-6 + (1e-3 - 5e-6) * (1 + math.cos(math.pi * 5 / 6)) / 2, rel=1e-6)
    assert result.top1 == pytest.approx(scored[-1]["top1"], rel=1e-6)
    assert result.ema_top1 == pytest.approx(scored[-1]["ema_top1"], rel=1e-6)
    assert Path(result.checkpoint) == folder / "checkpoints" / "best.ckpt"
    text = (folder / "log.txt").read_text()
    for part in ("step 2/6", "loss", "lr", "grad norm", "images/s", "GiB", "epoch 2/2 done", "(360 images)"):
        assert part in text


BUSY = {
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "augment.scale": [0.5, 1.0],
    "augment.random_erasing": 0.25,
    "model.args": {"drop_path_rate": 0.2},
    "ema.enabled": True,
    "trainer.limit_val_batches": 1,
}


def test_equal_seeds_are_bitwise_equal_and_others_are_not(make_config: MakeConfig) -> None:
    configs = [
        make_config({**BUSY, "seed": seed, "schedule.epochs": 1}, name) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    for cfg in configs:
        train(cfg)
    first, second, other = (last(cfg) for cfg in configs)
    for key in ("state_dict", "ema_state_dict", "optimizer_states", "evaluation"):
        assert_same(first[key], second[key])
    assert not torch.equal(first["state_dict"]["model.head.weight"], other["state_dict"]["model.head.weight"])


def test_accumulated_passes_equal_one_large_batch(make_config: MakeConfig) -> None:
    changes = {"augment.scale": [0.6, 1.0], "trainer.limit_val_batches": 1}
    large = make_config(changes, "large")
    small = make_config({**changes, "micro_batch": 45}, "small")
    for cfg in (large, small):
        train(cfg)
    # Only the order of summation differs. AdamW's first steps are about the sign of each gradient, whatever its
    # size, so the last bits of the smallest gradients show.
    assert_same(last(large)["state_dict"], last(small)["state_dict"], rtol=1e-4, atol=2e-5)
    rows = [read_metrics(Path(cfg.run_dir) / "metrics.csv") for cfg in (large, small)]
    for ours, theirs in zip(*rows, strict=True):
        for key in {"step", "loss", "grad_norm", "lr"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"grad_checkpointing": True},
        {"optim.clip_grad_norm": None},
        {"schedule.name": "linear", "optim.lr_scaling": "linear"},
        {"schedule.name": "constant", "optim.name": "lamb"},
        {"model.name": "resnet18", "data.in_chans": 3, "data.img_size": 16, "global_batch": 32},
        {"model.name": "vit_tiny_patch16_224", "data.img_size": 32, "data.in_chans": 1, "global_batch": 32},
    ],
    ids=lambda changes: "-".join(f"{key}={value}" for key, value in changes.items()),
)
def test_two_steps_with(make_config: MakeConfig, changes: dict) -> None:
    cfg = make_config({**QUICK, "data.val_batch": 90, **changes})
    result = train(cfg)
    assert 0 <= result.top1 <= 100
    assert last(cfg)["global_step"] == 2
    cfg.checkpoint = result.checkpoint
    cfg.name = cfg.run_dir = None
    assert evaluate(cfg)["top1"] == pytest.approx(result.top1)


def test_grad_checkpointing_changes_no_weight(make_config: MakeConfig) -> None:
    configs = [make_config({**QUICK, "grad_checkpointing": on}, f"checkpointing-{on}") for on in (False, True)]
    for cfg in configs:
        train(cfg)
    assert_same(last(configs[0])["state_dict"], last(configs[1])["state_dict"])


@pytest.mark.slow
def test_compile_keeps_names_and_results(make_config: MakeConfig) -> None:
    vit = {"model.name": "vit_tiny_patch16_224", "model.args": {"depth": 1, "embed_dim": 24, "patch_size": 4}}
    changes = {**QUICK, **vit, "data.in_chans": 1, "data.img_size": 8, "ema.enabled": True}
    eager, compiled = (make_config({**changes, "compile": bool(on)}, f"compile-{on}") for on in (0, 1))
    for cfg in (eager, compiled):
        train(cfg)
    for key in ("state_dict", "ema_state_dict"):
        assert not any("_orig_mod" in name for name in last(compiled)[key])
        assert_same(last(eager)[key], last(compiled)[key], rtol=1e-3, atol=1e-4)


def test_clipping_limits_the_update_and_the_norm_is_the_one_before(make_config: MakeConfig) -> None:
    """timm's SGD has Nesterov momentum 0.9: its first update is lr * 1.9 times the clipped gradient."""
    from natrain.training.build import build_model, model_input

    limit, lr = 0.01, 0.5
    cfg = make_config({"optim.name": "sgd", "optim.lr": lr, "optim.weight_decay": 0.0, "optim.clip_grad_norm": limit})
    OmegaConf.update(cfg, "schedule.warmup_epochs", 0)
    OmegaConf.update(cfg, "trainer.max_steps", 1)
    OmegaConf.update(cfg, "trainer.limit_val_batches", 1)
    train(cfg)
    torch.manual_seed(0)
    start = build_model("nat_digits", {}, num_classes=10, input=model_input(cfg), kernel="reference").state_dict()
    end = last(cfg)["state_dict"]
    moved = torch.cat([(end[f"model.{name}"] - tensor).flatten() for name, tensor in start.items()])
    assert moved.norm().item() == pytest.approx(1.9 * lr * limit, rel=1e-3)
    assert read_metrics(Path(cfg.run_dir) / "metrics.csv")[0]["grad_norm"] > limit


def test_a_loss_that_is_not_finite_stops_the_run(make_config: MakeConfig) -> None:
    cfg = make_config({"schedule.epochs": 50, "global_batch": 64, "trainer.limit_val_batches": 1})
    cfg.optim.lr = 1e30
    cfg.optim.clip_grad_norm = None
    with pytest.raises(NonFiniteLoss) as caught:
        train(cfg)
    text = str(caught.value)
    assert "not been a finite number for" in text and "Try: optim.lr=5e+29" in text
    rows = read_metrics(Path(cfg.run_dir) / "metrics.csv")
    # noticed at the first log line (every 2 steps) at which the streak is long enough
    assert rows[-1]["step"] <= 2 + NON_FINITE_LIMIT + 2


def test_weights_that_are_not_finite_are_not_saved(make_config: MakeConfig) -> None:
    cfg = make_config({"schedule.epochs": 1})
    train(cfg)
    before = (Path(cfg.run_dir) / "checkpoints" / "last.ckpt").read_bytes()
    cfg.resume, cfg.schedule.epochs, cfg.schedule.name, cfg.optim.lr = "auto", 2, "constant", 1e38
    cfg.optim.weight_decay = 0.9
    with pytest.raises(NonFiniteLoss, match="nothing was saved over the checkpoint before"):
        train(cfg)
    assert (Path(cfg.run_dir) / "checkpoints" / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_targets_are_distributions_of_the_mixed_images(mixup: float, cutmix: float) -> None:
    augment = OmegaConf.create(
        {"mixup": mixup, "cutmix": cutmix, "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "label_smoothing": 0.1}
    )
    mix = make_mixup(augment, num_classes=7)
    targets = torch.arange(6)
    # Each image is a constant plane of its own class, so its mean shows how much of which image it holds.
    for _ in range(20):
        images = torch.eye(6)[:, :, None, None].expand(6, 6, 16, 16).clone()
        mixed, soft = mix(images, targets)
        torch.testing.assert_close(soft.sum(-1), torch.ones(6))
        shares = mixed.mean((2, 3))  # [image, class it came from]
        expected = 0.9 * torch.cat([shares, torch.zeros(6, 1)], dim=1) + 0.1 / 7
        torch.testing.assert_close(soft, expected, rtol=1e-4, atol=1e-4)


def test_mixing_stops_at_its_epoch(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = torch.nn.functional.cross_entropy

    def spy(logits, targets, **options):
        if targets.ndim == 2:  # training with mixup; evaluation has plain targets
            seen.append(targets.max(dim=-1).values.min().item())
        return original(logits, targets, **options)

    monkeypatch.setattr("natrain.training.task.F.cross_entropy", spy)
    changes = {"augment.mixup": 1.0, "augment.mixup_off_epoch": 1, "schedule.epochs": 2}
    train(make_config({**changes, "augment.label_smoothing": 0.1}))
    assert len(seen) == 6
    assert min(seen[:3]) < 0.9  # mixed
    assert all(value == pytest.approx(0.91) for value in seen[3:])  # 1 - 0.1 + 0.1 / 10: smoothed only


def test_no_mixing_where_both_are_off() -> None:
    assert make_mixup(OmegaConf.create({"mixup": 0.0, "cutmix": 0.0}), num_classes=3) is None


@pytest.mark.parametrize("sink", ["wandb", "tensorboard"])
def test_loggers_get_the_rows(make_config: MakeConfig, sink: str) -> None:
    pytest.importorskip("wandb" if sink == "wandb" else "tensorboard")
    cfg = make_config({**QUICK, f"logger.{sink}.enabled": True})
    folder = Path(train(cfg).run_dir)
    if sink == "wandb":
        import wandb

        assert wandb.run is None  # the next training in this process is another run
        run_id = (folder / "wandb_id.txt").read_text()
        assert list((folder / "wandb").glob(f"offline-run-*-{run_id}"))
        cfg.resume = "auto"
        cfg.trainer.max_steps = 4
        train(cfg)
        assert (folder / "wandb_id.txt").read_text() == run_id
        assert len(list((folder / "wandb").glob(f"offline-run-*-{run_id}"))) >= 1
    else:
        assert list((folder / "tensorboard").glob("events.out.tfevents.*"))


def test_a_checkpoint_of_other_classes_is_not_evaluated(make_config: MakeConfig) -> None:
    cfg = make_config(QUICK)
    path = Path(train(cfg).checkpoint)
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["class_names"][3] = "horse"
    torch.save(content, path)
    cfg.checkpoint = str(path)
    with pytest.raises(ValueError, match="class 3 named '3'.*'horse', as in the checkpoint"):
        evaluate(cfg)


def test_evaluation_without_checkpoint(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="checkpoint=None.*a checkpoint file"):
        evaluate(make_config())
