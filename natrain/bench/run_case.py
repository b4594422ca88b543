"""All contenders of one problem, measured side by side; whatever goes wrong becomes a row that says why."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from natrain.bench.arms import Arm, Work, backward_of
from natrain.bench.case import Case
from natrain.bench.estimate import DIRECTIONS, feature_bytes
from natrain.bench.measure import Timing, measure, ratio
from natrain.bench.peers import truth_case
from natrain.bench.truth import TOLERANCES, Inputs, Truth, WrongOutput, random_inputs, sample_truth

MIN_RUNS = 3
_MOST_TURNS = 4


@dataclass(frozen=True)
class Setup:
    """How times are taken; see ``natrain.bench.plan``."""

    device: str
    runs: int = 15
    timer: str = "device"
    cache: str = "cold"
    seconds: float = 10.0


@dataclass(frozen=True)
class Outcome:
    """One run: ``timing`` is None unless ``status`` is "ok"; ``error`` relative, ``peak_mib`` beyond the inputs."""

    arm: str
    direction: str
    status: str
    reason: str = ""
    timing: Timing | None = None
    error: float | None = None
    peak_mib: float | None = None

    @property
    def row(self) -> dict[str, Any]:
        """The columns of natrain.bench.rows that it fills."""
        row: dict[str, Any] = {name: getattr(self, name) for name in ("arm", "direction", "status", "reason")}
        if self.timing is not None:
            row |= {f"{name}_ms": f"{getattr(self.timing, f'{name}_ms'):.5g}" for name in ("median", "low", "high")}
            row |= {"runs": self.timing.runs, "clock_mhz": self.timing.clock_mhz, "error": f"{self.error:.3g}"}
            row["peak_mib"] = None if self.peak_mib is None else f"{self.peak_mib:.1f}"
        return row


class DeviceLost(RuntimeError):
    """A kernel broke the device's context: nothing more can be measured in this process."""


Note = Callable[[Sequence[str], Sequence[str]], None]


def run_case(
    case: Case, wanted: Mapping[Arm, Sequence[str]], setup: Setup, note: Note = lambda contenders, directions: None
) -> Iterator[Outcome]:
    """Measure the wanted directions of every contender, interleaved; each yields exactly one outcome a direction.

    Args:
        note: called with the names of the contenders and the directions that run next, before they can crash.

    Raises:
        DeviceLost: after the outcome of the contender that did it.
    """
    able: dict[Arm, list[str]] = {}
    for arm, directions in wanted.items():
        for which in directions:
            try:
                reasons = arm.reasons(case, setup.device, which)
            except Exception as error:  # of an older commit, which cannot describe the problem, say
                yield from _failures({arm.name: [which]}, error)
                continue
            if reasons:
                yield Outcome(arm.name, which, "unsupported", "; ".join(reasons))
            else:
                able.setdefault(arm, []).append(which)
    if not able:
        return
    note([arm.name for arm in able], DIRECTIONS)
    try:
        inputs = [random_inputs(case, setup.device, seed) for seed in range(_num_turns(case, setup))]
        truths = {truth_case(arm.name, case): None for arm in able}
        truths = {judged: sample_truth(judged, inputs[0]) for judged in truths}
    except Exception as error:  # too large a problem for the device, say
        yield from _failures({arm.name: directions for arm, directions in able.items()}, error)
        _clean_up(setup.device)
        return
    for which in DIRECTIONS:
        now = [arm for arm, directions in able.items() if which in directions]
        yield from _run_direction(case, now, which, inputs, truths, setup, note)
        _clean_up(setup.device)


def _num_turns(case: Case, setup: Setup) -> int:
    """Input sets that take turns, so that none finds itself in the second-level cache."""
    if setup.device == "cpu" or setup.cache == "warm":
        return 1
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(_MOST_TURNS, 1 + cache_bytes // (4 * feature_bytes(case)))


@dataclass(frozen=True)
class _Probed:
    """What one untimed call told: its calls, relative error, peak memory, seconds."""

    calls: list[Callable[[], Any]]
    error: float
    peak_mib: float | None
    seconds: float


def _run_direction(
    case: Case,
    arms: Sequence[Arm],
    which: str,
    inputs: Sequence[Inputs],
    truths: Mapping[Case, Truth],
    setup: Setup,
    note: Note,
) -> Iterator[Outcome]:
    probed: dict[str, _Probed] = {}
    for arm in arms:
        note([arm.name], [which])
        try:
            probed[arm.name] = _probe(case, arm, which, inputs, truths[truth_case(arm.name, case)], setup.device)
        except Exception as error:  # any failure of a contender is a result
            yield from _failures({arm.name: [which]}, error)
            _clean_up(setup.device)
    note(list(probed), [which])
    timings, failed = _time({name: found.calls for name, found in probed.items()}, _num_runs(probed, setup), setup)
    for name, error in failed.items():
        yield from _failures({name: [which]}, error)
    for name, timing in timings.items():
        yield Outcome(name, which, "ok", "", timing, probed[name].error, probed[name].peak_mib)


def _num_runs(probed: Mapping[str, _Probed], setup: Setup) -> int:
    slowest = max((found.seconds for found in probed.values()), default=0.0)
    return max(MIN_RUNS, min(setup.runs, int(setup.seconds / max(slowest, 1e-9))))


def _probe(case: Case, arm: Arm, which: str, inputs: Sequence[Inputs], truth: Truth, device: str) -> _Probed:
    """One call, its output checked; the calls of all turns.

    Raises:
        WrongOutput: the error is beyond the dtype's tolerance.
    """
    works = [arm.work(case, each) for each in inputs]
    before = _reset_peak(device)
    if which == "forward":
        calls = [_without_result(work.forward) for work in works]
        error = truth.forward_error(works[0].heads_last(works[0].forward().detach()))
        peak = _peak_mib(device, before)
    else:
        calls = [backward_of(works[0])]
        gradients = calls[0]()
        error = truth.backward_error(*works[0].split(gradients))
        peak = _peak_mib(device, before)
        if truth.bias_inputs is not None:
            error = max(error, _bias_error(case, arm, works[0], gradients, inputs[0], truth))
        del gradients
        calls += [backward_of(work) for work in works[1:]]
    if not error <= TOLERANCES[case.dtype]:
        raise WrongOutput(f"wrong {which}: relative error {error:.2e}, at most {TOLERANCES[case.dtype]:.0e} passes")
    _synchronize(device)
    started = time.perf_counter()
    calls[0]()
    _synchronize(device)
    return _Probed(calls, error, peak, time.perf_counter() - started)


def _bias_error(case: Case, arm: Arm, work: Work, gradients: Sequence[Tensor], inputs: Inputs, truth: Truth) -> float:
    if truth.bias_inputs is not inputs:
        work = arm.work(case, truth.bias_inputs)
        gradients = backward_of(work)()
    d_rpb = work.d_rpb(gradients)
    return 0.0 if d_rpb is None else truth.bias_error(d_rpb)


def _without_result(forward: Callable[[], Any]) -> Callable[[], None]:
    """A call that drops its output at once, as a captured graph must."""

    def call() -> None:
        forward()

    return call


def _time(
    calls: Mapping[str, Sequence[Callable]], runs: int, setup: Setup
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Times of all side by side; where that fails, of each alone, to know which it was."""
    if not calls:
        return {}, {}
    take = partial(
        measure,
        runs=runs,
        warm_ups=2,
        warm_cache=setup.cache == "warm",
        timer=setup.timer,
        device=setup.device,
    )
    try:
        return take(calls), {}
    except Exception as error:
        if _is_lost():
            raise DeviceLost(f"{type(error).__name__} while {', '.join(calls)} took turns: {error}") from error
        _clean_up(setup.device)
    timings: dict[str, Timing] = {}
    failed: dict[str, Exception] = {}
    for name, own in calls.items():
        try:
            timings |= take({name: own})
        except Exception as error:
            failed[name] = error
            _clean_up(setup.device)
    return timings, failed


def _failures(runs: Mapping[str, Sequence[str]], error: Exception) -> Iterator[Outcome]:
    if isinstance(error, torch.OutOfMemoryError):
        reason = f"out of memory: {error}"
    elif isinstance(error, WrongOutput):
        reason = str(error)
    else:
        reason = f"{type(error).__name__}: {error}"
    for name, directions in runs.items():
        yield from (Outcome(name, which, "failed", reason) for which in directions)
    if _is_lost():
        raise DeviceLost(reason) from error


def _is_lost() -> bool:
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _clean_up(device: str) -> None:
    """Give memory back: the next problem's shapes differ."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _reset_peak(device: str) -> int:
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak_mib(device: str, before: int) -> float | None:
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def close_calls(outcomes: Sequence[Outcome], baseline: str) -> list[str]:
    """A line for every contender whose difference from the baseline is within their spread."""
    lines = []
    for which in DIRECTIONS:
        timed = {o.arm: o.timing for o in outcomes if o.direction == which and o.timing is not None}
        for name in [name for name in timed if name != baseline and baseline in timed]:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                ratio(timed[baseline], timed[name])
            lines += [f"{which}: {warning.message}" for warning in caught]
    return lines
