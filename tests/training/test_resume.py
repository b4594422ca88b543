"""A run that was killed, stopped or cut short goes on as if it had not been."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from natrain.training import train
from natrain.training.metrics import read_metrics
from tests.training.helpers import assert_same, finish, last, start

MakeConfig = Callable[..., DictConfig]
# Everything that draws random numbers or keeps a state of its own is on.
BUSY = {
    "schedule.epochs": 3,
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "augment.scale": [0.6, 1.0],
    "augment.random_erasing": 0.25,
    "model.args": {"drop_path_rate": 0.2},
    "ema.enabled": True,
    "ema.decay": 0.9,
    "micro_batch": 90,
}
STATE = ("state_dict", "ema_state_dict", "optimizer_states", "global_step", "evaluation", "best")


def wait_for(condition: Callable[[], bool], process, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.005)


def state(cfg: DictConfig) -> dict:
    checkpoint = last(cfg)
    return {key: checkpoint[key] for key in STATE}


def training_rows(cfg: DictConfig) -> list[dict[str, float]]:
    """What does not depend on the clock."""
    rows = read_metrics(Path(cfg.run_dir) / "metrics.csv")
    return [{key: row[key] for key in row if key not in ("images_per_s", "memory_gib")} for row in rows]


def steps_in(cfg: DictConfig) -> float:
    path = Path(cfg.run_dir) / "metrics.csv"
    rows = read_metrics(path) if path.exists() else []
    return max((row["step"] for row in rows), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_in_the_middle_of_an_epoch_changes_nothing(make_config: MakeConfig, workers: int) -> None:
    changes = {**BUSY, "trainer.log_every_steps": 1, "data.workers": workers}
    whole = make_config(changes, "whole")
    finish(start(whole))

    killed = make_config({**changes, "resume": "auto"}, "killed")
    process = start(killed)
    wait_for(lambda: steps_in(killed) >= 4, process)  # one step into the second epoch of three steps
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert last(killed)["global_step"] == 3
    assert not list((Path(killed.run_dir) / "checkpoints").glob("best.ckpt.*"))
    finish(start(killed))

    assert_same(state(whole), state(killed))
    assert training_rows(whole) == training_rows(killed)


def test_stopping_between_epochs_changes_nothing(make_config: MakeConfig) -> None:
    """The same in one process: two of three epochs, then the third."""
    whole = make_config(BUSY, "whole")
    train(whole)
    part = make_config(BUSY, "part")
    train(make_config({**BUSY, "schedule.epochs": 3, "trainer.max_steps": 6}, "part"))
    assert last(part)["global_step"] == 6
    part.resume = "auto"
    train(part)
    assert_same(state(whole), state(part))
    assert training_rows(whole) == training_rows(part)


def test_auto_without_checkpoint_starts_anew(make_config: MakeConfig) -> None:
    result = train(make_config({"resume": "auto", "trainer.max_steps": 1, "trainer.limit_val_batches": 1}))
    assert Path(result.checkpoint).is_file()


def test_auto_on_a_finished_run_returns_its_result(make_config: MakeConfig) -> None:
    cfg = make_config({"schedule.epochs": 1})
    first = train(cfg)
    before = last(cfg)
    cfg.resume = "auto"
    assert train(cfg) == first
    assert_same(before["state_dict"], last(cfg)["state_dict"])


def test_best_is_not_reset(make_config: MakeConfig) -> None:
    """The epoch after resuming is worse (its learning rate destroys the weights), so best.ckpt stays."""
    cfg = make_config({"schedule.epochs": 2, "optim.lr": 3e-3})
    best = Path(train(cfg).checkpoint)
    before = best.read_bytes()
    cfg.resume = "auto"
    cfg.schedule.epochs = 3
    cfg.schedule.name = "constant"
    cfg.optim.lr = 30.0
    cfg.optim.weight_decay = 0.0
    result = train(cfg)
    # What changed since the checkpoint counts, not what the restored optimiser remembers.
    groups = last(cfg)["optimizer_states"][0]["param_groups"]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(30.0, 0.0)] * 2
    assert best.read_bytes() == before
    assert result.top1 < last(cfg)["best"]["top1"]


def held_by(best: str | Path) -> dict:
    """The epoch in a checkpoint, and what it says of the best one."""
    checkpoint = torch.load(best, weights_only=True)
    return {"epoch": checkpoint["evaluation"]["epoch"], "best": checkpoint["best"]}


# The epoch after resuming destroys the weights, so the best one lies before it.
WORSE = {"schedule.epochs": 3, "schedule.name": "constant", "optim.lr": 30.0, "optim.weight_decay": 0.0}


@pytest.mark.parametrize("left", ["nothing", "an older epoch"])
def test_best_is_there_after_a_kill_before_it_was_copied(make_config: MakeConfig, left: str) -> None:
    cfg = make_config({"schedule.epochs": 1, "optim.lr": 3e-3})
    best = Path(train(cfg).checkpoint)
    older = best.read_bytes()
    train(make_config({"schedule.epochs": 2, "optim.lr": 3e-3, "resume": "auto"}))
    assert held_by(best)["epoch"] == 2
    best.unlink()
    if left != "nothing":
        best.write_bytes(older)
    result = train(make_config({**WORSE, "resume": "auto"}))
    assert held_by(result.checkpoint) == {"epoch": 2, "best": last(cfg)["best"]}
    assert sorted(path.name for path in best.parent.iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize("is_best_there", [True, False])
def test_a_new_folder_gets_the_best_epoch_of_the_old_one(make_config: MakeConfig, is_best_there: bool) -> None:
    first = make_config({"schedule.epochs": 1, "optim.lr": 3e-3})
    best = Path(train(first).checkpoint)
    train(make_config({**WORSE, "schedule.epochs": 2, "resume": "auto"}))
    assert held_by(best)["epoch"] == 1 and last(first)["evaluation"]["epoch"] == 2
    if not is_best_there:
        best.unlink()
    second = make_config({**WORSE, "resume": str(best.with_name("last.ckpt"))}, "second")
    result = train(second)
    told = held_by(result.checkpoint)
    # Without the file of the best epoch, the best is sought from the resumed one on.
    assert told["epoch"] == 1 if is_best_there else told["epoch"] >= 2
    assert last(second)["best"]["epoch"] == told["epoch"]


def test_path_of_another_run_continues_in_a_new_folder(make_config: MakeConfig) -> None:
    first = make_config({"schedule.epochs": 1})
    train(first)
    checkpoint = Path(first.run_dir) / "checkpoints" / "last.ckpt"
    second = make_config({"schedule.epochs": 2, "resume": str(checkpoint)}, "second")
    train(second)
    assert last(first)["global_step"] == 3 and last(second)["global_step"] == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 180}, "global_batch=180.*360"),
        ({"optim.name": "sgd"}, "optim.name='sgd'.*adamw"),
        ({"model.name": "nat_cifar"}, "the file says it holds nat_digits"),
        ({"resume": "/nowhere/last.ckpt"}, "resume='/nowhere/last.ckpt'.*existing checkpoint"),
    ],
)
def test_what_cannot_be_resumed_says_why(make_config: MakeConfig, changes: dict, message: str) -> None:
    train(make_config({"trainer.max_steps": 1, "trainer.limit_val_batches": 1}))
    with pytest.raises(ValueError, match=message):
        train(make_config({"resume": "auto", **changes}))


def test_weights_alone_are_for_checkpoint_not_resume(make_config: MakeConfig, tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"resume=.*weights\.pt.*Try: checkpoint="):
        train(make_config({"resume": str(tmp_path / "weights.pt")}))


@pytest.mark.slow
def test_sigterm_leaves_cleanly_and_resumes(make_config: MakeConfig) -> None:
    cfg = make_config({**BUSY, "trainer.log_every_steps": 1, "data.workers": 2, "resume": "auto"})
    process = start(cfg)
    wait_for(lambda: steps_in(cfg) >= 4, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "stopped by SIGTERM" in output and "Traceback" not in output
    finish(start(cfg))
    assert last(cfg)["global_step"] == 9


@pytest.mark.slow
def test_sigterm_stops_two_processes_at_the_same_step(make_config: MakeConfig) -> None:
    changes = {"trainer.devices": 2, "trainer.log_every_steps": 1, "schedule.epochs": 50, "resume": "auto"}
    cfg = make_config({**changes, "global_batch": 60})
    process = start(cfg)
    wait_for(lambda: steps_in(cfg) >= 25, process)  # in the second epoch of 23 steps
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 143, output
    assert output.count("stopped by SIGTERM") == 1, output
    assert last(cfg)["global_step"] == 23
