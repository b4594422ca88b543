"""Results of a sweep, made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from natrain.bench import rows
from natrain.bench.case import Case

# Times in ms of three contenders on four problems: forward, backward.
TIMES = {
    ("28x28", 3): {"naive": (2.0, 4.0), "gemm": (1.0, 4.0), "fused": (0.5, 1.0)},
    ("28x28", 7): {"naive": (4.0, 8.0), "gemm": (1.0, 4.0), "fused": (0.5, 2.0)},
    ("56x56", 3): {"naive": (1.0, 2.0), "gemm": (2.0, 4.0), "fused": (0.5, 2.0)},
    ("56x56", 7): {"naive": (8.0, 8.0), "gemm": (4.0, 2.0), "fused": None},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "results.csv"
    rows.start(path)
    for (shape, kernel_size), arms in TIMES.items():
        case = Case.of({"shape": shape, "heads": 2, "head_dim": 32, "kernel_size": kernel_size, "dtype": "fp16"})
        for arm, times in arms.items():
            for index, direction in enumerate(("forward", "backward")):
                row = {**case.words, "plan": "p", "arm": arm, "direction": direction, "utc": "now"}
                if times is None:
                    row |= {"status": "failed", "reason": "RuntimeError: <no>"}
                else:
                    ms = times[index]
                    row |= {"status": "ok", "median_ms": ms, "low_ms": 0.9 * ms, "high_ms": 1.1 * ms}
                    row |= {"error": 1e-3, "peak_mib": 8.0, "clock_mhz": 1980 - 15 * index}
                rows.append(path, row)
    session = {
        "device": "a device",
        "driver_version": "570.1",
        "clocks.max.sm": "1981 MHz",
        "clocks.mem": "2619 MHz",
        "power.limit": "700 W",
        "commit": "abc",
        "commits": {"naive": "abc", "fused@def": "def"},
        "plan": "mine",
        "baseline": "naive",
        "torch": "2.0",
        "copy_bytes_per_s": 1e12,
        "product_flops_per_s": {"fp16": 1e14},
    }
    (tmp_path / "environment.jsonl").write_text(json.dumps(session) + "\n")
    return tmp_path
