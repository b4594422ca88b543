"""The statistics of a time, and on a GPU the times themselves."""

from __future__ import annotations

import random
import time
import warnings

import pytest
import torch

from natrain.bench.measure import Timing, measure, median_interval, ratio


def _timing(name: str, low: float, median: float, high: float) -> Timing:
    return Timing(name, median, low, high, runs=30, clock_mhz=None)


def test_interval_holds_the_true_median_about_95_times_in_100():
    """A skewed distribution (log-normal, median 1): 2,000 samples of 30; three standard errors are 1.5 %."""
    rng = random.Random(0)
    inside = 0
    for _ in range(2000):
        low, high = median_interval([rng.lognormvariate(0, 1) for _ in range(30)])
        inside += low <= 1 <= high
    assert 0.935 <= inside / 2000 <= 0.985


def test_interval_of_few_times_is_their_range():
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_a_difference_within_the_spread_warns():
    with pytest.warns(UserWarning, match="differ by less than their spread"):
        assert ratio(_timing("a", 0.9, 1.1, 1.3), _timing("b", 0.8, 1.0, 1.2)) == pytest.approx(1.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ratio(_timing("a", 1.9, 2.0, 2.1), _timing("b", 0.9, 1.0, 1.1)) == 2.0


def test_contenders_and_their_inputs_take_turns():
    called = []
    turns = {"a": [lambda: called.append("a0"), lambda: called.append("a1")], "b": lambda: called.append("b")}
    assert set(measure(turns, runs=3, warm_ups=1, warm_cache=True, device="cpu")) == {"a", "b"}
    assert called == ["a0", "a1", "b"] + ["a0", "b", "a1", "b", "a0", "b"]


@pytest.mark.gpu
@pytest.mark.parametrize("timer", ["events", "device", "graph"])
def test_twice_the_work_takes_twice_as_long(timer):
    small, large = (torch.randn(n, 4096, device="cuda") for n in (32768, 65536))
    timings = measure({"small": lambda: small.mul_(0.5), "large": lambda: large.mul_(0.5)}, runs=10, timer=timer)
    assert 1.8 < ratio(timings["large"], timings["small"]) < 2.2


@pytest.mark.gpu
def test_what_the_host_takes_counts_by_events_alone():
    """A call that enqueues a little work, then dawdles, then enqueues some more.

    Where other processes use the GPU too, a start event may be late by what they take: the call dawdles far longer.
    """
    x = torch.randn(1000, device="cuda")

    def call():
        x.mul_(0.5)
        time.sleep(60e-3)
        x.mul_(2)

    events, device = (measure({"call": call}, runs=10, timer=timer)["call"] for timer in ("events", "device"))
    assert events.high_ms > 30
    assert device.low_ms < 0.5 * events.high_ms


@pytest.mark.gpu
def test_a_wrong_output_stops_the_measurement():
    def check(name, output):
        assert output.sum() == 0, name

    with pytest.raises(AssertionError, match="wrong"):
        measure({"wrong": lambda: torch.ones(3, device="cuda")}, check=check)
