"""scripts/bench_host.py runs, and its table has every contender."""

from __future__ import annotations

import os
import subprocess
import sys


def test_the_table_of_host_times(repository):
    done = subprocess.run(
        [sys.executable, "scripts/bench_host.py", "--calls", "50", "--kernels", "reference"],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = {line[:28].strip(): [float(number) for number in line[28:].split()] for line in done.stdout.splitlines()[2:]}
    assert {"floor", "na2d", "na2d_qkvpacked, nothing", "na2d_qkvpacked, reference"} <= set(rows)
    assert all(len(times) == 3 and min(times) > 0 for times in rows.values())
