"""Run a sweep: every contender on every problem of a yaml, one row of a CSV each; goes on where it was stopped.

    python3 -m natrain.bench.sweep PLAN.yaml --out DIR --only dtype=fp16 --time-limit 540

Needs torch, timm and PyYAML alone. What was measured stays measured: the same command again measures what is missing,
after a kill too. ``natrain ablate`` is the same with names in place of files, and with several devices. The processes
that measure are ``natrain.bench.worker``'s, started by ``natrain.bench.spread``.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from natrain.bench import rows
from natrain.bench.ahead import Ahead
from natrain.bench.arms import Arm, find_arm
from natrain.bench.case import WORDS, Case
from natrain.bench.ceilings import copy_bytes_per_s, product_flops_per_s
from natrain.bench.environment import add_session, commit_of_code, device_name, typed
from natrain.bench.estimate import kernel_seconds
from natrain.bench.plan import ArmSpec, Plan, parse_changes, read_plan
from natrain.bench.run_case import MIN_RUNS, Outcome, Setup, close_calls, run_case
from natrain.bench.threads import pinned, threads_each
from natrain.errors import invalid, nearest

try:
    from natrain.ops.precision import tf32_products
except ImportError:  # the code of a commit before it: its process ends with the sweep, there is nothing to give back

    @contextmanager
    def tf32_products(is_allowed: bool) -> Iterator[None]:
        torch.set_float32_matmul_precision("high" if is_allowed else "highest")
        yield


# Seconds besides timed calls, measured roughly. Of a contender in one direction: its truth, warm-ups, capture. Of all
# in one direction: memory that the caches are emptied with. Of emptying them before each call.
_OVERHEAD_S = {"cuda": 0.08, "cpu": 0.02}
_FLUSH_START_S = {"cuda": 0.0, "cpu": 0.15}
_FLUSH_S = {"cuda": 0.0002, "cpu": 0.025}
_UNTIMED = 5  # calls of a contender in one direction besides the timed ones

Missing = dict[Case, dict[ArmSpec, list[str]]]


@dataclass(frozen=True)
class Options:
    """What does not change the results: where, which part, how long.

    ``slot``: which of the processes at once this is, so that each has cores of its own. ``commit``: the contenders of
    this commit, whose code runs; ``broken`` says why it cannot, for its rows. ``command``: as the user typed it.
    """

    out: Path
    device: str
    only: Mapping[str, str]
    arms: Sequence[str] | None = None
    time_limit_s: float | None = None
    chunk: int = 24
    shard: tuple[int, int] = (0, 1)
    retry_failed: bool = False
    threads: int | None = None
    slot: int = 0
    commit: str | None = None
    broken: str = ""
    command: str = ""

    @property
    def results(self) -> Path:
        return self.out / "results.csv"

    @property
    def running(self) -> Path:
        """The file that says what this process measures now; see ``_Running``."""
        return self.out / f".running-{self.slot}"


def missing_runs(plan: Plan, options: Options) -> Missing:
    """What is not in the CSV yet, by problem, in a fixed random order: any part of a sweep covers all of its kinds.

    Raises:
        ValueError: the CSV's rows were measured in another way; ``only`` or ``arms`` selects nothing.
    """
    names = [arm.name for arm in plan.arms]
    for name in options.arms or ():
        if name not in names:
            raise invalid("--arms", name, f"some of {', '.join(names)}", f"--arms {nearest(name, names) or names[0]}")
    found = set()
    if options.results.exists():
        for row in rows.read(options.results):
            _check_settings(row, plan, options)
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


def _check_settings(row: Mapping[str, str], plan: Plan, options: Options) -> None:
    """Rows of one file are measured in one way.

    Raises:
        ValueError: this one was measured in another.
    """
    timer = plan.timer if options.device == "cuda" else "wall"
    now = {"plan": plan.digest, "timer": timer}
    if options.device == "cpu" and options.threads is not None:
        now["threads"] = str(options.threads)
    if all(row[name] == value for name, value in now.items()):
        return
    wanted = {**plan.measuring, **now}
    sessions = options.out / "environment.jsonl"
    last = json.loads(sessions.read_text(encoding="utf-8").splitlines()[-1]) if sessions.exists() else {}
    had = {**last.get("measuring", {}), **{name: row[name] for name in now}}
    differing = [name for name in had if str(had[name]) != str(wanted[name]) and name != "plan"] or ["plan"]
    shown, other = (" ".join(f"{name}={of[name]}" for name in differing) for of in (wanted, had))
    raise invalid(
        "out", str(options.out), f"a folder of rows measured with {shown}, not {other}", "--out NEW (out=NEW)"
    )


def count_runs(missing: Missing) -> int:
    return sum(len(which) for arms in missing.values() for which in arms.values())


def estimated_s(plan: Plan, missing: Missing, device: str, threads: int = 1) -> float:
    """A guess of the seconds that these runs take once all is compiled; what a kernel cannot do on a CPU takes none."""
    total = 0.0
    flush_s = _FLUSH_S[device] if plan.cache == "cold" else 0.0
    for case, arms in missing.items():
        for which in plan.directions:
            calls = [
                kernel_seconds(case, arm.kernel, which, device, threads)
                for arm, directions in arms.items()
                if which in directions and (device == "cuda" or _runs_on_cpu(case, arm, which))
            ]
            if not calls:
                continue
            timed = max(MIN_RUNS, min(plan.runs, int(plan.seconds / max(calls))))
            total += (_FLUSH_START_S[device] if plan.cache == "cold" else 0.0) + sum(
                _OVERHEAD_S[device] + (timed + _UNTIMED) * call + timed * flush_s for call in calls
            )
    return total


def _runs_on_cpu(case: Case, arm: ArmSpec, which: str) -> bool:
    """As far as this code can tell of a commit's contender."""
    try:
        return not find_arm(arm.kernel).reasons(case, "cpu", which)
    except ValueError:
        return arm.commit is not None


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
def run_sweep(plan: Plan, options: Options, death: str | None = None) -> int:
    """Measure what is missing; 0 when nothing is missing any more, 3 when the time limit came first.

    Args:
        death: how the process before this one died by itself, which went on with the same share of the sweep.

    Raises:
        DeviceLost: a kernel broke the device; a new process goes on.
    """
    if options.device == "cuda":
        with tf32_products(plan.tf32):
            return _run(plan, options, death)
    with pinned(threads_each(options.threads, "--threads "), options.slot):
        return _run(plan, options, death)


def _run(plan: Plan, options: Options, death: str | None) -> int:
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    running, missing, ahead = _Running(options.running), missing_runs(plan, options), Ahead()
    if not missing:
        running.clear()
        return 0
    rows.start(options.results)
    writer = _Writer(plan, options)
    if options.broken:
        for case, wanted in missing.items():
            writer.fail(case, wanted, options.broken)
        return 0
    if death is not None:
        _blame(death, running, missing, writer)
    arms = _find_arms(missing, writer, options)
    _keep_environment(plan, options)
    setup = Setup(options.device, plan.runs, plan.timer, plan.cache, plan.seconds)
    todo, done = list(missing.items()), 0
    if options.device == "cuda" and (seconds := ahead.seconds(_to_compile(missing))) > 1:
        print(f"compilation takes about {seconds:.0f} s of it", flush=True)

    def has_time_for(part: Missing, is_compiled: bool) -> bool:
        if options.time_limit_s is None:
            return True
        needed = estimated_s(plan, dict([next(iter(part.items()))]), options.device, torch.get_num_threads())
        needed += 0 if is_compiled or options.device == "cpu" else ahead.seconds(_to_compile(part))
        return time.monotonic() - started + needed <= options.time_limit_s

    while done < len(todo):
        size = options.chunk
        while not has_time_for(part := dict(todo[done : done + size]), is_compiled=False):
            if size == 1:
                return _stop(len(todo) - done)
            size //= 2
        if compiled := ahead.compile(_to_compile(part)) if options.device == "cuda" else 0:
            print(f"compiled {compiled} kernels, {time.monotonic() - started:.0f} s since the start", flush=True)
        for case, wanted in part.items():
            if not has_time_for({case: wanted}, is_compiled=True):
                return _stop(len(todo) - done)
            done += 1
            able = {arms[spec]: which for spec, which in wanted.items()}
            # Side by side; each alone where that ended a process, to know which contender did.
            is_alone = case.name == running.suspect
            found = []
            for group in [{arm: which} for arm, which in able.items()] if is_alone else [able]:
                for outcome in run_case(case, group, setup, running.note(case, is_alone)):
                    writer.write(case, outcome)
                    found.append(outcome)
            running.clear()
            _say(f"[{done}/{len(todo)}] {case.name}", found, plan.baseline)
    print(f"done in {time.monotonic() - started:.0f} s: {options.results}", flush=True)
    return 0


def _find_arms(missing: Missing, writer: _Writer, options: Options) -> dict[ArmSpec, Arm]:
    """The contenders of ``missing``; without those, then, that a commit does not have, whose rows say so."""
    arms: dict[ArmSpec, Arm] = {}
    for spec in dict.fromkeys(spec for case in missing.values() for spec in case):
        try:
            arms[spec] = _named(spec)
        except ValueError as error:
            if options.commit is None:
                raise
            for case in list(missing):
                if spec in missing[case]:
                    writer.fail(case, {spec: missing[case].pop(spec)}, str(error))
                    if not missing[case]:
                        del missing[case]
    return arms


def _blame(death: str, running: _Running, missing: Missing, writer: _Writer) -> None:
    """Rows for what ended the process before, where it was one contender alone, else that problem as ``suspect``.

    They are taken out of ``missing``.
    """
    last = running.read()
    running.clear()
    case = next((case for case in missing if case.name == last.get("problem")), None)
    if case is None:
        return
    running.suspect = case.name
    reason = f"the process died ({last.get('reason') or death}) while at this"
    print(f"{case.name}: {reason}", flush=True)
    if not last["is_alone"]:
        return
    for spec in [spec for spec in missing[case] if spec.name in last["contenders"]]:
        died_at = [which for which in missing[case][spec] if which in last["directions"]]
        writer.fail(case, {spec: died_at}, reason)
        missing[case][spec] = [which for which in missing[case][spec] if which not in died_at]
        if not missing[case][spec]:
            del missing[case][spec]
    if not missing[case]:
        del missing[case]


def _keep_environment(plan: Plan, options: Options) -> None:
    """The environment of each session beside the rows."""
    dtypes = sorted({case.dtype_name for case in plan.cases})
    note = {
        "commit": options.commit or commit_of_code(),
        "command": options.command or typed(),
        "plan": plan.name,
        "measuring": plan.measuring,
        "commits": {arm.name: options.commit or commit_of_code() for arm in plan.arms if arm.commit == options.commit},
        "baseline": plan.baseline,
        "copy_bytes_per_s": copy_bytes_per_s(options.device),
        "product_flops_per_s": product_flops_per_s(options.device, dtypes),
    }
    add_session(options.out, options.device, note)


def _named(spec: ArmSpec) -> Arm:
    arm = find_arm(spec.kernel)
    if arm.name != spec.name:
        from natrain.bench.arms import KernelArm

        arm = KernelArm(spec.kernel, spec.name)
    return arm


def _stop(problems: int) -> int:
    print(f"stopped by the time limit; {problems} problems are left, run it again")
    return 3


class _Writer:
    def __init__(self, plan: Plan, options: Options) -> None:
        self._path = options.results
        self._common = {
            "plan": plan.digest,
            "timer": plan.timer if options.device == "cuda" else "wall",
            "cache": plan.cache,
            "threads": torch.get_num_threads() if options.device == "cpu" else None,
            "device": device_name(options.device),
            "torch": torch.__version__,
            "commit": options.commit or commit_of_code(),
            "session": secrets.token_hex(3),
        }

    def write(self, case: Case, outcome: Outcome) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        rows.append(self._path, {**self._common, **case.words, **outcome.row, "utc": now})

    def fail(self, case: Case, wanted: Mapping[ArmSpec, Sequence[str]], reason: str) -> None:
        for spec, directions in wanted.items():
            for which in directions:
                self.write(case, Outcome(spec.name, which, "failed", reason))


class _Running:
    """What this process measures now, in a file that outlives it: where it dies by itself, the next one reads it.

    ``suspect``: the name of the problem that ended the process before.
    """

    suspect = ""

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, case: Case, is_alone: bool) -> Callable[[Sequence[str], Sequence[str]], None]:
        """For ``run_case``: called with the contenders and directions that are next."""

        def write(contenders: Sequence[str], directions: Sequence[str]) -> None:
            now = {"problem": case.name, "is_alone": is_alone, "contenders": contenders, "directions": directions}
            self._path.write_text(json.dumps(now), encoding="utf-8")

        return write

    def read(self) -> dict[str, Any]:
        return json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}

    def clear(self) -> None:
        self._path.unlink(missing_ok=True)


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
        # As the CSV has flags; a yaml, and what is typed, has them in words.
        only[name] = {"true": "1", "false": "0"}.get(value.lower(), value)
    return only


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that ``natrain ablate`` shares."""
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD=VALUE", help="problems with these words only")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="these contenders only")
    parser.add_argument("--time-limit", type=float, metavar="S", help="stop in time (exit code 3); again goes on")
    parser.add_argument("--chunk", type=int, default=24, help="problems whose kernels are compiled at once")
    parser.add_argument("--threads", type=int, metavar="N", help="on a CPU: threads, each on a core of its own")
    parser.add_argument("--retry-failed", action="store_true", help="measure again what has no time")


def checked_device(name: str | None) -> str:
    """``name``, by default the GPU where there is one.

    Raises:
        ValueError: there is no such device.
    """
    here = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    if name is not None and name not in here:
        raise invalid("device", name, f"a device that is here: {' or '.join(here)}", f"device={here[0]}")
    return name or here[0]


def main(argv: Sequence[str] | None = None) -> int:
    """The command of this module's head; exit code 1 where runs failed, 3 at the time limit."""
    from natrain.bench.spread import run_everywhere

    parser = argparse.ArgumentParser(prog="natrain.bench.sweep", description=__doc__)
    parser.add_argument("plan", type=Path, metavar="PLAN.yaml")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="settings of the plan, axes of its problems")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", metavar="cuda|cpu", help="default: the GPU where there is one")
    add_options(parser)
    arguments = parser.parse_intermixed_args(argv)
    options = options_of(arguments, arguments.out, checked_device(arguments.device))
    plan = read_plan(arguments.plan, parse_changes(arguments.changes))
    return run_everywhere(plan, arguments.plan, arguments.changes, options, [0])


def check_limits(arguments: argparse.Namespace) -> None:
    """Refuses numbers of ``add_options`` that would measure nothing, or go on for ever.

    Raises:
        ValueError: such a ``--time-limit`` or ``--chunk``.
    """
    limit_s, chunk = arguments.time_limit, arguments.chunk
    if limit_s is not None and not limit_s > 0:
        raise invalid("--time-limit", limit_s, "seconds above 0", "--time-limit 600")
    if chunk < 1:
        raise invalid("--chunk", chunk, "a whole number >= 1", "--chunk 24")


def options_of(arguments: argparse.Namespace, out: Path, device: str) -> Options:
    """Those of ``add_options``.

    Raises:
        ValueError: a word of ``--only`` that no problem has, a number out of range.
    """
    check_limits(arguments)
    return Options(
        out=out,
        device=device,
        only=parse_only(arguments.only),
        arms=arguments.arms,
        time_limit_s=arguments.time_limit,
        chunk=arguments.chunk,
        retry_failed=arguments.retry_failed,
        threads=arguments.threads,
        command=typed(),
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
