"""Compiling ahead: every kernel once, nothing twice, a failure is left to the measurement."""

from __future__ import annotations

import pytest
import torch

from natrain.bench import ahead, rows, sweep
from natrain.bench.case import Case
from natrain.bench.plan import make_plan
from natrain.bench.run_case import Outcome
from natrain.jit import BuildError

WORDS = {"shape": "28x28", "heads": 4, "head_dim": 32, "batch": 8, "dtype": "fp16"}


@pytest.fixture
def built(monkeypatch) -> list:
    """Specs whose compilation was asked for, as on a machine with an H100."""
    found = []

    def build(spec):
        found.append(spec)
        if "softmax" in spec.name:
            raise BuildError("no")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(ahead, "build", build)
    monkeypatch.setattr(ahead, "find_built", lambda spec: spec in found or None)
    return found


def test_every_kernel_is_compiled_once(built):
    pairs = [(Case.of({**WORDS, "kernel_size": k, "batch": b}), ["naive"]) for k in (5, 7) for b in (8, 16)]
    compiler = ahead.Ahead()
    before_s = compiler.seconds(pairs)
    # qk, av, inverse and softmax, its derivative, dropout, of each window.
    assert compiler.compile(pairs) == len(built) == len(set(built)) == 12
    assert {spec.name for spec in built} == {
        f"natrain_naive_{name}" for name in ("qk", "av", "inverse", "softmax", "softmax_grad", "dropout")
    }
    assert before_s > 0 == compiler.seconds(pairs) and compiler.compile(pairs) == 0


def test_peers_and_what_a_kernel_cannot_do_need_nothing(built):
    case = Case.of({**WORDS, "kernel_size": 7, "dtype": "fp64"})
    assert ahead.Ahead().compile([(case, ["flex", "sdpa", "reference", "gemm"])]) == 0


@pytest.fixture
def device(built, monkeypatch):
    """A sweep "on cuda" whose measurements take no time and whose compilations take 10 s of processor time each."""
    monkeypatch.setattr(ahead.Ahead, "seconds", lambda self, pairs: 10.0 * len(self.missing(pairs)))
    monkeypatch.setattr(sweep, "device_name", lambda _: "mock")
    monkeypatch.setattr(sweep, "add_session", lambda *_: None)
    monkeypatch.setattr(sweep, "copy_bytes_per_s", lambda _: 1e12)
    monkeypatch.setattr(sweep, "product_flops_per_s", lambda *_: {})
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)

    def run_case(case, wanted, setup, note):
        for arm, directions in wanted.items():
            yield from (Outcome(arm.name, which, "unsupported", "not here") for which in directions)

    monkeypatch.setattr(sweep, "run_case", run_case)
    return built


def test_a_group_shrinks_until_its_compilation_fits_the_time(device, tmp_path):
    settings = {"kernels": ["naive"], "problems": [WORDS], "axes": {"kernel_size": [3, 5, 7, 9]}}
    plan = make_plan("mine", settings, "", {})
    # Six kernels a window: 130 s hold two windows, not four.
    assert sweep.run_sweep(plan, sweep.Options(tmp_path, "cuda", {}, time_limit_s=130)) == 0
    assert len(list(rows.read(tmp_path / "results.csv"))) == 8 and len(device) == 24
    device.clear()
    assert sweep.run_sweep(plan, sweep.Options(tmp_path / "short", "cuda", {}, time_limit_s=50)) == 3
    assert not device and not list(rows.read(tmp_path / "short" / "results.csv"))
