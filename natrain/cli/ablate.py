"""Compare kernels over many problems, or models, or trainings, as a yaml describes it; goes on where it was stopped.

  natrain ablate ablation=nat_layers                                 configs/ablation/nat_layers.yaml
  natrain ablate ablation=mine.yaml kernels=cpu,reference dtype=fp32 a file of yours; key=value changes it
  natrain ablate ablation=paper_2d devices=4                         problems spread over four GPUs
  natrain ablate ablation=models model=nat_tiny,nat_mini             whole models: images/s, memory, drift
  natrain ablate ablation=training seeds=5 data.root=DIR             short trainings, paired by seed
  natrain ablate ablation=search trials=20 cluster=slurm             any setting of `natrain train`, by Optuna
Prints the number of runs and an estimate before it starts. A row of results.csv in runs/ablations/NAME-HASH is one run;
`natrain report` makes a page of it; wandb=PROJECT logs the page's tables to Weights & Biases at the end. A contender
can be a commit: kernels=[naive,{kernel: naive, commit: HEAD~3}]."""

from __future__ import annotations

import argparse
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
    import yaml

    from natrain.bench.sweep import default_device
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
    path = _find(words["ablation"])
    device = words["device"] or default_device()
    if device not in ("cuda", "cpu"):
        raise invalid("device", device, "cuda or cpu", "device=cuda")
    if words["wandb"] is not None:
        check_wandb("wandb", words["wandb"])
    kinds = {"kernels": _kernels, "models": _models, "training": _training}
    kind = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("kind", "kernels")
    if kind not in kinds:
        raise invalid("kind", kind, f"one of {', '.join(kinds)}", "kind: kernels")
    out, code = kinds[kind](path, words, changes, device, arguments)
    if words["wandb"] is not None:
        log_tables(build_page([out]), words["wandb"], out)
    print(f"the page: natrain report {out}")
    return code


def _folder() -> Path:
    from natrain.cli.settings import config_folder

    return config_folder() / "ablation"


def _find(name: str | None) -> Path:
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
    from natrain.bench.sweep import parse_only

    plan = read_plan(path, parse_changes(changes))
    parse_only(arguments.only)
    if not words["devices"].isdigit() or int(words["devices"]) < 1:
        raise invalid("devices", words["devices"], "a whole number >= 1", "devices=1")
    out = _out(words, plan.name, plan.digest)
    options = [*changes]
    for name in ("only", "arms"):
        if getattr(arguments, name):
            options += [f"--{name}", *getattr(arguments, name)]
    for name in ("time_limit", "chunk", "threads"):
        if getattr(arguments, name) is not None:
            options += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    options += ["--retry-failed"] if arguments.retry_failed else []
    total = len(plan.cases) * len(plan.arms) * len(plan.directions)
    print(f"{plan.name}: {total} runs, baseline {plan.baseline}; results in {out}", flush=True)
    return out, run_everywhere(plan, path, options, out, device, int(words["devices"]))


def _models(
    path: Path, words: dict[str, str], changes: list[str], device: str, arguments: argparse.Namespace
) -> tuple[Path, int]:
    from natrain.bench.models import INSTEAD, read_model_plan, run_models
    from natrain.bench.options import Options
    from natrain.bench.plan import parse_changes

    options = Options.of(arguments, words["devices"], "models", INSTEAD)
    plan = read_model_plan(path, parse_changes(changes))
    out = _out(words, path.stem, plan.digest)
    return out, run_models(plan, out, device, options)


def _training(
    path: Path, words: dict[str, str], changes: list[str], device: str, arguments: argparse.Namespace
) -> tuple[Path, int]:
    from natrain.bench.options import Options
    from natrain.bench.training import INSTEAD, read_training_plan, run_training
    from natrain.cli.compose import compose_config

    options = Options.of(arguments, words["devices"], "training", INSTEAD)
    plan = read_training_plan(path, changes, words["device"])
    out = _out(words, path.stem, plan.digest)
    return out, run_training(plan, out, compose_config, options)


def _out(words: dict[str, str], name: str, digest: str) -> Path:
    return Path(words["out"] or f"runs/ablations/{name}-{digest[:6]}")
