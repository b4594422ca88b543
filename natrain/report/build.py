"""From folders of results to a page."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from natrain.bench import models, rows, training
from natrain.errors import invalid, nearest
from natrain.report import kernels, others
from natrain.report.blocks import Chart, Page, Section, Table

# Shown once for all folders; what differs between sessions is listed.
_ENVIRONMENT = (
    "device", "count", "threads", "cores", "driver_version", "clocks.max.sm", "clocks.mem", "power.limit",
    "temperature.gpu", "natrain", "commit", "commits", "torch", "cuda", "timm", "natten", "python", "platform",
    "command", "tuned_plans",
)  # fmt: skip


# Columns of results.csv that say how a time was taken.
_WAY = ("device", "timer", "cache", "threads")

# The CSV of each kind of ablation: its columns, and the one that names the contender.
_FILES = {
    "results.csv": (rows.COLUMNS, "arm"),
    "models.csv": (models.COLUMNS, "kernel"),
    "training.csv": (training.COLUMNS, "kernel"),
}


def build_page(folders: Sequence[Path], title: str | None = None, baseline: str | None = None) -> Page:
    """One page out of the folders of ``natrain ablate``.

    Args:
        title: default: the plans' names and the device.
        baseline: a contender; default: the plan's.

    Raises:
        ValueError: a folder without results, a baseline without a time.
    """
    sessions = [session for folder in folders for session in _sessions(folder)]
    found: list[Section] = []
    runs: list[kernels.Run] = []
    clocks: set[int] = set()
    ways: dict[tuple[str, ...], None] = {}
    summary: list[str] = []
    kernels_baseline = baseline
    for folder in folders:
        files = [name for name in _FILES if (folder / name).is_file()]
        if not files:
            raise invalid(
                "RUN", str(folder), "a folder of `natrain ablate` with results", "natrain report runs/ablations/NAME"
            )
        default = baseline or next(
            (session["baseline"] for session in _sessions(folder) if "baseline" in session), None
        )
        for name in files:
            if name == "results.csv":
                kernels_baseline = kernels_baseline or default
                lines = list(rows.read(folder / name))
                runs += map(kernels.Run.of, lines)
                clocks |= {int(float(line["clock_mhz"])) for line in lines if line["clock_mhz"]}
                ways |= dict.fromkeys(tuple(line[column] for column in _WAY) for line in lines if line["median_ms"])
                continue
            lines = list(rows.read(folder / name, _FILES[name][0]))
            if name == "models.csv":
                sections, said = others.model_sections(lines, default), []
            else:
                sections, said = others.training_sections(lines, folder, default), training.comparison(lines, default)
            same = [each for each in folders if (each / name).is_file()]
            if len(same) > 1:
                sections = [_of_folder(section, folder, same.index(folder) + 1) for section in sections]
                said = [f"{folder}: {line}" for line in said]
            found, summary = found + sections, summary + said
    _check_baseline(folders, baseline)
    if runs:
        results = _results(runs, kernels_baseline)
        ceilings = next((session for session in reversed(sessions) if "copy_bytes_per_s" in session), {})
        summary = _mixed(list(ways)) + kernels.summary(results) + summary
        found = kernels.sections(results, ceilings) + found
    device = sessions[-1]["device"] if sessions else "unknown device"
    names = ", ".join(dict.fromkeys(session["plan"] for session in sessions)) or "results"
    return Page(title or f"{names} on {device}", tuple(summary), (*found, _environment(sessions, clocks)))


def _mixed(ways: Sequence[tuple[str, ...]]) -> list[str]:
    """A sentence where times were taken in several ways: a kernel may be faster for that alone."""
    if len(ways) < 2:
        return []
    differing = {name: list(dict.fromkeys(own)) for name, own in zip(_WAY, zip(*ways, strict=True), strict=True)}
    said = [f"{name} {', '.join(value or 'none' for value in own)}" for name, own in differing.items() if len(own) > 1]
    return [f"times that were taken in {len(ways)} ways are compared, which differ in: {'; '.join(said)}"]


def _of_folder(section: Section, folder: Path, number: int) -> Section:
    """The section of one folder of several: its title says which, and its files have names of their own."""

    def renamed(block: Table | Chart) -> Table | Chart:
        name = f"{block.name}-{number}"
        return (
            replace(block, name=name, data=renamed(block.data))
            if isinstance(block, Chart)
            else replace(block, name=name)
        )

    return replace(section, title=f"{section.title}: {folder}", blocks=tuple(map(renamed, section.blocks)))


def _check_baseline(folders: Sequence[Path], asked: str | None) -> None:
    """Refuses a baseline that no folder has a result of."""
    if asked is None:
        return
    timed: dict[str, None] = {}
    for folder in folders:
        for name, (columns, contender) in _FILES.items():
            if (folder / name).is_file():
                read = rows.read(folder / name, columns)
                timed |= dict.fromkeys(row[contender] for row in read if row["status"] == "ok")
    if not timed:
        raise invalid("--baseline", asked, "none: no contender has a time or an accuracy", "no --baseline")
    if asked not in timed:
        best = nearest(asked, timed) or next(iter(timed))
        raise invalid("--baseline", asked, f"one of {', '.join(timed)}", f"--baseline {best}")


def _results(runs: list[kernels.Run], default: str | None) -> kernels.Results:
    timed = list(dict.fromkeys(run.arm for run in runs if run.ms is not None))
    chosen = default if default in timed else next(iter(timed), "")
    return kernels.Results(tuple(runs), chosen)


def _sessions(folder: Path) -> list[dict[str, Any]]:
    path = folder / "environment.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _environment(sessions: Sequence[dict[str, Any]], clocks: Collection[int]) -> Section:
    table_rows = []
    for name in _ENVIRONMENT:
        values = list(dict.fromkeys(_shown(session[name]) for session in sessions if session.get(name) is not None))
        if values:
            table_rows.append((name, "; ".join(values)))
    if clocks:
        slowest, fastest = min(clocks), max(clocks)
        between = f"{slowest} to {fastest}" if slowest < fastest else str(fastest)
        table_rows.append(("clock of the GPU after a run", f"{between} MHz"))
    return Section(
        "Environment", (Table("environment", "Where it was measured", ("what", "value"), tuple(table_rows)),)
    )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {of_it}" for name, of_it in value.items())
    return str(value)
