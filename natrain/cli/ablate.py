"""Compare kernels over many problems, or models, or trainings, as a yaml describes it; goes on where it was stopped.

  natrain ablate ablation=nat_layers                                 configs/ablation/nat_layers.yaml
  natrain ablate ablation=mine.yaml kernels=cpu,reference dtype=fp32 a file of yours; key=value changes it
  natrain ablate ablation=paper_2d devices=4                         problems spread over four GPUs (devices=0,3: those)
  natrain ablate ablation=models model=nat_tiny,nat_mini             whole models: images/s, memory, drift
  natrain ablate ablation=training seeds=5 data.root=DIR             short trainings, paired by seed
  natrain ablate ablation=search trials=20 cluster=slurm             any setting of `natrain train`, by Optuna
Prints the number of runs and an estimate before it starts. A row of results.csv in runs/ablations/NAME-HASH is one run;
`natrain report` makes a page of it; wandb=PROJECT logs the page's tables to Weights & Biases at the end. A contender
can be a commit: kernels=[naive,{kernel: naive, commit: HEAD~3}]."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from natrain.errors import invalid, nearest

_OPTIONS = ("ablation", "device", "devices", "out", "wandb")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from natrain.bench.sweep import add_options

    parser.add_argument("words", nargs="+", metavar="key=value", help="ablation=NAME, then changes of its yaml")
    add_options(parser)


def epilog() -> str:
    lines = ["ablations (configs/ablation):"]
    for path in sorted(_folder().glob("*.yaml")):
        lines.append(f"  {path.stem:12} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> int:
    from natrain.bench.plan import read_settings
    from natrain.bench.sweep import checked_device
    from natrain.report.build import build_page
    from natrain.report.tables import check_wandb, log_tables

    words = dict(zip(_OPTIONS, (None, None, "1", None, None), strict=True))
    changes = []
    for word in arguments.words:
        key, equals, value = word.partition("=")
        if not equals:
            raise invalid("setting", word, "key=value", "ablation=nat_layers")
        if key in words:
            words[key] = value
        else:
            changes.append(word)
    path = find_ablation(words["ablation"])
    device = checked_device(words["device"])
    if words["wandb"] is not None:
        check_wandb("wandb", words["wandb"])
    kinds = {"kernels": _kernels, "models": _models, "training": _training}
    kind = read_settings(path).get("kind", "kernels")
    if str(kind) not in kinds:
        raise invalid("kind", kind, f"one of {', '.join(kinds)}", "kind: kernels")
    out, code = kinds[kind](path, words, changes, device, arguments)
    if words["wandb"] is not None:
        log_tables(build_page([out]), words["wandb"], out)
    print(f"the page: {shlex.join(['natrain', 'report', str(out)])}")
    return code


def _folder() -> Path:
    from natrain.cli.settings import config_folder

    return config_folder() / "ablation"


def find_ablation(name: str | None) -> Path:
    """The yaml of ``ablation=name``.

    Raises:
        ValueError: there is none.
    """
    names = sorted(path.stem for path in _folder().glob("*.yaml"))
    if name is not None and name.endswith(".yaml") and Path(name).is_file():
        return Path(name)
    if name not in names:
        best = nearest(str(name), names) or "nat_layers"
        raise invalid("ablation", name, f"one of {', '.join(names)}, or a .yaml file", f"ablation={best}")
    return _folder() / f"{name}.yaml"


def _kernels(
    path: Path, words: dict[str, str], changes: list[str], device: str, arguments: argparse.Namespace
) -> tuple[Path, int]:
    from natrain.bench.plan import parse_changes, read_plan
    from natrain.bench.spread import run_everywhere
    from natrain.bench.sweep import options_of

    plan = read_plan(path, parse_changes(changes))
    devices = _devices(words["devices"])
    out = _out(words, plan.name, plan.digest)
    return out, run_everywhere(plan, path, changes, options_of(arguments, out, device), devices)


def _devices(text: str) -> list[int]:
    """``2``: the first two; ``0,3`` or ``[3]``: those."""
    parts = text.removeprefix("[").removesuffix("]").split(",")
    is_list = len(parts) > 1 or text.startswith("[")
    if not all(part.strip().isdigit() for part in parts) or (not is_list and int(text) < 1):
        raise invalid("devices", text, "a number of devices >= 1, or indices of devices", "devices=1 or devices=0,1")
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers):
        raise invalid("devices", text, "each device once", f"devices={','.join(map(str, dict.fromkeys(numbers)))}")
    return numbers if is_list else list(range(numbers[0]))


def _models(
    path: Path, words: dict[str, str], changes: list[str], device: str, arguments: argparse.Namespace
) -> tuple[Path, int]:
    from natrain.bench.models import INSTEAD, read_model_plan, run_models
    from natrain.bench.options import Options
    from natrain.bench.plan import parse_changes
    from natrain.bench.supervise import locked
    from natrain.bench.threads import computing_on

    options = Options.of(arguments, words["devices"], "models", INSTEAD)
    plan = read_model_plan(path, parse_changes(changes))
    out = _out(words, path.stem, plan.digest)
    with locked(out), computing_on(device, options.threads, "--threads "):
        return out, run_models(plan, out, device, options)


def _training(
    path: Path, words: dict[str, str], changes: list[str], device: str, arguments: argparse.Namespace
) -> tuple[Path, int]:
    from natrain.bench.options import Options
    from natrain.bench.supervise import locked
    from natrain.bench.training import INSTEAD, read_training_plan, run_training
    from natrain.cli.compose import compose_config

    options = Options.of(arguments, words["devices"], "training", INSTEAD)
    plan = read_training_plan(path, changes, words["device"])
    out = _out(words, path.stem, plan.digest)
    with locked(out):
        return out, run_training(plan, out, compose_config, options)


def _out(words: dict[str, str], name: str, digest: str) -> Path:
    return Path(words["out"] or f"runs/ablations/{name}-{digest[:6]}")
