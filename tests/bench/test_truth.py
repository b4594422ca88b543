"""The sampled truth against dense attention in float64, and against wrong kernels."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
import torch

from natrain.bench import truth as truth_module
from natrain.bench.arms import find_arm
from natrain.bench.case import Case
from natrain.bench.run_case import Setup, run_case
from natrain.bench.truth import TOLERANCES, random_inputs, sample_truth
from natrain.ops import registry
from natrain.ops.cpu import CpuKernel
from tests.ops.oracle import dense_attention

CASES = [
    {"shape": 23, "batch": 2, "heads": 3, "head_dim": 5, "kernel_size": 7, "dilation": 3},
    {"shape": "9x14", "heads": 2, "head_dim": 8, "kernel_size": "3x4", "dilation": "2x3", "rpb": True},
    {"shape": "9x14", "batch": 2, "heads": 1, "head_dim": 8, "kernel_size": "5x4", "stride": "2x1", "is_causal": "0x1"},
    {"shape": "4x7x6", "heads": 2, "head_dim": 3, "kernel_size": "3x5x2", "rpb": True},
]


@pytest.mark.parametrize("words", CASES, ids=lambda words: str(words["shape"]))
def test_the_samples_are_the_dense_ones(words):
    case = Case.of({**words, "dtype": "fp64"})
    inputs, window = random_inputs(case, "cpu"), case.window
    q, k, v = (x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    rpb = None if inputs.rpb is None else inputs.rpb.clone().requires_grad_()
    axes = {name: getattr(window, name) for name in ("kernel_size", "dilation", "stride", "is_causal")}
    out, _ = dense_attention(q, k, v, rpb, axes, case.head_dim**-0.5)
    gradients = torch.autograd.grad(out, (q, k, v), inputs.d_out, retain_graph=True)
    with torch.no_grad():
        truth = sample_truth(case, inputs)
        assert truth.forward_error(out) < 1e-12
        assert truth.backward_error(*gradients) < 1e-12
        assert truth.forward_error(out.float() * (1 + 1e-3)) == pytest.approx(1e-3, rel=1e-2)
        corner = out.clone()
        corner[:, (0,) * len(case.spatial)] += 1
        assert truth.forward_error(corner) > TOLERANCES[torch.bfloat16]
        wrong = gradients[1].clone()
        wrong.flatten(1, -3)[:, -1] *= 2
        assert truth.backward_error(gradients[0], wrong, gradients[2]) > TOLERANCES[torch.bfloat16]
        assert truth.forward_error(out * torch.nan) == float("inf")
    if rpb is not None:
        assert truth.bias_inputs is inputs
        (d_rpb,) = torch.autograd.grad(out, rpb, inputs.d_out)
        assert truth.bias_error(d_rpb) < 1e-12
        assert truth.bias_error(torch.full_like(d_rpb, 17)) > TOLERANCES[torch.bfloat16]


def test_a_bias_that_many_queries_share_is_judged_by_some_of_them(monkeypatch):
    """The sampled output gradient gives what attention gives with it, and differs from the whole."""
    monkeypatch.setattr(truth_module, "_BIAS_PAIRS", 12 * 40)
    case = Case.of({**CASES[1], "dtype": "fp64"})
    inputs, window = random_inputs(case, "cpu"), case.window
    truth = sample_truth(case, inputs)
    used = truth.bias_inputs.d_out.abs().sum(-1) > 0
    assert 20 <= used.sum() <= 40 and torch.equal(truth.bias_inputs.d_out[used], inputs.d_out[used])
    rpb = inputs.rpb.clone().requires_grad_()
    axes = {name: getattr(window, name) for name in ("kernel_size", "dilation", "stride", "is_causal")}
    out, _ = dense_attention(inputs.q, inputs.k, inputs.v, rpb, axes, case.head_dim**-0.5)
    (sampled,) = torch.autograd.grad(out, rpb, truth.bias_inputs.d_out, retain_graph=True)
    (whole,) = torch.autograd.grad(out, rpb, inputs.d_out)
    assert truth.bias_error(sampled) < 1e-12 and truth.bias_error(whole) > 0.1


class _WrongBias(CpuKernel):
    """Right but for the gradient of the bias, by a factor or everywhere 17."""

    summary = "wrong"

    def __init__(self, name: str, factor: float | None) -> None:
        self.name, self._factor = name, factor

    def backward(self, *arguments):
        d_rpb = super().backward(*arguments)
        return torch.full_like(d_rpb, 17) if self._factor is None else self._factor * d_rpb


@pytest.mark.parametrize("most", [1, 100], ids=["sampled", "whole"])
def test_a_kernel_of_another_package_with_a_wrong_bias_gradient_gets_no_time(most, monkeypatch):
    entries = [
        EntryPoint(name, f"{__name__}:{name}", registry.ENTRY_POINT_GROUP) for name in ("seventeen", "doubled", "close")
    ]
    monkeypatch.setattr(registry, "_KERNELS", dict(registry._KERNELS))
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    monkeypatch.setattr(truth_module, "_BIAS_PAIRS", 49 * 200 * most)
    registry._pending.cache_clear()
    case = Case.of({"shape": "14x14", "heads": 2, "head_dim": 8, "kernel_size": 7, "rpb": True})
    arms = {find_arm(name): ("forward", "backward") for name in ("seventeen", "doubled", "close", "cpu", "sdpa")}
    found = {(o.arm, o.direction): o for o in run_case(case, arms, Setup("cpu", 3, cache="warm"))}
    registry._pending.cache_clear()
    failed = {key for key, outcome in found.items() if outcome.status == "failed"}
    assert failed == {("seventeen", "backward"), ("doubled", "backward")}
    assert found["doubled", "backward"].reason.startswith("wrong backward: relative error 1.00e+00")
    assert found["close", "backward"].error == pytest.approx(1e-3, rel=0.01)
    assert found["cpu", "backward"].error < 1e-5 and found["sdpa", "backward"].error < 1e-5


seventeen, doubled, close = (
    _WrongBias(name, factor) for name, factor in (("seventeen", None), ("doubled", 2.0), ("close", 1.001))
)
