"""A sweep on a CPU: what it writes, what it survives, what it refuses to count."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from natrain.bench import rows
from natrain.bench.plan import make_plan, read_plan
from natrain.bench.sweep import Options, count_runs, main, missing_runs, run_sweep
from natrain.ops import registry
from natrain.ops.cpu import CpuKernel

PLAN = """\
kernels: [cpu, reference, naive]
runs: 3
cache: warm
axes: {shape: [8x9, 6x6], heads: 2, head_dim: 8, kernel_size: [3, 5, 7], dtype: [fp32, bf16]}
"""
# 2 shapes, 3 windows, 2 dtypes; 7 does not fit 6.
PROBLEMS, RUNS = 10, 60


@pytest.fixture
def plan_file(tmp_path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(PLAN)
    return path


def results(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_run_has_one_row_and_a_second_time_measures_nothing(plan_file, tmp_path, capsys):
    out = tmp_path / "out"
    command = [str(plan_file), "--out", str(out), "--device", "cpu"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"{PROBLEMS} problems, {RUNS} runs in all, 2 combinations whose window does not fit left out" in said
    assert f"to measure: {RUNS} runs on cpu, {torch.get_num_threads()} threads, wall clock, about" in said
    found = results(out)
    assert len({rows.key(row) for row in found}) == len(found) == RUNS
    for row in found:
        if row["arm"] == "naive":
            assert row["status"] == "unsupported" and "device cpu" in row["reason"] and not row["median_ms"]
        else:
            assert row["status"] == "ok" and row["runs"] == "3" and row["timer"] == "wall"
            assert 0 < float(row["low_ms"]) <= float(row["median_ms"]) <= float(row["high_ms"]) < 1e3
            assert 0 < float(row["error"]) < (1e-5 if row["dtype"] == "fp32" else 2e-2)
    assert {row["plan"] for row in found} == {read_plan(plan_file).digest}
    environment = json.loads((out / "environment.jsonl").read_text().splitlines()[0])
    assert environment["torch"] == torch.__version__ and environment["threads"] == torch.get_num_threads()
    before = (out / "results.csv").read_bytes()
    assert main(command) == 0
    assert "to measure: 0 runs" in capsys.readouterr().out
    assert (out / "results.csv").read_bytes() == before


def test_a_new_contender_is_all_that_is_measured(plan_file, tmp_path):
    options = Options(tmp_path / "out", "cpu", {"dtype": "fp32", "shape": "6x6"}, arms=["cpu"])
    plan = read_plan(plan_file)
    assert run_sweep(plan, options) == 0
    assert {row["arm"] for row in results(options.out)} == {"cpu"}
    both = Options(options.out, "cpu", options.only, arms=["cpu", "reference"])
    missing = missing_runs(plan, both)
    assert count_runs(missing) == 4 and {arm.name for arms in missing.values() for arm in arms} == {"reference"}


@pytest.mark.slow
def test_a_killed_sweep_loses_nothing(plan_file, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "natrain.bench.sweep", str(plan_file), "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    results_file = out / "results.csv"
    deadline = time.monotonic() + 120
    while not results_file.exists() or results_file.read_bytes().count(b"\n") < 0.3 * RUNS:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = results_file.read_bytes()
    assert 0.3 * RUNS <= before.count(b"\n") < RUNS
    # The worst that a kill can leave: half a row.
    results_file.write_bytes(before + before.splitlines()[-1][:40])
    assert main(command[3:]) == 0
    after = list(rows.read(results_file))
    assert results_file.read_bytes().startswith(before)
    assert sorted(map(rows.key, after)) == sorted({rows.key(row) for row in after}) and len(after) == RUNS


class Broken(CpuKernel):
    name, summary, priority = "broken", "right but for its values' gradient", 99

    def backward(self, problem, *args):
        result = super().backward(problem, *args)
        args[-1].mul_(2)
        return result


class Raising(CpuKernel):
    name, summary, priority = "raising", "raises", 99

    def forward(self, problem, *args):
        raise RuntimeError("no\nway")


@pytest.fixture
def foreign_kernels():
    for kernel in (Broken(), Raising()):
        registry.register(kernel)
    yield
    for name in ("broken", "raising"):
        del registry._KERNELS[name]
    registry._choose_cached.cache_clear()


def test_failures_are_rows_with_their_reason(foreign_kernels, tmp_path):
    settings = {
        "kernels": ["cpu", "broken", "raising"],
        "runs": 3,
        "problems": [{"shape": "8x8", "heads": 1, "head_dim": 8, "kernel_size": 3}],
    }
    plan = make_plan("failures", settings, "", {})
    options = Options(tmp_path, "cpu", {})
    assert run_sweep(plan, options) == 0
    found = {(row["arm"], row["direction"]): row for row in results(tmp_path)}
    assert {key for key, row in found.items() if row["status"] == "ok"} == {
        ("cpu", "forward"),
        ("cpu", "backward"),
        ("broken", "forward"),
    }
    assert found["broken", "backward"]["reason"].startswith("wrong backward: relative error 1.00e+00")
    assert found["raising", "forward"]["reason"] == "RuntimeError: no way"
    assert not missing_runs(plan, options)
    assert count_runs(missing_runs(plan, Options(tmp_path, "cpu", {}, retry_failed=True))) == 3


def test_a_problem_that_ends_the_process_twice_fails(plan_file, tmp_path):
    plan = read_plan(plan_file)
    options = Options(tmp_path, "cpu", {"shape": "8x9", "kernel_size": "5", "dtype": "fp32"}, arms=["cpu"])
    (case,) = missing_runs(plan, options)
    (tmp_path / ".attempt-0").write_text(f"{case.name}\t2")
    assert run_sweep(plan, options) == 0
    assert [row["reason"] for row in results(tmp_path)] == ["the process ended 2 times while at this"] * 2


def test_the_time_limit_stops_before_it_is_passed(plan_file, tmp_path, capsys):
    command = [str(plan_file), "--out", str(tmp_path / "out"), "--device", "cpu", "--time-limit", "0"]
    assert main(command) == 3
    assert f"{PROBLEMS} problems are left" in capsys.readouterr().out


def test_shards_share_the_problems_and_the_file(plan_file, tmp_path):
    plan, cases = read_plan(plan_file), []
    for index in range(3):
        cases += missing_runs(plan, Options(tmp_path, "cpu", {}, shard=(index, 3)))
    assert len(cases) == PROBLEMS and set(cases) == set(plan.cases)


def _append_many(path: Path, arm: str) -> None:
    rows.start(path)
    for index in range(200):
        rows.append(path, {"arm": arm, "direction": index, "status": "ok", "reason": "x" * 300, "utc": "now"})


def test_rows_of_many_writers_stay_whole(tmp_path):
    path = tmp_path / "results.csv"
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_append_many, args=(path, arm)) for arm in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len({(row["arm"], row["direction"]) for row in rows.read(path)}) == 400


def test_another_yaml_needs_another_folder(plan_file, tmp_path):
    options = Options(tmp_path, "cpu", {"shape": "6x6", "kernel_size": "3", "dtype": "fp32"}, arms=["cpu"])
    assert run_sweep(read_plan(plan_file), options) == 0
    with pytest.raises(ValueError, match="--out NEW"):
        missing_runs(read_plan(plan_file, {"runs": 4}), options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": ["cpu"]}, "kernels="),
        ({"runs": 1}, "runs=15"),
        ({"timer": "clock"}, "timer=device"),
        ({"kernels": []}, "kernels="),
        ({"directions": ["sideways"]}, "directions="),
        ({"baseline": "fused"}, "baseline=cpu"),
        ({"kernel_size": 99}, "at least one problem"),
        ({"kernels": [{"name": "a"}]}, "commit: "),
    ],
)
def test_a_bad_plan_says_what_to_type(plan_file, changes, message):
    with pytest.raises(ValueError, match=message):
        read_plan(plan_file, changes)


def test_an_unknown_contender_names_the_nearest(plan_file, tmp_path):
    with pytest.raises(ValueError, match="kernels=reference"):
        run_sweep(read_plan(plan_file, {"kernels": ["referense"]}), Options(tmp_path, "cpu", {}))


@pytest.mark.parametrize("arm", ["sdpa", "dense"])
def test_peers_compute_what_they_say(arm, tmp_path):
    """Their outputs pass the same check as a kernel's: windows, dilation, causal masks and bias."""
    settings = {
        "kernels": [arm],
        "runs": 3,
        "problems": [
            {
                "shape": 11,
                "heads": 2,
                "head_dim": 4,
                "kernel_size": 3,
                "dilation": 2,
                "is_causal": True,
                "dtype": "fp64",
            },
            {"shape": "5x6", "heads": 1, "head_dim": 4, "kernel_size": "3x2", "rpb": arm == "sdpa", "dtype": "fp64"},
        ],
    }
    assert run_sweep(make_plan("peers", settings, "", {}), Options(tmp_path, "cpu", {})) == 0
    found = results(tmp_path)
    assert len(found) == 4 and all(row["status"] == "ok" and float(row["error"]) < 1e-12 for row in found)


@pytest.mark.gpu
@pytest.mark.slow
def test_a_device_times_kernels_and_peers_in_turn(tmp_path):
    problem = {"shape": "28x28", "heads": 4, "head_dim": 32, "kernel_size": 7, "batch": 32, "dtype": "bf16"}
    for timer in ("device", "graph", "events"):
        settings = {"kernels": ["naive", "flex", "sdpa", "dense"], "timer": timer, "problems": [problem]}
        out = tmp_path / timer
        assert run_sweep(make_plan("device", settings, timer, {}), Options(out, "cuda", {})) == 0
        found = results(out)
        assert len(found) == 8 and {row["status"] for row in found} == {"ok"}, found
        assert all(float(row["peak_mib"]) > 0 and float(row["error"]) < 3e-2 for row in found)
