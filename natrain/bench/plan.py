"""A sweep as a yaml describes it: contenders, problems, how times are taken.

    kernels: [naive, {name: naive-before, kernel: naive, commit: 60fac93}]   # contenders; a commit of this project
    baseline: naive                 # what the others are compared with
    directions: [forward, backward]
    runs: 15                        # timed calls of each
    timer: device                   # device | graph | events: natrain/bench/measure.py
    cache: cold                     # cold | warm
    tf32: true                      # float32 products may use TF32
    seconds: 10                     # most seconds of timed calls of one contender; fewer runs, at least 3, keep it
    problems: [{shape: 56x56, heads: 2, head_dim: 32, kernel_size: 7, batch: 128}]
    axes: {dtype: [fp16, fp32], kernel_size: [3, 5, 7]}   # all combinations, on top of every problem

``batch: auto`` takes as many images as keep the naive kernel's backward at about 3 ms on one H200. Combinations whose
window does not fit the shape are left out, and counted.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from natrain.bench.arms import find_arm
from natrain.bench.case import WORDS, Case, meant
from natrain.bench.estimate import DIRECTIONS, RATES, seconds
from natrain.bench.measure import METHOD, TIMERS
from natrain.errors import invalid

_AUTO_S = 3e-3  # of one call, where the batch is chosen
_MOST_IMAGES = 1024
_CHOICES = {"timer": TIMERS, "cache": ("cold", "warm")}
_MEASURING = ("runs", "timer", "cache", "tf32", "seconds")
_DEFAULTS = {
    "kind": "kernels",
    "kernels": None,
    "baseline": None,
    "directions": list(DIRECTIONS),
    "runs": 15,
    "timer": "device",
    "cache": "cold",
    "tf32": True,
    "seconds": 10,
    "problems": None,
    "axes": {},
}


@dataclass(frozen=True)
class ArmSpec:
    """A contender: the name of its rows, its kernel or peer, and the commit whose code runs it (None: this one)."""

    name: str
    kernel: str
    commit: str | None = None


@dataclass(frozen=True)
class Plan:
    """``digest`` is the hash of how times are taken; rows carry it, and rows of one folder share it."""

    name: str
    text: str
    arms: tuple[ArmSpec, ...]
    baseline: str
    cases: tuple[Case, ...]
    num_left_out: int
    directions: tuple[str, ...]
    runs: int
    timer: str
    cache: str
    tf32: bool
    seconds: float

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.measuring).encode()).hexdigest()[:12]

    @property
    def measuring(self) -> dict[str, Any]:
        """How times are taken: what a time depends on besides its problem, contender and direction."""
        return {name: getattr(self, name) for name in _MEASURING} | {"method": METHOD}


def read_plan(path: Path, changes: Mapping[str, Any] | None = None) -> Plan:
    """The plan of a yaml file; ``changes`` replace its settings, or add axes where they are words of a problem.

    Raises:
        ValueError: no such file, an unknown or missing setting, a value out of range.
    """
    settings = read_settings(path)
    return make_plan(path.stem, settings, path.read_text(encoding="utf-8"), changes or {})


def read_settings(path: Path) -> dict[str, Any]:
    """What a yaml of any kind of ablation holds.

    Raises:
        ValueError: no such file, no yaml, no settings.
    """
    import yaml

    if not path.is_file():
        raise invalid("ablation", str(path), "a yaml file that exists", "ablation=paper_2d")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise invalid("ablation", str(path), f"a yaml file ({where})", "correct that line") from None
    if not isinstance(settings, dict):
        raise invalid("ablation", str(path), "a yaml file of settings with values", "kernels: [naive, cpu]")
    return settings


def make_plan(name: str, settings: Mapping[str, Any], text: str, changes: Mapping[str, Any]) -> Plan:
    """See ``read_plan``; ``text`` is the yaml's."""
    known = {**_DEFAULTS, **settings, **{key: value for key, value in changes.items() if key not in WORDS}}
    if not isinstance(known["axes"] or {}, dict):
        raise invalid("axes", known["axes"], "words of a problem with their values", "axes: {kernel_size: [3, 7]}")
    axes = dict(known["axes"] or {})
    for key, value in changes.items():
        if key in WORDS:
            axes[key] = value if isinstance(value, list) else [value]
    for key in known:
        if key not in _DEFAULTS:
            names = [*_DEFAULTS, *WORDS]
            raise invalid("setting", key, f"one of {', '.join(names)}", f"{meant(key, names)}=...")
    if known["kind"] != "kernels":
        raise invalid(
            "kind", known["kind"], "kernels, for a sweep over problems", "natrain ablate, which takes all kinds"
        )
    directions = as_list(known["directions"])
    _check_measuring(known)
    if not directions or not set(map(str, directions)) <= set(DIRECTIONS):
        raise invalid("directions", known["directions"], f"some of {', '.join(DIRECTIONS)}", "directions=[forward]")
    arms = tuple(_arm(entry) for entry in as_list(known["kernels"]))
    if not arms:
        raise invalid("kernels", known["kernels"], "names of contenders", "kernels=[naive,fused]")
    names = [arm.name for arm in arms]
    baseline = known["baseline"]
    if baseline not in names:
        if baseline is not None and ("baseline" in changes or "kernels" not in changes):
            raise invalid("baseline", baseline, f"one of {', '.join(names)}", f"baseline={names[0]}")
        baseline = names[0]
    problems = known["problems"] or [{}]
    if not isinstance(problems, list) or not all(isinstance(problem, dict) for problem in problems):
        fix = "problems: [{shape: 56x56, heads: 2, head_dim: 32}]"
        raise invalid("problems", known["problems"], "a list of problems, each with its words", fix)
    cases, num_left_out = _cases(problems, axes)
    plan = Plan(
        name=name,
        text=text,
        arms=arms,
        baseline=baseline,
        cases=tuple(cases),
        num_left_out=num_left_out,
        directions=tuple(dict.fromkeys(directions)),
        runs=known["runs"],
        timer=known["timer"],
        cache=known["cache"],
        tf32=known["tf32"],
        seconds=float(known["seconds"]),
    )
    check_names(plan)
    return plan


def _check_measuring(known: Mapping[str, Any]) -> None:
    for key, choices in _CHOICES.items():
        if known[key] not in choices:
            raise invalid(key, known[key], f"one of {', '.join(choices)}", f"{key}={choices[0]}")
    runs, seconds = known["runs"], known["seconds"]
    if not isinstance(runs, int) or runs < 3:
        raise invalid("runs", runs, "a whole number of at least 3, for an interval", "runs=15")
    if type(seconds) not in (int, float) or not 0 < seconds < math.inf:
        raise invalid("seconds", seconds, "a number above 0", "seconds=10")
    if not isinstance(known["tf32"], bool):
        raise invalid("tf32", known["tf32"], "true or false", "tf32=true")


def check_names(plan: Plan) -> None:
    """A name is a contender's own.

    Raises:
        ValueError: two have the same.
    """
    names = [arm.name for arm in plan.arms]
    for name in names:
        if names.count(name) > 1:
            fix = f"{{name: {name}-before, kernel: KERNEL, commit: COMMIT}}"
            raise invalid("kernels", name, "a name that no other contender has", fix)


def check_kernels(plan: Plan) -> None:
    """This code has the contenders that are not a commit's; whether a commit has its own, its process finds out.

    Raises:
        ValueError: one is unknown.
    """
    for arm in plan.arms:
        if arm.commit is None:
            find_arm(arm.kernel)


def as_list(value: Any) -> list:
    """One value stands for a list of it."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def as_names(key: str, value: Any, example: str) -> list[str]:
    """One name or several, each once.

    Raises:
        ValueError: none, or something that is no name.
    """
    names = as_list(value)
    if not names or not all(isinstance(name, str) for name in names):
        raise invalid(key, value, "a name, or a list of names", f"{key}={example}")
    return list(dict.fromkeys(names))


def value_of(word: str) -> Any:
    """The value of ``key=value`` as yaml.

    Raises:
        ValueError: it is none.
    """
    import yaml

    try:
        return yaml.safe_load(word.partition("=")[2])
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise invalid("setting", word, f"a value as yaml has it ({where})", f"{word.partition('=')[0]}=...") from None


def parse_changes(words: Sequence[str]) -> dict[str, Any]:
    """``kernels=cpu,reference runs=5 dtype=[fp16]`` as changes; several values are joined by commas, or a yaml list.

    Raises:
        ValueError: a word without "=", or a value that is no yaml.
    """
    import yaml

    changes: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        try:
            parts = [text] if text[:1] in ("[", "{", '"') else text.split(",")
            values = [yaml.safe_load(part) for part in parts]
        except yaml.YAMLError:
            values = []
        if not equals or not values:
            raise invalid("setting", word, "key=value or key=a,b", "kernels=cpu,reference")
        changes[key] = values[0] if len(values) == 1 and key not in ("kernels", "directions") else values
        if isinstance(values[0], list):
            changes[key] = values[0]
    return changes


def _arm(entry: Any) -> ArmSpec:
    if isinstance(entry, str):
        return ArmSpec(entry, entry)
    if not isinstance(entry, dict) or not set(entry) <= {"name", "kernel", "commit"} or "kernel" not in entry:
        raise invalid("kernels", entry, "a name, or {kernel: NAME, commit: COMMIT}", "{kernel: naive, commit: HEAD~1}")
    kernel = str(entry["kernel"])
    if entry.get("commit") is None:
        return ArmSpec(str(entry.get("name") or kernel), kernel)
    return ArmSpec(str(entry.get("name") or f"{kernel}@{entry['commit']}"), kernel, str(entry["commit"]))


def _cases(problems: Sequence[Mapping[str, Any]], axes: Mapping[str, Any]) -> tuple[list[Case], int]:
    lists = {key: value if isinstance(value, list) else [value] for key, value in axes.items()}
    for key, values in lists.items():
        if not values:
            raise invalid(key, values, "at least one value", f"values for {key}, or no {key} among the axes")
    cases: dict[Case, None] = {}
    num_left_out = 0
    for line in problems:
        for values in itertools.product(*lists.values()):
            words = {**line, **dict(zip(lists, values, strict=True))}
            if lists and not _fits(words):
                num_left_out += 1
                continue
            cases[_case(words)] = None
    if not cases:
        raise invalid("axes", dict(axes), "at least one problem whose window fits its shape", "a smaller kernel_size")
    return list(cases), num_left_out


def _case(words: Mapping[str, Any]) -> Case:
    if words.get("batch") != "auto":
        return Case.of(words)
    case = Case.of({**words, "batch": 1})
    slope, fixed = (seconds(case.with_batch(batch), RATES["naive"], "backward") for batch in (1025, 1))
    return case.with_batch(max(1, min(_MOST_IMAGES, int(1024 * (_AUTO_S - fixed) / (slope - fixed)))))


def _fits(words: Mapping[str, Any]) -> bool:
    """Whether kernel_size * dilation fits every axis; what is no list of numbers is left to ``Case.of``."""
    try:
        spatial, window, dilation = (
            [int(part) for part in str(words.get(word, 1)).split("x")] for word in ("shape", "kernel_size", "dilation")
        )
    except ValueError:
        return True
    window, dilation = (part * len(spatial) if len(part) == 1 else part for part in (window, dilation))
    return all(k * d <= length for k, d, length in zip(window, dilation, spatial, strict=False))
