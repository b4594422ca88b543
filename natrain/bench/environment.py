"""Where a number comes from: device, clocks, driver, versions, commit, command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import natrain
from natrain.bench.threads import cores
from natrain.ops import fused_tuned

# Not clocks.sm: asked now it is an idle device's; rows carry the clock after their calls.
_NVIDIA_SMI = ("driver_version", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


@lru_cache
def commit_of_code() -> str:
    """The commit of the clone that natrain runs from, with "+" where its files differ; "" outside a clone."""
    folder = Path(natrain.__file__).parent
    commit = _said("git", "-C", str(folder), "rev-parse", "--short=10", "HEAD")
    if not commit:
        return ""
    changed = _said("git", "-C", str(folder.parent), "status", "--porcelain", "--untracked-files=no", "natrain", "csrc")
    return commit + ("+" if changed else "")


def environment(device: str) -> dict[str, Any]:
    """What a reader of a result needs to judge it, as JSON can hold it."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "count": torch.cuda.device_count() if device == "cuda" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cores": ",".join(map(str, cores())),
        "natrain": natrain.__version__,
        "commit": commit_of_code(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "timm": _version("timm"),
        "natten": _version("natten"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": typed(),
        "tuned_plans": fused_tuned.count_usable(device_name(device)) if device == "cuda" else 0,
    }
    if device == "cuda":
        fields = _said("nvidia-smi", f"--query-gpu={','.join(_NVIDIA_SMI)}", "--format=csv,noheader", "-i", "0")
        found |= dict(zip(_NVIDIA_SMI, (field.strip() for field in fields.split(",")), strict=False))
    return found


def device_name(device: str) -> str:
    """Of the current GPU or the processor."""
    return torch.cuda.get_device_name() if device == "cuda" else processor()


def add_session(out: Path, device: str, more: Mapping[str, Any]) -> None:
    """A line of environment.jsonl in ``out``, beside the rows: where and how they are measured from now on."""
    with open(out / "environment.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({**environment(device), **more}) + "\n")


def typed() -> str:
    """This process's command as one types it: a module by its name, a script without its folder."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    start = ["python", "-m", module.name.removesuffix(".__main__")] if module else [Path(sys.argv[0]).name]
    return shlex.join([*start, *sys.argv[1:]])


@lru_cache
def processor() -> str:
    """The processor's name and how many cores this process sees."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
