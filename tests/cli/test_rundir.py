"""The run folder: never mixed, never lost, frozen once."""

from __future__ import annotations

import os

import pytest
from omegaconf import OmegaConf

from natrain.cli.compose import compose_config, typed_keys
from natrain.cli.rundir import claim, load_frozen


@pytest.fixture(autouse=True)
def one_process(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def start(*words: str):
    overrides = ["model=nat_tiny", "data=imagefolder", "data.root=images", *words]
    return claim(compose_config(overrides), typed_keys(overrides))


def test_a_folder_with_a_run_is_left_alone():
    config, frozen = start("seed=1")
    assert load_frozen(frozen) == config
    with pytest.raises(ValueError, match="resume=auto"):
        start("seed=1")
    assert start("seed=2")[1] != frozen


def test_a_requeued_job_finds_its_folder_and_its_settings():
    config, frozen = start("seed=1", "resume=auto")
    edited = OmegaConf.load(frozen)
    edited.optim.lr = 0.125  # as if a yaml file of the recipe had been edited since: the run's own file counts
    OmegaConf.save(edited, frozen)
    again, folder = start("seed=1", "resume=auto", "trainer.devices=2", "data.workers=1")
    assert folder == frozen
    assert (again.optim.lr, again.trainer.devices, again.data.workers) == (0.125, 2, 1)
    assert load_frozen(frozen) == again


def test_a_resumed_run_keeps_what_it_learns():
    start("name=one", "optim.lr=0.1")
    with pytest.raises(ValueError, match=r"optim.lr=0.2 .*0.1"):
        start("name=one", "optim.lr=0.2", "resume=auto")
    with pytest.raises(ValueError, match="model.name='nat_mini'"):
        start("name=one", "model=nat_mini", "resume=auto")
    moved, _ = start("name=one", "resume=auto", "data.root=/elsewhere")
    assert moved.data.root == "/elsewhere"


def test_a_checkpoint_inside_the_folder_continues_it_and_one_outside_does_not():
    _, frozen = start("name=one")
    start("name=one", f"resume={frozen.parent / 'checkpoints' / 'last.ckpt'}")
    with pytest.raises(ValueError, match="overwrite=true"):
        start("name=one", "resume=elsewhere/last.ckpt")


def test_overwrite_removes_the_old_run_and_nothing_else():
    _, frozen = start("name=one")
    (frozen.parent / "notes.txt").write_text("mine")
    (frozen.parent / "metrics.csv").write_text("old")
    (frozen.parent / "checkpoints").mkdir()
    start("name=one", "seed=5", "overwrite=true")
    assert sorted(path.name for path in frozen.parent.iterdir()) == ["config.yaml", "notes.txt"]
    assert load_frozen(frozen).seed == 5
    with pytest.raises(ValueError, match="overwrite"):
        start("name=one", "overwrite=true", "resume=auto")


def test_further_ranks_write_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    _, frozen = start("name=one")
    assert not frozen.exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match="run_dir"):
        start("name=one")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_write_permission(tmp_path):
    (tmp_path / "runs").mkdir(mode=0o555)
    with pytest.raises(ValueError, match="run_dir.*Permission denied"):
        start("name=one")


def test_not_a_frozen_config(tmp_path):
    (tmp_path / "other.yaml").write_text("a: 1\n")
    for path in (tmp_path / "other.yaml", tmp_path / "absent.yaml"):
        with pytest.raises(ValueError, match="--config"):
            load_frozen(path)
