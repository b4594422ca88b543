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
goes on where its last checkpoint was. More kernels, seeds or trials in the same folder add to it; other settings are
another comparison.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from natrain.bench import rows
from natrain.bench.environment import add_session, commit_of_code
from natrain.bench.jobs import Cluster, Job, computes_on, need, run_jobs
from natrain.bench.model_cost import Cost
from natrain.bench.options import Options
from natrain.bench.plan import as_names, read_settings, value_of
from natrain.bench.search import check_space, examples, run_search
from natrain.data import build_datamodule
from natrain.errors import invalid, nearest
from natrain.ops.registry import get_kernel
from natrain.training import validate
from natrain.training.build import build_model, model_input
from natrain.training.plan import make_plan

COLUMNS = (
    "plan", "kernel", "seed", "trial", "settings", "status", "reason", "top1", "val_loss", "loss", "seconds",
    "images_per_s", "run", "device", "commit", "utc",
)  # fmt: skip
_DEFAULTS = {
    "kind": "training",
    "kernels": ["auto"],
    "baseline": None,
    "seeds": 1,
    "settings": [],
    "search": None,
    "trials": 0,
    "cluster": None,
    "cluster_options": None,
    "parallel": 4,
}
# Options of `natrain ablate` that are for sweeps alone -> what says the same here.
INSTEAD = {
    "only": "kernels=cpu seeds=1 into the same out=",
    "arms": "kernels=cpu,reference into the same out=",
    "threads": "OMP_NUM_THREADS=2 natrain ablate ...",
    "chunk": "parallel=4 with cluster=local",
    "devices": "trainer.devices=4, or cluster=local parallel=4",
}
_START_S = 12  # of one training: its process, its imports, its data; a guess
# 97.5 % quantile of Student's t by degrees of freedom, for two-sided 95 % intervals; beyond 30 the normal one.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class TrainingPlan:
    """See this module's head; ``digest`` covers what a training's result depends on."""

    kernels: tuple[str, ...]
    baseline: str
    seeds: int
    settings: tuple[str, ...]
    text: str
    digest: str
    search: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 0
    cluster: Cluster = field(default_factory=Cluster)

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """(kernel, seed) of every training of a comparison."""
        return [(kernel, seed) for seed in range(self.seeds) for kernel in self.kernels]

    def trial(self, chosen: Sequence[str], folder: str, number: int | None) -> Job:
        """The training of a trial; a kernel or seed that is chosen or typed is the one that its row names."""
        words = dict(map(_split, (*self.settings, *chosen)))
        kernel, seed = words.pop("kernel", self.baseline), int(words.pop("seed", 0))
        kept = [word for word in (*self.settings, *chosen) if _split(word)[0] in words]
        return Job(kernel, seed, tuple(kept), folder, number)


def read_training_plan(path: Path, changes: Sequence[str], device: str | None = None) -> TrainingPlan:
    """The plan of a yaml; what is typed as key=value is one of its settings, or else one of ``natrain train``.

    Args:
        device: "cuda" or "cpu" where one was asked for; None: what ``natrain train`` finds.

    Raises:
        ValueError: an unknown kernel, a value out of range, what a training would be told twice.
    """
    found = {**_DEFAULTS, **read_settings(path)}
    for key in set(found) - set(_DEFAULTS):
        known = ", ".join(_DEFAULTS)
        raise invalid("setting", key, f"one of {known}", f"{nearest(str(key), _DEFAULTS) or 'seeds'}: ...")
    _check_kinds(found)
    typed, words = _apply(found, changes, device)
    found["kernels"] = as_names("kernels", found["kernels"], "naive,fused")
    search = found["search"] or {}
    _refuse(words, search)
    check_space(search)
    _check(found, typed)
    baseline = found["baseline"] if found["baseline"] in found["kernels"] else found["kernels"][0]
    fixed = [*sorted(words), *([repr(search), baseline] if search else [])]
    return TrainingPlan(
        tuple(found["kernels"]),
        baseline,
        found["seeds"],
        tuple(words),
        path.read_text(encoding="utf-8"),
        hashlib.sha256("\0".join(fixed).encode()).hexdigest()[:12],
        search,
        found["trials"],
        Cluster(found["cluster"], found["cluster_options"] or {}, found["parallel"]),
    )


def _check_kinds(found: Mapping[str, Any]) -> None:
    """Refuses values of the yaml that are of another kind than this code takes."""
    settings = found["settings"]
    if not isinstance(settings, list) or not all(isinstance(word, str) and "=" in word for word in settings):
        allowed = "a list of what is typed after `natrain train`, each key=value"
        raise invalid("settings", settings, allowed, "settings: [model=nat_cifar, data=cifar10]")
    for key, example in (("search", "{optim.lr: [1.0e-3, 2.0e-3]}"), ("cluster_options", "{timeout_min: 60}")):
        value = found[key]
        if value is not None and not (isinstance(value, dict) and all(isinstance(name, str) for name in value)):
            raise invalid(key, value, "names with their values, or null", f"{key}: {example}")


def _apply(found: dict[str, Any], changes: Sequence[str], device: str | None) -> tuple[set[str], list[str]]:
    """Changes ``found`` as typed; the keys of it that were, and the settings of every training."""
    typed, words, options = set(), list(found["settings"]), dict(found["cluster_options"] or {})
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise invalid("setting", change, "key=value", "seeds=5")
        if key.startswith("cluster_options."):
            options[key.partition(".")[2]] = value_of(change)
        elif key == "kernels":
            found[key] = [name.strip() for name in value.strip("[]").split(",")]
            typed.add(key)
        elif key in ("baseline", "seeds", "trials", "cluster", "parallel"):
            found[key] = value_of(change)
            typed.add(key)
        else:
            words = [word for word in words if _split(word)[0] != key.lstrip("+")] + [change]
            typed.add(key)
    found["cluster_options"] = options
    if device is not None:
        if "trainer.accelerator" in typed:
            raise invalid("device", device, "no device beside trainer.accelerator", "one of the two")
        words = [word for word in words if _split(word)[0] != "trainer.accelerator"]
        words.append(f"trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}")
    return typed, words


def _check(found: Mapping[str, Any], typed: set[str]) -> None:
    """Refuses values out of range, and what was typed and would do nothing."""
    kernels, baseline, search = found["kernels"], found["baseline"], found["search"]
    if "seeds" in typed and search:
        raise invalid("seeds", found["seeds"], "no seeds with a search", "seed=0")
    if "trials" in typed and not search:
        raise invalid("trials", found["trials"], "no trials without a search", "seeds=5")
    for name in kernels:
        if name != "auto":
            get_kernel(name)
    for key in ("seeds", "parallel", *(["trials"] if search else [])):
        if type(found[key]) is not int or found[key] < 1:
            raise invalid(key, found[key], "a whole number >= 1", f"{key}=3")
    if found["cluster"] not in (None, "local", "slurm"):
        raise invalid("cluster", found["cluster"], "null, local or slurm", "cluster=slurm")
    is_meant = "baseline" in typed or (baseline is not None and "kernels" not in typed)
    if is_meant and baseline not in kernels:
        raise invalid("baseline", baseline, f"one of {', '.join(kernels)}", f"baseline={kernels[0]}")


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


def run_training(
    plan: TrainingPlan, out: Path, compose: Callable[[list[str]], DictConfig], options: Options | None = None
) -> int:
    """Train what training.csv in ``out`` lacks, print the comparison.

    Args:
        compose: from settings as typed to a configuration; raises ValueError for wrong ones.

    Returns:
        0; 1 where a training of the plan failed or none has an accuracy; 3 where the time limit came first.

    Raises:
        ValueError: the folder belongs to another plan, a setting is wrong, Optuna or submitit is wanted and missing.
    """
    options = options or Options()
    plan.cluster.check()
    if options.time_limit_s is not None and plan.cluster.name is not None:
        fix = "cluster_options.timeout_min=60"
        raise invalid(
            "--time-limit", options.time_limit_s, "no time limit with a cluster, where jobs have their own", fix
        )
    if plan.search:
        need("optuna", "a search")
    path = out / "training.csv"
    done = list(rows.read(path, COLUMNS)) if path.exists() else []
    if any(row["plan"] != plan.digest for row in done):
        raise invalid("out", str(out), f"a folder of this plan ({plan.digest}): same settings, same search", "out=NEW")
    latest = {row["run"]: row for row in done}
    found = {run: row for run, row in latest.items() if row["status"] == "ok" or not options.retry_failed}
    total = plan.trials if plan.search else len(plan.jobs)
    jobs = [
        Job(kernel, seed, plan.settings, str((out / "runs" / f"{kernel}-{seed}").resolve()))
        for kernel, seed in ([] if plan.search else plan.jobs)
        if f"{kernel}-{seed}" not in found
    ]
    count = max(0, total - len(found)) if plan.search else len(jobs)
    each_s = _check_and_estimate(plan, out, compose) if count else 0.0
    width = plan.cluster.parallel if plan.cluster.name else 1
    kind = "trials" if plan.search else "trainings"
    guess = f", about {math.ceil(count / width) * each_s:.0f} s" if count else ""
    print(f"training ({plan.digest}): {total} {kind} in all, {count} to run{guess}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    rows.start(path, COLUMNS)
    (out / "plan.yaml").write_text(plan.text, encoding="utf-8")
    if count:
        add_session(out, computes_on(plan.settings), {"baseline": plan.baseline, "plan": "training"})
    progress = _Progress(count, width, options.time_limit_s, each_s)

    def record(job: Job, result: Mapping[str, Any]) -> None:
        _write(path, plan, job, result)
        progress.count_one()

    if plan.search:
        study = (plan.digest, plan.search, plan.trials, plan.trial, plan.cluster, out)
        is_whole = run_search(*study, found, record, progress.has_time)
    else:
        is_whole = True
        for part in [jobs] if plan.cluster.name else [[job] for job in jobs]:
            if not progress.has_time():
                is_whole = False
                break
            for job, result in run_jobs(plan.cluster, part, out):
                record(job, result)
        for line in comparison(list(rows.read(path, COLUMNS)), plan.baseline):
            print(line)
    if not is_whole:
        print(f"stopped by the time limit of {options.time_limit_s:.0f} s; {progress.left} are left, run it again")
        return 3
    names = None if plan.search else {f"{kernel}-{seed}" for kernel, seed in plan.jobs}
    latest = {row["run"]: row["status"] for row in rows.read(path, COLUMNS) if names is None or row["run"] in names}
    return int("failed" in latest.values() or "ok" not in latest.values())


def _check_and_estimate(plan: TrainingPlan, out: Path, compose: Callable[[list[str]], DictConfig]) -> float:
    """Checks every setting and the data as ``natrain train`` does; a guess of the seconds of one training."""
    folder = str((out / "runs" / "check").resolve())
    jobs = [Job(plan.baseline, 0, plan.settings, folder)]
    if plan.search:
        jobs = [plan.trial(words, folder, None) for words in examples(plan.search)]
    configs = [compose(job.settings) for job in jobs]
    for cfg in configs:
        if plan.cluster.name == "slurm":  # whose nodes have other devices than this machine
            cfg.trainer.accelerator, cfg.trainer.num_nodes = "cpu", 1
        validate(cfg)
    cfg = configs[0]
    images = model_input(cfg)
    data = build_datamodule(cfg.data, cfg.augment, input=images, micro_batch=1, seed=0, global_batch=cfg.global_batch)
    steps = make_plan(cfg, data.num_train).steps_per_epoch * (cfg.schedule.epochs + cfg.schedule.cooldown_epochs)
    with torch.device("meta"):
        model = build_model(
            cfg.model.name,
            OmegaConf.to_container(cfg.model.args),
            num_classes=data.num_classes,
            input=images,
            kernel="auto",
        )
    if cfg.trainer.max_steps is not None:
        steps = min(steps, cfg.trainer.max_steps)
    device = "cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu"
    cost = Cost.of(model, (images["in_chans"], *images["img_size"]))
    step_s = cost.step_seconds(cfg.global_batch, device, "training")
    image_s = cost.step_seconds(cfg.global_batch, device, "inference") / cfg.global_batch
    evaluations = math.ceil(steps * cfg.global_batch / data.num_train)
    return _START_S + steps * step_s + evaluations * data.num_val * image_s


class _Progress:
    """Trainings that are left, and the time they take: guessed first, then as those before took."""

    def __init__(self, left: int, width: int, limit_s: float | None, each_s: float) -> None:
        self.left, self._width, self._limit_s, self._each_s = left, width, limit_s, each_s
        self._started, self._done = time.monotonic(), 0

    def has_time(self) -> bool:
        return self._limit_s is None or time.monotonic() - self._started + self._each_s <= self._limit_s

    def count_one(self) -> None:
        self.left, self._done = self.left - 1, self._done + 1
        self._each_s = (time.monotonic() - self._started) / self._done
        if self.left and self._done % self._width == 0:
            print(f"{self.left} left, about {self.left * self._each_s:.0f} s", flush=True)


def _write(path: Path, plan: TrainingPlan, job: Job, result: Mapping[str, Any]) -> None:
    row = {
        "plan": plan.digest,
        "kernel": job.kernel,
        "seed": job.seed,
        "trial": job.trial,
        "settings": " ".join(job.words),
        "run": Path(job.folder).name,
        "commit": commit_of_code(),
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **result,
    }
    rows.append(path, row, COLUMNS)
    shown = f"top-1 {result['top1']} %, {result['images_per_s']} images/s" if "top1" in result else result["reason"]
    print(f"{job.kernel} seed {job.seed}{'' if job.trial is None else f' trial {job.trial}'}: {shown}", flush=True)


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
    """A line a kernel: difference of accuracy from the baseline's at the same seed, and how much faster it trains.

    Trials of a search are left out: more than their kernels differs.
    """
    by_seed: dict[str, dict[str, Mapping[str, str]]] = {}
    for row in found:
        if row["status"] == "ok" and not row["trial"]:
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
