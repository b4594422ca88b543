"""How every benchmark here takes a time on a CUDA device.

CUDA events around one call; the second-level cache emptied before it (or kept warm when asked); the contenders
interleaved A B A B in one process, so that a drifting clock hits all alike; medians with an interval that assumes no
distribution; outputs checked before any time counts.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping
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


def captured(function: Callable[[], Any], warm_ups: int = 3) -> Callable[[], None]:
    """``function`` as a CUDA graph: a replay has no gaps between launches, hence the device's time alone."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def measure(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    runs: int = 30,
    warm_ups: int = 3,
    warm_cache: bool = False,
    graphs: bool = False,
    check: Callable[[str, Any], None] | None = None,
) -> dict[str, Timing]:
    """Time every contender on the current device.

    Args:
        contenders: name -> a call that enqueues the work; its inputs are its own affair (random, never zeros).
        runs: timed calls of each, interleaved.
        warm_ups: untimed calls of each first: compilation, allocation.
        warm_cache: leave what the call before left in the second-level cache.
        graphs: time replays of a CUDA graph of the call: the device's work alone, without the host's gaps.
        check: called with (name, output of a call) before anything is timed; raises if the output is wrong.
    """
    for name, call in contenders.items():
        for _ in range(warm_ups):
            output = call()
        if check is not None:
            check(name, output)
        del output
    if graphs:
        contenders = {name: captured(call) for name, call in contenders.items()}
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(max(4 * cache_bytes, 2**28), dtype=torch.uint8, device="cuda")
    events: dict[str, list] = {name: [] for name in contenders}
    torch.cuda.synchronize()
    for _ in range(runs):
        for name, call in contenders.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if not warm_cache:
                flush.fill_(1)
            start.record()
            call()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    clock = clock_mhz()
    timings = {}
    for name, pairs in events.items():
        times = [start.elapsed_time(end) for start, end in pairs]
        timings[name] = Timing(name, statistics.median(times), *median_interval(times), runs, clock)
    return timings


def ratio(slower: Timing, faster: Timing) -> float:
    """``slower.median_ms / faster.median_ms``, with a warning where their intervals overlap."""
    if slower.low_ms <= faster.high_ms and faster.low_ms <= slower.high_ms:
        warnings.warn(
            f"{slower.name} ({slower.low_ms:.4f} to {slower.high_ms:.4f} ms) and {faster.name} "
            f"({faster.low_ms:.4f} to {faster.high_ms:.4f} ms) differ by less than their spread",
            stacklevel=2,
        )
    return slower.median_ms / faster.median_ms
