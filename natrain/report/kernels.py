"""Tables and charts of a sweep of kernels."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from natrain.bench.case import WORDS, Case
from natrain.bench.estimate import DIRECTIONS, feature_bytes, floor_bytes, flops, unfused_floor_bytes
from natrain.report import svg
from natrain.report.blocks import Chart, Section, Table

_MOST_BINS = 8


@dataclass(frozen=True)
class Run:
    """One row of results.csv; times in ms, None without one."""

    case: Case
    arm: str
    direction: str
    status: str
    reason: str
    ms: float | None
    low_ms: float | None
    high_ms: float | None
    peak_mib: float | None
    error: float | None

    @staticmethod
    def of(row: Mapping[str, str]) -> Run:
        case = Case.of({word: row[word] for word in WORDS})
        names = ("median_ms", "low_ms", "high_ms", "peak_mib", "error")
        numbers = (float(row[name]) if row[name] else None for name in names)
        return Run(case, row["arm"], row["direction"], row["status"], row["reason"], *numbers)

    @property
    def is_disturbed(self) -> bool:
        """Whether the interval of its time is wider than the median: something else had the machine meanwhile."""
        return self.ms is not None and self.high_ms - self.low_ms > self.ms


@dataclass(frozen=True)
class Results:
    """The runs of a sweep; the last one counts where a problem was measured again."""

    runs: tuple[Run, ...]
    baseline: str

    @cached_property
    def times(self) -> dict[tuple[Case, str], dict[str, Run]]:
        """(problem, direction) -> contender -> its run, of those with a time."""
        found: dict[tuple[Case, str], dict[str, Run]] = defaultdict(dict)
        for run in self.runs:
            if run.ms is not None:
                found[run.case, run.direction][run.arm] = run
        return dict(found)

    @cached_property
    def arms(self) -> list[str]:
        """Contenders with a time, the baseline first."""
        timed = dict.fromkeys(run.arm for run in self.runs if run.ms is not None)
        return sorted(timed, key=lambda name: (name != self.baseline, list(timed).index(name)))

    @cached_property
    def groups(self) -> list[tuple[str, str, str]]:
        """(op, dtype, direction) that have times, in a fixed order."""
        found = {(case.op, case.dtype_name, direction) for case, direction in self.times}
        return sorted(found, key=lambda group: (group[0], group[1], DIRECTIONS.index(group[2])))

    def speed_ups(self, arm: str, group: tuple[str, str, str] | None = None) -> list[tuple[Case, str, float]]:
        """(problem, direction, baseline's time over the contender's) where both have one."""
        return [
            (case, direction, own[self.baseline].ms / own[arm].ms)
            for (case, direction), own in self.times.items()
            if arm in own and self.baseline in own and (group is None or (case.op, case.dtype_name, direction) == group)
        ]


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def sections(results: Results, ceilings: Mapping[str, object]) -> list[Section]:
    """All of a sweep's sections, the headline figures first."""
    found = [
        Section(
            "Speed-up over the baseline",
            tuple([*_gains(results), *_room(results, ceilings), *_distributions(results)]),
            _GAIN_TEXT,
        ),
        Section("Who beats whom", tuple(_wins(results)), _WIN_TEXT),
        Section("Speed-up over window and size", tuple(_heat_maps(results)), _HEAT_TEXT),
        Section("Rates and ceilings", tuple(_rooflines(results, ceilings)), _ROOF_TEXT),
        Section("Memory", tuple(_memory(results)), _MEMORY_TEXT),
        Section("Errors", tuple(_errors(results)), _ERROR_TEXT),
        Section("What has no time", tuple(_failures(results))),
        Section("Every run", (_every_run(results),)),
    ]
    return [section for section in found if section.blocks]


_GAIN_TEXT = (
    "Gain: the baseline's time over the contender's, less one; over problems the arithmetic mean, minimum and maximum, "
    "as the paper's tables 3 and 4 give it (arXiv 2403.04690), with the geometric mean of the speed-up beside it. The "
    "most that memory lets a kernel gain: a contender that takes what its bytes take at the speed of a copy; one that "
    "moves q, k, v, out and their gradients once, and one that stores attention weights besides, and touches them no "
    "more than it must: forward twice, backward five times."
)
_WIN_TEXT = "Percentage of problems on which the row is faster than the column, as in the paper's tables 1 and 2."
_HEAT_TEXT = (
    "Each cell is the geometric mean of the speed-up over the problems in it: blue is faster than the baseline, orange "
    "slower. Window: keys a query; size: tokens an image."
)
_ROOF_TEXT = (
    "Useful FLOPs a second over useful FLOPs a byte (any kernel must move q, k, v and the output, and backward their "
    "gradients, once). The dashed line is what this device was measured to do: a copy, and torch's matrix product."
)
_MEMORY_TEXT = "Memory a call takes at its peak beyond its inputs, in multiples of the size of q."
_ERROR_TEXT = (
    "Relative error against float64 at sampled places: out; the worst of the gradients of q, k, v and a bias (rows of "
    "older commits: of q, k and v)."
)


def _rounded(value: float, digits: int = 2) -> float:
    return round(value, digits)


def _gains(results: Results) -> list[Table]:
    rows = []
    for group in results.groups:
        for arm in results.arms[1:]:
            ratios = [ratio for _, _, ratio in results.speed_ups(arm, group)]
            if ratios:
                gains = [100 * (ratio - 1) for ratio in ratios]
                rows.append(
                    (
                        *group,
                        arm,
                        len(ratios),
                        _rounded(statistics.fmean(gains), 1),
                        _rounded(min(gains), 1),
                        _rounded(max(gains), 1),
                        _rounded(geometric_mean(ratios), 3),
                        _rounded(100 * sum(ratio >= 0.98 for ratio in ratios) / len(ratios), 1),
                    )
                )
    if not rows:
        return []
    columns = (
        "op",
        "dtype",
        "pass",
        "kernel",
        "problems",
        "mean gain %",
        "min %",
        "max %",
        "geo. mean x",
        "within 2 % or faster, %",
    )
    return [Table("gains", f"Gain over {results.baseline}", columns, tuple(rows))]


def _room(results: Results, ceilings: Mapping[str, object]) -> list[Table]:
    """What memory leaves to gain over the baseline, fused and unfused."""
    bytes_per_s = ceilings.get("copy_bytes_per_s")
    if not bytes_per_s:
        return []
    rows = []
    for op, dtype, direction in results.groups:
        times = [
            (case, own[results.baseline].ms)
            for (case, which), own in results.times.items()
            if (case.op, case.dtype_name, which) == (op, dtype, direction) and results.baseline in own
        ]
        if not times:
            continue
        means = [
            statistics.fmean(100 * (ms * 1e-3 * bytes_per_s / least(case, direction) - 1) for case, ms in times)
            for least in (floor_bytes, unfused_floor_bytes)
        ]
        rows.append((op, dtype, direction, len(times), *(_rounded(mean, 1) for mean in means)))
    columns = ("op", "dtype", "pass", "problems", "fused, mean gain %", "with weights in memory, mean gain %")
    return [Table("room", f"The most that memory lets a kernel gain over {results.baseline}", columns, tuple(rows))]


def _distributions(results: Results) -> list[Chart]:
    charts = []
    for direction in DIRECTIONS:
        series, rows, kinds = {}, [], {}
        for op, dtype, which in results.groups:
            for arm in results.arms[1:]:
                found = results.speed_ups(arm, (op, dtype, which)) if which == direction else []
                if found:
                    name = f"{arm} {op} {dtype}"
                    series[name] = [(ratio, f"{case.name}: {ratio:.2f}x") for case, _, ratio in found]
                    kinds[name] = results.arms.index(arm)
                    rows += [(arm, case.name, _rounded(ratio, 4)) for case, _, ratio in found]
        if series:
            title = f"Speed-up over {results.baseline}, {direction}"
            picture = svg.strips(title, series, kinds, f"times as fast as {results.baseline} (logarithmic)", 1.0)
            data = Table(f"distribution-{direction}", title, ("kernel", "problem", "speed-up"), tuple(rows))
            charts.append(Chart(data.name, title, picture, data, "A mark is a problem; the box holds the middle half."))
    return charts


def _wins(results: Results) -> list[Table]:
    tables = []
    for op, dtype, direction in results.groups if len(results.arms) > 1 else []:
        rows = []
        for row in results.arms:
            cells: list[float | None] = []
            for column in results.arms:
                pairs = [
                    own[row].ms < own[column].ms
                    for (case, which), own in results.times.items()
                    if (case.op, case.dtype_name, which) == (op, dtype, direction) and row in own and column in own
                ]
                cells.append(_rounded(100 * sum(pairs) / len(pairs), 1) if pairs and row != column else None)
            if any(cell is not None for cell in cells):
                rows.append((row, *cells))
        if rows:
            title = f"{op}, {dtype}, {direction}: % of problems"
            name = f"wins-{op}-{dtype}-{direction}"
            tables.append(Table(name, title, ("faster than", *results.arms), tuple(rows)))
    return tables


def _bins(values: Sequence[int]) -> dict[int, str]:
    """Each value's label: itself where there are few, else ranges of about equally many values."""
    unique = sorted(set(values))
    if len(unique) <= _MOST_BINS:
        return {value: svg.number(value) for value in unique}
    labels = {}
    for index in range(_MOST_BINS):
        part = unique[index * len(unique) // _MOST_BINS : (index + 1) * len(unique) // _MOST_BINS]
        label = svg.number(part[0]) if len(part) == 1 else f"{svg.number(part[0])} to {svg.number(part[-1])}"
        labels |= dict.fromkeys(part, label)
    return labels


def _heat_maps(results: Results) -> list[Chart]:
    charts = []
    for group in results.groups:
        for arm in results.arms[1:]:
            found = results.speed_ups(arm, group)
            if not found:
                continue
            windows = _bins([case.window.num_neighbors for case, _, _ in found])
            sizes = _bins([case.tokens for case, _, _ in found])
            cells: dict[tuple[str, str], list[float]] = defaultdict(list)
            for case, _, ratio in found:
                cells[sizes[case.tokens], windows[case.window.num_neighbors]].append(ratio)
            means = {place: (geometric_mean(ratios), len(ratios)) for place, ratios in cells.items()}
            columns, rows = list(dict.fromkeys(windows.values())), list(dict.fromkeys(sizes.values()))
            title = f"{arm} over {results.baseline}: {', '.join(group)}"
            picture = svg.heat_map(title, means, columns, rows, "window (keys)", "size (tokens)")
            data = Table(
                f"heat-{arm}-{'-'.join(group)}",
                title,
                ("tokens", "keys", "speed-up", "problems"),
                tuple((*place, _rounded(ratio, 4), count) for place, (ratio, count) in means.items()),
            )
            charts.append(Chart(data.name, title, picture, data))
    return charts


def _rooflines(results: Results, ceilings: Mapping[str, object]) -> list[Chart]:
    charts = []
    bytes_per_s, products = ceilings.get("copy_bytes_per_s"), ceilings.get("product_flops_per_s") or {}
    for dtype in sorted({case.dtype_name for case, _ in results.times}):
        for direction in DIRECTIONS:
            series: dict[str, list[svg.Point]] = {}
            rows = []
            for (case, which), own in results.times.items():
                if case.dtype_name != dtype or which != direction:
                    continue
                work = flops(case, direction)
                intensity = work / floor_bytes(case, direction)
                for arm, run in own.items():
                    rate = work / (run.ms / 1e3) / 1e12
                    series.setdefault(arm, []).append((intensity, rate, f"{arm}: {case.name}, {rate:.3g} TFLOP/s"))
                    rows.append((arm, case.name, _rounded(intensity, 3), float(f"{rate:.5g}")))
            if not series:
                continue
            lines = []
            if bytes_per_s and dtype in products:
                most = max(point[0] for own in series.values() for point in own) * 1.1
                least = min(point[0] for own in series.values() for point in own) / 1.1
                peak = products[dtype] / 1e12
                knee = products[dtype] / bytes_per_s
                corners = [(least, least * bytes_per_s / 1e12)] if least < knee else [(least, peak)]
                corners += [(knee, peak)] if least < knee < most else []
                corners += [(most, min(peak, most * bytes_per_s / 1e12))]
                lines = [(f"copy {bytes_per_s / 1e9:,.0f} GB/s, product {peak:,.3g} TFLOP/s", corners)]
            title = f"Roofline, {dtype}, {direction}"
            ordered = {arm: series[arm] for arm in results.arms if arm in series}
            picture = svg.scatter(title, ordered, "useful FLOPs a byte of the floor", "TFLOP/s", lines)
            data = Table(
                f"roofline-{dtype}-{direction}", title, ("kernel", "problem", "FLOPs a byte", "TFLOP/s"), tuple(rows)
            )
            charts.append(Chart(data.name, title, picture, data))
    return charts


def _memory(results: Results) -> list[Chart]:
    charts = []
    for direction in DIRECTIONS:
        series: dict[str, list[svg.Point]] = {}
        rows = []
        for (case, which), own in results.times.items():
            for arm, run in own.items():
                if which == direction and run.peak_mib:
                    multiple = run.peak_mib * 2**20 / feature_bytes(case)
                    keys = case.window.num_neighbors
                    series.setdefault(arm, []).append((keys, multiple, f"{arm}: {case.name}, {run.peak_mib:.1f} MiB"))
                    rows.append((arm, case.name, keys, _rounded(run.peak_mib, 1), _rounded(multiple, 3)))
        if series:
            title = f"Peak memory, {direction}"
            ordered = {arm: series[arm] for arm in results.arms if arm in series}
            picture = svg.scatter(title, ordered, "window (keys)", "multiples of q")
            columns = ("kernel", "problem", "keys", "MiB", "multiples of q")
            charts.append(
                Chart(f"memory-{direction}", title, picture, Table(f"memory-{direction}", title, columns, tuple(rows)))
            )
    return charts


def _errors(results: Results) -> list[Table]:
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for (case, direction), own in results.times.items():
        for arm, run in own.items():
            found[arm, case.dtype_name, direction].append(run.error)
    rows = [
        (*key, len(errors), float(f"{statistics.median(errors):.3g}"), float(f"{max(errors):.3g}"))
        for key, errors in sorted(found.items(), key=lambda item: (results.arms.index(item[0][0]), item[0][1:]))
    ]
    columns = ("kernel", "dtype", "pass", "problems", "median error", "largest error")
    return [Table("errors", "Relative error against float64", columns, tuple(rows))] if rows else []


def _failures(results: Results) -> list[Table]:
    latest = {(run.case, run.arm, run.direction): run for run in results.runs}
    count = Counter((run.arm, run.status, run.reason) for run in latest.values() if run.ms is None)
    rows = tuple((*key, runs) for key, runs in count.most_common())
    return [Table("failures", "Runs without a time", ("kernel", "status", "reason", "runs"), rows)] if rows else []


def _every_run(results: Results) -> Table:
    rows = []
    for (case, direction), own in results.times.items():
        base = own.get(results.baseline)
        for arm, run in own.items():
            ratio = None if base is None else _rounded(base.ms / run.ms, 3)
            numbers = (run.ms, run.low_ms, run.high_ms, ratio, run.peak_mib, run.error)
            rows.append((case.name, arm, direction, *numbers, "yes" if run.is_disturbed else None))
    columns = ("problem", "kernel", "pass", "ms", "low", "high", "speed-up", "MiB", "error", "disturbed")
    note = "Disturbed: the interval is wider than the median."
    return Table("runs", "Medians with the bounds of their 95 % intervals", columns, tuple(rows), note)


def summary(results: Results) -> list[str]:
    """A sentence a contender and direction; one about times that were disturbed, where some were."""
    timed = [run for own in results.times.values() for run in own.values()]
    disturbed = sum(run.is_disturbed for run in timed)
    lines = []
    if disturbed:
        lines.append(
            f"{disturbed} of {len(timed)} times have an interval wider than their median: something else had the "
            "machine. They are marked in the table of every run; measure them again, in another folder"
        )
    for arm in results.arms[1:]:
        for direction in DIRECTIONS:
            ratios = [ratio for _, which, ratio in results.speed_ups(arm) if which == direction]
            if ratios:
                share = 100 * sum(ratio > 1 for ratio in ratios) / len(ratios)
                lines.append(
                    f"{arm}, {direction}: {geometric_mean(ratios):.2f} times as fast as {results.baseline} "
                    f"(geometric mean over {len(ratios)} problems; {min(ratios):.2f} to {max(ratios):.2f}; faster on "
                    f"{share:.0f} %)"
                )
    return lines
