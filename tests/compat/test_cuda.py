"""The interfaces on CUDA tensors agree with the same calls on the CPU, in float64 and in half precision."""

from __future__ import annotations

import pytest
import torch

from natrain.compat import switches, v014, v017, v021

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def fresh_switches(monkeypatch):
    """Every test starts with NATTEN's own defaults."""
    monkeypatch.setattr(switches, "state", switches.State())


def agree(function, *tensors, dtype):
    """``function`` on CUDA in ``dtype`` against float64 on the CPU, value and gradients."""
    truth = [t.double().requires_grad_() for t in tensors]
    given = [t.to("cuda", dtype).requires_grad_() for t in tensors]
    expected, out = function(*truth), function(*given)
    assert out.is_cuda and out.dtype == dtype
    weights = torch.randn(expected.shape, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), truth)
    found = torch.autograd.grad((out * weights.to("cuda", dtype)).sum(), given)
    for ours, theirs in zip((out, *found), (expected, *wanted), strict=True):
        scale = theirs.abs().max()
        assert ((ours.cpu().double() - theirs).abs().max() / scale) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("gemm", [True, False])
def test_the_old_pair(dtype, gemm):
    switches.use_gemm_na(gemm)
    q, k, v = (torch.randn(2, 2, 9, 10, 16) for _ in range(3))
    rpb = torch.randn(2, 5, 5)

    def attend(q, k, v, rpb):
        attn = v014.natten2dqkrpb(q * 0.25, k, rpb, 3, 2).softmax(-1)
        return v014.natten2dav(attn, v, 3, 2)

    agree(attend, q, k, v, rpb, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fused_017_causal(dtype):
    q, k, v = (torch.randn(2, 9, 10, 2, 16) for _ in range(3))
    agree(lambda q, k, v: v017.na2d(q, k, v, (3, 4), (2, 1), (True, False)), q, k, v, dtype=dtype)


def test_grouped_heads_and_additional_tokens_of_021():
    q, k, v = torch.randn(1, 33, 4, 16), torch.randn(1, 33, 2, 16), torch.randn(1, 33, 2, 16)
    k_extra, v_extra = torch.randn(1, 5, 2, 16), torch.randn(1, 5, 2, 16)

    def attend(q, k, v, k_extra, v_extra):
        extra = {"additional_keys": k_extra, "additional_values": v_extra}
        return v021.na1d(q, k, v, 8, 2, backend="cutlass-fna" if q.is_cuda else None, **extra)

    agree(attend, q, k, v, k_extra, v_extra, dtype=torch.float32)


def test_014_computes_in_float16_under_autocast():
    q, k, v = (torch.randn(1, 2, 8, 8, 16, device="cuda") for _ in range(3))
    with torch.autocast("cuda", torch.bfloat16):
        scores = v014.natten2dqk(q, k, 3, 1)
        assert scores.dtype == torch.float16
        assert v014.natten2dav(scores.softmax(-1), v, 3, 1).dtype == torch.float16
