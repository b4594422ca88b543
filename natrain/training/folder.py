"""The run folder: who may use it, and where a run continues."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from natrain.errors import invalid
from natrain.training.checkpoint import write_atomically

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
METRICS = "metrics.csv"
# What may differ between two starts of the same run: where it lives and what it runs on, not what it learns.
_FREE = {"name", "run_dir", "overwrite", "resume", "micro_batch", "logger", "trainer"}


def run_name(cfg: DictConfig) -> str:
    """``MODEL-DATA-HASH``, a function of what is learned: a job that is started again finds its folder."""
    plain = OmegaConf.to_container(cfg, resolve=False)
    told = {key: value for key, value in plain.items() if key not in _FREE}
    told["data"] = {key: value for key, value in told["data"].items() if key not in ("workers", "val_batch")}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    return f"{cfg.model.name}-{cfg.data.name}-{digest}"


def resume_path(cfg: DictConfig) -> Path | None:
    """The checkpoint that ``resume`` means; None to start anew.

    ``auto`` is the folder's ``last.ckpt``, or a new start where the run was stopped before its first epoch ended.

    Raises:
        ValueError: ``resume=PATH`` names no file.
    """
    if cfg.resume in (None, "none"):
        return None
    last = Path(cfg.run_dir) / CHECKPOINTS / "last.ckpt"
    if cfg.resume == "auto":
        return last if last.is_file() else None
    path = Path(cfg.resume)
    if not path.is_file():
        raise invalid("resume", cfg.resume, "none, auto, or an existing checkpoint", f"resume={last}")
    return path


def open_folder(cfg: DictConfig) -> Path:
    """Make the run folder ready to be written; called once per run, by its first process, before any work.

    A folder that holds another run's results is used only with ``resume`` or with ``overwrite=true``, which moves
    it to ``RUN_DIR.old-N``: nothing is deleted.

    Raises:
        ValueError: the folder holds another run, or cannot be written.
    """
    folder = Path(cfg.run_dir)
    resumed = resume_path(cfg)
    is_own = cfg.resume == "auto" or (resumed is not None and folder.resolve() in resumed.resolve().parents)
    try:
        if holds_run(folder) and not is_own:
            if not cfg.overwrite:
                raise invalid(
                    "run_dir",
                    str(folder),
                    "a folder without a run (this one holds one)",
                    "resume=auto to continue it, name=NAME for a new run, or overwrite=true to move it aside",
                )
            set_aside(folder)
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, lambda file: file.write(OmegaConf.to_yaml(cfg, resolve=True).encode()))
        probe = folder / CHECKPOINTS / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise invalid(
            "run_dir",
            str(folder),
            f"a folder that can be written ({error.strerror or error})",
            "run_dir=DIR of your own",
        ) from error
    return folder


def holds_run(folder: Path) -> bool:
    """True where metrics or checkpoints were written."""
    return (folder / METRICS).exists() or any((folder / CHECKPOINTS).glob("*.ckpt"))


def set_aside(folder: Path) -> Path:
    """Rename ``folder`` to the first free ``folder.old-N`` and return it."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return folder.rename(target)
