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

import torch

from natrain.bench import layers
from natrain.bench.case import Case
from natrain.bench.plans import KERNELS, compile_all, kernels_of, plans, timed
from natrain.ops import fused
from natrain.ops.fused_plan import Device, Plan


def describe(plan: Plan) -> str:
    kind = "resident" if plan.resident else "chunks"
    walk = plan.walk and f"{plan.walk.runs} runs along axis {plan.walk.axis}{' over groups' * plan.walk.is_over_groups}"
    return (
        f"tile {plan.row_tile} warps {plan.warps} box {plan.box} chunk {plan.chunk} step {plan.step} {kind} "
        f"table {plan.start_table} stages {plan.stages} blocks {plan.min_blocks} splits {plan.splits} grid {plan.grid} "
        f"shared {plan.shared_bytes} walk {walk}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="problems in the words of `natrain bench`")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, help="default: those that are launched")
    parser.add_argument("--most", type=int, default=24)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    cases = [Case.of(dict(word.split("=") for word in text.split())) for text in arguments.cases]
    cases = cases or [layer.case(torch.bfloat16, True) for layer in layers.LAYERS]
    is_timed = not (arguments.list or arguments.compile)
    device = fused.device_of(torch.cuda.current_device()) if is_timed else Device()
    try:
        wanted = [
            (case, kernel, plans(case, device, arguments.most, kernel))
            for case in cases
            for kernel in arguments.kernels or kernels_of(case, device)
        ]
    except ValueError as error:
        parser.error(str(error))
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
