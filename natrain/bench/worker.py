"""One process that measures its share of a sweep, as ``natrain.bench.spread`` tells it: worker.py JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from natrain.bench.plan import parse_changes, read_plan
from natrain.bench.run_case import DeviceLost
from natrain.bench.supervise import die_with
from natrain.bench.sweep import Options, run_sweep

DEVICE_LOST = 4  # the exit code with which a process asks for another one


def as_json(plan_file: Path, changes: list[str], options: Options, parent: int, death: str | None) -> str:
    """What ``main`` reads; see ``run_sweep``."""
    settings = asdict(options) | {"out": str(options.out)}
    return json.dumps(
        {"plan": str(plan_file), "changes": changes, "options": settings, "parent": parent, "death": death}
    )


def main(text: str) -> int:
    """Measure; the exit code is ``run_sweep``'s, ``DEVICE_LOST``, or 130 when interrupted."""
    job: dict[str, Any] = json.loads(text)
    die_with(job["parent"])
    settings = job["options"]
    options = Options(**{**settings, "out": Path(settings["out"]), "shard": tuple(settings["shard"])})
    try:
        return run_sweep(read_plan(Path(job["plan"]), parse_changes(job["changes"])), options, job["death"])
    except DeviceLost as error:
        noted = json.loads(options.running.read_text(encoding="utf-8"))
        options.running.write_text(json.dumps({**noted, "reason": f"device lost: {error}"}), encoding="utf-8")
        print(f"device lost: {error}; going on in a new process", flush=True)
        return DEVICE_LOST
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
