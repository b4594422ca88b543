"""merge_attentions against one softmax over all keys: values, every gradient, empty parts, 16 bits."""

from __future__ import annotations

import math

import pytest
import torch

import natrain
from tests.ops import oracle

WINDOW = {"kernel_size": (3, 3), "dilation": (2, 1), "stride": (1, 1), "is_causal": (False, False)}


def _dense(q, k, v, scale):
    """(out, lse) of q [..., N, D] on tokens k, v [B, M, N, D]."""
    scores = scale * torch.einsum("b...nd,bmnd->b...nm", q, k)
    return torch.einsum("b...nm,bmnd->b...nd", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_values_and_gradients_are_those_of_one_softmax(parts):
    torch.manual_seed(0)
    q = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 8, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = _dense(q, k, v, 0.5)
    split = [_dense(q, *kv, 0.5) for kv in zip(k.tensor_split(parts, 1), v.tensor_split(parts, 1), strict=True)]
    got = natrain.merge_attentions(*zip(*split, strict=True))
    torch.testing.assert_close(got, expected)
    weights = [torch.randn_like(t) for t in expected]
    torch.testing.assert_close(
        torch.autograd.grad(got, (q, k, v), weights), torch.autograd.grad(expected, (q, k, v), weights)
    )


def test_neighbours_and_more_tokens_are_one_softmax():
    q, k, v = (torch.randn(2, 7, 6, 3, 8, dtype=torch.float64) for _ in range(3))
    more_k, more_v = (torch.randn(2, 5, 3, 8, dtype=torch.float64) for _ in range(2))
    neighbours = natrain.na2d(q, k, v, **WINDOW, scale=0.3, return_lse=True)
    out, lse = natrain.merge_attentions(*zip(neighbours, _dense(q, more_k, more_v, 0.3), strict=True))
    scores = oracle.dense_scores(q, k, None, WINDOW, 0.3)
    scores = torch.cat([scores, 0.3 * torch.einsum("bind,bmnd->bnim", q.flatten(1, 2), more_k)], -1)
    values = torch.cat([v.flatten(1, 2), more_v], 1)
    expected = torch.einsum("bnim,bmnd->bind", scores.softmax(-1), values)
    torch.testing.assert_close(out, expected.view_as(q))
    torch.testing.assert_close(lse, scores.logsumexp(-1).transpose(1, 2).reshape(lse.shape))


def test_gradcheck_in_every_out_and_lse():
    outs = [torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def merge(*parts):
        return natrain.merge_attentions(parts[:3], parts[3:])

    assert torch.autograd.gradcheck(merge, (*outs, *lses), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(merge, (*outs, *lses))


def test_empty_parts_weigh_nothing_and_large_scores_do_not_overflow():
    outs = [torch.randn(4, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    empty = -math.inf
    lses = [
        torch.tensor([empty, empty, 0.0, 5000.0], dtype=torch.float64, requires_grad=True),
        torch.tensor([empty, 3.0, empty, 4999.0], dtype=torch.float64, requires_grad=True),
    ]
    out, lse = natrain.merge_attentions(outs, lses)
    assert (out[0] == 0).all() and torch.equal(out[1], outs[1][1]) and torch.equal(out[2], outs[0][2])
    share = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(out[3], share * outs[0][3] + (1 - share) * outs[1][3])
    assert lse[:3].tolist() == [empty, 3.0, 0.0] and lse[3].item() == pytest.approx(5000 + math.log1p(math.exp(-1)))
    grads = torch.autograd.grad((out, lse), (*outs, *lses), (torch.ones_like(out), torch.ones_like(lse)))
    assert all(torch.isfinite(grad).all() for grad in grads) and all((grad[0] == 0).all() for grad in grads)


def test_16_bits_are_summed_in_float32():
    torch.manual_seed(0)
    outs = [torch.randn(50, 4, 8).bfloat16() for _ in range(6)]
    lses = [torch.randn(50, 4) for _ in range(6)]
    out, lse = natrain.merge_attentions(outs, lses)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    weights = torch.stack(lses).double().softmax(0)[..., None]
    exact = (weights * torch.stack(outs).double()).sum(0)
    # Half a unit in the last place of the result: its own rounding, and float32's.
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_compiles_as_one_graph():
    outs, lses = [torch.randn(2, 3, 4) for _ in range(2)], [torch.randn(2, 3) for _ in range(2)]
    compiled = torch.compile(natrain.merge_attentions, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(outs, lses), natrain.merge_attentions(outs, lses))


T, L = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3)


@pytest.mark.parametrize(
    ("outs", "lses", "says"),
    [
        ([], [], r"outs, lses=\(0, 0\).*one or more"),
        ([T, T], [L], r"outs, lses=\(2, 1\).*as many lses"),
        ([T, T[:1]], [L, L], r"outs\[1\].shape=\(1, 5, 3, 4\).*\(2, 5, 3, 4\)"),
        ([T, T], [L, T], r"lses\[1\].shape=\(2, 5, 3, 4\).*\(2, 5, 3\)"),
        ([T, T.double()], [L, L], r"outs\[1\].dtype=torch.float64.*torch.float32"),
        ([T, None], [L, L], r"outs\[1\]='NoneType'.*a torch.Tensor"),
        ([T.int()], [L], r"outs\[0\].dtype=torch.int32.*floating point"),
        (torch.stack([T, T]), torch.stack([L]), r"outs, lses=\(2, 1\).*as many lses"),
        ([T, T.to("meta")], [L, L], r"outs\[1\].device='meta'.*cpu"),
    ],
)
def test_bad_parts_are_named(outs, lses, says):
    with pytest.raises(ValueError, match=says):
        natrain.merge_attentions(outs, lses)
