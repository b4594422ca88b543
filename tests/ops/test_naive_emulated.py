"""The naive kernels without a GPU: their sources on the CPU emulator, against the float64 oracle and the loops."""

from __future__ import annotations

import pytest
import torch

from natrain.ops import reference, registry
from natrain.ops.problem import Window
from tests.emulator.fixture import emulated
from tests.ops import oracle
from tests.ops.grid import CHOSEN

CASES = [CHOSEN[i] for i in (1, 3, 4, 6, 8, 10, 11, 13, 14, 18, 19, 20)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True, params=[0, 7], ids=["in order", "at random"])
def on_the_cpu(request):
    with emulated(registry.get_kernel("naive"), seed=request.param):
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_agrees_with_the_oracle(case):
    """out, lse and the gradients of q, k, v, rpb; a dtype a case in turn."""
    dtype = list(TOLERANCE)[CASES.index(case) % 4]
    q, k, v, rpb = case.tensors(dtype)
    inputs = [x for x in (q, k, v, rpb) if x is not None]
    out, lse = case.function()(q, k, v, **case.window, rpb=rpb, return_lse=True, kernel="naive")
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    mine = [out, lse, *torch.autograd.grad((out, lse), inputs, (d_out, d_lse))]

    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = oracle.dense_attention(*exact[:3], exact[3] if case.has_rpb else None, case.window, case.head_dim**-0.5)
    truth = [*truth, *torch.autograd.grad(truth, exact, (d_out.double(), d_lse.double()))]
    for name, a, b in zip(("out", "lse", "d_q", "d_k", "d_v", "d_rpb"), mine, truth, strict=False):
        error = (a.double() - b).norm() / b.norm()
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("case", [CHOSEN[0], CHOSEN[4], CHOSEN[13]], ids=str)
def test_visible_weights_agree_with_the_loops(case):
    q, k, v, rpb = case.tensors(requires_grad=False)
    scores = case.function("_qk")(q, k, **case.window, rpb=rpb, kernel="naive")
    expected = reference.qk(q, k, rpb, Window(**case.window), case.head_dim**-0.5)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
    probs = scores.softmax(-1)
    out = case.function("_av")(probs, v, **case.window, kernel="naive")
    torch.testing.assert_close(out, oracle.loop_av(probs, v, case.window), rtol=1e-12, atol=1e-12)
