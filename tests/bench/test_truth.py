"""The sampled truth against dense attention in float64, and against wrong kernels."""

from __future__ import annotations

import pytest
import torch

from natrain.bench.case import Case
from natrain.bench.truth import TOLERANCES, random_inputs, sample_truth
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
    axes = {name: getattr(window, name) for name in ("kernel_size", "dilation", "stride", "is_causal")}
    out, _ = dense_attention(q, k, v, inputs.rpb, axes, case.head_dim**-0.5)
    gradients = torch.autograd.grad(out, (q, k, v), inputs.d_out)
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
