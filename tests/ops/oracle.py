"""Independent truths: neighborhood attention word by word from its definition, with no code of natrain.

Per axis of length L: dilation splits the tokens into groups i mod d; inside a group of n positions, query p has the
keys [start, end) computed below. Two forms: ``neighbors`` lists them; ``dense_attention`` is a masked softmax over all
tokens in float64, differentiated by torch.
"""

from __future__ import annotations

import itertools
import math

import torch


def window_of(p: int, n: int, k: int, s: int, causal: bool) -> tuple[int, int]:
    """First key and one past the last, of position ``p`` in a group of ``n``: plain integers, the published rules."""
    left, right = k // 2, k // 2 + k % 2 - 1
    if causal:
        leader = min((p // s) * s + s - 1, n - 1)
        return max(leader - left - right, 0), min(p + 1, n)
    leader = min((p // s) * s + s // 2, n - 1)
    start = max(leader - left, 0)
    if leader + right >= n:
        start += n - right - leader - 1
    return start, start + k


def axis_neighbors(length: int, k: int, d: int, s: int, causal: bool) -> list[list[tuple[int, int]]]:
    """Per token: its (key token, bias index) in the order of the window."""
    table = []
    for i in range(length):
        group, p = i % d, i // d
        n = math.ceil((length - group) / d)
        start, end = window_of(p, n, k, s, causal)
        table.append([(position * d + group, position - p + k - 1) for position in range(start, end)])
    return table


def neighbors(spatial, kernel_size, dilation, stride, is_causal):
    """Per query token (row-major): list of (slot, key token, bias index), slot row-major over the full window."""
    axes = [axis_neighbors(*axis) for axis in zip(spatial, kernel_size, dilation, stride, is_causal, strict=True)]
    result = []
    for query in itertools.product(*[range(length) for length in spatial]):
        entries = []
        per_axis = [list(enumerate(axes[a][query[a]])) for a in range(len(spatial))]
        for combination in itertools.product(*per_axis):
            slot = token = 0
            for a, (index, (key, _)) in enumerate(combination):
                slot = slot * kernel_size[a] + index
                token = token * spatial[a] + key
            entries.append((slot, token, tuple(bias for _, (_, bias) in combination)))
        result.append(entries)
    return result


def head_of(n: int, heads: int, kv_heads: int) -> int:
    """The head of k and v that head ``n`` of q uses: equal consecutive groups."""
    return n // (heads // kv_heads)


def dense_scores(q, k, rpb, window, scale, key_mask=None):
    """[B, N, T, T] scores of all pairs, -inf where the key is no neighbour; float64 inputs keep torch's autograd."""
    spatial, heads = q.shape[1:-2], q.shape[-2]
    tokens = math.prod(spatial)
    table = neighbors(spatial, window["kernel_size"], window["dilation"], window["stride"], window["is_causal"])
    query_index = torch.tensor([i for i, row in enumerate(table) for _ in row])
    key_index = torch.tensor([token for row in table for _, token, _ in row])
    bias_index = torch.tensor([bias for row in table for _, _, bias in row])
    qf, kf = q.reshape(q.shape[0], tokens, heads, -1), _every_head(k, heads)
    scores = scale * torch.einsum("bind,bjnd->bnij", qf, kf)
    if rpb is not None:
        bias = torch.zeros(heads, tokens, tokens, dtype=scores.dtype)
        bias = bias.index_put(
            (torch.arange(heads)[:, None], query_index, key_index), rpb[(slice(None), *bias_index.unbind(1))]
        )
        scores = scores + bias
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    mask[query_index, key_index] = True
    if key_mask is not None:
        mask = mask & key_mask.reshape(-1, 1, 1, tokens)
    return scores.masked_fill(~mask, -math.inf)


def _every_head(x, heads):
    """k or v as [B, T, N, D]."""
    return torch.stack([x.flatten(1, -3)[..., head_of(n, heads, x.shape[-2]), :] for n in range(heads)], dim=-2)


def dense_attention(q, k, v, rpb, window, scale, key_mask=None):
    """(out, lse) by a masked softmax over all tokens; a query without any key has out 0 and lse -inf."""
    scores = dense_scores(q, k, rpb, window, scale, key_mask)
    vf = _every_head(v, q.shape[-2])
    has_keys = (scores > -math.inf).any(-1)
    weights = (scores - torch.where(has_keys, scores.detach().amax(-1), 0.0)[..., None]).exp()
    total = torch.where(has_keys, weights.sum(-1), 1.0)
    out = torch.einsum("bnij,bjnd->bind", weights / total[..., None], vf).reshape(*q.shape[:-1], v.shape[-1])
    lse = torch.where(has_keys, total.log() + scores.detach().amax(-1), -math.inf)
    return out, lse.transpose(1, 2).reshape(q.shape[:-1])


def loop_qk(q, k, rpb, window, scale):
    """Scores [B, *S, N, K], one Python loop an index; a slot without key holds -inf."""
    spatial, heads, slots = q.shape[1:-2], q.shape[-2], math.prod(window["kernel_size"])
    table = neighbors(spatial, window["kernel_size"], window["dilation"], window["stride"], window["is_causal"])
    qf, kf = q.reshape(q.shape[0], -1, *q.shape[-2:]), k.reshape(k.shape[0], -1, *k.shape[-2:])
    scores = torch.full((q.shape[0], len(table), heads, slots), -math.inf, dtype=q.dtype)
    for b, n in itertools.product(range(q.shape[0]), range(heads)):
        for i, row in enumerate(table):
            for slot, j, bias in row:
                scores[b, i, n, slot] = scale * (qf[b, i, n] * kf[b, j, n]).sum()
                if rpb is not None:
                    scores[b, i, n, slot] += rpb[(n, *bias)]
    return scores.reshape(*q.shape[:-1], slots)


def loop_av(probs, v, window):
    """sum probs * v, one Python loop an index."""
    spatial = v.shape[1:-2]
    table = neighbors(spatial, window["kernel_size"], window["dilation"], window["stride"], window["is_causal"])
    vf, pf = v.reshape(v.shape[0], -1, *v.shape[-2:]), probs.reshape(v.shape[0], -1, v.shape[-2], probs.shape[-1])
    out = torch.zeros_like(vf)
    for b, n in itertools.product(range(v.shape[0]), range(v.shape[-2])):
        for i, row in enumerate(table):
            for slot, j, _ in row:
                out[b, i, n] += pf[b, i, n, slot] * vf[b, j, n]
    return out.reshape(v.shape)
