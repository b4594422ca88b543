"""Device time of every CUDA kernel that attention launches on the layers of docs/performance.md, family by family.

    python scripts/profile_kernels.py gemm naive --dtype float16 float32 --tf32

The profiler's times, back to back: the second-level cache is warm, which only the small maps notice, and the host does
not count. Kernels are compiled side by side before. What whole calls take is `natrain bench`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from natrain.bench.layers import LAYERS, Layer, calls
from natrain.jit import cuda
from natrain.ops.registry import get_kernel

REPEATS = 5


def specs(layer: Layer, kernel: str, dtype: torch.dtype, has_rpb: bool):
    """What forward and backward of the layer need compiled for the current device."""
    capability = torch.cuda.get_device_capability()
    problem = layer.case(dtype, has_rpb).problem("cuda", capability)
    return get_kernel(kernel).build_specs(problem, cuda.arch_of(capability))


def kernel_times_us(call: Callable[[], object]) -> dict[str, float]:
    """Microseconds of one call by kernel of natrain."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPEATS):
            call()
        torch.cuda.synchronize()
    return {
        event.key.removeprefix("natrain_"): event.self_device_time_total / REPEATS
        for event in profile.key_averages()
        if event.key.startswith("natrain_")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kernels", nargs="+", help="names of `natrain kernels`")
    parser.add_argument("--dtype", nargs="+", default=["float16", "float32"])
    parser.add_argument("--rpb", action="store_true", help="with a trainable bias")
    parser.add_argument("--tf32", action="store_true", help="float32 products may use TF32")
    args = parser.parse_args()
    if args.tf32:
        torch.set_float32_matmul_precision("high")
    dtypes = [getattr(torch, name) for name in args.dtype]
    wanted = [
        spec for layer in LAYERS for kernel in args.kernels for dtype in dtypes
        for spec in specs(layer, kernel, dtype, args.rpb)
    ]  # fmt: skip
    cuda.build_all({spec.key(): spec for spec in wanted}.values())
    for layer in LAYERS:
        for dtype in dtypes:
            for kernel in args.kernels:
                pair = calls(layer, kernel, dtype, args.rpb)
                for direction, call in (("forward", pair.forward), ("backward", pair.backward)):
                    times = kernel_times_us(call)
                    detail = "  ".join(f"{name} {time:.0f}" for name, time in sorted(times.items()))
                    total = sum(times.values())
                    print(f"{layer.name:10} {str(dtype)[6:]:9} {kernel:6} {direction:8} {total:6.0f} us  {detail}")
                del pair
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
