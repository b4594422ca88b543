"""Times plans of a fused kernel against each other: what the models of cost in natrain/ops/fused*_plan.py come from.

For every problem the plan that is chosen and the ``--most`` next ones by cost, no more than four of one row tile and
block. Prints, fastest first: milliseconds (device time, cold second-level cache), the model's estimate, and the plan;
``*`` marks the choice. Outputs are compared with those of the choice. A backward kernel is timed with the others of
backward, which take their own choice. Without problems: the layers of natrain/bench/layers.py, bfloat16, with a bias.

    python scripts/bench_plans.py "shape=56x56 batch=8 heads=2 head_dim=32 kernel_size=7 dtype=bf16" --kernels forward
    python scripts/bench_plans.py --list       (the plans only; needs no GPU)
    python scripts/bench_plans.py --compile    (compiles them for --arch, no GPU either)
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
from natrain.bench.arms import backward_of, find_arm
from natrain.bench.case import Case
from natrain.bench.measure import measure
from natrain.bench.truth import random_inputs
from natrain.jit import cuda
from natrain.ops import fused
from natrain.ops.fused_forward_plan import candidates, choose_plan
from natrain.ops.fused_gradient_plan import choose_gradient_plan, demands_of_kv, demands_of_q, gradient_plans
from natrain.ops.fused_plan import Demands, Device, Plan, Space
from natrain.ops.registry import get_kernel

KERNELS = ("forward", "backward_q", "backward_kv")


def plans(case: Case, device: Device, most: int, kernel: str = "forward") -> list[Plan]:
    """The choice first, then others by cost."""
    problem = case.problem("cuda", device.capability)
    space = Space.of(case.spatial, case.window, case.batch, case.heads, case.heads, case.dtype, case.has_rpb)
    if kernel == "forward":
        demands = Demands.of_forward(case.head_dim, case.head_dim, case.dtype)
        chosen, others = choose_plan(space, demands, device), candidates(space, demands, device)
    else:
        demands = demands_of_q(problem) if kernel == "backward_q" else demands_of_kv(problem, 3)
        entries = math.prod(case.window.rpb_shape) if case.has_rpb and kernel == "backward_q" else 0
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


def compile_all(wanted: Iterable[tuple[Case, str, list[Plan]]], arch: str) -> None:
    """Every plan's kernel, and those it is timed with, on every processor at once."""
    specs = {}
    for case, kernel, found in wanted:
        for plan in found:
            with taking(kernel, plan):
                built = get_kernel("fused").build_specs(case.problem("cuda", (9, 0)), arch)
            # float32 is timed as TF32.
            specs |= {spec.key(): spec for spec in built if ("NATRAIN_TF32_TERMS", "3") not in spec.defines}
    cuda.build_all(specs.values())


def timed(kernel: str, case: Case, found: list[Plan]) -> Iterator[tuple[float, Plan]]:
    """(ms, plan) of those whose result is that of the first."""
    calls, expected, inputs = {}, None, random_inputs(case, "cuda")
    is_forward = kernel == "forward"
    for index, plan in enumerate(found):
        with taking(kernel, plan):
            fused._launches = {}
            work = find_arm("fused").work(case, inputs)
            call = work.forward if is_forward else backward_of(work)
            with torch.set_grad_enabled(not is_forward):
                result = call()
                results = [x.float() for x in (result if isinstance(result, tuple) else (result,))]
                expected = results if expected is None else expected
                if not all(torch.allclose(a, b, atol=0.05, rtol=0.05) for a, b in zip(results, expected, strict=True)):
                    print(f"WRONG: {plan}")
                    continue
                calls[str(index)] = functools.partial(_with_launches, fused._launches, call)
    with torch.set_grad_enabled(not is_forward):
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
    parser.add_argument("cases", nargs="*", help="problems in the words of `natrain bench`")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--most", type=int, default=24)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    cases = [Case.of(dict(word.split("=") for word in text.split())) for text in arguments.cases]
    cases = cases or [layer.case(torch.bfloat16, True) for layer in layers.LAYERS]
    is_timed = not (arguments.list or arguments.compile)
    device = fused._device(torch.cuda.current_device()) if is_timed else Device()
    wanted = [
        (case, kernel, plans(case, device, arguments.most, kernel)) for case in cases for kernel in arguments.kernels
    ]
    if not arguments.list:
        compile_all(wanted, arguments.arch)
    for case, kernel, found in wanted:
        print(f"{kernel} {case.name}")
        results = [(0.0, plan) for plan in found]
        if is_timed:
            results = sorted(timed(kernel, case, found), key=lambda result: result[0])
        for ms, plan in results:
            # An estimate in cycles, at the clock of an H200 under load.
            estimate = f"model {plan.cost / 1.755e6:.4f}"
            mark = "*" if plan == found[0] else " "
            print(f"  {mark} {f'{ms:.4f} ms, ' if ms else ''}{estimate}: {describe(plan)}", flush=True)


if __name__ == "__main__":
    main()
