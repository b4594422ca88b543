"""Train a model.

Settings are typed as key=value, groups as group=choice. The resolved settings are written to the run folder
(config.yaml) before training starts. A run's folder is named after the settings typed, so the same command with
resume=auto continues it; `natrain train --config runs/NAME/config.yaml` takes every setting from that file.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

EXAMPLES = """examples:
  natrain train model=nat_digits data=digits recipe=digits
  natrain train model=nat_mini data=imagefolder data.root=DIR optim.lr=5e-4 trainer.devices=2 resume=auto
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_composition(parser)
    parser.add_argument("--config", type=Path, help="config.yaml of a run folder, instead of composing")


def add_composition(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that composes a configuration."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings; `natrain train --help` lists them")
    parser.add_argument("--config-dir", type=Path, help="folder of your own data/, recipe/, ... yaml files")


def epilog() -> str:
    from natrain.cli.settings import read_schema, settings_text

    return f"{settings_text(read_schema())}\n\n{EXAMPLES}"


def run(arguments: argparse.Namespace) -> int:
    from natrain.cli.compose import compose_config, override_config
    from natrain.cli.frozen import load_frozen, requeued

    if arguments.config is not None:
        config = override_config(load_frozen(arguments.config), arguments.overrides)
    else:
        config = requeued(compose_config(arguments.overrides, arguments.config_dir), arguments.overrides)
    return train_and_report(config)


def train_and_report(config: DictConfig) -> int:
    """Train, then print the accuracy, the run folder and the command that evaluates the checkpoint."""
    from natrain.training import train
    from natrain.training.plan import global_rank

    result = train(config)
    if global_rank() != 0:
        return 0
    print(f"accuracy: {_percent(result)}")
    print(f"run folder: {Path(result.run_dir).resolve()}")
    print(f"evaluate: {shlex.join([*_program(), 'eval', f'checkpoint={Path(result.checkpoint).resolve()}'])}")
    return 0


def _percent(result: object) -> str:
    text = f"top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %"
    return text if result.ema_top1 is None else f"{text}, top-1 of the averaged weights {result.ema_top1:.2f} %"


def _program() -> list[str]:
    """The words that start natrain again, from any folder."""
    program = Path(sys.argv[0])
    return [str(program.absolute())] if program.name == "natrain" else [sys.executable, "-m", "natrain"]
