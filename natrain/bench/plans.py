"""Plans of a fused kernel timed against each other, and the fastest of them kept: ``natrain kernels tune``."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from natrain.bench.arms import backward_of, find_arm
from natrain.bench.case import Case
from natrain.bench.measure import measure
from natrain.bench.truth import random_inputs
from natrain.errors import invalid
from natrain.jit import cuda
from natrain.ops import fused, fused_tuned
from natrain.ops.fused_forward_plan import choose_plan, demands_of_forward, forward_search
from natrain.ops.fused_gradient_plan import (
    choose_gradient_plan,
    demands_of_kv,
    demands_of_q,
    demands_of_qkv,
    gradient_search,
    least_gradient_cost,
)
from natrain.ops.fused_plan import Demands, Device, Plan, Space
from natrain.ops.registry import get_kernel

KERNELS = ("forward", "backward_q", "backward_kv", "backward_qkv")
# Plans are interleaved, so that each is timed as often as the others and under the same clock.
_RUNS = 15


def kernels_of(case: Case, device: Device) -> tuple[str, ...]:
    """Those that a training step launches and whose plans can be exchanged.

    Not backward_kv of heads so wide that it runs twice.
    """
    problem = case.problem("cuda", device.capability)
    if fused.one_pass_plan(problem, fused.device_for(problem, device)):
        return "forward", "backward_qkv"
    return ("forward", "backward_q", "backward_kv")[: 3 if 2 * case.head_dim <= 256 else 2]


@dataclass(frozen=True)
class _Question:
    """What the plan of a kernel depends on."""

    space: Space
    demands: Demands
    bias_entries: int

    @staticmethod
    def of(case: Case, kernel: str) -> _Question:
        problem = case.problem("cuda", (9, 0))
        space = Space.of(case.spatial, case.window, case.batch, case.heads, case.heads, case.dtype, case.has_rpb)
        if kernel == "forward":
            return _Question(space, demands_of_forward(problem), 0)
        if kernel == "backward_kv":
            return _Question(space, demands_of_kv(problem, 3), 0)
        if kernel == "backward_qkv":
            return _Question(space, demands_of_qkv(problem), 0)
        entries = math.prod(case.window.rpb_shape) if case.has_rpb else 0
        return _Question(space, demands_of_q(problem), entries)


def plans(case: Case, device: Device, most: int, kernel: str = "forward") -> list[Plan]:
    """The choice first, then ``most`` others by cost, no more than four of one row tile and block."""
    problem = case.problem("cuda", device.capability)
    asked = _Question.of(case, kernel)
    device = fused.device_for(problem, device)
    if kernel == "backward_qkv" and not (
        fused.can_take_one_pass(problem) and least_gradient_cost(asked.space, asked.demands, device) < math.inf
    ):
        raise invalid(
            "kernel", f"{kernel} of {case.name}", "short windows in one line, no bias, head_dim up to 128",
            "backward_q or backward_kv",
        )  # fmt: skip
    if kernel == "forward":
        chosen = choose_plan(asked.space, asked.demands, device)
        search = forward_search(asked.space, asked.demands, device)
    else:
        chosen = choose_gradient_plan(asked.space, asked.demands, device, asked.bias_entries)
        search = gradient_search(asked.space, asked.demands, device, asked.bias_entries)
    alike: Counter = Counter()
    found = [chosen]
    for plan in sorted(search.plans(), key=lambda plan: plan.cost):
        if len(found) > most:
            break
        kind = plan.row_tile, plan.warps
        if alike[kind] == 4 or 4 * plan.grid * asked.bias_entries > fused.MAX_BIAS_WORKSPACE:
            continue
        # With blocks that walk, where they would, and without.
        others = [other for other in dict.fromkeys((search.walking(plan), plan)) if other != chosen]
        alike[kind] += bool(others)
        found += others
    return found[: most + 1]


def compile_all(wanted: Iterable[tuple[Case, str, list[Plan]]], arch: str) -> None:
    """Every plan's kernel, and those it is timed with, on every processor at once; needs no GPU."""
    specs = {}
    for case, kernel, found in wanted:
        for plan in found:
            with fused.taking(kernel, plan):
                built = get_kernel("fused").build_specs(case.problem("cuda", (9, 0)), arch)
            # float32 is timed as TF32.
            specs |= {spec.key(): spec for spec in built if ("NATRAIN_TF32_TERMS", "3") not in spec.defines}
    cuda.build_all(specs.values())


def timed(kernel: str, case: Case, found: list[Plan]) -> Iterator[tuple[float, Plan]]:
    """(ms, plan) of those whose result is that of the first; of a backward kernel the time of all of backward."""
    calls, expected, inputs = {}, None, random_inputs(case, "cuda")
    is_forward = kernel == "forward"
    for index, plan in enumerate(found):
        with fused.taking(kernel, plan):
            launches = fused.launches()
            work = find_arm("fused").work(case, inputs)
            call = work.forward if is_forward else backward_of(work)
            with torch.set_grad_enabled(not is_forward):
                result = call()
                results = [x.float() for x in (result if isinstance(result, tuple) else (result,))]
                expected = results if expected is None else expected
                if not all(torch.allclose(a, b, atol=0.05, rtol=0.05) for a, b in zip(results, expected, strict=True)):
                    print(f"WRONG: {plan}")
                    continue
                calls[str(index)] = functools.partial(_with_launches, launches, call)
    with torch.set_grad_enabled(not is_forward):
        timings = measure(calls, runs=_RUNS, warm_ups=1, timer="device")
    for timing in timings.values():
        yield timing.median_ms, found[int(timing.name)]


def _with_launches(launches: dict, call: Callable[[], object]) -> None:
    """``call`` as one plan launches it."""
    with fused.launching(launches):
        call()


@dataclass(frozen=True)
class Tuned:
    """A kernel of a problem: milliseconds of the plan that was taken, and of the one that is from now on."""

    case: Case
    kernel: str
    before_ms: float
    after_ms: float


def tune(cases: Iterable[Case], most: int = 10) -> Iterator[Tuned]:
    """Time the choice and ``most`` other plans of every kernel of the cases, one after the other, and keep the fastest.

    A plan takes the place of the choice if it is faster by more than 1 %.
    """
    index = torch.cuda.current_device()
    device, arch = fused.device_of(index), cuda.arch_of(torch.cuda.get_device_capability(index))
    for case in cases:
        for kernel in kernels_of(case, device):
            found = plans(case, device, most, kernel)
            compile_all([(case, kernel, found)], arch)
            results = {plan: ms for ms, plan in timed(kernel, case, found)}
            before = results[found[0]]
            best = min(results, key=results.get)
            if results[best] > 0.99 * before:
                best = found[0]
            asked = _Question.of(case, kernel)
            own = fused.device_for(case.problem("cuda", device.capability), device)
            fused_tuned.store(kernel, asked.space, asked.demands, own, best, results[best])
            fused.forget_plans()
            yield Tuned(case, kernel, before, results[best])
