"""The run folder: who may use it, and the frozen configuration that ranks and requeued jobs read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from natrain.cli.compose import is_free, leaves
from natrain.errors import invalid

CONFIG_FILE = "config.yaml"
RUN_FILES = (CONFIG_FILE, "metrics.csv", "curves.png", "checkpoints", "wandb", "tensorboard")


def claim(config: DictConfig, typed: set[str]) -> tuple[DictConfig, Path]:
    """Freeze ``config`` into its run folder, or take up the run that is there; returns it and the frozen file.

    A folder that holds a run is left alone unless ``overwrite=true`` or ``resume=auto`` (or a checkpoint inside the
    folder). When a run is resumed its frozen file counts, not yaml files that may have been edited since; only
    settings that do not change what is learned (devices, workers, ...) are taken from the command line.

    Args:
        config: a composed configuration.
        typed: the keys that the command line sets, see ``compose.typed_keys``.

    Raises:
        ValueError: the folder holds another run, differs in a typed setting, or cannot be written.
    """
    frozen = Path(config.run_dir) / CONFIG_FILE
    if frozen.is_file() and _continues(config, frozen.parent):
        if config.overwrite:
            raise invalid("overwrite", True, "overwrite=false where resume continues the run", "overwrite=false")
        config = _continued(config, frozen, typed)
    elif frozen.is_file() and _global_rank() == 0:
        if not config.overwrite:
            raise invalid(
                "run_dir",
                config.run_dir,
                "a folder without a run (this one holds one)",
                "resume=auto to continue it, name=NAME for a new run, or overwrite=true to replace it",
            )
        _remove_run(frozen.parent)
    if _global_rank() == 0:
        freeze(config, frozen)
    return config, frozen


def load_frozen(path: Path) -> DictConfig:
    """Read a frozen configuration.

    Raises:
        ValueError: no such file, or not a configuration of a run.
    """
    if not path.is_file():
        raise invalid("--config", str(path), "the config.yaml of a run folder", "--config runs/NAME/config.yaml")
    config = OmegaConf.load(path)
    if "model" not in config or "run_dir" not in config:
        raise invalid("--config", str(path), "the config.yaml of a run folder", "--config runs/NAME/config.yaml")
    return config


def freeze(config: DictConfig, path: Path) -> None:
    """Write the resolved configuration in one step, so that no reader ever sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(OmegaConf.to_yaml(config), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise invalid(
            "run_dir", str(path.parent), f"a folder that can be written ({error.strerror})", "run_dir=DIR"
        ) from error


def _remove_run(folder: Path) -> None:
    """Remove what a run wrote, and nothing that somebody else put into the folder."""
    for name in RUN_FILES:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _continues(config: DictConfig, folder: Path) -> bool:
    if config.resume in (None, "none"):
        return False
    return config.resume == "auto" or folder.resolve() in Path(config.resume).resolve().parents


def _continued(config: DictConfig, frozen: Path, typed: set[str]) -> DictConfig:
    """The frozen run with the free settings of ``config``."""
    run = OmegaConf.load(frozen)
    before = leaves(run)
    for key, value in leaves(config).items():
        if is_free(key):
            OmegaConf.update(run, key, value, force_add=True)
        elif key in typed and key != "data.root" and before.get(key) != value:
            raise invalid(
                key,
                value,
                f"{before.get(key)!r}, with which the run in {frozen.parent} was started",
                f"{key}={before.get(key)}, name=NAME for a new run, or overwrite=true to replace it",
            )
    if "data.root" in typed:
        run.data.root = config.data.root
    return run


def _global_rank() -> int:
    """This process's rank as torchrun, SLURM or Lightning's launcher set it; 0 for a process on its own."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("LOCAL_RANK") or 0)
