"""Out of memory: the error proposes settings with numbers that work."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from omegaconf import DictConfig

from natrain.training import train, validate
from natrain.training.memory import OutOfMemory, explain_out_of_memory, is_out_of_memory

MakeConfig = Callable[..., DictConfig]


def cuda_error() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")


def cpu_error() -> Exception:
    """What this machine's allocator says when asked for more than any machine has."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize("make_error", [cuda_error, cpu_error])
def test_it_is_recognised_and_explained(make_config: MakeConfig, make_error: Callable[[], Exception]) -> None:
    error = make_error()
    assert is_out_of_memory(error)
    with pytest.raises(OutOfMemory) as caught, explain_out_of_memory(make_config(), 90, 4):
        raise error
    text = str(caught.value)
    assert "micro_batch=90, precision=fp32, grad_checkpointing=false" in text
    assert "micro_batch=45 (accumulates 8 passes instead of 4; same result)" in text
    assert "precision=bf16" in text and "grad_checkpointing=true" in text


def test_other_errors_pass_through(make_config: MakeConfig) -> None:
    with pytest.raises(RuntimeError, match="^shapes") as caught, explain_out_of_memory(make_config(), 90, 4):
        raise RuntimeError("shapes do not match")
    assert not isinstance(caught.value, OutOfMemory)


@pytest.mark.parametrize(("micro", "passes"), [(360, 1), (90, 4), (6, 60), (2, 180), (1, 360)])
def test_what_it_proposes_is_valid(make_config: MakeConfig, micro: int, passes: int) -> None:
    cfg = make_config({"augment.mixup": 0.8, "micro_batch": micro} if micro % 2 == 0 else {"micro_batch": micro})
    with pytest.raises(OutOfMemory) as caught, explain_out_of_memory(cfg, micro, passes):
        raise cuda_error()
    proposed = re.search(r"Try: micro_batch=(\d+)", str(caught.value))
    if proposed is not None:
        cfg.micro_batch = int(proposed[1])
        assert cfg.micro_batch < micro
        validate(cfg)
    else:
        assert micro <= 2  # a pair is the least that can be mixed, one image the least of all


def test_settings_in_use_are_not_proposed(make_config: MakeConfig) -> None:
    cfg = make_config({"precision": "bf16", "grad_checkpointing": True})
    with pytest.raises(OutOfMemory) as caught, explain_out_of_memory(cfg, 1, 360):
        raise cuda_error()
    advice = str(caught.value).rpartition("Try: ")[2]
    assert "smaller data.img_size" in advice
    assert "precision" not in advice and "grad_checkpointing" not in advice and "micro_batch" not in advice


def test_a_run_that_runs_out_says_so(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natrain.training.task.F.cross_entropy", lambda *_, **__: torch.empty(2**60))
    with pytest.raises(OutOfMemory, match="micro_batch=180 .accumulates 2 passes instead of 1"):
        train(make_config())
