"""Heads-last attention of 0.17 to 0.21 against a dense masked softmax over all tokens."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from natrain.compat import v017, v020, v021
from tests.ops import oracle

SPATIAL = {1: (9,), 2: (7, 6), 3: (4, 3, 5)}


def inputs(na_dim, heads=4, heads_kv=4, dim=3, dim_v=3, batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, dim), (heads_kv, dim), (heads_kv, dim_v)]
    return [torch.randn(batch, *SPATIAL[na_dim], *shape, generator=generator, dtype=dtype) for shape in shapes]


def spec_of(na_dim, kernel_size, dilation=1, stride=1, is_causal=False):
    sizes = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride, "is_causal": is_causal}
    return {name: size if isinstance(size, tuple) else (size,) * na_dim for name, size in sizes.items()}


def truth(q, k, v, spec, scale=None, k_extra=None, v_extra=None):
    """(out, lse) by one softmax over all tokens and the extra ones; key heads repeated for their group."""
    tokens, heads = math.prod(q.shape[1:-2]), q.shape[-2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = heads // k.shape[-2]
    k, v = (torch.stack([t[..., h // group, :] for h in range(heads)], -2) for t in (k, v))
    scores = oracle.dense_scores(q, k, None, spec, scale)
    vf = v.reshape(v.shape[0], tokens, heads, -1)
    if k_extra is not None:
        k_extra, v_extra = (torch.stack([t[..., h // group, :] for h in range(heads)], -2) for t in (k_extra, v_extra))
        extra = scale * torch.einsum("bind,bmnd->bnim", q.reshape(q.shape[0], tokens, heads, -1), k_extra)
        scores = torch.cat([scores, extra], -1)
        vf = torch.cat([vf, v_extra], 1)
    out = torch.einsum("bnij,bjnd->bind", scores.softmax(-1), vf)
    return out.reshape(*q.shape[:-1], -1), scores.logsumexp(-1).transpose(1, 2).reshape(q.shape[:-1])


@pytest.mark.parametrize("na_dim", [1, 2, 3])
def test_017_takes_dilation_fifth_and_020_stride(na_dim):
    q, k, v = inputs(na_dim)
    kernel_size = 3 if na_dim < 3 else (2, 3, 2)
    dilation = 2 if na_dim < 3 else (2, 1, 2)
    dilated, strided = spec_of(na_dim, kernel_size, dilation), spec_of(na_dim, kernel_size, 1, 2)
    old, new = getattr(v017, f"na{na_dim}d"), getattr(v020, f"na{na_dim}d")
    torch.testing.assert_close(old(q, k, v, kernel_size, dilation), truth(q, k, v, dilated)[0])
    torch.testing.assert_close(new(q, k, v, kernel_size, 2), truth(q, k, v, strided)[0])


def test_017_bias_scale_causal_and_even_sizes():
    q, k, v = inputs(2)
    rpb = torch.randn(4, 5, 5, dtype=torch.float64)
    spec = spec_of(2, 3, (2, 1))
    expected = oracle.dense_attention(q, k, v, rpb, spec, 0.3)[0]
    torch.testing.assert_close(v017.na2d(q, k, v, 3, (2, 1), rpb=rpb, scale=0.3), expected)
    spec = spec_of(2, (4, 2), 1, 1, (True, False))
    torch.testing.assert_close(v017.na2d(q, k, v, (4, 2), 1, (True, False)), truth(q, k, v, spec)[0])


@pytest.mark.parametrize("module", [v020, v021])
@pytest.mark.parametrize("is_causal", [False, (True, False)])
def test_stride_dilation_causal(module, is_causal):
    q, k, v = inputs(2)
    spec = spec_of(2, 3, (2, 1), (3, 2), is_causal)
    torch.testing.assert_close(module.na2d(q, k, v, 3, (3, 2), (2, 1), is_causal), truth(q, k, v, spec)[0])


def test_grouped_heads_and_lse_of_0215():
    q, k, v = inputs(2, heads=6, heads_kv=2)
    out, lse = v021.na2d(q, k, v, 3, return_lse=True)
    expected, expected_lse = truth(q, k, v, spec_of(2, 3))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    with pytest.raises(ValueError, match="heads"):
        v020.na2d(q, k, v, 3)
    with pytest.raises(ValueError, match="heads"):
        v021.na2d(q, *(t[..., :1, :].expand(-1, -1, -1, 4, -1) for t in (k, v)), 3)


@pytest.mark.parametrize(("dim", "dim_v"), [(3, 5), (5, 2)])
def test_values_of_another_head_dim(dim, dim_v):
    q, k, v = inputs(1, dim=dim, dim_v=dim_v)
    torch.testing.assert_close(v021.na1d(q, k, v, 4), truth(q, k, v, spec_of(1, 4))[0])


def test_additional_tokens_join_the_softmax():
    q, k, v = inputs(2, heads=4, heads_kv=2)
    k_extra, v_extra = (torch.randn(2, 5, 2, 3, dtype=torch.float64) for _ in range(2))
    leaves = [t.requires_grad_() for t in (q, k, v, k_extra, v_extra)]
    out, lse = v021.na2d(q, k, v, 3, additional_keys=k_extra, additional_values=v_extra, return_lse=True)
    expected, expected_lse = truth(q, k, v, spec_of(2, 3), None, k_extra, v_extra)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum() + lse.sum(), leaves)
    expected_grads = torch.autograd.grad((expected * weights).sum() + expected_lse.sum(), leaves)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_additional_tokens_of_017_and_020():
    q, k, v = inputs(2)
    k_extra, v_extra = (torch.randn(2, 5, 4, 3, dtype=torch.float64) for _ in range(2))
    expected = truth(q, k, v, spec_of(2, 3), None, k_extra, v_extra)[0]
    extra = {"additional_keys": k_extra, "additional_values": v_extra}
    torch.testing.assert_close(v017.na2d(q, k, v, 3, **extra), expected)
    torch.testing.assert_close(v020.na2d(q, k, v, 3, **extra), expected)
    for function in (v017.na2d, v020.na2d):
        with pytest.raises(ValueError, match="both"):
            function(q, k, v, 3, additional_keys=k_extra)


def test_full_windows_are_plain_attention():
    q, k, v = inputs(2)
    heads_first = [t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads_first).transpose(1, 2).reshape(q.shape)
    torch.testing.assert_close(v020.na2d(q, k, v, SPATIAL[2]), expected)
    q, k, v = inputs(1)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(v021.na1d(q, k, v, 9, 4, is_causal=True), expected)


def test_attention():
    q = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    k, v = torch.randn(2, 7, 2, 3, dtype=torch.float64), torch.randn(2, 7, 2, 6, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2), *(t.repeat_interleave(2, 2).transpose(1, 2) for t in (k, v)), is_causal=True
    ).transpose(1, 2)
    out, lse = v021.attention(q, k, v, is_causal=True, return_lse=True)
    torch.testing.assert_close(out, expected)
    assert lse.shape == (2, 5, 4)
    torch.testing.assert_close(lse[:, 0], (q[:, 0] * k[:, 0].repeat_interleave(2, 1)).sum(-1) * 3**-0.5)
    k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=0.7).transpose(1, 2)
    torch.testing.assert_close(v020.attention(q, k, v, 0.7), expected)


def test_packed_sequences_see_only_their_own_tokens():
    lengths_q, lengths_kv = torch.tensor([2, 5], dtype=torch.int32), torch.tensor([3, 4], dtype=torch.int32)
    q, k, v = (torch.randn(1, 7, 2, 3) for _ in range(3))
    out = v021.attention(q, k, v, seqlens_Q=lengths_q, seqlens_KV=lengths_kv)
    alone = [v021.attention(q[:, :2], k[:, :3], v[:, :3]), v021.attention(q[:, 2:], k[:, 3:], v[:, 3:])]
    torch.testing.assert_close(out, torch.cat(alone, 1))
    ends = {
        "cumulative_seqlen_Q": torch.tensor([0, 2, 7], dtype=torch.int32),
        "cumulative_seqlen_KV": torch.tensor([0, 3, 7], dtype=torch.int32),
        "max_seqlen_Q": 5,
        "max_seqlen_KV": 4,
    }
    torch.testing.assert_close(v021.attention(q, k, v, **ends), out)
    with pytest.raises(ValueError, match="seqlens_Q"):
        v021.attention(q, k, v, seqlens_Q=lengths_q.long(), seqlens_KV=lengths_kv)
    with pytest.raises(ValueError, match="as many"):
        v021.attention(q, k, v, seqlens_Q=lengths_q)
    # Sums that do not start at 0 left the first sequence in the second; lengths below 0 moved the borders.
    for name, bad in (("cumulative_seqlen", [2, 7]), ("cumulative_seqlen", [7]), ("seqlens", [-1, 8])):
        bad = torch.tensor(bad, dtype=torch.int32)
        with pytest.raises(ValueError, match=f"{name}_Q=.*its 7 tokens"):
            v021.attention(q, k, v, **{f"{name}_Q": bad, f"{name}_KV": bad})


def test_merging_parts_is_one_softmax():
    q = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    k, v = (torch.randn(2, 9, 3, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    whole, whole_lse = v021.attention(q, k, v, return_lse=True)
    parts = [v021.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 2), (2, 6), (6, 9))]
    out, lse = v021.merge_attentions([o.contiguous() for o, _ in parts], [e for _, e in parts])
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)
    weights = torch.randn_like(out)
    for tensor in (k, v):
        torch.testing.assert_close(
            torch.autograd.grad((out * weights).sum(), tensor, retain_graph=True)[0],
            torch.autograd.grad((whole * weights).sum(), tensor, retain_graph=True)[0],
        )
    only_out = v020.merge_attentions([o.contiguous() for o, _ in parts], [e for _, e in parts], torch_compile=False)
    assert torch.equal(only_out, out)


Q = torch.randn(1, 6, 6, 2, 8)
T = torch.randn(1, 6, 2, 8)


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: v017.na2d(Q, Q, Q, 3, is_causal=True, rpb=torch.zeros(2, 5, 5)), NotImplementedError, "bias"),
        (lambda: v017.na2d(Q, Q, Q, 4, rpb=torch.zeros(2, 7, 7)), RuntimeError, "odd"),
        (lambda: v017.na2d(Q, Q, Q, 3, 3), RuntimeError, "dilation"),
        (lambda: v017.na2d(Q, Q, Q[..., :4], 3), RuntimeError, "value.shape"),
        (lambda: v020.na2d(Q, Q, Q, 1), ValueError, ">= 2"),
        (lambda: v020.na2d(Q, Q, Q, 7), ValueError, "input's axes"),
        (lambda: v020.na2d(Q, Q, Q, 3, 4), ValueError, "stride"),
        (lambda: v020.na2d(Q, Q, Q, 3, 1, 0), ValueError, "dilation"),
        (lambda: v020.na1d(Q, Q, Q, 3), ValueError, "query.shape"),
        (lambda: v020.na2d(Q, Q.double(), Q, 3), ValueError, "key.dtype"),
        (lambda: v020.na2d(Q, Q, Q, 3, backend="cutlas-fna"), NotImplementedError, "cutlass-fna"),
        (lambda: v020.na2d(Q, Q, Q, 3, backend="hopper-fna"), RuntimeError, "capability 9.x"),
        (lambda: v020.na2d(Q, Q, Q, 3, kernel_schedule="fast"), ValueError, "coop"),
        (lambda: v020.attention(T, T, T, backend="flex-fna"), NotImplementedError, "flex-fmha"),
        (lambda: v020.attention(T, T[:, :, :1], T[:, :, :1]), ValueError, "equal heads"),
        (lambda: v020.merge_attentions([T], [T[..., 0]]), ValueError, "at least two"),
        (lambda: v020.merge_attentions([T, T], [T[..., 0], T[:, :3, :, 0]]), ValueError, "lse_tensors"),
        (lambda: v020.merge_attentions([T, T.mT.contiguous().mT], [T[..., 0]] * 2), ValueError, "contiguous"),
    ],
)
def test_errors_are_of_the_type_that_natten_raised(call, kind, says):
    with pytest.raises(kind, match=says):
        call()


def test_backends_that_fit_the_device_are_natrains_choice():
    assert torch.equal(v020.na2d(Q, Q, Q, 3, backend="flex-fna"), v020.na2d(Q, Q, Q, 3))
    assert torch.equal(v020.attention(T, T, T, backend="flex-fmha"), v020.attention(T, T, T))
