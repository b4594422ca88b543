"""One problem, every contender: forward, backward, memory, rates, share of the floor, error against float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from natrain.bench.case import Case
from natrain.bench.estimate import DIRECTIONS, floor_bytes, flops
from natrain.bench.run_case import Outcome, Setup


def table(case: Case, outcomes: Sequence[Outcome], bytes_per_s: float, device: str) -> list[tuple[str, ...]]:
    """A row a run that has a time, titles first: useful FLOPs and the bytes any kernel must move, a second; floor over
    time."""
    unit, scale = ("TFLOP/s", 1e12) if device == "cuda" else ("GFLOP/s", 1e9)
    rows = [("kernel", "pass", "ms", "interval", unit, "GB/s", "of the floor", "MiB", "error")]
    for outcome in sorted(outcomes, key=lambda o: DIRECTIONS.index(o.direction)):
        timing = outcome.timing
        if timing is None:
            continue
        seconds = timing.median_ms / 1e3
        moved = floor_bytes(case, outcome.direction)
        rows.append(
            (
                outcome.arm,
                outcome.direction,
                _digits(timing.median_ms),
                f"{_digits(timing.low_ms)} to {_digits(timing.high_ms)}",
                _digits(flops(case, outcome.direction) / seconds / scale),
                _digits(moved / seconds / 1e9),
                f"{moved / bytes_per_s / seconds:.1%}",
                "" if outcome.peak_mib is None else f"{outcome.peak_mib:.0f}",
                f"{outcome.error:.1e}",
            )
        )
    return rows


def refusals(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for every contender without a time in some direction, with its reason."""
    lines: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.timing is None:
            lines.setdefault(f"{outcome.arm} {outcome.status}: {outcome.reason}", []).append(outcome.direction)
    return [line if len(which) > 1 else f"{line} ({which[0]})" for line, which in lines.items()]


def _digits(value: float, count: int = 3) -> str:
    """``value`` with that many significant digits, without an exponent."""
    if not value:
        return "0"
    return f"{value:.{max(0, count - 1 - math.floor(math.log10(abs(value))))}f}"


def text_of(rows: Sequence[Sequence[str]]) -> str:
    """The table as columns of text, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def heading(case: Case, setup: Setup, bytes_per_s: float, device_name: str) -> str:
    """What the table below it is about, and how it was measured."""
    floors = ", ".join(f"{which} {_digits(1e3 * floor_bytes(case, which) / bytes_per_s)} ms" for which in DIRECTIONS)
    clock = f"wall clock, {torch.get_num_threads()} threads" if setup.device == "cpu" else f"{setup.timer} times"
    return (
        f"{case.name}\n{device_name}, torch {torch.__version__}; {clock}, {setup.cache} cache, medians of up to "
        f"{setup.runs} interleaved runs with 95 % intervals\n"
        f"floor (q, k, v, out; their gradients: moved once at the {bytes_per_s / 1e9:.0f} GB/s of a copy): {floors}"
    )
