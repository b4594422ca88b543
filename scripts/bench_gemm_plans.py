"""Times tilings of the gemm kernels against each other and against naive: what the cost in natrain/ops/gemm_plan.py
comes from.

For qk, av and inverse of every problem the cheapest tilings of every kind (slices, whole halo or chunks, weights staged
or not). Prints, fastest first: microseconds (device time, cold second-level cache), the model's cost, the tiling; ``*``
marks the choice. Outputs are compared with naive's.

    python scripts/bench_gemm_plans.py "shape=100x70 batch=60 heads=2 head_dim=128 kernel_size=3 dtype=fp32" ...
    python scripts/bench_gemm_plans.py --list ...       (the tilings only; needs no GPU)
    python scripts/bench_gemm_plans.py --compile ...    (compiles them for --arch, no GPU either)
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from unittest import mock

import torch

from natrain.bench.case import Case
from natrain.bench.measure import measure
from natrain.jit import cuda
from natrain.ops import gemm, naive
from natrain.ops.gemm_plan import GemmTiling, choose_gemm_tiling, gemm_tilings
from natrain.ops.geometry import weights_pitch
from natrain.ops.registry import get_kernel

PRIMITIVES = ("qk", "av", "inverse")


def tilings(primitive: str, case: Case, most: int) -> list[GemmTiling]:
    """The choice first, then the cheapest of every kind."""
    problem = primitive, case.spatial, case.window, case.head_dim, case.dtype, case.has_rpb and primitive == "qk"
    found = [choose_gemm_tiling(*problem)]
    alike: Counter = Counter()
    for tiling in sorted(gemm_tilings(*problem), key=lambda tiling: tiling.cost):
        columns = tiling.halo[0] * tiling.halo[1] * tiling.halo[2]
        kind = tiling.slices, tiling.columns, tiling.is_staged, min(3, columns // tiling.chunk)
        if tiling != found[0] and alike[kind] < most:
            alike[kind] += 1
            found.append(tiling)
    return found


def taking(tiling: GemmTiling):
    """A patch with which the gemm kernels take ``tiling``, and qk leaves the softmax to others."""
    return mock.patch.object(gemm, "choose_gemm_tiling", lambda *problem: None if problem[-1] else tiling)


def compile_all(wanted: list[tuple[Case, str, list[GemmTiling]]], arch: str) -> None:
    """Every tiling's kernel, on every processor at once."""
    specs = {}
    for case, primitive, found in wanted:
        for tiling in found:
            # Of the other primitives, which take the same constants here, nothing is built.
            with taking(tiling):
                built = get_kernel("gemm").build_specs(case.problem("cuda", (9, 0)), arch)
            terms = ("NATRAIN_TERMS", "1")
            specs |= {s.key(): s for s in built if s.name == f"natrain_gemm_{primitive}" and terms in s.defines}
    cuda.build_all(specs.values())


def call_of(kernel: str, primitive: str, case: Case, tensors: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Writes the primitive's output and returns it; rows of weights are padded, as in attention."""
    impl, window, scale = get_kernel(kernel), case.window, case.head_dim**-0.5
    if primitive == "qk":
        scores = torch.empty_like(tensors["weights"])

        def call():
            impl.write_scores(window, tensors["q"], tensors["k"], tensors["rpb"], scale, 0.0, scores)
            return scores

    else:
        out = torch.empty_like(tensors["q"])

        def call():
            impl.write_sums(primitive, window, tensors["weights"], tensors["k"], out, 1.0)
            return out

    return call


def timed(primitive: str, case: Case, found: list[GemmTiling]) -> tuple[float, list[tuple[float, GemmTiling]]]:
    """Milliseconds of naive, and (ms, tiling) of those whose output is naive's."""
    row = case.shape[:-1]
    pitch = weights_pitch(case.window.num_neighbors, case.dtype)
    tensors = {name: torch.randn(case.shape, device="cuda", dtype=case.dtype) for name in "qk"}
    tensors["weights"] = torch.rand(*row, pitch, device="cuda", dtype=case.dtype)
    tensors["rpb"] = torch.randn(case.heads, *case.window.rpb_shape, device="cuda") if case.has_rpb else None
    calls = {"naive": call_of("naive", primitive, case, tensors)}
    expected = calls["naive"]().clone()
    for index, tiling in enumerate(found):
        naive.plans.clear()
        with taking(tiling):
            call = call_of("gemm", primitive, case, tensors)
            if not torch.allclose(call().float(), expected.float(), atol=0.05, rtol=0.05):
                print(f"WRONG: {primitive} {case.name} {tiling}")
                continue
            calls[str(index)] = _with_plans(dict(naive.plans), call)
    calls["naive"] = _with_plans({}, calls["naive"])
    taken = measure(calls, runs=9, warm_ups=1, timer="device")
    results = [(timing.median_ms, found[int(name)]) for name, timing in taken.items() if name != "naive"]
    return taken["naive"].median_ms, sorted(results, key=lambda result: result[0])


def _with_plans(plans: dict, call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """``call`` with launches of its own."""

    def alone():
        naive.plans.clear()
        naive.plans.update(plans)
        result = call()
        plans.update(naive.plans)
        return result

    return alone


def describe(tiling: GemmTiling) -> str:
    return (
        f"row {tiling.row} warps {tiling.warps} halo {tiling.halo} slices {tiling.slices} columns {tiling.columns} "
        f"chunk {tiling.chunk} staged {int(tiling.is_staged)} blocks {tiling.min_blocks} shared {tiling.shared_bytes}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", help="problems in the words of `natrain bench`")
    parser.add_argument("--primitives", nargs="+", choices=PRIMITIVES, default=PRIMITIVES)
    parser.add_argument("--most", type=int, default=3, help="tilings of a kind")
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    cases = [Case.of(dict(word.split("=") for word in text.split())) for text in arguments.cases]
    wanted = [(case, name, tilings(name, case, arguments.most)) for case in cases for name in arguments.primitives]
    if not arguments.list:
        compile_all(wanted, arguments.arch)
    for case, primitive, found in wanted:
        print(f"{primitive} {case.name}")
        results = [(0.0, tiling) for tiling in found]
        if not arguments.list and not arguments.compile:
            naive_ms, results = timed(primitive, case, found)
            print(f"    {1e3 * naive_ms:.1f} us: naive")
        for ms, tiling in results:
            mark = "*" if tiling == found[0] else " "
            print(f"  {mark} {f'{1e3 * ms:.1f} us, ' if ms else ''}model {tiling.cost:.0f}: {describe(tiling)}")


if __name__ == "__main__":
    main()
