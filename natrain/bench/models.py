"""Whole models end to end: model x kernel x precision x compile, in training and inference.

    kind: models
    model: [nat_tiny]               # names of models
    kernels: [naive, gemm, fused]   # take turns in one process
    baseline: naive
    precision: [bf16, fp32]         # fp16 trains with a loss scaler, as `natrain train` does
    compile: [false, true]          # torch.compile
    batch: 128
    img_size: null                  # null: the model's own
    runs: 10                        # timed steps of each

A row of models.csv is one kernel in one setting and mode. ``attention_share``: all attention layers alone, forward and
in training backward, over the step. ``drift``: of the model as it is timed, compiled where it is, against an eager one
on the reference kernel with the same weights and data, in inference the relative difference of logits, in training the
largest relative difference of ten steps' losses. More models, kernels or precisions in the same folder add to it;
another ``batch``, ``img_size`` or ``runs`` is another comparison.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from natrain.bench import rows
from natrain.bench.arms import KernelArm
from natrain.bench.case import DTYPES, Case
from natrain.bench.environment import add_session, commit_of_code, device_name
from natrain.bench.estimate import DIRECTIONS
from natrain.bench.measure import Timing, measure
from natrain.bench.model_cost import Cost
from natrain.bench.options import Options
from natrain.bench.plan import as_list, as_names, read_settings
from natrain.bench.run_case import Setup, run_case
from natrain.errors import invalid
from natrain.models import list_models
from natrain.models.problems import attention_problems
from natrain.models.registry import default_input
from natrain.ops.precision import tf32_products
from natrain.ops.registry import get_kernel

SETTING = ("model", "precision", "compile", "batch", "img_size")
COLUMNS = (
    "plan", *SETTING, "kernel", "mode", "status", "reason", "images_per_s", "low", "high", "step_ms", "runs",
    "attention_share", "peak_mib", "drift", "device", "threads", "torch", "commit", "utc",
)  # fmt: skip
MODES = ("inference", "training")
_DRIFT_STEPS, _DRIFT_BATCH = 10, 8
# Guesses: seconds of a run besides its steps, and of compiling a model for one mode; how much slower than their fastest
# kernel contenders are, and how many calls the layers alone get.
_RUN_S, _COMPILE_S, _SLOWER, _LAYER_CALLS = {"cuda": 5, "cpu": 0.5}, {"cuda": 60, "cpu": 60}, 1.5, 12
# Options of `natrain ablate` that are for sweeps alone -> what says the same here.
INSTEAD = {
    "only": "model=nat_tiny precision=fp16 into the same out=",
    "arms": "kernels=naive,fused into the same out=",
    "chunk": "nothing: a model is compiled when its turn comes",
    "devices": "CUDA_VISIBLE_DEVICES=1 natrain ablate ... out=ANOTHER for a part of the models",
}


@dataclass(frozen=True)
class ModelPlan:
    """See this module's head; ``digest`` covers ``batch``, ``img_size`` and ``runs``, which all rows share."""

    models: tuple[str, ...]
    kernels: tuple[str, ...]
    baseline: str
    precisions: tuple[str, ...]
    compiles: tuple[bool, ...]
    batch: int
    img_size: int | None
    runs: int
    text: str
    digest: str

    @property
    def settings(self) -> list[dict[str, Any]]:
        return [
            dict(zip(SETTING, (*values, self.batch, self.img_size or ""), strict=True))
            for values in itertools.product(self.models, self.precisions, map(int, self.compiles))
        ]


def read_model_plan(path: Path, changes: Mapping[str, Any]) -> ModelPlan:
    """The plan of a yaml, changed.

    Raises:
        ValueError: an unknown setting, model, kernel or precision.
    """
    known = ("kind", "model", "kernels", "precision", "compile", "batch", "img_size", "runs", "baseline")
    found = {**dict.fromkeys(known), "runs": 10, **read_settings(path), **changes}
    for name in set(found) - set(known):
        raise invalid("setting", name, f"one of {', '.join(sorted(known[1:]))}", "batch=64")
    examples = {"model": "nat_tiny", "kernels": "naive,fused", "precision": "bf16"}
    lists = {name: as_names(name, found[name], example) for name, example in examples.items()}
    for name in lists["model"]:
        if name not in list_models():
            raise invalid("model", name, "models of natrain (`natrain models` lists them)", "model=nat_tiny")
    for name in lists["kernels"]:
        get_kernel(name)
    for name in lists["precision"]:
        if name not in ("bf16", "fp16", "fp32"):
            raise invalid("precision", name, "some of bf16, fp16, fp32", "precision=bf16")
    compiles = as_list(found["compile"])
    if not compiles or not all(isinstance(value, bool) for value in compiles):
        raise invalid("compile", found["compile"], "true, false or both", "compile=[false,true]")
    for name, least, may_be_null in (("batch", 1, False), ("img_size", 1, True), ("runs", 3, False)):
        value = found[name]
        if (type(value) is not int or value < least) and not (may_be_null and value is None):
            why = ", for an interval" if name == "runs" else " or null" if may_be_null else ""
            example = {"batch": 64, "img_size": 224, "runs": 10}[name]
            raise invalid(name, value, f"a whole number >= {least}{why}", f"{name}={example}")
    baseline = found["baseline"]
    if baseline not in lists["kernels"]:
        if baseline is not None and ("baseline" in changes or "kernels" not in changes):
            kernels = lists["kernels"]
            raise invalid("baseline", baseline, f"one of {', '.join(kernels)}", f"baseline={kernels[0]}")
        baseline = lists["kernels"][0]
    measuring = (found["batch"], found["img_size"], found["runs"])
    return ModelPlan(
        tuple(lists["model"]),
        tuple(lists["kernels"]),
        baseline,
        tuple(lists["precision"]),
        tuple(dict.fromkeys(compiles)),
        *measuring,
        path.read_text(encoding="utf-8"),
        hashlib.sha256(repr(measuring).encode()).hexdigest()[:12],
    )


def run_models(plan: ModelPlan, out: Path, device: str, options: Options | None = None) -> int:
    """Measure what models.csv in ``out`` lacks.

    Returns:
        0; 1 where a run of the plan failed or none has a time; 3 where the time limit came first.

    Raises:
        ValueError: the folder belongs to another plan, an option that this device does not have.
    """
    options, path = options or Options(), out / "models.csv"
    latest = {}
    for row in rows.read(path, COLUMNS) if path.exists() else ():
        if row["plan"] != plan.digest:
            allowed = f"a folder of this plan ({plan.digest}): same batch, img_size and runs"
            raise invalid("out", str(out), allowed, "out=NEW")
        latest[_key(row)] = row["status"]
    done = {key for key, status in latest.items() if status == "ok" or not options.retry_failed}
    todo = []
    for setting in plan.settings:
        wanted = {
            kernel: [mode for mode in MODES if _key({**setting, "kernel": kernel, "mode": mode}) not in done]
            for kernel in plan.kernels
        }
        if any(wanted.values()):
            todo.append((setting, {kernel: modes for kernel, modes in wanted.items() if modes}))
    runs = sum(len(modes) for _, wanted in todo for modes in wanted.values())
    total = len(plan.settings) * len(plan.kernels) * len(MODES)
    estimates = [_estimate_s(setting, wanted, plan.runs, device) for setting, wanted in todo]
    title = f"models ({plan.digest}): {total} runs in all"
    print(f"{title}, {runs} to measure on {device}, about {sum(estimates):.0f} s", flush=True)
    if todo:
        out.mkdir(parents=True, exist_ok=True)
        rows.start(path, COLUMNS)
        (out / "plan.yaml").write_text(plan.text, encoding="utf-8")
        add_session(out, device, {"baseline": plan.baseline, "plan": "models"})
    started = time.monotonic()
    # Compiled code counts by function, and all models share theirs: each contender is compiled for two modes and two
    # sizes. Past the limit a model would run eagerly under the name of a compiled one.
    many = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
    with many, tf32_products(True) if device == "cuda" else nullcontext():
        for index, (setting, wanted) in enumerate(todo):
            if options.time_limit_s is not None:
                if time.monotonic() - started + estimates[index] > options.time_limit_s:
                    left = f"{len(todo) - index} settings are left, run it again"
                    print(f"stopped by the time limit of {options.time_limit_s:.0f} s; {left}")
                    return 3
            _measure(plan, setting, wanted, path, device)
    wanted = {
        _key({**setting, "kernel": kernel, "mode": mode})
        for setting in plan.settings
        for kernel in plan.kernels
        for mode in MODES
    }
    latest = {_key(row): row["status"] for row in rows.read(path, COLUMNS) if _key(row) in wanted}
    return int("failed" in latest.values() or "ok" not in latest.values())


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in (*SETTING, "kernel", "mode"))


def _estimate_s(setting: Mapping[str, Any], wanted: Mapping[str, Sequence[str]], runs: int, device: str) -> float:
    """A guess of the seconds that these runs take."""
    cost = _cost(setting["model"], _image_size(setting), _channels(setting))
    seconds = 0.0
    for mode in (mode for modes in wanted.values() for mode in modes):
        steps = runs + 4 + _LAYER_CALLS
        drift_steps = 2 * (_DRIFT_STEPS if mode == "training" else 1)
        large, small = (
            cost.step_seconds(batch, device, mode) for batch in (setting["batch"], min(setting["batch"], _DRIFT_BATCH))
        )
        seconds += _RUN_S[device] + _SLOWER * (steps * large + drift_steps * small)
        seconds += 2 * _COMPILE_S[device] if setting["compile"] else 0
    return seconds


@lru_cache
def _cost(model: str, size: tuple[int, int], channels: int) -> Cost:
    with torch.device("meta"):
        return Cost.of(timm.create_model(model, img_size=size), (channels, *size))


def _measure(
    plan: ModelPlan, setting: dict[str, Any], wanted: Mapping[str, Sequence[str]], path: Path, device: str
) -> None:
    """Append a row to ``path`` for every mode that each kernel lacks."""
    for found in _run_setting(setting, wanted, plan.runs, device):
        common = {
            "plan": plan.digest,
            **setting,
            "device": device_name(device),
            "threads": torch.get_num_threads() if device == "cpu" else None,
            "torch": torch.__version__,
            "commit": commit_of_code(),
            "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        rows.append(path, {**common, **found}, COLUMNS)
        shown = found["images_per_s"] if found["status"] == "ok" else found["reason"][:150]
        print(
            f"{setting['model']} {setting['precision']} compile={setting['compile']} {found['kernel']} "
            f"{found['mode']}: {found['status']} {shown}",
            flush=True,
        )


@dataclass
class _Contender:
    """A model on one kernel, its two steps, and what went wrong."""

    model: nn.Module
    infer: Callable[[], torch.Tensor]
    train: Callable[[], torch.Tensor]

    def step(self, mode: str) -> Callable[[], torch.Tensor]:
        self.model.train(mode == "training")
        return self.train if mode == "training" else self.infer


def _run_setting(
    setting: Mapping[str, Any], wanted: Mapping[str, Sequence[str]], runs: int, device: str
) -> Iterator[dict[str, Any]]:
    """What the rows of one setting say, each as soon as it is known."""
    images, labels = _data(setting, setting["batch"], device)
    small = images[:_DRIFT_BATCH], labels[:_DRIFT_BATCH]
    contenders: dict[str, _Contender] = {}
    truth: dict[str, torch.Tensor] = {}
    for kernel, modes in wanted.items():
        try:
            contender = _contender(setting, kernel, images, labels, device)
            for mode in modes:
                contender.step(mode)()
            contenders[kernel] = contender
        except Exception as error:  # any failure of a contender is a result
            reason = f"{type(error).__name__}: {error}"
            yield from ({"kernel": kernel, "mode": mode, "status": "failed", "reason": reason} for mode in modes)
    for mode in MODES:
        now = {kernel: contender for kernel, contender in contenders.items() if mode in wanted[kernel]}
        peaks = {kernel: _peak_mib(contender.step(mode), device) for kernel, contender in now.items()}
        steps = {kernel: _in_mode(contender, mode) for kernel, contender in now.items()}
        timings, failed = _time(steps, runs, device)
        for kernel, error in failed.items():
            reason = f"{type(error).__name__}: {error}"
            yield {"kernel": kernel, "mode": mode, "status": "failed", "reason": reason}
        for kernel, timing in timings.items():
            if mode not in truth:
                truth[mode] = _signature({**setting, "compile": 0}, "reference", mode, small, device)
            drift = _drift(_signature(setting, kernel, mode, small, device), truth[mode])
            yield _row(setting, kernel, mode, timing, peaks[kernel], device) | {"drift": f"{drift:.3g}"}
    torch._dynamo.reset()  # the next setting's models are others, and compiled code of one function is limited


def _time(steps: Mapping[str, Callable], runs: int, device: str) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Times of all in turn; where that fails (memory, say), of each alone."""
    take = partial(measure, runs=runs, warm_ups=1, warm_cache=True, device=device)
    try:
        return take(steps) if steps else {}, {}
    except Exception:  # of whichever contender: each alone tells
        timings, failed = {}, {}
    for kernel, step in steps.items():
        try:
            timings |= take({kernel: step})
        except Exception as error:
            failed[kernel] = error
    return timings, failed


def _in_mode(contender: _Contender, mode: str) -> Callable[[], torch.Tensor]:
    step = contender.step(mode)

    def run() -> torch.Tensor:
        contender.model.train(mode == "training")
        return step()

    return run


def _data(setting: Mapping[str, Any], batch: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    size = _image_size(setting)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, _channels(setting), *size, generator=generator).to(device)
    return images, torch.randint(10, (batch,), generator=generator).to(device)


def _image_size(setting: Mapping[str, Any]) -> tuple[int, int]:
    return (setting["img_size"],) * 2 if setting["img_size"] else tuple(default_input(setting["model"])["img_size"])


def _channels(setting: Mapping[str, Any]) -> int:
    return timm.get_pretrained_cfg(setting["model"]).input_size[0]


def _build(setting: Mapping[str, Any], kernel: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(setting["model"], num_classes=10, kernel=kernel, img_size=_image_size(setting)).to(device)


def _contender(
    setting: Mapping[str, Any], kernel: str, images: torch.Tensor, labels: torch.Tensor, device: str
) -> _Contender:
    model = _build(setting, kernel, device)
    called = torch.compile(model, dynamic=False) if setting["compile"] else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    scaler = torch.amp.GradScaler(device, enabled=setting["precision"] == "fp16")
    precision = _precision(setting, device)

    def infer() -> torch.Tensor:
        with torch.no_grad(), precision():
            return called(images)

    def train() -> torch.Tensor:
        with precision():
            loss = F.cross_entropy(called(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return _Contender(model, infer, train)


def _precision(setting: Mapping[str, Any], device: str) -> Callable:
    if setting["precision"] == "fp32":
        return nullcontext
    return lambda: torch.autocast(device, dtype=DTYPES[setting["precision"]])


def _signature(
    setting: Mapping[str, Any], kernel: str, mode: str, data: tuple[torch.Tensor, torch.Tensor], device: str
) -> torch.Tensor:
    """Logits, or the losses of ten steps, of fresh weights on a few images."""
    contender = _contender(setting, kernel, *data, device)
    step = contender.step(mode)
    if mode == "inference":
        return step().double()
    torch.manual_seed(1)  # drop path draws the same for every kernel
    return torch.stack([step() for _ in range(_DRIFT_STEPS)]).double()


def _drift(found: torch.Tensor, truth: torch.Tensor) -> float:
    if found.dim() == 1:
        return ((found - truth).abs() / truth.abs()).max().item()
    return ((found - truth).norm() / truth.norm()).item()


def _peak_mib(step: Callable[[], Any], device: str) -> float | None:
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _row(
    setting: Mapping[str, Any], kernel: str, mode: str, timing: Timing, peak: float | None, device: str
) -> dict[str, Any]:
    share = _attention_ms(setting, kernel, mode, device) / timing.median_ms
    batch = setting["batch"]
    return {
        "kernel": kernel,
        "mode": mode,
        "status": "ok",
        "images_per_s": f"{1e3 * batch / timing.median_ms:.5g}",
        "low": f"{1e3 * batch / timing.high_ms:.5g}",
        "high": f"{1e3 * batch / timing.low_ms:.5g}",
        "step_ms": f"{timing.median_ms:.5g}",
        "runs": timing.runs,
        "attention_share": f"{share:.3f}",
        "peak_mib": None if peak is None else f"{peak:.0f}",
    }


def _attention_ms(setting: Mapping[str, Any], kernel: str, mode: str, device: str) -> float:
    """All attention layers alone, warm caches, as calls like the model's own."""
    with torch.device("meta"):
        model = timm.create_model(setting["model"], img_size=_image_size(setting))
    dtype = DTYPES[setting["precision"]]
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    shape = (setting["batch"], _channels(setting), *_image_size(setting))
    total = 0.0
    for problem, count in attention_problems(model, shape, dtype, device, capability).items():
        case = Case(
            problem.spatial, problem.batch, problem.heads, problem.head_dim, problem.window, dtype, problem.has_rpb
        )
        forward_ms, backward_ms = _layer_ms(case, kernel, device)
        total += count * (forward_ms + (backward_ms if mode == "training" else 0))
    return total


_layers_ms: dict[tuple[Case, str, str], tuple[float, float]] = {}


def _layer_ms(case: Case, kernel: str, device: str) -> tuple[float, float]:
    """Forward and backward of one layer, which models of a family share; nan where it fails, which is forgotten."""
    found = _layers_ms.get((case, kernel, device))
    if found is None:
        setup = Setup(device, runs=5, cache="warm", timer="device", seconds=2)
        outcomes = run_case(case, {KernelArm(kernel): DIRECTIONS}, setup)
        times = {outcome.direction: outcome.timing.median_ms for outcome in outcomes if outcome.timing}
        found = tuple(times.get(direction, float("nan")) for direction in DIRECTIONS)
        if len(times) == len(DIRECTIONS):
            _layers_ms[case, kernel, device] = found
    return found
