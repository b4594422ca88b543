"""Run a sweep: every contender on every problem of a yaml, one row of a CSV each; goes on where it was stopped.

    python3 -m natrain.bench.sweep PLAN.yaml --out DIR --only dtype=fp16 --time-limit 540

Needs torch, timm and PyYAML alone. What was measured stays measured: the same command again measures what is missing,
after a kill too. ``natrain ablate`` is the same with names in place of files, and with several devices and commits.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from natrain.bench import rows
from natrain.bench.ahead import Ahead
from natrain.bench.arms import Arm, find_arm
from natrain.bench.case import WORDS, Case
from natrain.bench.ceilings import copy_bytes_per_s, product_flops_per_s
from natrain.bench.environment import commit_of_code, environment
from natrain.bench.estimate import kernel_seconds
from natrain.bench.plan import ArmSpec, Plan, parse_changes, read_plan
from natrain.bench.run_case import DeviceLost, Outcome, Setup, close_calls, run_case
from natrain.errors import invalid
from natrain.ops.precision import tf32_products

# What a contender costs besides its timed calls, measured roughly: truth, warm-ups, capture; emptying the caches.
_OVERHEAD_S = {"cuda": 0.08, "cpu": 0.02}
_FLUSH_S = {"cuda": 0.0002, "cpu": 0.03}
_TRIES = 2  # times that a problem may end the process before it counts as failed

Missing = dict[Case, dict[ArmSpec, list[str]]]


@dataclass(frozen=True)
class Options:
    """What does not change the results: where, which part, how long."""

    out: Path
    device: str
    only: Mapping[str, str]
    arms: Sequence[str] | None = None
    time_limit_s: float | None = None
    chunk: int = 24
    shard: tuple[int, int] = (0, 1)
    retry_failed: bool = False
    threads: int | None = None
    commit: str | None = None

    @property
    def results(self) -> Path:
        return self.out / "results.csv"


def missing_runs(plan: Plan, options: Options) -> Missing:
    """What is not in the CSV yet, by problem, in a fixed random order: any part of a sweep covers all of its kinds.

    Raises:
        ValueError: the CSV belongs to another yaml; ``only`` selects nothing.
    """
    found = set()
    if options.results.exists():
        for row in rows.read(options.results):
            if row["plan"] != plan.digest:
                raise invalid(
                    "--out",
                    str(options.out),
                    f"a folder of this plan ({plan.digest}), not of {row['plan']}",
                    "--out NEW",
                )
            if row["status"] == "ok" or not options.retry_failed:
                found.add(rows.key(row))
    index, count = options.shard
    cases = [case for case in plan.cases if all(str(case.words[word]) == value for word, value in options.only.items())]
    if not cases:
        raise invalid("--only", dict(options.only), "words that some problem has", "--only dtype=fp16")
    random.Random(plan.digest).shuffle(cases)
    missing: Missing = {}
    for case in cases[index::count]:
        for arm in plan.arms:
            if arm.commit != options.commit or (options.arms is not None and arm.name not in options.arms):
                continue
            wanted = [
                which
                for which in plan.directions
                if rows.key({**case.words, "arm": arm.name, "direction": which}) not in found
            ]
            if wanted:
                missing.setdefault(case, {})[arm] = wanted
    return missing


def count_runs(missing: Missing) -> int:
    return sum(len(which) for arms in missing.values() for which in arms.values())


def estimated_s(plan: Plan, missing: Missing, device: str) -> float:
    """A guess of the seconds that these runs take once all is compiled."""
    total = 0.0
    for case, arms in missing.items():
        for arm, directions in arms.items():
            for which in directions:
                call = kernel_seconds(case, arm.kernel, which, device)
                total += _OVERHEAD_S[device] + min(plan.seconds, (plan.runs + 6) * (call + _FLUSH_S[device]))
    return total


def _to_compile(missing: Missing) -> list[tuple[Case, list[str]]]:
    return [(case, [arm.kernel for arm in arms]) for case, arms in missing.items()]


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Hides what exists from the garbage collector: every problem collects, and torch alone takes 0.1 s each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_only_new_garbage()
def run_sweep(plan: Plan, options: Options) -> int:
    """Measure what is missing; 0 when nothing is missing any more, 3 when the time limit came first.

    Raises:
        DeviceLost: a kernel broke the device; its row is written, and a new process goes on.
    """
    if options.device == "cuda":
        with tf32_products(plan.tf32):
            return _run(plan, options)
    if options.threads is not None:
        pin_threads(options.threads, options.shard[0])
    return _run(plan, options)


def _run(plan: Plan, options: Options) -> int:
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    missing, ahead = missing_runs(plan, options), Ahead()
    _announce(plan, missing, ahead, options)
    if not missing:
        return 0
    arms = {spec: _named(spec) for case in missing.values() for spec in case}
    rows.start(options.results)
    _keep_plan(plan, options)
    writer = _Writer(plan, options)
    setup = Setup(options.device, plan.runs, plan.timer, plan.cache, plan.seconds)
    todo, done = list(missing.items()), 0

    def has_time_for(part: Missing, is_compiled: bool) -> bool:
        if options.time_limit_s is None:
            return True
        needed = estimated_s(plan, dict([next(iter(part.items()))]), options.device)
        needed += 0 if is_compiled or options.device == "cpu" else ahead.seconds(_to_compile(part))
        return time.monotonic() - started + needed <= options.time_limit_s

    while done < len(todo):
        size = options.chunk
        while not has_time_for(part := dict(todo[done : done + size]), is_compiled=False):
            if size == 1:
                return _stop(len(todo) - done, options)
            size //= 2
        if compiled := ahead.compile(_to_compile(part)) if options.device == "cuda" else 0:
            print(f"compiled {compiled} kernels, {time.monotonic() - started:.0f} s since the start", flush=True)
        for case, wanted in part.items():
            if not has_time_for({case: wanted}, is_compiled=True):
                return _stop(len(todo) - done, options)
            done += 1
            with _Attempt(options, case) as tries:
                if tries > _TRIES:
                    _give_up(writer, case, wanted)
                    continue
                found = []
                for outcome in run_case(case, {arms[spec]: which for spec, which in wanted.items()}, setup):
                    writer.write(case, outcome)
                    found.append(outcome)
            _say(f"[{done}/{len(todo)}] {case.name}", found, plan.baseline)
    print(f"done in {time.monotonic() - started:.0f} s: {options.results}")
    return 0


def pin_threads(threads: int, index: int) -> None:
    """Compute with so many threads on as many cores, those after the ones of the processes before the ``index``-th."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[(index * threads + i) % len(cores)] for i in range(threads)})
    torch.set_num_threads(threads)


def _announce(plan: Plan, missing: Missing, ahead: Ahead, options: Options) -> None:
    runs = count_runs(missing)
    total = len(plan.cases) * len(plan.arms) * len(plan.directions)
    left_out = f", {plan.num_left_out} combinations whose window does not fit left out" if plan.num_left_out else ""
    print(f"{plan.name} ({plan.digest}): {len(plan.cases)} problems, {total} runs in all{left_out}")
    threads = f", {torch.get_num_threads()} threads, wall clock" if options.device == "cpu" else ""
    seconds = estimated_s(plan, missing, options.device)
    seconds += ahead.seconds(_to_compile(missing)) if options.device == "cuda" else 0
    print(f"to measure: {runs} runs on {options.device}{threads}, about {seconds:.0f} s; {options.results}", flush=True)


def _keep_plan(plan: Plan, options: Options) -> None:
    """The yaml and the environment of each session beside the rows."""
    (options.out / "plan.yaml").write_text(plan.text, encoding="utf-8")
    dtypes = sorted({case.dtype_name for case in plan.cases})
    note = {
        **environment(options.device),
        "plan": plan.name,
        "baseline": plan.baseline,
        "copy_bytes_per_s": copy_bytes_per_s(options.device),
        "product_flops_per_s": product_flops_per_s(options.device, dtypes),
    }
    with open(options.out / "environment.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(note) + "\n")


def _named(spec: ArmSpec) -> Arm:
    arm = find_arm(spec.kernel)
    if arm.name != spec.name:
        from natrain.bench.arms import KernelArm

        arm = KernelArm(spec.kernel, spec.name)
    return arm


def _stop(problems: int, options: Options) -> int:
    print(f"stopped by the time limit of {options.time_limit_s:.0f} s; {problems} problems are left, run it again")
    return 3


class _Writer:
    def __init__(self, plan: Plan, options: Options) -> None:
        self._path = options.results
        self._common = {
            "plan": plan.digest,
            "timer": plan.timer if options.device == "cuda" else "wall",
            "cache": plan.cache,
            "threads": torch.get_num_threads() if options.device == "cpu" else None,
            "device": environment(options.device)["device"],
            "torch": torch.__version__,
            "commit": options.commit or commit_of_code(),
            "session": secrets.token_hex(3),
        }

    def write(self, case: Case, outcome: Outcome) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        rows.append(self._path, {**self._common, **case.words, **outcome.row, "utc": now})


class _Attempt:
    """Counts, in a file, how often a problem was begun by a process that did not live to end it."""

    def __init__(self, options: Options, case: Case) -> None:
        self._path = options.out / f".attempt-{options.shard[0]}"
        self._name = case.name

    def __enter__(self) -> int:
        tries = 0
        if self._path.exists():
            name, _, count = self._path.read_text().rpartition("\t")
            tries = int(count) if name == self._name and count.isdigit() else 0
        self._path.write_text(f"{self._name}\t{tries + 1}")
        return tries + 1

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._path.unlink(missing_ok=True)


def _give_up(writer: _Writer, case: Case, wanted: Mapping[ArmSpec, Sequence[str]]) -> None:
    for spec, directions in wanted.items():
        for which in directions:
            writer.write(case, Outcome(spec.name, which, "failed", f"the process ended {_TRIES} times while at this"))


def _say(title: str, outcomes: Sequence[Outcome], baseline: str) -> None:
    cells = []
    for name in dict.fromkeys(outcome.arm for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.arm == name]
        cells.append(f"{name} " + "/".join(f"{o.timing.median_ms:.3f}" if o.timing else o.status for o in own))
    print(title, " ".join(cells), flush=True)
    for outcome in outcomes:
        if outcome.status == "failed":
            print(f"    {outcome.arm} {outcome.direction} failed: {outcome.reason[:200]}", flush=True)
    for line in close_calls(outcomes, baseline):
        print(f"    {line}", flush=True)


def parse_only(words: Sequence[str]) -> dict[str, str]:
    """``dtype=fp16 op=na2d`` as a mapping.

    Raises:
        ValueError: not the word of a problem.
    """
    only = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in WORDS:
            raise invalid("--only", word, f"WORD=VALUE, a word of {', '.join(WORDS)}", "--only dtype=fp16")
        only[name] = value
    return only


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that ``natrain ablate`` shares."""
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD=VALUE", help="problems with these words only")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="these contenders only")
    parser.add_argument("--time-limit", type=float, metavar="S", help="stop in time (exit code 3); again goes on")
    parser.add_argument("--chunk", type=int, default=24, help="problems whose kernels are compiled at once")
    parser.add_argument("--threads", type=int, metavar="N", help="on a CPU: threads, pinned to as many cores")
    parser.add_argument("--retry-failed", action="store_true", help="measure again what has no time")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def main(argv: Sequence[str] | None = None) -> int:
    """The command of this module's head; exit code 3 at the time limit."""
    parser = argparse.ArgumentParser(prog="natrain.bench.sweep", description=__doc__)
    parser.add_argument("plan", type=Path, metavar="PLAN.yaml")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="settings of the plan, axes of its problems")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default_device())
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th problem from the I-th on")
    parser.add_argument("--commit", metavar="SHA", help="the contenders of this commit, whose code this is")
    add_options(parser)
    arguments = parser.parse_intermixed_args(argv)
    index, _, count = arguments.shard.partition("/")
    options = Options(
        out=arguments.out,
        device=arguments.device,
        only=parse_only(arguments.only),
        arms=arguments.arms,
        time_limit_s=arguments.time_limit,
        chunk=arguments.chunk,
        shard=(int(index), int(count)),
        retry_failed=arguments.retry_failed,
        threads=arguments.threads,
        commit=arguments.commit,
    )
    try:
        return run_sweep(read_plan(arguments.plan, parse_changes(arguments.changes)), options)
    except DeviceLost as error:
        print(f"device lost: {error}; going on in a new process", flush=True)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
