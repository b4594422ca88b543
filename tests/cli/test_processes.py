"""Several processes and restarted jobs through the command line: one folder, one frozen configuration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

WORDS = ["model=nat_digits", "data=digits", "recipe=digits", "trainer.accelerator=cpu", "trainer.max_steps=2"]


def run(folder: Path, repository: Path, *command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_processes_of_torchrun_share_one_folder_and_one_voice(repository, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "natrain"]
    said = run(tmp_path, repository, *torchrun, "train", *WORDS)
    assert said.count("accuracy: ") == 1
    (folder,) = (tmp_path / "runs").iterdir()
    said = run(tmp_path, repository, *torchrun, "eval", f"checkpoint={folder}/checkpoints/last.ckpt", WORDS[3])
    assert said.count("images: 360, each counted once") == 1


@pytest.mark.slow
def test_the_same_command_with_resume_goes_on_in_the_same_folder(repository, tmp_path):
    natrain = [sys.executable, "-m", "natrain", "train", *WORDS, "resume=auto"]
    run(tmp_path, repository, *natrain)
    (folder,) = (tmp_path / "runs").iterdir()
    frozen = OmegaConf.load(folder / "config.yaml")
    run(tmp_path, repository, *natrain)
    assert list((tmp_path / "runs").iterdir()) == [folder]
    assert OmegaConf.load(folder / "config.yaml") == frozen
