"""What options of attention cost: a bias, dropout, deterministic algorithms, a key mask, each beside the plain call.

Every layer of natrain/bench/layers.py by ``--kernel``, packed qkv of one training step. Prints milliseconds (device
time, cold second-level cache) and the ratio to the plain call with the same bias.

    python scripts/bench_options.py [--kernel fused] [--dtype bfloat16] [--layers 56/1 14/1]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import natrain
from natrain.bench.layers import LAYERS, Layer
from natrain.bench.measure import measure, on_timing_stream

# name -> arguments of attention; True stands for a tensor of its own.
OPTIONS: dict[str, dict] = {
    "plain": {},
    "bias": {"rpb": True},
    "bias, deterministic": {"rpb": True},
    "dropout 0.1": {"dropout_p": 0.1},
    "key mask": {"key_mask": True},
}


def calls_of(layer: Layer, option: str, kernel: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """{"forward", "backward"} of the layer with that option."""
    arguments = dict(OPTIONS[option])
    rank, shape = len(layer.spatial), (layer.batch, *layer.spatial)
    qkv = torch.randn(*shape, 3, layer.heads, layer.head_dim, device="cuda", dtype=dtype, requires_grad=True)
    d_out = torch.randn(*shape, layer.heads, layer.head_dim, device="cuda", dtype=dtype)
    inputs = [qkv]
    if arguments.get("rpb"):
        table = [2 * layer.kernel_size - 1] * rank
        arguments["rpb"] = torch.randn(layer.heads, *table, device="cuda", requires_grad=True)
        inputs.append(arguments["rpb"])
    if arguments.get("key_mask"):
        arguments["key_mask"] = torch.rand(shape, device="cuda") > 0.2
    attend = getattr(natrain, f"na{rank}d_qkvpacked")

    def in_its_mode(call: Callable[[], object]) -> Callable[[], object]:
        def wrapped():
            torch.use_deterministic_algorithms("deterministic" in option)
            try:
                return call()
            finally:
                torch.use_deterministic_algorithms(False)

        return wrapped

    def forward():
        return attend(qkv, layer.kernel_size, layer.dilation, kernel=kernel, **arguments)

    with on_timing_stream():
        out = forward()
    return {
        "forward": in_its_mode(forward),
        "backward": in_its_mode(lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="fused")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", nargs="*", default=[layer.name for layer in LAYERS])
    parser.add_argument("--runs", type=int, default=15)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.kernel}, {arguments.dtype}, ms")
    for layer in LAYERS:
        if layer.name not in arguments.layers:
            continue
        both = {option: calls_of(layer, option, arguments.kernel, dtype) for option in OPTIONS}
        times = {
            direction: measure({o: both[o][direction] for o in OPTIONS}, runs=arguments.runs, timer="device")
            for direction in ("forward", "backward")
        }
        for option in OPTIONS:
            base = "bias" if option.startswith("bias,") else "plain"
            cells = [
                f"{timing[option].median_ms:.4f} ({timing[option].median_ms / timing[base].median_ms:.2f})"
                for timing in times.values()
            ]
            print(f"{layer.name:12}{option:22}{' / '.join(cells)}", flush=True)
        del both
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
