"""A sweep in several processes: one a device, and one a commit of this project, all writing to one CSV."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import natrain
from natrain.bench import at_commit
from natrain.bench.plan import Plan
from natrain.errors import invalid

# Two commits cannot take turns in one process; they take turns this many times, problem by problem, instead.
_TURNS = 4


def run_everywhere(plan: Plan, plan_file: Path, words: Sequence[str], out: Path, device: str, devices: int) -> int:
    """Measure what is missing: this code, then each commit, in turns; all devices at once.

    Args:
        words: further arguments of ``natrain.bench.sweep``, changes of the plan among them.
        devices: processes at once; process I gets the I-th visible GPU, or on a CPU its own cores.

    Returns:
        The first exit code that is not 0.

    Raises:
        ValueError: a commit that git does not know.
    """
    commits = list(dict.fromkeys(arm.commit for arm in plan.arms))
    codes = {commit: _code_of(commit, out) for commit in commits}
    turns = min(_TURNS, len(plan.cases)) if len(commits) > 1 else 1
    for turn in range(turns):
        for commit in commits:
            processes = []
            for index in range(devices):
                shard = f"{turn * devices + index}/{turns * devices}"
                command = [*codes[commit], str(plan_file), *words, "--out", str(out), "--device", device]
                command += ["--shard", shard] + (["--commit", commit] if commit else [])
                processes.append(subprocess.Popen(command, env=_environment(device, index)))
            results = [process.wait() for process in processes]
            if any(results):
                return next(filter(None, results))
    return 0


def _environment(device: str, index: int) -> dict[str, str]:
    """That of this process, with one GPU visible and this code importable."""
    environment = dict(os.environ)
    root = str(Path(natrain.__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    if device == "cuda":
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    return environment


def _code_of(commit: str | None, out: Path) -> list[str]:
    """The command that starts the sweep on the code of ``commit``."""
    if commit is None:
        return [sys.executable, "-m", "natrain.bench.sweep"]
    folder = export_commit(commit, out / "commits")
    return [sys.executable, str(Path(at_commit.__file__)), str(folder)]


def export_commit(commit: str, into: Path) -> Path:
    """The package as ``commit`` had it, in a folder of its own.

    Raises:
        ValueError: this natrain is no clone, or git does not know the commit.
    """
    root = Path(natrain.__file__).resolve().parents[1]
    found = subprocess.run(
        ["git", "-C", root, "rev-parse", "--verify", f"{commit}^{{commit}}"], capture_output=True, text=True
    )
    if found.returncode:
        raise invalid("commit", commit, f"a commit of the clone at {root}", "commit: HEAD~1")
    folder = into / found.stdout.strip()
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
        part.mkdir(parents=True)
        archive = subprocess.run(["git", "-C", root, "archive", folder.name], capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", part], input=archive.stdout, check=True)
        part.rename(folder)
    return folder
