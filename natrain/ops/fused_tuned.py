"""Plans that were measured to be the fastest on this machine's GPU: ``natrain kernels tune`` keeps them, planning asks.

One small file a kernel and problem beside the compiled kernels, named by a hash of what the plan depends on: the GPU's
name, the kernel's sources, the problem's shape, dtype and precision, and what a block holds. So a plan of other sources
or of another GPU is never met, and a process finds a file whole or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from natrain.jit import cache
from natrain.jit.build import source_root
from natrain.ops.fused_plan import Demands, Device, Plan
from natrain.ops.fused_tiles import Space

_FOLDER = "plans"
# What tells the plans of a problem apart, besides whether blocks walk.
_CHOICE = ("row_tile", "warps", "box", "chunk", "step", "resident", "chunked_x", "start_table", "stages", "min_blocks")


def choice_of(plan: Plan) -> dict[str, Any]:
    """A plan as a file holds it."""
    return json.loads(json.dumps({name: getattr(plan, name) for name in _CHOICE} | {"walks": plan.walk is not None}))


def find(kernel: str, space: Space, demands: Demands, device: Device) -> dict[str, Any] | None:
    """What ``store`` was given for this problem; None where nothing was, or the file does not hold it.

    Args:
        kernel: forward, backward_q, backward_kv or backward_qkv.
        device: that has plans of its own where ``tuned_as`` says so.
    """
    if not device.tuned_as:
        return None
    try:
        choice = json.loads(_path(kernel, space, demands, device).read_text())["plan"]
        is_whole = set(choice) == {*_CHOICE, "walks"} and all(len(choice[name]) == 3 for name in ("row_tile", "warps"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return choice if is_whole else None


def matching(choice: dict[str, Any], plans: Iterable[Plan]) -> Plan | None:
    """Of ``plans``, whose blocks do not walk, the one that ``choice_of`` was asked about, but for whether its did."""
    return next((plan for plan in plans if choice_of(plan) | {"walks": choice["walks"]} == choice), None)


def store(kernel: str, space: Space, demands: Demands, device: Device, plan: Plan, milliseconds: float) -> Path:
    """Keep ``plan`` as the fastest; the file."""
    path = _path(kernel, space, demands, device)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    content = {
        "kernel": kernel,
        "device": device.tuned_as,
        "sources": _sources(),
        "problem": dataclasses.asdict(space),
        "plan": choice_of(plan),
        "milliseconds": milliseconds,
    }
    part.write_text(json.dumps(content, indent=1, default=str))
    part.rename(path)
    return path


def count() -> int:
    """Plans that are kept."""
    return len(list((cache.folder() / _FOLDER).glob("*.json")))


def count_usable(gpu: str) -> int:
    """Plans that were measured on a GPU of that name, of the sources that there are."""
    found = 0
    for path in (cache.folder() / _FOLDER).glob("*.json"):
        try:
            content = json.loads(path.read_text())
            found += content["sources"] == _sources() and content["device"].startswith(f"{gpu}, ")
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def clear() -> int:
    """Forget every plan; how many there were."""
    found = count()
    shutil.rmtree(cache.folder() / _FOLDER, ignore_errors=True)
    return found


def _path(kernel: str, space: Space, demands: Demands, device: Device) -> Path:
    key = repr((kernel, space, demands, device, _sources()))
    return cache.folder() / _FOLDER / f"{kernel}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


@functools.cache
def _sources() -> str:
    files = sorted([*(source_root() / "fused").iterdir(), *(source_root() / "include").iterdir()])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
