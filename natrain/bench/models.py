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
in training backward, over the step. ``drift``: against the reference kernel with the same weights and data, in
inference the relative difference of logits, in training the largest relative difference of ten steps' losses.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from natrain.bench import rows
from natrain.bench.arms import KernelArm
from natrain.bench.case import DTYPES, Case
from natrain.bench.environment import commit_of_code, environment
from natrain.bench.estimate import DIRECTIONS
from natrain.bench.measure import Timing, measure
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
# Guesses: seconds of one run, with building, drift and the layers alone; how much longer torch.compile makes it.
_RUN_S, _COMPILED = {"cuda": 10, "cpu": 60}, 5


@dataclass(frozen=True)
class ModelPlan:
    """See this module's head; ``digest`` covers all of it."""

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
    import yaml

    text = path.read_text(encoding="utf-8")
    found = {"img_size": None, "runs": 10, "baseline": None, **yaml.safe_load(text), **changes}
    lists = {
        name: found[name] if isinstance(found[name], list) else [found[name]]
        for name in ("model", "kernels", "precision", "compile")
    }
    known = {"kind", "model", "kernels", "precision", "compile", "batch", "img_size", "runs", "baseline"}
    for name in set(found) - known:
        raise invalid("setting", name, f"one of {', '.join(sorted(known - {'kind'}))}", "batch=64")
    for name in lists["model"]:
        if name not in list_models():
            raise invalid("model", name, "models of natrain (`natrain models` lists them)", "model=nat_tiny")
    for name in lists["kernels"]:
        get_kernel(name)
    for name in lists["precision"]:
        if name not in ("bf16", "fp16", "fp32"):
            raise invalid("precision", name, "some of bf16, fp16, fp32", "precision=bf16")
    baseline = found["baseline"] if found["baseline"] in lists["kernels"] else lists["kernels"][0]
    return ModelPlan(
        tuple(lists["model"]),
        tuple(lists["kernels"]),
        baseline,
        tuple(lists["precision"]),
        tuple(map(bool, lists["compile"])),
        int(found["batch"]),
        found["img_size"],
        int(found["runs"]),
        text,
        hashlib.sha256(f"{text}\0{sorted(changes.items())!r}".encode()).hexdigest()[:12],
    )


def run_models(plan: ModelPlan, out: Path, device: str) -> int:
    """Measure what models.csv in ``out`` lacks.

    Raises:
        ValueError: the folder belongs to another plan.
    """
    path = out / "models.csv"
    done = set()
    if path.exists():
        for row in rows.read(path, COLUMNS):
            if row["plan"] != plan.digest:
                raise invalid("out", str(out), f"a folder of this plan ({plan.digest})", "out=NEW")
            done.add(tuple(row[name] for name in (*SETTING, "kernel", "mode")))
    todo = []
    for setting in plan.settings:
        values = [str(setting[name]) for name in SETTING]
        wanted = {kernel: [mode for mode in MODES if (*values, kernel, mode) not in done] for kernel in plan.kernels}
        if any(wanted.values()):
            todo.append((setting, wanted))
    runs = sum(len(modes) for _, wanted in todo for modes in wanted.values())
    total = len(plan.settings) * len(plan.kernels) * len(MODES)
    estimate_s = sum(
        _RUN_S[device] * len(modes) * (_COMPILED if setting["compile"] else 1)
        for setting, wanted in todo
        for modes in wanted.values()
    )
    title = f"models ({plan.digest}): {total} runs in all"
    print(f"{title}, {runs} to measure on {device}, about {estimate_s:.0f} s", flush=True)
    if not todo:
        return 0
    out.mkdir(parents=True, exist_ok=True)
    rows.start(path, COLUMNS)
    (out / "plan.yaml").write_text(plan.text, encoding="utf-8")
    with open(out / "environment.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({**environment(device), "baseline": plan.baseline, "plan": "models"}) + "\n")
    with tf32_products(True) if device == "cuda" else nullcontext():
        _measure(plan, todo, path, device)
    return 0


def _measure(
    plan: ModelPlan, todo: Sequence[tuple[dict[str, Any], dict[str, list[str]]]], path: Path, device: str
) -> None:
    """Append a row to ``path`` for every run of ``todo``: settings and the modes that each kernel lacks."""
    for setting, wanted in todo:
        for found in _run_setting(setting, wanted, plan.runs, device):
            common = {
                "plan": plan.digest,
                **setting,
                "device": environment(device)["device"],
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
                truth[mode] = _signature(setting, "reference", mode, small, device)
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
    called = torch.compile(model) if setting["compile"] else model
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
    """Logits, or the losses of ten steps, of fresh weights on a few images; eager."""
    contender = _contender({**setting, "compile": 0}, kernel, *data, device)
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
