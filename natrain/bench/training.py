"""Short real trainings with the kernel as the only difference, paired by seed; and searches over any setting.

    kind: training
    kernels: [naive, gemm, fused]
    baseline: naive
    seeds: 5                                   # trainings of each kernel, seed=0 to 4
    settings: [model=nat_cifar, data=cifar10]  # as typed after `natrain train`
    search: {optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}, augment.mixup: [0.0, 0.2, 0.8]}
    trials: 20                                 # with search: trainings that Optuna chooses; the baseline kernel and
                                               # seed 0, unless kernel and seed are searched or among the settings
    cluster: null                              # null: one after the other; local | slurm: submitit's jobs, in parallel
    cluster_options: {timeout_min: 60}         # what submitit's executor takes
    parallel: 4                                # jobs at once on a cluster

A row of training.csv is one training; its run folder with the loss curve lies beside it, and an interrupted training
goes on where its last checkpoint was.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from natrain.bench import rows
from natrain.bench.environment import commit_of_code, environment
from natrain.errors import invalid
from natrain.ops.registry import get_kernel
from natrain.training.metrics import read_metrics

COLUMNS = (
    "plan", "kernel", "seed", "trial", "settings", "status", "reason", "top1", "val_loss", "loss", "seconds",
    "images_per_s", "run", "device", "commit", "utc",
)  # fmt: skip
# 97.5 % quantile of Student's t by degrees of freedom, for two-sided 95 % intervals; beyond 30 the normal one.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class TrainingPlan:
    """See this module's head."""

    kernels: tuple[str, ...]
    baseline: str
    seeds: int
    settings: tuple[str, ...]
    text: str
    digest: str
    search: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 0
    cluster: str | None = None
    cluster_options: Mapping[str, Any] = field(default_factory=dict)
    parallel: int = 4


def read_training_plan(path: Path, changes: Sequence[str]) -> TrainingPlan:
    """The plan of a yaml; what is typed as key=value is one of its settings, or else one of ``natrain train``.

    Raises:
        ValueError: an unknown kernel, a value out of range.
    """
    import yaml

    text = path.read_text(encoding="utf-8")
    found = yaml.safe_load(text)
    known = ("kernels", "baseline", "seeds", "trials", "cluster", "parallel")
    words = list(found.get("settings", []))
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise invalid("setting", change, "key=value", "seeds=5")
        if key in known:
            found[key] = value.split(",") if key == "kernels" else yaml.safe_load(value)
        else:
            words = [word for word in words if _split(word)[0] != key.lstrip("+")] + [change]
    _refuse(words, found.get("search") or {})
    for name in found["kernels"]:
        if name != "auto":
            get_kernel(name)
    for key in ("seeds", "parallel"):
        if not isinstance(found.get(key, 1), int) or found.get(key, 1) < 1:
            raise invalid(key, found[key], "a whole number >= 1", f"{key}=3")
    if found.get("cluster") not in (None, "local", "slurm"):
        raise invalid("cluster", found["cluster"], "null, local or slurm", "cluster=slurm")
    fixed = [text, *words, *map(str, (found["kernels"], found["seeds"], found.get("trials", 0)))]
    return TrainingPlan(
        tuple(found["kernels"]),
        found["baseline"] if found.get("baseline") in found["kernels"] else found["kernels"][0],
        found["seeds"],
        tuple(words),
        text,
        hashlib.sha256("\0".join(fixed).encode()).hexdigest()[:12],
        found.get("search") or {},
        found.get("trials", 0),
        found.get("cluster"),
        found.get("cluster_options") or {},
        found.get("parallel", 4),
    )


def _split(word: str) -> tuple[str, str]:
    """Key and value of a setting as it is typed."""
    key, _, value = word.partition("=")
    return key.lstrip("+"), value


def _refuse(words: Sequence[str], search: Mapping[str, Any]) -> None:
    """Refuses what a training would be told twice."""
    for key, value in map(_split, words):
        if key in ("run_dir", "resume", "overwrite"):
            raise invalid(key, value, "no setting here: every training has a folder of its own below out", "out=DIR")
        if not search and key == "kernel":
            raise invalid(key, value, "no setting of a comparison: kernels are what differs", f"kernels={value}")
        if not search and key == "seed":
            raise invalid(key, value, "no setting of a comparison: each kernel trains with seed=0 to N-1", "seeds=5")
        if key in search:
            raise invalid(key, value, "no setting that the yaml searches", f"search without {key}, or no {key}=")


@dataclass(frozen=True)
class Job:
    """One training: what is typed, where it goes."""

    kernel: str
    seed: int
    words: tuple[str, ...]
    folder: str
    trial: int | None = None

    def command(self) -> list[str]:
        own = [f"kernel={self.kernel}", f"seed={self.seed}", f"run_dir={self.folder}", "resume=auto"]
        return [sys.executable, "-m", "natrain", "train", *self.words, *own]


def run_job(job: Job) -> dict[str, Any]:
    """Train, in a process of its own; what a row says of it."""
    started = time.monotonic()
    done = subprocess.run(job.command(), capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return {"status": "failed", "reason": lines[-1] if lines else f"exit code {done.returncode}"}
    metrics = read_metrics(Path(job.folder) / "metrics.csv")
    speeds = [row["images_per_s"] for row in metrics if "images_per_s" in row]
    last = {key: row[key] for row in metrics for key in ("top1", "val_loss", "loss") if key in row}
    return {
        "status": "ok",
        **{key: f"{value:.5g}" for key, value in last.items()},
        "images_per_s": f"{statistics.median(speeds):.5g}" if speeds else None,
        "seconds": f"{time.monotonic() - started:.1f}",
    }


def run_training(plan: TrainingPlan, out: Path, device: str) -> int:
    """Train what training.csv in ``out`` lacks, print the comparison.

    Raises:
        ValueError: the folder belongs to another plan.
        ModuleNotFoundError: Optuna or submitit is wanted and not installed.
    """
    path = out / "training.csv"
    out.mkdir(parents=True, exist_ok=True)
    rows.start(path, COLUMNS)
    done = list(rows.read(path, COLUMNS))
    if any(row["plan"] != plan.digest for row in done):
        raise invalid("out", str(out), f"a folder of this plan ({plan.digest})", "out=NEW")
    (out / "plan.yaml").write_text(plan.text, encoding="utf-8")
    with open(out / "environment.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({**environment(device), "baseline": plan.baseline, "plan": "training"}) + "\n")
    if plan.search:
        _search(plan, out, path)
        return 0
    found = {(row["kernel"], row["seed"]) for row in done}
    jobs = [
        Job(kernel, seed, plan.settings, str((out / "runs" / f"{kernel}-{seed}").resolve()))
        for seed in range(plan.seeds)
        for kernel in plan.kernels
        if (kernel, str(seed)) not in found
    ]
    total = len(plan.kernels) * plan.seeds
    print(f"training ({plan.digest}): {total} trainings in all, {len(jobs)} to run", flush=True)
    for job, result in _results(plan, jobs, out):
        _write(path, plan, job, result)
    for line in comparison(list(rows.read(path, COLUMNS)), plan.baseline):
        print(line)
    return 0


def _results(plan: TrainingPlan, jobs: Sequence[Job], out: Path) -> Iterable[tuple[Job, dict[str, Any]]]:
    """Each job with its result, as they end; in parallel on a cluster."""
    if plan.cluster is None:
        for job in jobs:
            yield job, run_job(job)
        return
    import submitit

    executor = submitit.AutoExecutor(folder=out / "jobs", cluster=plan.cluster)
    executor.update_parameters(**plan.cluster_options)

    def submit_and_wait(job: Job) -> dict[str, Any]:
        try:
            return executor.submit(run_job, job).result()
        except Exception as error:  # a lost node is a failed training, not the end of the others
            return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}

    with ThreadPoolExecutor(max_workers=plan.parallel) as pool:
        yield from zip(jobs, pool.map(submit_and_wait, jobs), strict=True)


def _write(path: Path, plan: TrainingPlan, job: Job, result: Mapping[str, Any]) -> None:
    row = {
        "plan": plan.digest,
        "kernel": job.kernel,
        "seed": job.seed,
        "trial": job.trial,
        "settings": " ".join(job.words),
        "run": Path(job.folder).name,
        "device": environment_name(),
        "commit": commit_of_code(),
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **result,
    }
    rows.append(path, row, COLUMNS)
    shown = f"top-1 {result['top1']} %, {result['images_per_s']} images/s" if "top1" in result else result["reason"]
    print(f"{job.kernel} seed {job.seed}{'' if job.trial is None else f' trial {job.trial}'}: {shown}", flush=True)


def environment_name() -> str:
    """The device that ``natrain train`` finds on this machine."""
    import torch

    return environment("cuda" if torch.cuda.is_available() else "cpu")["device"]


def _search(plan: TrainingPlan, out: Path, path: Path) -> None:
    """Optuna chooses; its study lies in the folder too, so that the same command goes on."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=plan.digest,
        storage=f"sqlite:///{(out / 'optuna.db').resolve()}",
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        load_if_exists=True,
    )
    finished = [trial for trial in study.trials if trial.state.is_finished()]
    print(f"search ({plan.digest}): {plan.trials} trials in all, {len(finished)} done", flush=True)
    left = plan.trials - len(finished)
    while left > 0:
        width = min(left, plan.parallel if plan.cluster else 1)
        trials = [study.ask() for _ in range(width)]
        jobs = []
        for trial in trials:
            chosen = [f"{key}={_suggest(trial, key, space)}" for key, space in plan.search.items()]
            folder = out / "runs" / f"trial-{trial.number}"
            jobs.append(_trial_job(plan, chosen, str(folder.resolve()), trial.number))
        for trial, (job, result) in zip(trials, _results(plan, jobs, out), strict=True):
            _write(path, plan, job, result)
            if "top1" in result:
                study.tell(trial, float(result["top1"]))
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
        left -= width
    if any(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.trials):
        best = study.best_trial
        words = " ".join(f"{key}={value}" for key, value in best.params.items())
        print(f"best: top-1 {best.value:.2f} %, trial {best.number}: {words}")


def _trial_job(plan: TrainingPlan, chosen: Sequence[str], folder: str, number: int) -> Job:
    """The training of a trial; a kernel or seed that is chosen or typed is the one that its row names."""
    words = dict(map(_split, (*plan.settings, *chosen)))
    kernel, seed = words.pop("kernel", plan.baseline), int(words.pop("seed", 0))
    kept = [word for word in (*plan.settings, *chosen) if _split(word)[0] in words]
    return Job(kernel, seed, tuple(kept), folder, number)


def _suggest(trial: Any, key: str, space: Any) -> Any:
    if isinstance(space, list):
        return trial.suggest_categorical(key, space)
    if isinstance(space, dict) and {"low", "high"} <= set(space) <= {"low", "high", "log", "step"}:
        kind = trial.suggest_int if isinstance(space["low"], int) else trial.suggest_float
        return kind(key, **space)
    raise invalid(f"search.{key}", space, "a list of values, or {low: , high: , log: }", "[0.0, 0.2]")


def paired_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences and the bounds of its 95 % interval (Student's t); infinite for one pair."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, -math.inf, math.inf
    freedom = len(differences) - 1
    quantile = _T[freedom - 1] if freedom <= len(_T) else 1.960
    half = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def comparison(found: Sequence[Mapping[str, str]], baseline: str) -> list[str]:
    """A line a kernel: difference of accuracy from the baseline's at the same seed, and how much faster it trains."""
    by_seed: dict[str, dict[str, Mapping[str, str]]] = {}
    for row in found:
        if row["status"] == "ok":
            by_seed.setdefault(row["kernel"], {})[row["seed"]] = row
    lines = []
    for kernel, own in by_seed.items():
        pairs = [(row, by_seed[baseline][seed]) for seed, row in own.items() if seed in by_seed.get(baseline, {})]
        if kernel == baseline or not pairs:
            continue
        mean, low, high = paired_interval([float(row["top1"]) - float(other["top1"]) for row, other in pairs])
        ratios = [float(row["images_per_s"]) / float(other["images_per_s"]) for row, other in pairs]
        speed, slowest, fastest = (math.exp(value) for value in paired_interval([math.log(ratio) for ratio in ratios]))
        lines.append(
            f"{kernel} against {baseline}, {len(pairs)} seeds: top-1 {mean:+.2f} points "
            f"(95 %: {low:+.2f} to {high:+.2f}), {speed:.2f}x the images/s (95 %: {slowest:.2f} to {fastest:.2f})"
        )
    return lines
