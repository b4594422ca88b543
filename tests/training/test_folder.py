"""Run folders: found again, never mixed, never deleted, writable or refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from natrain.training.folder import open_folder, run_name

MakeConfig = Callable[..., DictConfig]


def hold_a_run(cfg: DictConfig, content: str = "old") -> Path:
    folder = open_folder(cfg)
    (folder / "metrics.csv").write_text(content)
    return folder


def test_the_name_is_a_function_of_what_is_learned(make_config: MakeConfig) -> None:
    base = run_name(make_config())
    assert base.startswith("nat_digits-digits-")
    same = {"resume": "auto", "trainer.devices": 2, "data.workers": 3, "micro_batch": 90, "logger.wandb.enabled": True}
    assert run_name(make_config(same, name="other")) == base
    for key, value in {"optim.lr": 2e-3, "seed": 1, "model.args": {"drop_path_rate": 0.1}, "data.root": "x"}.items():
        assert run_name(make_config({key: value})) != base, key


def test_a_folder_that_holds_another_run_is_refused(make_config: MakeConfig) -> None:
    cfg = make_config()
    hold_a_run(cfg)
    with pytest.raises(ValueError, match="run_dir=.*holds one.*resume=auto.*name=NAME.*overwrite=true"):
        open_folder(cfg)


def test_a_folder_with_only_a_configuration_is_free(make_config: MakeConfig) -> None:
    cfg = make_config()
    open_folder(cfg)
    assert OmegaConf.load(open_folder(cfg) / "config.yaml").optim.lr == cfg.optim.lr


def test_overwrite_moves_the_old_run_aside(make_config: MakeConfig) -> None:
    cfg = make_config({"overwrite": True})
    for number in (1, 2):
        folder = hold_a_run(cfg, f"run {number}")
    open_folder(cfg)
    assert not (folder / "metrics.csv").exists()
    for number in (1, 2):
        assert (folder.with_name(f"run.old-{number}") / "metrics.csv").read_text() == f"run {number}"


def test_resume_goes_on_in_the_folder_even_with_overwrite(make_config: MakeConfig) -> None:
    cfg = make_config({"resume": "auto", "overwrite": True})
    folder = hold_a_run(cfg)
    open_folder(cfg)
    assert (folder / "metrics.csv").read_text() == "old"


def test_resume_from_elsewhere_does_not_mix_runs(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.ckpt").touch()
    cfg = make_config({"resume": str(tmp_path / "elsewhere.ckpt")})
    cfg_before = make_config()
    hold_a_run(cfg_before)
    with pytest.raises(ValueError, match="holds one"):
        open_folder(cfg)


@pytest.fixture
def as_ordinary_user(tmp_path: Path):
    """Root may write anywhere, so the test becomes somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("existing", [False, True])
def test_no_permission_to_write_is_one_clear_error(make_config: MakeConfig, tmp_path: Path, existing, request) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    if existing:
        (locked / "run" / "checkpoints").mkdir(parents=True)
        (locked / "run").chmod(0o555)
    locked.chmod(0o555)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)
    cfg = make_config({"run_dir": str(locked / "run")})
    request.getfixturevalue("as_ordinary_user")
    with pytest.raises(ValueError, match="run_dir=.*locked/run.*can be written.*Permission denied.*Try: run_dir=DIR"):
        open_folder(cfg)


def test_a_file_where_the_folder_should_be(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="run_dir=.*can be written.*Not a directory"):
        open_folder(make_config({"run_dir": str(tmp_path / "file" / "run")}))
