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

EXAMPLES = """examples:
  natrain train model=nat_digits data=digits recipe=digits
  natrain train model=nat_mini data=imagefolder data.root=DIR optim.lr=5e-4 trainer.devices=2 resume=auto
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, listed below")
    parser.add_argument("--config-dir", type=Path, help="folder of your own data/, recipe/, ... yaml files")
    parser.add_argument("--config", type=Path, help="config.yaml of a run folder, instead of composing")


def epilog() -> str:
    from natrain.cli.settings import read_schema, settings_text

    return f"{settings_text(read_schema())}\n\n{EXAMPLES}"


def run(arguments: argparse.Namespace) -> int:
    from natrain.cli.check import check_names
    from natrain.cli.compose import compose_config, override_config, typed_keys
    from natrain.cli.rundir import claim, load_frozen

    if arguments.config is not None:
        config = override_config(load_frozen(arguments.config), arguments.overrides)
    else:
        config = compose_config(arguments.overrides, arguments.config_dir)
    check_names(config)
    config, frozen = claim(config, typed_keys(arguments.overrides))
    # Lightning starts one process per further device by repeating the command line: it shall read the frozen file.
    sys.argv[1:] = ["train", "--config", str(frozen.resolve())]

    from natrain.training import train

    result = train(config)
    print(f"accuracy: {_percent(result)}")
    print(f"run folder: {result.run_dir}")
    print(f"evaluate: {shlex.join([*_program(), 'eval', f'checkpoint={result.checkpoint}'])}")
    return 0


def _percent(result: object) -> str:
    text = f"top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %"
    return text if result.ema_top1 is None else f"{text}, top-1 of the averaged weights {result.ema_top1:.2f} %"


def _program() -> list[str]:
    """The words that start natrain again from this folder."""
    program = Path(sys.argv[0])
    return [str(program)] if program.name == "natrain" else [sys.executable, "-m", "natrain"]
