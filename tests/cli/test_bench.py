"""``natrain bench``: the table of one problem, and peers judged like kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from natrain.bench import ceilings, threads
from natrain.bench.case import Case
from natrain.bench.ceilings import copy_bytes_per_s, product_flops_per_s
from natrain.bench.measure import Timing
from natrain.bench.one import refusals, table
from natrain.bench.run_case import Outcome
from natrain.cli import main

PROBLEM = ["op=na2d", "shape=9x8", "heads=2", "head_dim=8", "kernel_size=3", "batch=2"]


def test_a_table_of_kernels_and_peers(capsys):
    words = [*PROBLEM, "dtype=bf16", "kernels=sdpa,cpu,naive,flex", "device=cpu", "runs=3", "cache=warm"]
    assert main(["bench", *words]) == 0
    said = capsys.readouterr().out
    assert said.startswith("na2d 9x8 b2 n2 d8 k3 bf16\n")
    assert f"wall clock, {torch.get_num_threads()} threads, warm cache" in said
    rows = re.findall(r"^(\w+) +(forward|backward) +([\d.]+) +([\d.]+) to ([\d.]+) .* (\d\.\de-\d\d)$", said, re.M)
    assert [row[:2] for row in rows] == [(n, p) for p in ("forward", "backward") for n in ("sdpa", "cpu")]
    for _, _, median, low, high, error in rows:
        assert 0 < float(low) <= float(median) <= float(high) and 1e-5 < float(error) < 3e-2
    assert "naive unsupported: device cpu (has cuda)" in said and "flex unsupported: device cpu" in said


def test_every_kernel_of_this_machine_is_the_default(capsys):
    assert main(["bench", *PROBLEM, "device=cpu", "runs=3", "cache=warm"]) == 0
    said = capsys.readouterr().out
    assert {"cpu", "reference", "sdpa"} == set(re.findall(r"^(\w+) +forward", said, re.M))


def test_threads_are_pinned_and_given_back(capsys, monkeypatch):
    before, seen = threads.cores(), []

    def ceiling(device):
        seen.append(threads.cores())
        return copy_bytes_per_s(device)

    monkeypatch.setattr(ceilings, "copy_bytes_per_s", ceiling)
    assert main(["bench", *PROBLEM, "device=cpu", "runs=3", "cache=warm", "kernels=cpu", "threads=1"]) == 0
    assert "wall clock, 1 threads" in capsys.readouterr().out
    assert seen == [before[:1]] and threads.cores() == before


def test_rates_of_a_known_time():
    """56x56 tokens of 64 channels, batch 128, 16 bits: 51.4 MB a tensor; 2 products of 49 keys."""
    case = Case.of({"shape": "56x56", "heads": 2, "head_dim": 32, "kernel_size": 7, "batch": 128, "dtype": "bf16"})
    timing = Timing("x", 0.5, 0.4, 0.6, 10, None)
    outcomes = [Outcome("x", "forward", "ok", "", timing, 1e-3, 12.3), Outcome("x", "backward", "failed", "no")]
    titles, row = table(case, outcomes, 2.97e12, "cuda")
    found = dict(zip(titles, row, strict=True))
    tokens = 128 * 56 * 56 * 2
    assert float(found["TFLOP/s"]) == pytest.approx(2 * 2 * tokens * 49 * 32 / 0.5e-3 / 1e12, rel=5e-3)
    assert float(found["GB/s"]) == pytest.approx(4 * tokens * 32 * 2 / 0.5e-3 / 1e9, rel=5e-3)
    # design note: the floor of this layer is 0.069 ms at 2.97 TB/s
    assert found["of the floor"] == "13.8%" and found["MiB"] == "12"
    assert refusals(outcomes) == ["x failed: no (backward)"]


def test_copy_moves_what_a_memory_can():
    assert 5e8 < copy_bytes_per_s("cpu") < 1e12
    found = product_flops_per_s("cpu", ["fp32"])
    assert set(found) == {"fp32"} and 1e9 < found["fp32"] < 1e14


@pytest.mark.slow
def test_a_kernel_of_another_package_by_its_name(tmp_path):
    """One that has a forward alone gets a time for that; one that is wrong gets none."""
    (tmp_path / "theirs.py").write_text(
        "import torch\n"
        "from natrain.ops.registry import FusedKernel, Limits, get_kernel\n"
        "class Theirs(FusedKernel):\n"
        "    name, summary, priority = 'theirs', 'forward only', 200\n"
        "    limits = Limits(devices=frozenset({'cpu'}), backward=False)\n"
        "    def forward(self, problem, *args):\n"
        "        return get_kernel('cpu').forward(problem, *args)\n"
        "    def backward(self, *args):\n"
        "        raise AssertionError\n"
        "class Mean(Theirs):\n"
        "    name, summary = 'mean', 'averages all values'\n"
        "    def forward(self, problem, q, k, v, *args):\n"
        "        return v.mean((1, 2), keepdim=True).expand_as(v).contiguous(), torch.zeros(q.shape[:-1])\n"
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[natrain.kernels]\ntheirs = theirs:Theirs\nmean = theirs:Mean\n")
    words = [*PROBLEM, "kernels=theirs,mean,cpu", "device=cpu", "runs=3", "cache=warm"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "natrain", "bench", *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    timed = re.findall(r"^(\w+) +(forward|backward) ", done.stdout, re.M)
    assert timed == [("theirs", "forward"), ("cpu", "forward"), ("cpu", "backward")]
    assert "theirs unsupported: no gradients (backward)" in done.stdout
    assert "mean failed: wrong forward: relative error" in done.stdout


NATTEN = """
import sys, warnings
warnings.simplefilter("ignore")
import natrain.compat
natrain.compat.install(sys.argv[1])
from natrain.bench.case import Case
from natrain.bench.peers import PEERS
from natrain.bench.run_case import Setup, run_case
words = {"shape": "6x7", "heads": 2, "head_dim": 8, "kernel_size": "3x5", "dtype": "fp32", "batch": 2}
for has_rpb in (False, True):
    case = Case.of({**words, "rpb": has_rpb})
    for outcome in run_case(case, {PEERS[name]: ("forward", "backward") for name in sys.argv[2:]},
                            Setup("cpu", 3, cache="warm")):
        print(outcome.arm, outcome.direction, int(has_rpb), outcome.status, outcome.reason)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "arms", "without"),
    [("0.17", ["natten", "natten-naive", "natten-gemm"], "natten-cutlass-fna"), ("0.21", ["natten"], "natten-gemm")],
)
def test_natten_is_called_as_its_versions_want(version, arms, without):
    """natrain's stand-in has NATTEN's interfaces; outputs and gradients pass the float64 check."""
    command = [sys.executable, "-c", NATTEN, version, *arms, without]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for arm in arms:
        for direction in ("forward", "backward"):
            assert f"{arm} {direction} 0 ok" in said, said
            assert f"{arm} {direction} 1 {'ok' if version == '0.17' else 'unsupported no rpb since 0.20'}" in said, said
    assert f"{without} forward 0 unsupported natten {version} has no" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*PROBLEM, "kernel=cpu"], "kernel"),
        ([*PROBLEM, "kernels=cpo"], "kernels=cpu"),
        ([*PROBLEM, "device=tpu"], "device=cpu"),
        ([*PROBLEM, "runs=2"], "runs=30"),
        ([*PROBLEM, "device=cpu", "threads=0"], "threads="),
        ([*PROBLEM, "device=cpu", "threads=999"], "threads="),
        ([*PROBLEM, "device=cpu", "threads=a"], "threads=1"),
        ([*PROBLEM[:-1], "batch=abc"], "batch=2"),
        ([*PROBLEM, "window=3"], "kernel_size="),
        ([*PROBLEM, "timer=sun"], "timer=device"),
        (["shape=9x8"], "heads=2"),
    ],
)
def test_bad_words_say_what_to_type(words, message, capsys):
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err
