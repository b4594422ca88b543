"""Times plans of a fused kernel against each other: what the models of cost in natrain/ops/fused*_plan.py come from.

For every layer of natrain/bench/layers.py the plan that is chosen and the ``--most`` next ones by cost, no more than
four of one row tile and block. Prints, fastest first: milliseconds (device time, cold second-level cache), the model's
estimate, and the plan; ``*`` marks the choice. Outputs are compared with those of the choice. A backward kernel is
timed with the others of backward, which take their own choice.

    python scripts/bench_plans.py [--kernel backward_q] [--layers 56/1 28/1] [--dtype bfloat16] [--no-rpb] [--most 24]
    python scripts/bench_plans.py --list    (the plans only; needs no GPU)
"""

from __future__ import annotations

import argparse
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import torch

from natrain.bench import layers
from natrain.bench.measure import measure
from natrain.jit import cuda
from natrain.ops import fused
from natrain.ops.fused_forward_plan import candidates, choose_plan
from natrain.ops.fused_gradient_plan import choose_gradient_plan, demands_of_kv, demands_of_q, gradient_plans
from natrain.ops.fused_plan import Demands, Device, Plan, Space
from natrain.ops.registry import get_kernel

KERNELS = ("forward", "backward_q", "backward_kv")


def plans(
    layer: layers.Layer, dtype: torch.dtype, has_rpb: bool, device: Device, most: int, kernel: str = "forward"
) -> list[Plan]:
    """The choice first, then others by cost."""
    problem = layer.case(dtype, has_rpb).problem("cuda", device.capability)
    window = problem.window
    space = Space.of(layer.spatial, window, layer.batch, layer.heads, layer.heads, dtype, has_rpb)
    if kernel == "forward":
        demands = Demands.of_forward(layer.head_dim, layer.head_dim, dtype)
        chosen, others = choose_plan(space, demands, device), candidates(space, demands, device)
    else:
        demands = demands_of_q(problem) if kernel == "backward_q" else demands_of_kv(problem, 3)
        entries = math.prod(window.rpb_shape) if has_rpb and kernel == "backward_q" else 0
        chosen = choose_gradient_plan(space, demands, device, entries)
        others = gradient_plans(space, demands, device, entries)
    alike: Counter = Counter()
    found = [chosen]
    for plan in sorted(others, key=lambda plan: plan.cost):
        kind = plan.row_tile, plan.warps
        if plan != chosen and alike[kind] < 4 and len(found) <= most:
            alike[kind] += 1
            found.append(plan)
    return found


def taking(kernel: str, plan: Plan):
    """A patch with which ``kernel`` takes ``plan``."""
    if kernel == "forward":
        return mock.patch.object(fused, "choose_plan", lambda *_: plan)

    def choose(space, demands, device, bias_entries=0):
        if demands.rows_are_keys == plan.rows_are_keys:
            return plan
        return choose_gradient_plan(space, demands, device, bias_entries)

    return mock.patch.object(fused, "choose_gradient_plan", choose)


def compile_all(kernel: str, found: Iterable[tuple[layers.Layer, list[Plan]]], dtype: torch.dtype, has_rpb: bool):
    """Every plan's kernel, on every processor at once."""
    specs = {}
    arch = cuda.arch_of(torch.cuda.get_device_capability())
    for layer, layer_plans in found:
        problem = layer.case(dtype, has_rpb).problem("cuda", torch.cuda.get_device_capability())
        for plan in layer_plans:
            with taking(kernel, plan):
                specs |= {spec.key(): spec for spec in get_kernel("fused").build_specs(problem, arch)}
    cuda.build_all(specs.values())


def timed(
    kernel: str, layer: layers.Layer, found: list[Plan], dtype: torch.dtype, has_rpb: bool
) -> Iterator[tuple[float, Plan]]:
    """(ms, plan) of those whose result is that of the first."""
    calls, expected = {}, None
    for index, plan in enumerate(found):
        with taking(kernel, plan):
            fused._launches = {}
            both = layers.calls(layer, "fused", dtype, has_rpb)
            call = both.forward if kernel == "forward" else both.backward
            with torch.set_grad_enabled(kernel != "forward"):
                result = call()
                results = [x.float() for x in (result if isinstance(result, tuple) else (result,))]
                expected = results if expected is None else expected
                if not all(torch.allclose(a, b, atol=0.05, rtol=0.05) for a, b in zip(results, expected, strict=True)):
                    print(f"WRONG: {plan}")
                    continue
                calls[str(index)] = functools.partial(_with_launches, fused._launches, call)
    with torch.set_grad_enabled(kernel != "forward"):
        timings = measure(calls, runs=15, warm_ups=1, timer="device")
    for timing in timings.values():
        yield timing.median_ms, found[int(timing.name)]


def _with_launches(launches: dict, call: Callable[[], object]) -> None:
    """``call`` as one plan launches it."""
    fused._launches = launches
    call()


def describe(plan: Plan) -> str:
    kind = "resident" if plan.resident else "chunks"
    return (
        f"tile {plan.row_tile} warps {plan.warps} box {plan.box} chunk {plan.chunk} step {plan.step} {kind} "
        f"table {plan.start_table} stages {plan.stages} blocks {plan.min_blocks} splits {plan.splits} grid {plan.grid} "
        f"shared {plan.shared_bytes}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=KERNELS, default="forward")
    parser.add_argument("--layers", nargs="*", default=[layer.name for layer in layers.LAYERS])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--no-rpb", action="store_true")
    parser.add_argument("--most", type=int, default=24)
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    dtype, has_rpb = getattr(torch, arguments.dtype), not arguments.no_rpb
    device = Device() if arguments.list else fused._device(torch.cuda.current_device())
    wanted = [
        (layer, plans(layer, dtype, has_rpb, device, arguments.most, arguments.kernel))
        for layer in layers.LAYERS
        if layer.name in arguments.layers
    ]
    if not arguments.list:
        compile_all(arguments.kernel, wanted, dtype, has_rpb)
    for layer, found in wanted:
        print(f"{layer.name} {arguments.kernel} {arguments.dtype} {'with' if has_rpb else 'without'} bias")
        results = [(0.0, plan) for plan in found]
        if not arguments.list:
            results = sorted(timed(arguments.kernel, layer, found, dtype, has_rpb), key=lambda result: result[0])
        for ms, plan in results:
            # An estimate in cycles, at the clock of an H200 under load.
            estimate = f"model {plan.cost / 1.755e6:.4f}"
            mark = "*" if plan == found[0] else " "
            print(f"  {mark} {f'{ms:.4f} ms, ' if ms else ''}{estimate}: {describe(plan)}")


if __name__ == "__main__":
    main()
