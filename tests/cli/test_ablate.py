"""``natrain ablate``: shipped yamls, processes, commits, kernels of other packages."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from natrain.bench import spread
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
def test_two_processes_share_a_sweep(tmp_path, capfd):
    (tmp_path / "mine.yaml").write_text(TINY)
    command = ["ablate", f"ablation={tmp_path}/mine.yaml", "device=cpu", "devices=2", f"out={tmp_path}/out"]
    assert main([*command, "--threads", "1"]) == 0
    said = capfd.readouterr().out
    assert said.startswith("mine: 8 runs, baseline cpu") and said.count("on cpu, 1 threads, wall clock") == 2
    found = results(tmp_path / "out")
    assert len(found) == 8 and len({row["session"] for row in found}) == 2
    assert {row["threads"] for row in found} == {"1"} and {row["status"] for row in found} == {"ok"}


@pytest.mark.slow
def test_two_commits_are_contenders(tmp_path):
    """A clone with one more commit, which makes the reference kernel fail: its rows say which code ran."""
    clone = tmp_path / "clone"
    root = Path(spread.__file__).parents[2]
    clone.mkdir()
    for name in ("natrain", "csrc", "configs"):
        subprocess.run(["cp", "-r", root / name, clone], check=True)
    git = ["git", "-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "good"], check=True)
    good = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    cpu = clone / "natrain" / "ops" / "cpu.py"
    raising = "    def forward(self, *args):\n        raise OSError('old')\n\n    def _("
    cpu.write_text(cpu.read_text().replace("    def forward(", raising, 1))
    subprocess.run([*git, "commit", "-qam", "bad"], check=True)
    (tmp_path / "mine.yaml").write_text(
        TINY.replace("[cpu, reference]", f"[cpu, {{name: before, kernel: cpu, commit: {good}}}]")
    )
    command = [sys.executable, "-m", "natrain", "ablate", f"ablation={tmp_path}/mine.yaml", "device=cpu"]
    done = subprocess.run([*command, f"out={tmp_path}/out"], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path / "out")
    assert {(row["arm"], row["status"]) for row in found} == {("cpu", "failed"), ("before", "ok")}
    assert {row["commit"] for row in found if row["arm"] == "before"} == {good}
    assert {row["reason"] for row in found if row["arm"] == "cpu"} == {"OSError: old"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ablation=paper_4d"], "ablation=paper_"),
        (["paper_1d"], "ablation=nat_layers"),
        (["ablation=dtypes", "devices=0"], "devices=1"),
        (["ablation=dtypes", "device=tpu"], "device=cuda"),
        (["ablation=dtypes", "kernal=cpu"], "kernels="),
    ],
)
def test_bad_words_say_what_to_type(words, message, capsys):
    assert main(["ablate", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_commit_that_does_not_exist(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(TINY.replace("[cpu, reference]", "[{kernel: cpu, commit: no-such-thing}]"))
    assert main(["ablate", f"ablation={tmp_path}/mine.yaml", "device=cpu", f"out={tmp_path}/out"]) == 2
    assert "commit: HEAD~1" in capsys.readouterr().err
