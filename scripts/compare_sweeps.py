"""Gains over naive out of a sweep's results, by dtype, rank and direction, and what changed since an earlier sweep.

    natrain ablate ablation=sweep out=runs/new
    python scripts/compare_sweeps.py runs/new [runs/old]

Prints a Markdown table in the form of docs/performance.md: the mean gain over naive (smallest, largest), its geometric
mean, and the share of problems where a kernel is not slower (within 2 %). Left out are problems of which some arm's
interval is wider than its median, since something else had the machine then; how many is said. With a second folder:
how many times as fast each arm is, in the geometric mean (smallest, largest).
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from natrain.bench import rows
from natrain.bench.case import DTYPES, Case
from natrain.bench.estimate import DIRECTIONS
from natrain.report.kernels import Results, Run, geometric_mean

ARMS = ("naive", "gemm", "fused")
PAIRS = (("gemm", "naive"), ("fused", "naive"), ("fused", "gemm"))  # the first should not be slower
WITHIN = 0.98

Problem = tuple[Case, str]


def times_of(folder: Path) -> tuple[dict[Problem, dict[str, float]], int]:
    """{problem: {arm: ms}} of those that every arm was timed on, undisturbed; and how many were not."""
    results = Results(tuple(map(Run.of, rows.read(folder / "results.csv"))), ARMS[0])
    whole = {problem: own for problem, own in results.times.items() if own.keys() >= set(ARMS)}
    kept = {
        problem: {arm: run.ms for arm, run in own.items()}
        for problem, own in whole.items()
        if not any(run.is_disturbed for run in own.values())
    }
    return kept, len(whole) - len(kept)


def strata(problems: dict[Problem, dict[str, float]]):
    """((dtype, rank, direction), [times]) of every stratum that has problems."""
    for name, dtype in DTYPES.items():
        for rank in (1, 2, 3):
            for which in DIRECTIONS:
                found = [
                    times
                    for (case, direction), times in problems.items()
                    if (case.dtype, len(case.spatial), direction) == (dtype, rank, which)
                ]
                if found:
                    yield (name, rank, which), found


def gains(times: list[dict[str, float]], arm: str) -> tuple[str, str]:
    """Mean gain over naive with its range, in percent; geometric mean of the ratios."""
    ratios = [own["naive"] / own[arm] for own in times]
    mean, least, most = (f"{100 * (x - 1):+.0f}" for x in (sum(ratios) / len(ratios), min(ratios), max(ratios)))
    return f"{mean} % ({least}, {most})", f"{geometric_mean(ratios):.2f}"


def share(times: list[dict[str, float]], arm: str, other: str) -> float:
    """Of the problems, in percent, those where ``arm`` is not slower than ``other``."""
    return 100 * sum(own[other] / own[arm] >= WITHIN for own in times) / len(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=Path)
    parser.add_argument("old", type=Path, nargs="?")
    arguments = parser.parse_args()
    for folder in filter(None, (arguments.new, arguments.old)):
        if not (folder / "results.csv").is_file():
            raise SystemExit(f"error: folder {folder} holds no results.csv. Try: what a sweep was given as out=")
    new, left_out = times_of(arguments.new)
    print(f"{len(new)} problems and directions, {left_out} left out (disturbed)\n")
    print("| | | problems | gemm | geo. mean | not slower than naive | fused | geo. mean | than naive, gemm |")
    print("|" + "---|" * 9)
    of_dtype: dict[str, list[dict[str, float]]] = {}
    for (dtype, rank, which), times in strata(new):
        of_dtype.setdefault(dtype, []).extend(times)
        gemm, fused = (" | ".join(gains(times, arm)) for arm in ("gemm", "fused"))
        shares = [share(times, *pair) for pair in PAIRS]
        print(
            f"| {dtype} {rank}-D | {which} | {len(times)} | {gemm} | {shares[0]:.0f} % "
            f"| {fused} | {shares[1]:.0f} %, {shares[2]:.0f} % |"
        )
    print()
    for dtype, times in of_dtype.items():
        shares = [share(times, *pair) for pair in PAIRS]
        print("{}: gemm not slower than naive {:.1f} %, fused {:.1f} %, than gemm {:.1f} %".format(dtype, *shares))
    if arguments.old is None:
        return
    old, _ = times_of(arguments.old)
    both = {problem: {arm: old[problem][arm] / new[problem][arm] for arm in ARMS} for problem in new if problem in old}
    print("\nTimes as fast as before: geometric mean (smallest, largest)")
    for (dtype, rank, which), ratios in strata(both):
        cells = []
        for arm in ARMS:
            own = [x[arm] for x in ratios]
            cells.append(f"{arm} {geometric_mean(own):.2f} ({min(own):.2f}, {max(own):.2f})")
        print(f"{dtype} {rank}-D {which}: {', '.join(cells)}")
    missing = Counter(dtype for (dtype, *_), times in strata({p: old[p] for p in old if p not in new}) for _ in times)
    print("of the earlier sweep, not here: " + (", ".join(f"{n} {d}" for d, n in missing.items()) or "none"))


if __name__ == "__main__":
    main()
