"""What the floor of a layer means for a small one: a copy that moves the same bytes, beside the kernel, in four states
of the second-level cache.

The floor in docs/performance.md is bytes over the speed of a large copy. A small copy does not reach that speed, and
what it takes depends on how many lines of the cache somebody has to write back first. natrain/bench/measure.py empties
the cache by a copy; most benchmarks write a large tensor.

    python scripts/bench_floor.py [--layers 14/1 7/1] [--kernel fused] [--dtype bfloat16] [--no-rpb]

Prints microseconds (device time, medians of --runs) of the kernel and of the copy: cache full of written lines, as a
copy leaves it, full of lines that were only read, and warm.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from natrain.bench.layers import LAYERS, Layer, calls
from natrain.bench.measure import cache_flush, on_timing_stream

_STATES = ("written", "copied", "read", "warm")
_HOLD_CYCLES = 1_000_000  # longer than the host takes to enqueue a call


def copy_of(layer: Layer, dtype: torch.dtype, tensors: int) -> Callable[[], torch.Tensor]:
    """Moves the bytes of so many feature tensors, half of them in, half of them out."""
    elements = layer.batch * torch.Size(layer.spatial).numel() * layer.heads * layer.head_dim
    source = torch.randn(elements * tensors // 2, device="cuda").to(dtype)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def times_us(call: Callable[[], object], state: str, runs: int) -> float:
    """Median device time of ``call`` with the cache in that state."""
    large = torch.ones(2**28 // 4, device="cuda")
    prepare = {"written": lambda: large.fill_(1), "copied": cache_flush(), "read": large.sum, "warm": lambda: None}[
        state
    ]
    pairs = []
    with on_timing_stream():
        for _ in range(3):
            call()
        for _ in range(runs):
            prepare()
            torch.cuda._sleep(_HOLD_CYCLES)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            call()
            events[1].record()
            pairs.append(events)
    torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(end) for start, end in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="*", default=["56/1", "28/1", "14/1", "7/1"])
    parser.add_argument("--kernel", default="fused")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--no-rpb", action="store_true")
    parser.add_argument("--runs", type=int, default=25)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.kernel}, {arguments.dtype}, us")
    print(f"{'layer':10}{'pass':10}" + "".join(f"{f'{what}, {s}':>16}" for s in _STATES for what in ("kernel", "copy")))
    for layer in LAYERS:
        if layer.name not in arguments.layers:
            continue
        both = calls(layer, arguments.kernel, dtype, not arguments.no_rpb)
        for which, call, tensors in (("forward", both.forward, 4), ("backward", both.backward, 8)):
            copy = copy_of(layer, dtype, tensors)
            cells = [times_us(timed, state, arguments.runs) for state in _STATES for timed in (call, copy)]
            print(f"{layer.name:10}{which:10}" + "".join(f"{cell:16.1f}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
