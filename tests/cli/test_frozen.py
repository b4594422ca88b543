"""A requeued job: the same folder, the settings it was started with."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from natrain.cli.compose import compose_config, override_config
from natrain.cli.frozen import load_frozen, requeued

BASE = ["model=nat_tiny", "data=imagefolder", "data.root=/images"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A run folder as training leaves it, started with lr 0.1 from a recipe file that was edited since."""
    monkeypatch.chdir(tmp_path)
    config = compose_config([*BASE, "seed=1"])
    OmegaConf.update(config, "optim.lr", 0.1)
    Path(config.run_dir).mkdir(parents=True)
    OmegaConf.save(config, Path(config.run_dir) / "config.yaml")
    return config


def start(*words: str):
    overrides = [*BASE, *words]
    return requeued(compose_config(overrides), overrides)


def test_a_requeued_job_finds_its_folder_and_its_settings(run, caplog):
    again = start("seed=1", "resume=auto", "trainer.devices=2")
    assert again.run_dir == run.run_dir
    assert (again.optim.lr, again.trainer.devices, again.resume) == (0.1, 2, "auto")
    assert "optim.lr=0.1 (now 0.001)" in caplog.text


def test_typed_settings_win_over_the_frozen_ones(run):
    assert start(f"name={run.name}", "seed=1", "resume=auto", "optim.lr=0.2").optim.lr == 0.2


def test_without_resume_nothing_is_taken_up(run):
    assert start("seed=1").optim.lr == 0.001
    assert start("seed=2", "resume=auto").optim.lr == 0.001


def test_a_run_keeps_its_data(run):
    with pytest.raises(ValueError, match="data='digits'.*data=imagefolder"):
        start(f"name={run.name}", "resume=auto", "data=digits")


def test_settings_on_top_of_a_frozen_file(run):
    frozen = load_frozen(Path(run.run_dir) / "config.yaml")
    del frozen["precision"]  # as an older version would have written it
    again = override_config(frozen, ["name=again", "optim.clip_grad_norm=0.25"])
    assert (again.run_dir, again.optim.lr, again.optim.clip_grad_norm) == ("runs/again", 0.1, 0.25)
    assert again.precision == "fp32"
    with pytest.raises(ValueError, match="recipe"):
        override_config(frozen, ["recipe=null"])


def test_not_a_frozen_file(tmp_path):
    (tmp_path / "other.yaml").write_text("a: 1\n")
    for path in (tmp_path / "other.yaml", tmp_path / "absent.yaml"):
        with pytest.raises(ValueError, match="--config"):
            load_frozen(path)


@pytest.mark.parametrize("content", [b"a: [1\n", b"\xff\xfe\x00", b"a: b: c\n", b"- 1\n", b""])
def test_a_damaged_file_is_one_error(content, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="^--config='.*config.yaml' "):
        load_frozen(path)
