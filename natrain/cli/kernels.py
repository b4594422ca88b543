"""List the attention kernels and what each can do; compile them ahead; see or clear what is compiled.

  natrain kernels                                        the table of the README
  natrain kernels build model=nat_tiny dtype=bf16 arch=90 [kernel=naive,gemm] [img_size=384] [batch=128]
                                                         compile what a training step launches; needs no GPU
  natrain kernels tune model=nat_tiny dtype=bf16 batch=128 [img_size=384]
  natrain kernels tune shape=56x56 heads=2 head_dim=32 kernel_size=7 batch=128 dtype=bf16 rpb=true
  natrain kernels tune ablation=nat_layers [dtype=fp16]
                                                         time ten more plans of every fused kernel on this GPU and keep
                                                         the fastest for these problems; 10 to 20 s a problem
  natrain kernels list                                   what is compiled, with size, target and compiler
  natrain kernels clear [NAME...]                        delete what is compiled and tuned, or what begins with a name
arch is a CUDA capability (80, 90) or, for the cpu kernel, an instruction set (avx512, avx2, portable). Plans of the
fused kernels depend on the GPU too: build takes the current one where it is of that capability, else an H100.
`natrain doctor` says which kernels work on this machine."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from natrain.errors import invalid, nearest

if TYPE_CHECKING:
    from natrain.bench.case import Case
    from natrain.ops.problem import Problem

ACTIONS = ("build", "tune", "list", "clear")
EXAMPLES = {"model": "nat_tiny", "dtype": "bf16", "arch": "90", "kernel": "naive", "batch": "128", "img_size": "224"}

# What a kernel may lack, in the order of the columns: attribute of its limits, title.
ABILITIES = {
    "backward": "gradients",
    "rpb": "bias",
    "causal": "causal",
    "stride": "stride",
    "dropout": "dropout",
    "key_mask": "key mask",
    "gqa": "GQA",
    "value_dim": "value dim",
    "unfused": "`na*d_qk`, `na*d_av`",
    "double_backward": "2nd derivatives",
    "forward_ad": "forward AD",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", metavar="ACTION", help="build, tune, list or clear (default: the table)")
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="of build and tune: key=value; of clear: names of entries"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.action is None:
        print(kernel_table())
        return 0
    actions = {"build": _build, "tune": _tune, "list": _list, "clear": _clear}
    if arguments.action not in actions:
        best = nearest(arguments.action, ACTIONS) or "list"
        raise invalid("ACTION", arguments.action, f"one of {', '.join(ACTIONS)}", f"natrain kernels {best}")
    return actions[arguments.action](arguments.words)


def _build(words: list[str]) -> int:
    """Compile what the attention layers of a model launch in training."""
    from natrain.jit.build import BuildError, find_built
    from natrain.jit.cuda import build_all, find_nvcc
    from natrain.ops.registry import get_kernel, kernels

    settings = {"kernel": None, "dtype": "bf16", "batch": "128", "img_size": None, **_settings(words)}
    for key in ("model", "arch"):
        if key not in settings:
            raise invalid(key, None, "a value", f"natrain kernels build model=nat_tiny dtype=bf16 arch=90 ({key}=...)")
    arch, device, capability = _target(settings["arch"])
    chosen = [get_kernel(name) for name in settings["kernel"].split(",")] if settings["kernel"] else kernels()
    specs = {}
    for problem in _problems(settings, device, capability):
        for kernel in chosen:
            if reasons := kernel.limits.reasons(problem):
                if settings["kernel"]:
                    raise invalid(
                        "kernel", kernel.name, f"a kernel for {problem}; {'; '.join(reasons)}", "kernel=naive"
                    )
                continue
            specs |= {spec.key(): spec for spec in kernel.build_specs(problem, arch)}
    missing = [spec for spec in specs.values() if find_built(spec) is None]
    compiler = "the C++ compiler" if device == "cpu" else find_nvcc() or "NVRTC"
    print(f"{len(specs)} kernels for {arch}, {len(missing)} of them to compile with {compiler}", flush=True)
    begin_s = time.monotonic()
    try:
        build_all(missing)
    except BuildError as error:
        print(error)
        return 1
    for spec in missing:
        print(f"  {find_built(spec).parent.name}")
    print(f"compiled in {time.monotonic() - begin_s:.1f} s")
    return 0


def _tune(words: list[str]) -> int:
    """Keep the fastest plans of the fused kernels for the layers of a model, or for one problem."""
    import torch

    from natrain.bench.one import text_of
    from natrain.bench.plans import tune
    from natrain.jit.build import BuildError
    from natrain.ops.precision import tf32_products

    cases = _tuned_cases(words)
    if not torch.cuda.is_available():
        fix = "natrain kernels build model=nat_tiny arch=90, which needs no GPU"
        raise invalid("device", "cpu", "a CUDA device: plans are timed on it", fix)
    print(f"{len(cases)} problems on {torch.cuda.get_device_name()}", flush=True)
    rows = [("problem", "kernel", "ms before", "ms now")]
    status = 0
    with tf32_products(True):
        try:
            for found in tune(cases):
                rows.append((found.case.name, found.kernel, f"{found.before_ms:.4f}", f"{found.after_ms:.4f}"))
                print(f"  {' '.join(rows[-1])}", flush=True)
        except BuildError as error:
            print(error)
            status = 1
    print(text_of(rows))
    print("a backward kernel is timed with the others of backward")
    return status


def _tuned_cases(words: list[str]) -> list[Case]:
    from natrain.bench.case import WORDS, Case
    from natrain.ops.registry import get_kernel

    keys = [word.partition("=")[0] for word in words]
    if "ablation" in keys:
        return _ablation_cases(words)
    if "shape" in keys:
        for word, key in zip(words, keys, strict=True):
            if "=" not in word or key not in WORDS:
                best = nearest(key, WORDS) or "shape"
                raise invalid("setting", word, f"one of {', '.join(WORDS)} and a value", f"{best}=...")
        cases = [Case.of(dict(word.split("=", 1) for word in words))]
    else:
        names = [name for name in EXAMPLES if name not in ("arch", "kernel")]
        settings = {"dtype": "bf16", "batch": "128", "img_size": None, **_settings(words, names)}
        if "model" not in settings:
            fix = "natrain kernels tune model=nat_tiny dtype=bf16 batch=128, or ablation=nat_layers, or shape=56x56 ..."
            raise invalid("model", None, "a value", fix)
        cases = [
            Case(p.spatial, p.batch, p.heads, p.head_dim, p.window, p.dtype, p.has_rpb)
            for p in _problems(settings, "cuda", (9, 0))
        ]
        if not cases:
            raise invalid("model", settings["model"], "a model with neighborhood attention", "model=nat_tiny")
    for case in cases:
        if reasons := get_kernel("fused").limits.reasons(case.problem("cuda", (9, 0))):
            fix = "natrain kernels tune shape=56x56 heads=2 head_dim=32 kernel_size=7 dtype=bf16"
            raise invalid("problem", case.name, f"one of the fused kernels; {'; '.join(reasons)}", fix)
    return cases


def _ablation_cases(words: list[str]) -> list[Case]:
    """Those of its problems that the fused kernels take."""
    from natrain.bench.plan import parse_changes, read_plan, read_settings
    from natrain.cli.ablate import find_ablation
    from natrain.ops.registry import get_kernel

    names = [word.removeprefix("ablation=") for word in words if word.startswith("ablation=")]
    if not names:
        raise invalid("setting", "ablation", "ablation=NAME", "ablation=nat_layers")
    path = find_ablation(names[-1])
    if (kind := read_settings(path).get("kind", "kernels")) != "kernels":
        raise invalid("ablation", names[-1], f"one of kernels, not of {kind}", "ablation=nat_layers")
    plan = read_plan(path, parse_changes([word for word in words if not word.startswith("ablation=")]))
    if not plan.tf32:
        raise invalid("tf32", False, "true: float32 is timed as TF32", "tf32=true")
    limits = get_kernel("fused").limits
    cases = [case for case in plan.cases if not limits.reasons(case.problem("cuda", (9, 0)))]
    if not cases:
        raise invalid("ablation", names[-1], "one with problems of the fused kernels", "ablation=nat_layers")
    return cases


def _settings(words: list[str], names: Sequence[str] = tuple(EXAMPLES)) -> dict[str, str]:
    settings = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in names or not equals:
            best = nearest(key, names) or "model"
            raise invalid("setting", word, f"one of {', '.join(names)} and a value", f"{best}={EXAMPLES[best]}")
        settings[key] = value
    return settings


def _target(text: str) -> tuple[str, str, tuple[int, int] | None]:
    """(target of the compiler, device type, capability) of ``arch=``: 90, 9.0, sm_90a; avx512."""
    from natrain.jit.cuda import MIN_CAPABILITY, arch_of
    from natrain.jit.host import LEVELS

    if text in LEVELS:
        return text, "cpu", None
    digits = text.removeprefix("sm_").rstrip("af").replace(".", "")
    capability = (int(digits[:-1]), int(digits[-1])) if digits.isdigit() and len(digits) >= 2 else (0, 0)
    if capability < MIN_CAPABILITY:
        oldest = "{}{}".format(*MIN_CAPABILITY)
        raise invalid("arch", text, f"a CUDA capability from {oldest} on, or {', '.join(LEVELS)}", "arch=90")
    return arch_of(capability), "cuda", capability


def _problems(settings: dict[str, Any], device: str, capability: tuple[int, int] | None) -> list[Problem]:
    import timm
    import torch

    from natrain.models import list_models
    from natrain.models.problems import attention_problems
    from natrain.models.registry import default_input

    dtypes = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if settings["dtype"] not in dtypes:
        raise invalid("dtype", settings["dtype"], f"one of {', '.join(dtypes)}", "dtype=bf16")
    name = settings["model"]
    if name not in list_models():
        best = nearest(name, list_models()) or "nat_tiny"
        raise invalid("model", name, "a model of natrain (`natrain models` lists them)", f"model={best}")
    for key in ("batch", "img_size"):
        if settings[key] is not None and not (settings[key].isdigit() and int(settings[key])):
            raise invalid(key, settings[key], "a whole number >= 1", f"{key}={EXAMPLES[key]}")
    size = (int(settings["img_size"]),) * 2 if settings["img_size"] else tuple(default_input(name)["img_size"])
    with torch.device("meta"):
        model = timm.create_model(name, img_size=size)
    channels = model.pretrained_cfg["input_size"][0]
    images = (int(settings["batch"]), channels, *size)
    return list(attention_problems(model, images, dtypes[settings["dtype"]], device, capability))


def _list(words: list[str]) -> int:
    from natrain.jit import cache
    from natrain.ops import fused_tuned

    if words:
        raise invalid("WORD", " ".join(words), "no words after list, which shows all", "natrain kernels list")
    entries = cache.entries()
    rows = [("kernel", "target", "KiB", "compiler")]
    for entry in entries:
        kib = os.path.getsize(os.path.join(entry["folder"], entry["artifact"])) / 1024
        rows.append((os.path.basename(entry["folder"]), entry["target"].split()[0], f"{kib:.0f}", entry["compiler"]))
    widths = [max(len(str(row[column])) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(f"{value!s:{width}}" for value, width in zip(row, widths, strict=False)), row[3]]))
    tuned = fused_tuned.count()
    print(f"{len(entries)} compiled kernels in {cache.folder()}" + (f", {tuned} tuned plans" if tuned else ""))
    return 0


def _clear(words: list[str]) -> int:
    from natrain.jit import cache
    from natrain.ops import fused_tuned

    removed = cache.clear(words)
    if words and not removed:
        raise invalid("NAME", " ".join(words), "the beginning of an entry's name", "natrain kernels list")
    tuned = 0 if words else fused_tuned.clear()
    print(f"{removed} compiled kernels deleted from {cache.folder()}" + (f", {tuned} tuned plans" if tuned else ""))
    return 0


def kernel_table() -> str:
    """A markdown table out of the registry, in the order in which ``kernel="auto"`` tries the kernels."""
    from natrain.ops.registry import kernels

    titles = ["kernel", "what it is", "devices", "dtypes", *ABILITIES.values()]
    rows = [titles, ["---"] * len(titles)]
    for kernel in kernels():
        limits = kernel.limits
        rows.append(
            [
                f"`{kernel.name}`",
                kernel.summary,
                _listed(limits.devices),
                _listed(
                    None if limits.dtypes is None else {str(dtype).removeprefix("torch.") for dtype in limits.dtypes}
                ),
                *("yes" if getattr(limits, name) else "-" for name in ABILITIES),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _listed(names: frozenset[str] | None) -> str:
    return "any" if names is None else ", ".join(sorted(names))
