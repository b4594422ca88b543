"""Two processes on the CPU (gloo) against one, at the same global batch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import DictConfig

from natrain.training import evaluate, train
from natrain.training.metrics import read_metrics
from natrain.training.score import score
from tests.training.helpers import assert_same, finish, last, start

# No dropout and no mixing, which differ by rank; augmentation does not.
STEPS = {"schedule.epochs": 2, "augment.scale": [0.6, 1.0], "ema.enabled": True, "global_batch": 240}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["trainer.devices=2", "torchrun"])
def test_two_processes_equal_one(make_config: Callable[..., DictConfig], launcher: str) -> None:
    one = make_config(STEPS, "one")
    train(one)
    two = make_config({**STEPS, "micro_batch": 60}, "two")
    if launcher == "torchrun":
        output = finish(start(two, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"))
    else:
        two.trainer.devices = 2
        output = finish(start(two))
    assert output.count("epoch 2/2 done") == 1  # one rank speaks
    alone, together = last(one), last(two)
    assert alone["global_step"] == together["global_step"] == 10
    for key in ("state_dict", "ema_state_dict"):
        # Sums of gradients in another order; AdamW's first steps divide by their own size, which amplifies it.
        assert_same(alone[key], together[key], rtol=1e-4, atol=2e-5)
    assert together["evaluation"]["images"] == 360
    left, right = (read_metrics(Path(cfg.run_dir) / "metrics.csv") for cfg in (one, two))
    assert [row["step"] for row in left] == [row["step"] for row in right]
    for ours, theirs in zip(left, right, strict=True):
        for key in {"loss", "grad_norm", "val_loss", "ema_val_loss"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


@pytest.mark.slow
def test_an_error_in_a_rank_is_the_callers_error(make_config: Callable[..., DictConfig]) -> None:
    cfg = make_config({"trainer.devices": 2, "data.num_classes": 7})
    process = start(cfg)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "ValueError: data.num_classes=7 is not allowed" in output.splitlines()[-1]


@pytest.mark.slow
def test_evaluation_with_two_processes(make_config: Callable[..., DictConfig]) -> None:
    cfg = make_config({"schedule.epochs": 1, "ema.enabled": True})
    cfg.checkpoint = train(cfg).checkpoint
    alone = evaluate(cfg)
    cfg.trainer.devices = 2
    together = evaluate(cfg)
    assert together.pop("checkpoint") == alone.pop("checkpoint") == cfg.checkpoint
    assert together == pytest.approx(alone, rel=1e-6)
    assert alone["images"] == alone["ema_images"] == 360


def _uneven(rank: int, store: str, results) -> None:
    """Rank 0 has three batches, rank 1 one: no collective may wait inside the loop."""
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    sizes = [(4, 4, 3), (2,)][rank]
    first = [0, 11][rank]
    batches = []
    for size in sizes:
        index = torch.arange(first, first + size)
        batches.append((torch.eye(13)[index], index % 5, index))
        first += size
    model = torch.nn.Linear(13, 13, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(13))  # predicts its own index
    found = score({"raw": model}, batches, device=torch.device("cpu"), autocast=torch.no_grad, expected=13)["raw"]
    try:
        score({"raw": model}, batches[:1] * 2, device=torch.device("cpu"), autocast=torch.no_grad, expected=None)
    except RuntimeError as error:
        results[rank] = (found.top1, found.images, str(error))
    dist.destroy_process_group()


def test_uneven_ranks_count_each_image_once(tmp_path: Path) -> None:
    results = mp.Manager().dict()
    mp.start_processes(_uneven, args=(str(tmp_path / "store"), results), nprocs=2, start_method="spawn")
    for rank in range(2):
        top1, images, error = results[rank]
        assert images == 13
        assert top1 == pytest.approx(100 * 5 / 13)  # only indices 0 to 4 equal their index modulo 5
        assert "more than once" in error
