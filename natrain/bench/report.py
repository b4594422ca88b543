"""Tables of measured layers: one line a layer and dtype, with the floor and the peer beside each time."""

from __future__ import annotations

import csv
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from natrain.bench.layers import LAYERS, Layer, calls, floor_ms
from natrain.bench.measure import Timing, measure

HEADER = (
    "layer", "dtype", "rpb", "kernel", "pass", "median_ms", "low_ms", "high_ms", "device_ms", "floor_ms", "natten_ms",
    "ratio", "clock_mhz",
)  # fmt: skip


def copy_bytes_per_s() -> float:
    """Bytes read plus bytes written a second by a device copy too large for any cache."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    seconds = measure({"copy": lambda: target.copy_(source)}, runs=10)["copy"].median_ms / 1e3
    return 2 * source.numel() * source.element_size() / seconds


def _check(reference: torch.Tensor, tolerance: float):
    def check(name: str, output: torch.Tensor) -> None:
        error = (output[:1].float() - reference.float()).norm() / reference.float().norm()
        assert error <= tolerance, f"{name}: relative error {error:.1e}, at most {tolerance:.0e}"

    return check


def measure_layer(
    layer: Layer, kernels: Sequence[str], dtype: torch.dtype, has_rpb: bool, runs: int
) -> dict[tuple[str, str], tuple[Timing, Timing]]:
    """{(kernel, pass): (call, device)}: as a caller sees it, and of the device alone (no host gaps).

    The first image of every forward output is checked with the reference.
    """
    contenders = {kernel: calls(layer, kernel, dtype, has_rpb) for kernel in kernels}
    with torch.no_grad():
        truth = calls(replace(layer, batch=1), "reference", dtype, has_rpb).forward()
    check = _check(truth, 2e-2 if dtype == torch.bfloat16 else 4e-3)
    timings = {}
    for which in ("forward", "backward"):
        work = {name: getattr(contender, which) for name, contender in contenders.items()}
        called = measure(work, runs=runs, check=check if which == "forward" else None)
        alone = measure(work, runs=runs, timer="device")
        timings |= {(name, which): (called[name], alone[name]) for name in kernels}
    return timings


def layer_table(
    kernels: Sequence[str],
    dtypes: Sequence[torch.dtype],
    path: Path,
    with_rpb: Sequence[bool] = (False,),
    runs: int = 20,
) -> dict[str, float]:
    """Measure every layer, print and write one row each; {kernel: geometric mean of the peer's time over ours}."""
    bandwidth = copy_bytes_per_s()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    ratios = defaultdict(list)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(HEADER)
        for dtype, layer, has_rpb in itertools.product(dtypes, LAYERS, with_rpb):
            name = str(dtype).removeprefix("torch.")
            for (kernel, which), (t, alone) in measure_layer(layer, kernels, dtype, has_rpb, runs).items():
                index = int(which == "backward")
                peer = layer.natten_naive_ms.get(name, (None, None))[index]
                ratio = peer / t.median_ms if peer else None
                if ratio and not has_rpb:
                    ratios[kernel].append(ratio)
                floor = floor_ms(layer, dtype, bandwidth)[index]
                times = [f"{x:.4f}" for x in (t.median_ms, t.low_ms, t.high_ms, alone.median_ms, floor)]
                row = [layer.name, name, int(has_rpb), kernel, which, *times, peer, ratio and f"{ratio:.2f}"]
                row.append(alone.clock_mhz)
                rows.writerow(row)
                file.flush()
                print(*(f"{str(x):>9}" for x in row))
            torch.cuda.empty_cache()
    return {kernel: float(torch.tensor(found).log().mean().exp()) for kernel, found in ratios.items()}


def kernel_profile(layer: Layer, kernel: str, dtype: torch.dtype, has_rpb: bool) -> dict[str, float]:
    """Device microseconds of each CUDA kernel in one forward and backward, warm second-level cache."""
    work = calls(layer, kernel, dtype, has_rpb)
    work.forward(), work.backward()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            work.forward(), work.backward()
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / 5 for event in profile.key_averages() if event.device_time_total}
