"""How every benchmark here takes a time.

On a CUDA device by events around one call, elsewhere by the wall clock; the caches emptied before it (or kept warm when
asked); for the device's time alone the stream is held until the host has enqueued the call, or a CUDA graph replayed;
inputs that take turns; the contenders interleaved A B A B in one process, so that a drifting clock hits all alike;
medians with an interval that assumes no distribution; outputs checked before any time counts.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender: the median and the bounds of its 95 % interval."""

    name: str
    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    clock_mhz: int | None

    @property
    def spread(self) -> float:
        """Width of the interval as a share of the median."""
        return (self.high_ms - self.low_ms) / self.median_ms


def median_interval(times: list[float]) -> tuple[float, float]:
    """Bounds that hold the true median with a probability of about 95 %, whatever the distribution.

    The ranks n/2 -+ 0.98 sqrt(n) of the sorted times (the normal approximation of the sign test).
    """
    ordered = sorted(times)
    half_width = 0.98 * math.sqrt(len(ordered))
    low = max(0, math.floor(len(ordered) / 2 - half_width))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + half_width))
    return ordered[low], ordered[high]


def clock_mhz(device: int = 0) -> int | None:
    """The multiprocessors' clock now, or None where it cannot be read."""
    try:
        return torch.cuda.clock_rate(device)
    except (ModuleNotFoundError, RuntimeError, AttributeError):
        return None


@functools.cache
def timing_stream(device: int) -> torch.cuda.Stream:
    """Where everything is timed: backward runs on the stream of its forward, the default one cannot be captured, and
    another one would be waited for."""
    return torch.cuda.Stream(device)


@contextmanager
def on_timing_stream() -> Iterator[None]:
    """Work in this context runs on ``timing_stream``, in order with the current stream."""
    stream = timing_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(function: Callable[[], Any], warm_ups: int = 3) -> Callable[[], None]:
    """``function`` as a CUDA graph: a replay has no gaps between launches, hence the device's time alone.

    What comes back keeps ``function`` alive: the graph knows its inputs by address only.
    """
    with on_timing_stream():
        for _ in range(warm_ups):
            function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=timing_stream(torch.cuda.current_device())):
        function()
    return functools.partial(_replay, graph, function)


def _replay(graph: torch.cuda.CUDAGraph, _: Callable[[], Any]) -> None:
    graph.replay()


# Counts the ways in which this module has taken times: rows of one file are of one way.
METHOD = 2  # 1: the second-level cache emptied by writing
TIMERS = ("device", "graph", "events")  # of a CUDA device; see ``measure``
Call = Callable[[], Any]
# Beyond the last-level cache of the processors that one finds under a desk.
_CPU_FLUSH_BYTES = 2**27


def measure(
    contenders: Mapping[str, Call | Sequence[Call]],
    *,
    runs: int = 30,
    warm_ups: int = 3,
    warm_cache: bool = False,
    timer: str = "events",
    check: Callable[[str, Any], None] | None = None,
    device: str = "cuda",
) -> dict[str, Timing]:
    """Time every contender on the current device of that type.

    Args:
        contenders: name -> a call that enqueues the work, or several that take turns, the same work on other inputs;
            inputs are their own affair (random, never zeros).
        runs: timed calls of each, interleaved.
        warm_ups: untimed calls of each first: compilation, allocation.
        warm_cache: leave what the call before left in the caches.
        timer: of a CUDA device: "events", eager calls with the gaps that the host leaves; "device", the device's work
            alone: the stream is held until the call is enqueued; "graph", replays of a CUDA graph, where one can be
            captured.
        check: called with (name, output of the first call) before anything is timed; raises if the output is wrong.
        device: "cuda", or "cpu" for the wall clock.
    """
    assert timer in TIMERS, timer
    turns = {name: (calls,) if callable(calls) else tuple(calls) for name, calls in contenders.items()}
    for name, calls in turns.items():
        for run in range(max(warm_ups, len(calls))):
            output = calls[run % len(calls)]()
            if check is not None and run == 0:
                check(name, output)
            del output
    if device == "cpu":
        times = _wall_times(turns, runs, warm_cache)
    else:
        if timer == "graph":
            turns = {name: tuple(captured(call) for call in calls) for name, calls in turns.items()}
        with on_timing_stream():
            times = _event_times(turns, runs, warm_cache, timer == "device")
    clock = None if device == "cpu" else clock_mhz()
    return {
        name: Timing(name, statistics.median(taken), *median_interval(taken), runs, clock)
        for name, taken in times.items()
    }


# Of a multiprocessor, at most: what a held stream counts in.
_CLOCK_HZ = 2.1e9


def _hold_cycles(calls: Sequence[Call]) -> int:
    """Twice what the host takes to enqueue a call, and a little."""
    longest = 0.0
    for call in [*calls] * 2:
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        longest = max(longest, time.perf_counter() - started)
    return int(_CLOCK_HZ * (2 * longest + 50e-6))


def cache_flush() -> Call:
    """Replaces all that the second-level cache of the current device holds, by a copy.

    A copy leaves it as steady work does: half of its lines were read, half written and still to be written back. So a
    call pays for about as much of others' writing as it leaves to others of its own, and a copy of any size takes what
    its bytes take at the speed of a large one, by which floors are counted. In a cache filled by writing alone a call
    would write back as much as it reads; in one that was only read it would keep its own writes for free.
    """
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    source = torch.ones(max(2 * cache_bytes, 2**27), dtype=torch.uint8, device="cuda")
    return functools.partial(torch.empty_like(source).copy_, source)


def _event_times(
    turns: Mapping[str, Sequence[Call]], runs: int, warm_cache: bool, is_held: bool
) -> dict[str, list[float]]:
    """Milliseconds between two events around each call."""
    holds = {name: _hold_cycles(calls) for name, calls in turns.items()} if is_held else {}
    flush = None if warm_cache else cache_flush()
    events: dict[str, list] = {name: [] for name in turns}
    torch.cuda.synchronize()
    for run in range(runs):
        for name, calls in turns.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if flush is not None:
                flush()
            if is_held:
                torch.cuda._sleep(holds[name])
            start.record()
            calls[run % len(calls)]()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def _wall_times(turns: Mapping[str, Sequence[Call]], runs: int, warm_cache: bool) -> dict[str, list[float]]:
    """Milliseconds that each call took."""
    flush = torch.empty(_CPU_FLUSH_BYTES, dtype=torch.uint8)
    times: dict[str, list[float]] = {name: [] for name in turns}
    for run in range(runs):
        for name, calls in turns.items():
            if not warm_cache:
                flush.fill_(run % 256)
            start = time.perf_counter()
            calls[run % len(calls)]()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratio(slower: Timing, faster: Timing) -> float:
    """``slower.median_ms / faster.median_ms``, with a warning where their intervals overlap."""
    if slower.low_ms <= faster.high_ms and faster.low_ms <= slower.high_ms:
        warnings.warn(
            f"{slower.name} ({slower.low_ms:.4f} to {slower.high_ms:.4f} ms) and {faster.name} "
            f"({faster.low_ms:.4f} to {faster.high_ms:.4f} ms) differ by less than their spread",
            stacklevel=2,
        )
    return slower.median_ms / faster.median_ms
