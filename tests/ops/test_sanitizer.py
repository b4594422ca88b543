"""compute-sanitizer over a small grid: no access outside of what is allocated, no race within a block."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def sanitizer() -> str:
    """The program; skips where there is none."""
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    found = shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)
    if found is None:
        pytest.skip("no compute-sanitizer on PATH or in CUDA_HOME/bin")
    return found


def run(tool: str, what: str, repository: Path) -> subprocess.CompletedProcess:
    command = [sanitizer(), "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=natrain_"]
    # Without torch's cache every tensor is an allocation of its own, past whose end nobody may read.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(
        [*command, sys.executable, "-m", "tests.ops.sanitized", what],
        cwd=repository, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.parametrize("kernel", ["naive", "gemm", "fused"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_small_grid_is_clean(tool, kernel, repository):
    done = run(tool, kernel, repository)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert f"{kernel} " in done.stdout, "no problem ran"
    assert "SUMMARY: 0 " in done.stdout + done.stderr


def test_a_mistake_is_found(repository):
    done = run("memcheck", "mistake", repository)
    assert "Invalid __global__ write" in done.stdout + done.stderr, (done.stdout + done.stderr)[-6000:]
    assert "natrain_naive_av" in done.stdout + done.stderr
