"""qk and av of 0.14 to 0.17 against loops over the definition: layout, order of slots, extra tokens, errors."""

from __future__ import annotations

import math

import pytest
import torch

from natrain.compat import v014, v015, v017
from tests.ops import oracle

SPATIAL = {1: (9,), 2: (7, 6), 3: (5, 4, 6)}


def inputs(na_dim: int, dtype=torch.float64, heads: int = 2, dim: int = 3, batch: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, *SPATIAL[na_dim], dim)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


def bias_of(heads: int, kernel_size, dtype=torch.float64):
    return torch.randn(
        heads, *(2 * k - 1 for k in kernel_size), generator=torch.Generator().manual_seed(9), dtype=dtype
    )


def window(na_dim, kernel_size, dilation, is_causal=False):
    return {
        "kernel_size": kernel_size,
        "dilation": dilation,
        "stride": (1,) * na_dim,
        "is_causal": (is_causal,) * na_dim,
    }


def true_qk(q, k, rpb, spec):
    return oracle.loop_qk(q.movedim(1, -2), k.movedim(1, -2), rpb, spec, 1.0).movedim(-2, 1)


def true_av(attn, v, spec):
    return oracle.loop_av(attn.movedim(1, -2), v.movedim(1, -2), spec).movedim(-2, 1)


OLD = {
    1: (v014.natten1dqkrpb, v014.natten1dqk, v014.natten1dav),
    2: (v014.natten2dqkrpb, v014.natten2dqk, v014.natten2dav),
}


@pytest.mark.parametrize("na_dim", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_014(na_dim, dilation):
    qkrpb, qk, av = OLD[na_dim]
    q, k, v = inputs(na_dim)
    spec = window(na_dim, (3,) * na_dim, (dilation,) * na_dim)
    rpb = bias_of(2, spec["kernel_size"])
    scores = qkrpb(q, k, rpb, 3, dilation)
    assert scores.is_contiguous() and scores.dtype == torch.float64
    torch.testing.assert_close(scores, true_qk(q, k, rpb, spec))
    torch.testing.assert_close(qk(q, k, 3, dilation), true_qk(q, k, None, spec))
    out = av(scores.softmax(-1), v, 3, dilation)
    assert out.is_contiguous() and out.shape == v.shape
    torch.testing.assert_close(out, true_av(scores.softmax(-1), v, spec))


def test_gradients_of_the_old_pair():
    q, k, v = (t[:1, :1, :5, :5, :2].contiguous().requires_grad_() for t in inputs(2))
    rpb = bias_of(1, (3, 3)).requires_grad_()

    def attend(q, k, v, rpb):
        return v014.natten2dav(v014.natten2dqkrpb(q, k, rpb, 3, 1).softmax(-1), v, 3, 1)

    assert torch.autograd.gradcheck(attend, (q, k, v, rpb))


def test_015_rank_3_has_a_depth_of_its_own():
    q, k, v = inputs(3)
    spec = window(3, (5, 3, 3), (1, 1, 1))
    rpb = bias_of(2, spec["kernel_size"])
    scores = v015.na3d_qk_with_bias(q, k, rpb, 5, 3, 1, 1)
    torch.testing.assert_close(scores, true_qk(q, k, rpb, spec))
    torch.testing.assert_close(v015.natten3dqkrpb(q, k, rpb, 5, 3, 1, 1), scores)
    torch.testing.assert_close(v015.na3d_av(scores.softmax(-1), v, 5, 3, 1, 1), true_av(scores.softmax(-1), v, spec))


@pytest.mark.parametrize("na_dim", [1, 2, 3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_017(na_dim, is_causal):
    qk, av = getattr(v017, f"na{na_dim}d_qk"), getattr(v017, f"na{na_dim}d_av")
    q, k, v = inputs(na_dim)
    dilation = (2, *(1,) * (na_dim - 1)) if na_dim < 3 else (1, 1, 2)
    spec = window(na_dim, (3,) * na_dim, dilation, is_causal)
    rpb = None if is_causal else bias_of(2, spec["kernel_size"])
    scores = qk(q, k, 3, dilation, is_causal=is_causal, rpb=rpb)
    torch.testing.assert_close(scores, true_qk(q, k, rpb, spec))
    assert bool((scores == -math.inf).any()) is is_causal
    torch.testing.assert_close(
        av(scores.softmax(-1), v, 3, dilation, is_causal=is_causal), true_av(scores.softmax(-1), v, spec)
    )


def test_additional_tokens_follow_the_window_and_join_the_softmax():
    q, k, v = inputs(2)
    k_extra, v_extra = (torch.randn(2, 2, 4, 3, dtype=torch.float64) for _ in range(2))
    spec = window(2, (3, 3), (1, 1))
    scores = v017.na2d_qk(q, k, 3, additional_keys=k_extra)
    expected = torch.cat([true_qk(q, k, None, spec), torch.einsum("bnyxd,bnmd->bnyxm", q, k_extra)], -1)
    torch.testing.assert_close(scores, expected)
    attn = scores.softmax(-1)
    out = v017.na2d_av(attn, v, 3, additional_values=v_extra)
    expected = true_av(attn[..., :9], v, spec) + torch.einsum("bnyxm,bnmd->bnyxd", attn[..., 9:], v_extra)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(v015.na2d_av(attn, v, 3, 1, v_extra), out)


def test_nested_tensors_are_computed_one_by_one():
    sizes = [(5, 6), (7, 4)]
    q, k, v = (torch.nested.nested_tensor([torch.randn(1, 2, *size, 3) for size in sizes]) for _ in range(3))
    scores = v017.na2d_qk(q, k, 3)
    out = v017.na2d_av(torch.nested.nested_tensor([s.softmax(-1) for s in scores.unbind()]), v, 3)
    for index, (qi, ki, vi) in enumerate(zip(q.unbind(), k.unbind(), v.unbind(), strict=True)):
        alone = v017.na2d_qk(qi, ki, 3)
        torch.testing.assert_close(scores.unbind()[index], alone)
        torch.testing.assert_close(out.unbind()[index], v017.na2d_av(alone.softmax(-1), vi, 3))
    with pytest.raises(ValueError, match="nested"):
        v017.na2d_qk(q, k.unbind()[0], 3)


def test_bias_and_weights_take_the_dtype_of_key_and_value():
    q, k, v = inputs(2, torch.float32)
    scores = v017.na2d_qk(q.bfloat16(), k.bfloat16(), 3, rpb=bias_of(2, (3, 3), torch.float32))
    assert scores.dtype == torch.bfloat16
    assert v017.na2d_av(scores.float().softmax(-1), v.bfloat16(), 3).dtype == torch.bfloat16


def test_autocast_leaves_the_dtype_alone():
    q, k, v = inputs(2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        scores = v017.na2d_qk(q, k, 3)
        assert scores.dtype == torch.float32
        assert v017.na2d_av(scores.softmax(-1), v, 3).dtype == torch.float32


def test_the_names_of_014_live_on_in_017_and_say_so():
    q, k, _ = inputs(2)
    with pytest.warns(DeprecationWarning, match="na2d_qk"):
        old = v017.LAYOUT["functional"]["natten2dqkrpb"](q, k, None, 3, 2)
    torch.testing.assert_close(old, v017.na2d_qk(q, k, 3, 2))
    q, k, _ = inputs(3)
    with pytest.warns(DeprecationWarning):
        old = v017.LAYOUT["functional"]["natten3dqk"](q, k, 5, 3, 1, 1)
    torch.testing.assert_close(old, v017.na3d_qk(q, k, (5, 3, 3)))


Q = torch.randn(1, 2, 6, 6, 4)
ATTN = torch.rand(1, 2, 6, 6, 9)


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: v014.natten2dqk(Q, Q, 4, 1), RuntimeError, "odd"),
        (lambda: v014.natten2dqk(Q, Q, 3, 3), RuntimeError, r"kernel_size \* dilation <= \(6, 6\)"),
        (lambda: v014.natten2dqk(Q, Q, 3), TypeError, "dilation"),
        (lambda: v014.natten2dqkrpb(Q, Q, torch.zeros(2, 3, 3), 3, 1), RuntimeError, "rpb.shape"),
        (lambda: v015.na2d_qk(Q, Q, 1, 1), RuntimeError, "kernel_size"),
        (lambda: v015.na2d_qk(Q, Q, 3, 0), RuntimeError, "dilation"),
        (lambda: v015.na2d_av(ATTN[..., :8], Q, 3, 1), ValueError, "9 weights"),
        (lambda: v015.na2d_qk(Q, Q, 3, 1, Q[:, :, 0]), None, None),
        (lambda: v015.na2d_qk(Q, Q, 3, 1, Q[:, :1, 0]), ValueError, "additional_keys"),
        (lambda: v017.na2d_qk(Q, Q, 4), RuntimeError, "odd"),
        (lambda: v017.na2d_av(ATTN, Q, (4, 3)), RuntimeError, "odd"),
        (lambda: v017.na2d_qk(Q, Q, "3"), ValueError, "kernel_size"),
        (lambda: v017.na2d_qk(Q, Q, (3, 3, 3)), ValueError, "kernel_size"),
        (lambda: v017.na2d_qk(Q, Q, 3, is_causal=1), ValueError, "is_causal"),
        (lambda: v017.na2d_qk(Q, Q, 3, is_causal=True, rpb=torch.zeros(2, 5, 5)), NotImplementedError, "bias"),
        (lambda: v017.na2d_qk(Q, Q[:, :1], 3), RuntimeError, "key.shape"),
        (lambda: v017.na2d_qk(Q, Q.double(), 3), RuntimeError, "key.dtype"),
        (lambda: v017.na1d_qk(Q, Q, 3), RuntimeError, "4 axes"),
        (lambda: v017.na2d_av(ATTN, Q[:, :, :5], 3), RuntimeError, "attn.shape"),
    ],
)
def test_errors_are_of_the_type_that_natten_raised(call, kind, says):
    if kind is None:
        assert call().shape[-1] == 15
        return
    with pytest.raises(kind, match=says):
        call()
