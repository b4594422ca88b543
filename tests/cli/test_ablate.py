"""``natrain ablate``: shipped yamls, processes, commits, kernels of other packages."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from natrain.bench import rows, spread, supervise, threads
from natrain.bench.arms import find_arm
from natrain.bench.plan import read_plan
from natrain.bench.run_case import Setup, run_case
from natrain.bench.sweep import estimated_s
from natrain.cli import main
from natrain.cli.settings import config_folder
from natrain.ops.registry import list_kernels

KERNEL_YAMLS = (
    "paper_1d",
    "paper_2d",
    "paper_3d",
    "nat_layers",
    "peers",
    "windows",
    "dilations",
    "rpb",
    "dtypes",
    "sweep",
)
TINY = """\
kernels: [cpu, reference]
runs: 3
cache: warm
axes: {shape: 6x7, heads: 1, head_dim: 8, kernel_size: [3, 5], dtype: fp32}
"""


def results(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", KERNEL_YAMLS)
def test_every_shipped_yaml_makes_a_plan_that_takes_minutes(name):
    plan = read_plan(config_folder() / "ablation" / f"{name}.yaml")
    assert plan.cases and plan.baseline == "naive" and plan.arms[0].kernel in list_kernels()
    missing = {case: {arm: list(plan.directions) for arm in plan.arms} for case in plan.cases}
    assert 1 < estimated_s(plan, missing, "cuda") < 600


@pytest.mark.parametrize("name", KERNEL_YAMLS)
def test_the_problems_of_every_shipped_yaml_run(name):
    """The smallest of each, with one image, on a CPU."""
    plan = read_plan(config_folder() / "ablation" / f"{name}.yaml")
    small = min(plan.cases, key=lambda case: case.tokens * case.window.num_neighbors * case.heads * case.head_dim)
    wanted = {find_arm("cpu"): plan.directions}
    outcomes = list(run_case(small.with_batch(1), wanted, Setup("cpu", 3, cache="warm")))
    assert [outcome.status for outcome in outcomes] == ["ok", "ok"]


@pytest.mark.slow
@pytest.mark.skipif(len(threads.cores()) < 2, reason="needs two cores")
def test_two_processes_share_a_sweep(tmp_path, capfd):
    (tmp_path / "mine.yaml").write_text(TINY)
    command = ["ablate", f"ablation={tmp_path}/mine.yaml", "device=cpu", "devices=2", f"out={tmp_path}/out"]
    assert main([*command, "--threads", "1"]) == 0
    said = capfd.readouterr().out
    assert said.startswith(
        "mine: 2 problems, 8 runs in all, baseline cpu\nto measure: 8 runs on cpu, 2 processes, 1 thr"
    )
    assert said.count("about") == 1
    found = results(tmp_path / "out")
    assert len(found) == 8 and len({row["session"] for row in found}) == 2
    assert {row["threads"] for row in found} == {"1"} and {row["status"] for row in found} == {"ok"}


@pytest.fixture
def clone(tmp_path) -> Path:
    """A repository of its own with this code as its one commit."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("natrain", "csrc", "configs"):
        subprocess.run(["cp", "-r", Path(spread.__file__).parents[2] / name, folder], check=True)
    git(folder, "init", "-q")
    commit(folder, "good")
    return folder


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit(folder: Path, message: str) -> str:
    """Everything; the short SHA."""
    git(folder, "add", ".")
    git(folder, "commit", "-qm", message)
    return git(folder, "rev-parse", "--short=10", "HEAD")


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.slow
def test_commits_are_contenders(tmp_path, clone):
    """A good commit; one whose names today's sweep does not find; one whose kernel raises; into a relative folder."""
    good = git(clone, "rev-parse", "--short=10", "HEAD")
    change(clone / "natrain/ops/window.py", "def axis_window(", "def another_name(")
    broken = commit(clone, "cannot be imported")
    change(clone / "natrain/ops/window.py", "def another_name(", "def axis_window(")
    change(
        clone / "natrain/ops/cpu.py",
        "    def forward(",
        "    def forward(self, *args):\n        raise OSError('old')\n\n    def _(",
    )
    bad = commit(clone, "raises")
    kernels = "[reference, {kernel: cpu, commit: HEAD}, {name: before, kernel: cpu, commit: HEAD~2}, "
    kernels += "{kernel: cpu, commit: HEAD~1}, {kernel: unheard, commit: HEAD~2}]"
    (tmp_path / "mine.yaml").write_text(TINY.replace("[cpu, reference]", kernels).replace("[3, 5]", "3"))
    command = [sys.executable, "-m", "natrain", "ablate", f"ablation={tmp_path}/mine.yaml", "device=cpu"]
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    (out,) = (clone / "runs" / "ablations").iterdir()
    found = {row["arm"]: row for row in results(out)}
    assert len(results(out)) == 10
    assert {name: row["status"] for name, row in found.items()} == {
        "reference": "ok",
        f"cpu@{bad}": "failed",
        f"before@{good}": "ok",
        f"cpu@{broken}": "failed",
        f"unheard@{good}": "failed",
    }
    assert {name.partition("@")[2]: row["commit"] for name, row in found.items() if "@" in name} == {
        sha: sha for sha in (good, broken, bad)
    }
    assert found[f"cpu@{bad}"]["reason"] == "OSError: old"
    assert found[f"cpu@{broken}"]["reason"].startswith(
        f"commit {broken}: ImportError: cannot import name 'axis_window'"
    )
    assert found[f"unheard@{good}"]["reason"].startswith("kernels='unheard' is not allowed")
    sessions = [json.loads(line) for line in (out / "environment.jsonl").read_text().splitlines()]
    assert {"before": good, "reference": bad}.items() <= {
        name.partition("@")[0]: sha for session in sessions for name, sha in session["commits"].items()
    }.items()
    # What was typed, not how the processes that measure are started.
    assert {session["command"] for session in sessions} == {f"python -m natrain {' '.join(command[3:])}"}
    # The same words after another commit: HEAD is another contender, whose rows are missing.
    change(clone / "natrain/ops/cpu.py", "raise OSError('old')", "raise OSError('new')")
    newest = commit(clone, "raises anew")
    done = subprocess.run(
        [*command, "--arms", f"cpu@{newest}"], cwd=clone, env=environment, capture_output=True, text=True
    )
    assert "to measure: 2 runs" in done.stdout, done.stdout + done.stderr
    assert {row["reason"] for row in results(out) if row["arm"] == f"cpu@{newest}"} == {"OSError: new"}


THEIRS = """\
import os, signal, time
from pathlib import Path
from natrain.ops.registry import FusedKernel, Limits, get_kernel
class Crashing(FusedKernel):
    name, summary, priority, limits = "crashing", "forward ends its process", 200, Limits(devices=frozenset({"cpu"}))
    def forward(self, *args):
        os.kill(os.getpid(), signal.SIGSEGV)
    def backward(self, *args):
        raise AssertionError
class Slow(Crashing):
    name, summary = "slow", "hangs as long as there is a file"
    def forward(self, *args):
        while Path(os.environ["HANG"]).exists():
            time.sleep(0.01)
        return get_kernel("cpu").forward(*args)
    def backward(self, *args):
        return get_kernel("cpu").backward(*args)
"""


@pytest.fixture
def ablate(tmp_path):
    """Starts ``natrain ablate`` with two kernels of another package: one crashes, one hangs while a file is there."""
    (tmp_path / "theirs.py").write_text(THEIRS)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[natrain.kernels]\ncrashing = theirs:Crashing\nslow = theirs:Slow\n")
    (tmp_path / "mine.yaml").write_text(TINY.replace("[3, 5]", "3"))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "HANG": str(tmp_path / "hang")}
    command = [sys.executable, "-m", "natrain", "ablate", "ablation=mine.yaml", "device=cpu", "out=out"]

    def start(*words: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # A shell that starts the tests in the background has Ctrl-C ignored, and children inherit that.
        return subprocess.Popen(
            [*command, *words],
            cwd=tmp_path,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **pipes,
        )

    return start


@pytest.mark.slow
def test_a_contender_that_crashes_fails_alone(ablate, tmp_path):
    process = ablate("kernels=reference,crashing,cpu", "directions=forward")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1, said
    found = {row["arm"]: row for row in results(tmp_path / "out")}
    assert len(results(tmp_path / "out")) == 3, said
    assert {name: row["status"] for name, row in found.items()} == {
        "reference": "ok",
        "cpu": "ok",
        "crashing": "failed",
    }
    assert found["crashing"]["reason"] == "the process died (SIGSEGV) while at this"
    assert "b1 n1 d8 k3 fp32: the process died (SIGSEGV)" in said and "1 runs failed" in said


@pytest.mark.slow
def test_a_killed_command_leaves_nobody_at_work_and_loses_nothing(ablate, tmp_path):
    """Three times in one slow problem, twice by SIGKILL, once by Ctrl-C: none of it is a crash of the problem."""
    (tmp_path / "hang").touch()
    running = tmp_path / "out" / ".running-0"
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGINT):
        process = ablate("kernels=cpu,slow")
        deadline = time.monotonic() + 120
        while not running.exists() or '["slow"]' not in running.read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        if number == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, number)
        # To its end: no process that it started holds the pipe.
        said, _ = process.communicate(timeout=20)
        assert process.returncode == (130 if number == signal.SIGINT else -number), said
        assert "Traceback" not in said
        running.unlink()
    results_file = tmp_path / "out" / "results.csv"
    # The worst that a kill can leave: half a row.
    results_file.write_bytes(results_file.read_bytes() + b"af6b2b,na2d,6x7,1")
    (tmp_path / "hang").unlink()
    process = ablate("kernels=cpu,slow")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    found = [row for row in rows.read(results_file)]
    assert len(found) == len(set(map(rows.key, found))) == 4 and {row["status"] for row in found} == {"ok"}


def test_two_commands_do_not_share_a_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text(TINY)
    monkeypatch.setattr(supervise, "_WAIT_S", 0.1)
    words = ["ablate", f"ablation={tmp_path}/mine.yaml", "device=cpu", f"out={tmp_path}/out"]
    with supervise.locked(tmp_path / "out"):
        assert main(words) == 2
    assert f"(now: process {os.getpid()}). Try: out=NEW" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.csv").exists()


@pytest.mark.parametrize(
    ("visible", "words", "expected"),
    [("4,GPU-ab,6", "3", ["4", "GPU-ab", "6"]), ("4,GPU-ab,6", "0,2", ["4", "6"]), (None, "[1]", ["1"])],
)
def test_every_process_has_a_gpu_of_its_own(tmp_path, monkeypatch, visible, words, expected):
    seen, out = [], tmp_path / "out"

    class Process:
        def __init__(self, command, env, pass_fds):
            seen.append(env["CUDA_VISIBLE_DEVICES"])
            rows.start(out / "results.csv")

        def poll(self):
            return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(spread, "subprocess", SimpleNamespace(Popen=Process))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (tmp_path / "mine.yaml").write_text(TINY.replace("[3, 5]", "[1, 3, 5]"))
    assert main(["ablate", f"ablation={tmp_path}/mine.yaml", "device=cuda", f"devices={words}", f"out={out}"]) == 0
    assert seen == expected


def test_more_devices_than_there_are(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert main(["ablate", "ablation=dtypes", "device=cuda", "devices=4"]) == 2
    said = capsys.readouterr().err
    assert "devices=2 is not allowed" in said and "CUDA_VISIBLE_DEVICES=0,1" in said and "Try: devices=2" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ablation=paper_4d"], "ablation=paper_"),
        (["paper_1d"], "ablation=nat_layers"),
        (["ablation=dtypes", "devices=0"], "devices=1"),
        (["ablation=dtypes", "devices=0,0"], "devices=0"),
        (["ablation=dtypes", "devices=a"], "devices=0,1"),
        (["ablation=dtypes", "device=tpu"], "device=c"),
        (["ablation=dtypes", "device=cpu", "kernels=cpo"], "kernels=cpu"),
        (["ablation=dtypes", "device=cpu", "kernels=cpu", "--threads", "0"], "--threads "),
        (["ablation=dtypes", "device=cpu", "kernels=cpu", "--arms", "nope"], "--arms cpu"),
        (["ablation=dtypes", "device=cpu", "kernels=cpu", "--chunk", "0"], "--chunk 24"),
        (["ablation=dtypes", "device=cpu", "kernels=cpu", "--time-limit", "nan"], "--time-limit 600"),
        (["ablation=models", "device=cpu", "kernels=cpu", "--time-limit", "-1"], "--time-limit 600"),
        (["ablation=training", "kernels=cpu", "--time-limit", "0"], "--time-limit 600"),
        (["ablation=dtypes", "window=3"], "kernel_size="),
        (["ablation=dtypes", "kernal=cpu"], "kernels="),
    ],
)
def test_bad_words_say_what_to_type(words, message, capsys):
    assert main(["ablate", *words]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and "the page" not in said.out


@pytest.mark.parametrize("words", [["ablation=dtypes"], ["ablation=models", "model=nat_digits"]])
def test_a_folder_that_cannot_be_made(words, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["ablate", *words, "device=cpu", "kernels=cpu", f"out={tmp_path}/file/out"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"natrain: error: out='{tmp_path}/file/out' is not allowed") and said.count("\n") == 1


@pytest.mark.parametrize("kind", ["[kernels]", "null", "sweep"])
def test_a_kind_that_is_none(tmp_path, capsys, kind):
    (tmp_path / "mine.yaml").write_text(f"kind: {kind}\nkernels: cpu\n")
    assert main(["ablate", f"ablation={tmp_path}/mine.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "one of kernels, models, training" in said


@pytest.mark.parametrize("text", ["kernels: [cpu", "[cpu, reference]"])
def test_a_yaml_without_settings(tmp_path, capsys, text):
    (tmp_path / "mine.yaml").write_text(text)
    assert main(["ablate", f"ablation={tmp_path}/mine.yaml"]) == 2
    assert capsys.readouterr().err.startswith(f"natrain: error: ablation='{tmp_path}/mine.yaml' is not allowed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", [["ablate", "ablation=dtypes"], ["bench", "shape=8x8", "heads=1"]])
def test_a_gpu_that_is_not_there(command, capsys):
    assert main([*command, "device=cuda"] + (["head_dim=8", "kernel_size=3"] if command[0] == "bench" else [])) == 2
    assert "device='cuda' is not allowed" in capsys.readouterr().err


def test_a_commit_that_does_not_exist(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(TINY.replace("[cpu, reference]", "[{kernel: cpu, commit: no-such-thing}]"))
    assert main(["ablate", f"ablation={tmp_path}/mine.yaml", "device=cpu", f"out={tmp_path}/out"]) == 2
    assert "commit: HEAD~1" in capsys.readouterr().err
