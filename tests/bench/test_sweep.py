"""A sweep on a CPU: what it writes, what it survives, what it refuses to count."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from natrain.bench import plan as plan_module
from natrain.bench import rows, sweep, threads, worker
from natrain.bench.arms import find_arm
from natrain.bench.case import Case
from natrain.bench.environment import commit_of_code, typed
from natrain.bench.estimate import kernel_seconds
from natrain.bench.plan import make_plan, read_plan
from natrain.bench.run_case import DeviceLost, Outcome, Setup, run_case
from natrain.bench.sweep import Options, count_runs, estimated_s, main, missing_runs, parse_only, run_sweep
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


def test_every_run_has_one_row_and_a_second_time_measures_nothing(plan_file, tmp_path, capfd):
    out = tmp_path / "out"
    command = [str(plan_file), "--out", str(out), "--device", "cpu", "--threads", "1"]
    assert main(command) == 0
    said = capfd.readouterr().out
    assert f"{PROBLEMS} problems, {RUNS} runs in all, baseline cpu, 2 combinations whose window does not fit" in said
    assert f"to measure: {RUNS} runs on cpu, 1 threads, wall clock, about" in said
    found = results(out)
    assert len({rows.key(row) for row in found}) == len(found) == RUNS
    for row in found:
        if row["arm"] == "naive":
            assert row["status"] == "unsupported" and "device cpu" in row["reason"] and not row["median_ms"]
        else:
            assert row["status"] == "ok" and row["runs"] == "3" and row["timer"] == "wall" and row["threads"] == "1"
            assert 0 < float(row["low_ms"]) <= float(row["median_ms"]) <= float(row["high_ms"]) < 1e3
            assert 0 < float(row["error"]) < (1e-5 if row["dtype"] == "fp32" else 2e-2)
    assert {row["plan"] for row in found} == {read_plan(plan_file).digest}
    environment = json.loads((out / "environment.jsonl").read_text().splitlines()[0])
    assert environment["torch"] == torch.__version__ and environment["threads"] == 1
    assert environment["command"] == typed() and "worker" not in typed()
    assert environment["commits"] == dict.fromkeys(("cpu", "reference", "naive"), commit_of_code())
    before = (out / "results.csv").read_bytes()
    assert main(command) == 0
    assert "to measure: 0 runs" in capfd.readouterr().out
    assert (out / "results.csv").read_bytes() == before


def test_a_new_contender_is_all_that_is_measured(plan_file, tmp_path):
    options = Options(tmp_path / "out", "cpu", {"dtype": "fp32", "shape": "6x6"}, arms=["cpu"])
    plan = read_plan(plan_file)
    assert run_sweep(plan, options) == 0
    assert {row["arm"] for row in results(options.out)} == {"cpu"}
    both = Options(options.out, "cpu", options.only, arms=["cpu", "reference"])
    missing = missing_runs(plan, both)
    assert count_runs(missing) == 4 and {arm.name for arms in missing.values() for arm in arms} == {"reference"}


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


def test_what_runs_next_is_told_before_it_can_crash():
    """All at their inputs, each at its first call, all again where they take turns; directions in order."""
    case, told = Case.of({"shape": "6x6", "heads": 1, "head_dim": 8, "kernel_size": 3}), []
    arms = {find_arm(name): ("forward", "backward") for name in ("cpu", "reference")}
    list(run_case(case, arms, Setup("cpu", 3, cache="warm"), lambda *now: told.append(tuple(map(list, now)))))
    both = ["cpu", "reference"]
    assert told == [(both, ["forward", "backward"])] + [
        (names, [which]) for which in ("forward", "backward") for names in (["cpu"], ["reference"], both)
    ]


def test_a_lost_device_is_blamed_on_who_ran_alone(plan_file, tmp_path, monkeypatch):
    """Side by side nobody fails; the next process runs each alone, and whom the device is lost with has the row."""
    options = Options(tmp_path, "cpu", ONE, arms=["cpu", "reference"], threads=1)

    def run_case(case, wanted, setup, note):
        note([arm.name for arm in wanted], ["forward", "backward"])
        if "reference" in [arm.name for arm in wanted]:
            raise DeviceLost("gone")
        return (Outcome(arm.name, which, "unsupported") for arm, own in wanted.items() for which in own)

    monkeypatch.setattr(sweep, "run_case", run_case)
    monkeypatch.setattr(worker, "die_with", lambda parent: None)
    codes, deaths = [], (None, "device lost", "device lost")
    for death in deaths:
        codes.append(worker.main(worker.as_json(plan_file, [], options, 0, death)))
    assert codes == [worker.DEVICE_LOST, worker.DEVICE_LOST, 0]
    reason = "the process died (device lost: gone) while at this"
    assert {(row["arm"], row["status"], row["reason"]) for row in results(tmp_path)} == {
        ("cpu", "unsupported", ""),
        ("reference", "failed", reason),
    }
    assert len(results(tmp_path)) == 4 and not options.running.exists()


def test_the_time_limit_stops_before_it_is_passed(plan_file, tmp_path, capsys):
    assert run_sweep(read_plan(plan_file), Options(tmp_path, "cpu", {}, time_limit_s=0)) == 3
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


ONE = {"shape": "6x6", "kernel_size": "3", "dtype": "fp32"}


def write_row(path: Path, shape: str, **more) -> None:
    case = Case.of({"shape": shape, "heads": 1, "head_dim": 4, "kernel_size": 3})
    row = {**case.words, "arm": "cpu", "direction": "forward", "status": "ok", "utc": "now"}
    rows.append(path, {**row, **more})


@pytest.mark.parametrize("left", [", b", '"', "\u2192", "RuntimeError", ",failed,"])
def test_half_of_a_row_takes_no_other_row_with_it(tmp_path, left):
    path = tmp_path / "results.csv"
    rows.start(path)
    write_row(path, "10")
    write_row(path, "11", status="failed", reason='RuntimeError: a, b "c" \u2192 d')
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(left.encode()) + 1])
    rows.start(path)
    write_row(path, "12")
    write_row(path, "13", status="failed", reason='RuntimeError: a, b "c"')
    assert [row["shape"] for row in rows.read(path)] == ["10", "12", "13"]


def test_a_file_whose_header_was_never_written_is_started_again(plan_file, tmp_path):
    options = Options(tmp_path, "cpu", {})
    options.results.touch()
    assert count_runs(missing_runs(read_plan(plan_file), options)) == RUNS
    rows.start(options.results)
    write_row(options.results, "10")
    assert [row["shape"] for row in rows.read(options.results)] == ["10"]


def test_a_row_that_is_not_written_whole_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "results.csv"
    rows.start(path)
    write = os.write
    monkeypatch.setattr(rows.os, "write", lambda descriptor, line: write(descriptor, line[:20]))  # a disk that is full
    with pytest.raises(OSError, match=r"No space left on device.*results\.csv"):
        write_row(path, "10")


def test_rows_belong_to_how_they_were_measured_and_not_to_the_yaml(plan_file, tmp_path):
    """A comment, a contender and a problem more leave what was measured; runs, cache and threads do not."""
    options = Options(tmp_path, "cpu", ONE, threads=1)
    assert run_sweep(read_plan(plan_file, {"kernels": ["cpu"]}), options) == 0
    assert count_runs(missing_runs(read_plan(plan_file, {"kernels": ["cpu"]}), options)) == 0
    plan_file.write_text("# more\n" + PLAN.replace("naive]", "naive, sdpa]").replace("8x9, 6x6", "8x9, 6x6, 7x7"))
    plan = read_plan(plan_file)
    missing = missing_runs(plan, options)
    assert {arm.name for arms in missing.values() for arm in arms} == {"reference", "naive", "sdpa"}
    assert count_runs(missing_runs(plan, replace(options, only={}))) == 16 * 4 * 2 - 2
    for changes, now, then in (({"runs": 4}, "runs=4", "runs=3"), ({"cache": "cold"}, "cache=cold", "cache=warm")):
        with pytest.raises(ValueError, match=f"measured with {now}, not {then}.* --out NEW"):
            missing_runs(read_plan(plan_file, changes), options)
    with pytest.raises(ValueError, match="measured with threads=2, not threads=1"):
        missing_runs(plan, replace(options, threads=2))


def test_how_times_are_taken_is_part_of_the_hash(plan_file, monkeypatch):
    before = read_plan(plan_file).digest
    monkeypatch.setattr(plan_module, "METHOD", plan_module.METHOD + 1)
    assert read_plan(plan_file).digest != before


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
        ({"kernels": ["cpu", {"kernel": "cpu", "name": "cpu", "commit": "HEAD"}]}, "no other contender has"),
        ({"seconds": "abc"}, "seconds='abc' .* Try: seconds=10"),
        ({"batch": "abc"}, "batch='abc' .* one whole number"),
        ({"heads": "2x4"}, "heads='2x4' .* one whole number"),
        ({"window": 3}, "Try: kernel_size="),
        ({"problems": 3}, "problems=3 .* a list of problems"),
        ({"axes": [1]}, "axes: .kernel_size"),
        ({"tf32": "some"}, "tf32=true"),
        ({"seconds": float("inf")}, "seconds=inf .* Try: seconds=10"),
        ({"seconds": float("nan")}, "seconds=nan .* Try: seconds=10"),
        ({"heads": 1.5}, "heads=1.5 .* one whole number"),
        ({"kernel_size": [3, 3.5]}, "kernel_size=3.5 .* whole numbers"),
        ({"heads": True}, "heads=True .* one whole number"),
        ({"shape": "4x4x4x4"}, "shape='4x4x4x4' .* 1 to 3 axes"),
        ({"dtype": []}, r"dtype=\[\] .* at least one value"),
        ({"kernels": ["cpu", "reference"], "baseline": "naive"}, "baseline='naive' .* Try: baseline=cpu"),
        ({"kind": "models"}, "kind='models' .* natrain ablate"),
        ({5: 1}, "setting=5 .* one of"),
        ({"axes": {5: [1]}}, "setting=5 .* one of"),
    ],
)
def test_a_bad_plan_says_what_to_type(plan_file, changes, message):
    with pytest.raises(ValueError, match=message):
        read_plan(plan_file, changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernels: [cpu", "a yaml file .*line 1"),
        ("[cpu, reference]", "settings with values"),
        ("", "settings with"),
        ("name: \udcff", "bad.yaml' .* a yaml file .*decode byte 0xff"),
    ],
)
def test_a_yaml_that_is_none_says_so(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message) as caught:
        read_plan(path)
    assert "\n" not in str(caught.value)


def test_one_value_stands_for_a_list_of_it(plan_file):
    plan_file.write_text("kind: kernels\n" + PLAN.replace("[cpu, reference, naive]", "cpu") + "directions: forward\n")
    plan = read_plan(plan_file)
    assert [arm.name for arm in plan.arms] == ["cpu"] and plan.directions == ("forward",)


def test_a_direction_named_twice_is_measured_once(plan_file, tmp_path):
    plan = read_plan(plan_file, {"directions": ["backward", "forward", "backward"]})
    assert plan.directions == ("backward", "forward")
    assert count_runs(missing_runs(plan, Options(tmp_path, "cpu", {}))) == RUNS


@pytest.mark.parametrize("name", ["2", "tile 4, warps 8"])
def test_a_baseline_of_any_name_is_that_of_the_processes_that_measure(plan_file, tmp_path, name):
    arms = f"[reference, {{name: {json.dumps(name)}, kernel: cpu}}]"
    small = "axes: {shape: 6, heads: 1, head_dim: 8, kernel_size: 3}\ndirections: forward\n"
    plan_file.write_text(f"kernels: {arms}\nbaseline: {json.dumps(name)}\nruns: 3\ncache: warm\n{small}")
    assert main([str(plan_file), "--out", str(tmp_path / "out"), "--device", "cpu", "--threads", "1"]) == 0
    assert json.loads((tmp_path / "out/environment.jsonl").read_text())["baseline"] == name


@pytest.mark.parametrize("word", ["rpb=false", "rpb=0", "rpb=true"])
def test_only_takes_flags_as_the_yaml_has_them(plan_file, tmp_path, word):
    plan = read_plan(plan_file, {"rpb": [False, True], "is_causal": [False, True]})
    only = parse_only([word, "is_causal=False"])
    assert count_runs(missing_runs(plan, Options(tmp_path, "cpu", only))) == RUNS


def test_arms_that_are_none_of_the_plan(plan_file, tmp_path):
    with pytest.raises(ValueError, match="--arms reference"):
        missing_runs(read_plan(plan_file), Options(tmp_path, "cpu", {}, arms=["referense"]))


def test_an_unknown_contender_names_the_nearest(plan_file, tmp_path):
    with pytest.raises(ValueError, match="kernels=reference"):
        main([str(plan_file), "kernels=referense", "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert not (tmp_path / "out").exists()


def test_a_process_computes_on_cores_of_its_own(plan_file, tmp_path, monkeypatch):
    """By default torch's number of threads, pinned; the second of two processes on what the first one leaves."""
    seen = []

    def run_case(case, wanted, setup, note):
        seen.append((threads.cores(), torch.get_num_threads()))
        return iter(())

    monkeypatch.setattr(sweep, "run_case", run_case)
    monkeypatch.setattr(sweep, "_keep_environment", lambda *_: None)
    before, number = threads.cores(), torch.get_num_threads()
    for slot in range(min(2, len(before))):
        assert run_sweep(read_plan(plan_file), Options(tmp_path, "cpu", ONE, threads=1, slot=slot)) == 0
        assert seen[-1] == ([before[slot]], 1)
    assert run_sweep(read_plan(plan_file), Options(tmp_path, "cpu", ONE)) == 0
    assert seen[-1] == (before[:number], number)
    assert threads.cores() == before and torch.get_num_threads() == number


def test_threads_are_as_many_as_cores_allow(monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: list(range(6)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [threads.threads_each(None, "--threads ", n) for n in (1, 2, 6)] == [4, 3, 1]
    assert threads.threads_each(3, "--threads ", 2) == 3
    for asked, processes, message in ((7, 1, "--threads 6"), (0, 1, "--threads 6"), (4, 2, "--threads 3")):
        with pytest.raises(ValueError, match=f"Try: {message}"):
            threads.threads_each(asked, "--threads ", processes)
    with pytest.raises(ValueError, match="devices=7 .* Try: devices=6"):
        threads.threads_each(None, "--threads ", 7)


def test_a_guess_of_the_time_follows_the_work(plan_file):
    """Against milliseconds that layers took on one core of an AMD server processor; what cannot run takes none."""
    layers = [
        ({"shape": "28x28", "heads": 4, "kernel_size": 7, "batch": 4}, "cpu", (4.6, 10.0)),
        ({"shape": "56x56", "heads": 2, "kernel_size": 13, "batch": 8, "dilation": 4}, "cpu", (23.4, 42.6)),
        ({"shape": "56x56", "heads": 2, "kernel_size": 13, "batch": 8, "dilation": 4}, "reference", (3677, 8021)),
        ({"shape": "4096", "heads": 4, "kernel_size": 63}, "reference", (461, 438)),
        ({"shape": "4096", "heads": 4, "kernel_size": 63}, "sdpa", (613, 589)),
    ]
    for words, kernel, times in layers:
        case = Case.of({**words, "head_dim": 32})
        for which, ms in zip(("forward", "backward"), times, strict=True):
            assert 1 / 3 < 1e3 * kernel_seconds(case, kernel, which, "cpu") / ms < 3
    large = {"kernels": ["reference", "naive"], "shape": ["28x28"], "batch": [64], "dtype": ["fp32"], "seconds": 1000}
    plan = read_plan(plan_file, large)

    def guess(name: str, changes=plan, count: int = 1) -> float:
        arms = [arm for arm in changes.arms if arm.name == name]
        missing = {case: {arm: list(changes.directions) for arm in arms} for case in changes.cases}
        return estimated_s(changes, missing, "cpu", count)

    assert guess("naive") == 0 < guess("reference")
    longer = read_plan(plan_file, {**large, "runs": 11})
    # 3 and 5 untimed calls become 11 and 5.
    assert guess("reference", longer) / guess("reference") == pytest.approx(2, rel=0.1)
    assert guess("reference", count=2) / guess("reference") == pytest.approx(0.5, rel=0.1)


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
