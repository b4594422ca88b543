"""The resolved configuration in a run folder, which a requeued job reads in place of yaml files edited since."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from natrain.cli.compose import leaves, override_config, typed_keys
from natrain.cli.settings import read_schema
from natrain.errors import invalid

logger = logging.getLogger(__name__)


def load_frozen(path: Path) -> DictConfig:
    """Read the config.yaml of a run folder.

    Raises:
        ValueError: no such file, or not the configuration of a run.
    """
    try:
        config = OmegaConf.load(path) if path.is_file() else {}
    except Exception as error:  # yaml and its reader raise several types for a damaged file
        reason = str(error).splitlines()[0]
        raise invalid("--config", str(path), f"a yaml file ({reason})", "--config runs/NAME/config.yaml") from error
    if "model" not in config or "run_dir" not in config:
        raise invalid("--config", str(path), "the config.yaml of a run folder", "--config runs/NAME/config.yaml")
    return config


def requeued(config: DictConfig, overrides: list[str]) -> DictConfig:
    """``config``, or where ``resume=auto`` finds its run folder in use: that run's file with ``overrides`` on top.

    Args:
        config: composed from ``overrides``.
        overrides: as typed.

    Raises:
        ValueError: the run trains on other data.
    """
    file = Path(config.run_dir) / "config.yaml"
    if config.resume != "auto" or not file.is_file():
        return config
    frozen = load_frozen(file)
    if frozen.data.name != config.data.name:
        fix = f"data={frozen.data.name}, or name=NAME for a new run"
        raise invalid("data", config.data.name, f"{frozen.data.name}, on which the run in {file.parent} trains", fix)
    groups = read_schema().groups
    run = override_config(frozen, [word for word in overrides if word.partition("=")[0] not in groups])
    typed, now = typed_keys(overrides), leaves(config)
    kept = {key: value for key, value in leaves(run).items() if key not in typed and now.get(key) != value}
    if kept:
        shown = ", ".join(f"{key}={value} (now {now.get(key)})" for key, value in kept.items())
        logger.warning("%s counts where it differs from what composes now: %s", file, shown)
    return run
