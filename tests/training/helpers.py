"""Starting runs in processes of their own and comparing what they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

DRIVER = Path(__file__).with_name("driver.py")
ROOT = Path(__file__).resolve().parents[2]


def start(cfg: DictConfig, *launcher: str) -> subprocess.Popen:
    """Train in another process; ``launcher`` replaces the plain interpreter."""
    config = Path(cfg.run_dir).with_suffix(".yaml")
    OmegaConf.save(cfg, config)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*(launcher or (sys.executable,)), str(DRIVER), str(config)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=config.parent
    )


def finish(process: subprocess.Popen, timeout: float = 180) -> str:
    """Wait for a run that must succeed; its output."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


def last(cfg: DictConfig) -> dict[str, Any]:
    """The run's last checkpoint."""
    return torch.load(Path(cfg.run_dir) / "checkpoints" / "last.ckpt", weights_only=True)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of nested containers under its path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, item in items:
        leaves |= flat(item, f"{prefix}/{key}")
    return leaves


def assert_same(left: dict[str, Any], right: dict[str, Any], rtol: float = 0.0, atol: float = 0.0) -> None:
    """All leaves equal; tensors within the tolerance, bitwise by default."""
    ours, theirs = flat(left), flat(right)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                value, theirs[path], rtol=rtol, atol=atol, msg=lambda text, p=path: f"{p}: {text}"
            )
        else:
            assert value == theirs[path], path
