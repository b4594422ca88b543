"""Trainings as jobs: what is typed for each, run one after the other here or in parallel on a cluster."""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from natrain.bench.environment import device_name
from natrain.errors import invalid
from natrain.training.metrics import read_metrics


@dataclass(frozen=True)
class Job:
    """One training: what is typed, where it goes."""

    kernel: str
    seed: int
    words: tuple[str, ...]
    folder: str
    trial: int | None = None

    @property
    def settings(self) -> list[str]:
        """All that is typed after ``natrain train``."""
        own = [f"kernel={self.kernel}", f"seed={self.seed}", f"run_dir={self.folder}", "resume=auto"]
        return [*self.words, *own]

    def command(self) -> list[str]:
        return [sys.executable, "-m", "natrain", "train", *self.settings]


@dataclass(frozen=True)
class Cluster:
    """Where jobs run: ``name`` None is here, else submitit's, with the options of its executor."""

    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    parallel: int = 4

    def check(self) -> None:
        """Whether jobs can be sent.

        Raises:
            ValueError: submitit or SLURM is missing, or an option that submitit does not know.
        """
        if self.name is None:
            return
        need("submitit", f"cluster={self.name}")
        if self.name == "slurm" and shutil.which("srun") is None:
            raise invalid("cluster", "slurm", "a machine of SLURM, with srun on its PATH", "cluster=local")
        self.executor(Path("jobs"))

    def executor(self, folder: Path):
        import submitit

        executor = submitit.AutoExecutor(folder=folder, cluster=self.name)
        try:
            executor.update_parameters(**self.options)
        except (NameError, TypeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())
            allowed = f"options of submitit's executor ({reason})"
            raise invalid("cluster_options", dict(self.options), allowed, "cluster_options.timeout_min=60") from None
        return executor


def need(package: str, wanted_by: str) -> None:
    """Raises: ValueError: the package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{wanted_by} needs {package}, which is not installed. Try: pip install 'natrain[ablate]'")


def run_job(job: Job) -> dict[str, Any]:
    """Train, in a process of its own; what a row says of it."""
    started = time.monotonic()
    done = subprocess.run(job.command(), capture_output=True, text=True)
    found: dict[str, Any] = {
        "device": device_name(computes_on(job.words)),
        "seconds": f"{time.monotonic() - started:.1f}",
    }
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return {**found, "status": "failed", "reason": lines[-1] if lines else f"exit code {done.returncode}"}
    metrics = read_metrics(Path(job.folder) / "metrics.csv")
    speeds = [row["images_per_s"] for row in metrics if "images_per_s" in row]
    last = {key: row[key] for row in metrics for key in ("top1", "val_loss", "loss") if key in row}
    return {
        **found,
        "status": "ok",
        **{key: f"{value:.5g}" for key, value in last.items()},
        "images_per_s": f"{statistics.median(speeds):.5g}" if speeds else None,
    }


def computes_on(words: Sequence[str]) -> str:
    """ "cuda" or "cpu": what ``natrain train`` with these words computes on, on this machine."""
    import torch

    return "cpu" if "trainer.accelerator=cpu" in words or not torch.cuda.is_available() else "cuda"


def run_jobs(cluster: Cluster, jobs: Sequence[Job], out: Path) -> Iterable[tuple[Job, dict[str, Any]]]:
    """Each job with its result, in their order, as they end."""
    if cluster.name is None:
        for job in jobs:
            yield job, run_job(job)
        return
    executor = cluster.executor(out / "jobs")

    def submit_and_wait(job: Job) -> dict[str, Any]:
        try:
            return executor.submit(run_job, job).result()
        except Exception as error:  # a lost node is a failed training, not the end of the others
            return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}

    with ThreadPoolExecutor(max_workers=cluster.parallel) as pool:
        yield from zip(jobs, pool.map(submit_and_wait, jobs), strict=True)


Record = Callable[[Job, Mapping[str, Any]], None]
