"""A sweep in several processes: one a device, and one a commit of this project, all writing to one CSV.

A commit gets rows whatever it is: those of its contenders that its code cannot run say why.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import natrain
from natrain.bench import at_commit, rows, worker
from natrain.bench.plan import ArmSpec, Plan, check_kernels, check_names
from natrain.bench.supervise import crash_of, locked
from natrain.bench.sweep import Missing, Options, count_runs, estimated_s, missing_runs
from natrain.bench.threads import threads_each
from natrain.errors import invalid

# Two commits cannot take turns in one process; they take turns this many times, problem by problem, instead.
_TURNS = 4
_POLL_S = 0.05
_START_S = 6.0  # of a process, until it measures: imports, ceilings


def run_everywhere(
    plan: Plan, plan_file: Path, changes: Sequence[str], options: Options, devices: Sequence[int]
) -> int:
    """Measure what is missing: this code, then each commit, in turns; all devices at once.

    Args:
        changes: of the plan, as typed.
        devices: a process each, on that visible GPU, or on a CPU on cores of its own.

    Returns:
        0; 1 where runs of the plan failed or a process could not go on; 3 at the time limit.

    Raises:
        ValueError: a commit that git does not know, an unknown contender, a device or core that is not there, results
            that were measured in another way, another sweep at work in the folder.
    """
    short = [arm.name for arm in plan.arms]
    plan = with_commits(plan)
    check_names(plan)
    check_kernels(plan)
    if options.arms is not None:
        full = dict(zip(short, (arm.name for arm in plan.arms), strict=True))
        options = replace(options, arms=[full.get(name, name) for name in options.arms])
    if options.device == "cpu":
        options = replace(options, threads=threads_each(options.threads, "--threads ", len(devices)))
    environments = [_environment(options.device, device) for device in devices]
    missing = {
        commit: missing_runs(plan, replace(options, commit=commit))
        for commit in dict.fromkeys(arm.commit for arm in plan.arms)
    }
    _announce(plan, missing, options, len(devices))
    fixed = [
        *changes,
        f"kernels={json.dumps([asdict(arm) for arm in plan.arms])}",
        f"baseline={json.dumps(plan.baseline)}",
    ]
    commits = [commit for commit, runs in missing.items() if runs]
    deadline = None if options.time_limit_s is None else time.monotonic() + options.time_limit_s
    if commits:
        sweep = _Sweep(plan, plan_file, fixed, environments, commits, deadline)
        with locked(options.out) as lock:
            (options.out / "plan.yaml").write_text(plan.text, encoding="utf-8")
            if code := sweep.run(options, lock):
                return code
    return _report_failures(plan, options)


def with_commits(plan: Plan) -> Plan:
    """``plan`` with the short SHA of each commit, also in the names of its contenders.

    So a name means one state of the code for ever: ``HEAD`` is another contender after the next commit.

    Raises:
        ValueError: git does not know a commit.
    """
    arms = tuple(arm if arm.commit is None else _at_sha(arm, _resolved(arm.commit)) for arm in plan.arms)
    baseline = next(new.name for old, new in zip(plan.arms, arms, strict=True) if old.name == plan.baseline)
    return replace(plan, arms=arms, baseline=baseline)


def _at_sha(arm: ArmSpec, sha: str) -> ArmSpec:
    return ArmSpec(f"{arm.name.removesuffix(f'@{arm.commit}')}@{sha}", arm.kernel, sha)


def _announce(plan: Plan, missing: Mapping[str | None, Missing], options: Options, processes: int) -> None:
    """One line about the plan, one about what is left of it in all."""
    total = len(plan.cases) * len(plan.arms) * len(plan.directions)
    left_out = f", {plan.num_left_out} combinations whose window does not fit left out" if plan.num_left_out else ""
    print(f"{plan.name}: {len(plan.cases)} problems, {total} runs in all, baseline {plan.baseline}{left_out}")
    runs = sum(map(count_runs, missing.values()))
    seconds = (
        sum(estimated_s(plan, part, options.device, options.threads or 1) for part in missing.values()) / processes
    )
    commits = sum(map(bool, missing.values()))
    seconds += _START_S * commits * (_num_turns(plan) if commits > 1 else 1)
    how = [f"{processes} processes"] * (processes > 1)
    how += [f"{options.threads} threads, wall clock"] * (options.device == "cpu")
    words = ", ".join([f"to measure: {runs} runs on {options.device}", *how, f"about {seconds:.0f} s"])
    print(f"{words}; {options.results}", flush=True)


def _num_turns(plan: Plan) -> int:
    return min(_TURNS, len(plan.cases))


@dataclass
class _Sweep:
    """``commits`` whose code cannot run are taken out as that is found; ``deadline``: of ``time.monotonic``."""

    plan: Plan
    plan_file: Path
    changes: list[str]
    environments: list[dict[str, str]]
    commits: list[str | None]
    deadline: float | None

    def run(self, options: Options, lock: int) -> int:
        turns = _num_turns(self.plan) if len(self.commits) > 1 else 1
        count = len(self.environments)
        for turn in range(turns):
            for commit in list(self.commits):
                share = replace(options, commit=commit)
                shares = [replace(share, slot=i, shard=(turn * count + i, turns * count)) for i in range(count)]
                code = self._measure([share for share in shares if missing_runs(self.plan, share)], lock)
                if code == 1 and commit is not None:
                    code = self._give_up(replace(options, commit=commit), lock)
                if code:
                    return code
        return 0

    def _give_up(self, options: Options, lock: int) -> int:
        """Rows that say why the code of a commit cannot run, written by today's."""
        self.commits.remove(options.commit)
        file = _reason_file(options)
        reason = file.read_text(encoding="utf-8") if file.exists() else "its process died before it measured anything"
        file.unlink(missing_ok=True)
        print(f"commit {options.commit} cannot be measured: {reason}", flush=True)
        return self._measure([replace(options, broken=f"commit {options.commit}: {reason}")], lock)

    def _measure(self, shares: Sequence[Options], lock: int) -> int:
        """All at once, each started again where it crashed in a problem; the worst exit code."""
        for options in shares:
            options.running.unlink(missing_ok=True)
        processes = {options.slot: self._start(options, lock, None) for options in shares}
        codes = [0]
        try:
            while processes:
                time.sleep(_POLL_S)
                for options in [options for options in shares if options.slot in processes]:
                    code = processes[options.slot].poll()
                    if code is None:
                        continue
                    death = "device lost" if code == worker.DEVICE_LOST else crash_of(code)
                    if death is not None and options.running.exists():
                        processes[options.slot] = self._start(options, lock, death)
                        continue
                    del processes[options.slot]
                    if death is not None:
                        print(f"the process died ({death}) before it measured anything", flush=True)
                    codes.append(1 if death is not None else 128 - code if code < 0 else code)
        finally:
            for process in processes.values():
                process.terminate()
                process.wait()
        return max(codes)

    def _start(self, options: Options, lock: int, death: str | None) -> subprocess.Popen:
        if self.deadline is not None:
            options = replace(options, time_limit_s=max(0.0, self.deadline - time.monotonic()))
        job = worker.as_json(self.plan_file, self.changes, options, os.getpid(), death)
        if options.commit is None or options.broken:
            code = [sys.executable, "-m", "natrain.bench.worker"]
        else:
            folder = export_commit(options.commit, options.out / "commits")
            code = [sys.executable, str(Path(at_commit.__file__)), str(folder), str(_reason_file(options))]
        # The lock is the workers' too: where this process is killed, the folder is free when they are gone.
        return subprocess.Popen([*code, job], env=self.environments[options.slot], pass_fds=[lock])


def _reason_file(options: Options) -> Path:
    return options.out / f".reason-{options.commit}"


def _report_failures(plan: Plan, options: Options) -> int:
    """1 where a run of the plan failed in the end, with a line that says so."""
    wanted = {
        rows.key({**case.words, "arm": arm.name, "direction": which})
        for case in plan.cases
        for arm in plan.arms
        for which in plan.directions
    }
    last = {rows.key(row): row["status"] for row in rows.read(options.results)}
    failed = sum(status == "failed" for run, status in last.items() if run in wanted)
    if failed:
        print(f"{failed} runs failed, for the reasons in {options.results}; --retry-failed measures them again")
    return 1 if failed else 0


def _environment(device: str, index: int) -> dict[str, str]:
    """That of this process, with the ``index``-th of its GPUs visible and this code importable.

    Raises:
        ValueError: there is no such GPU.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_root()), environment.get("PYTHONPATH")]))
    if device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = _gpu(index)
    return environment


def _gpu(index: int) -> str:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    if index >= len(names):
        known = f", those of CUDA_VISIBLE_DEVICES={visible}" if visible else ""
        allowed = f"indices below {len(names)}{known}"
        raise invalid("devices", index, allowed, f"devices={len(names)}" if names else "device=cpu")
    return names[index]


def _root() -> Path:
    return Path(natrain.__file__).resolve().parents[1]


def _resolved(commit: str) -> str:
    """Its short SHA.

    Raises:
        ValueError: this natrain is no clone, or git does not know the commit.
    """
    found = subprocess.run(
        ["git", "-C", _root(), "rev-parse", "--short=10", "--verify", f"{commit}^{{commit}}"],
        capture_output=True,
        text=True,
    )
    if found.returncode:
        raise invalid("commit", commit, f"a commit of the clone at {_root()}", "commit: HEAD~1")
    return found.stdout.strip()


def export_commit(sha: str, into: Path) -> Path:
    """The package as that commit had it, in a folder of its own."""
    folder = into.resolve() / sha
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
        part.mkdir(parents=True)
        archive = subprocess.run(["git", "-C", _root(), "archive", sha], capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", part], input=archive.stdout, check=True)
        part.rename(folder)
    return folder
