"""The float64 truth of a benchmark's problem at some places, cheap at any size: a time counts only beside an error.

Outputs and gradients of queries at a few tokens, of keys and values at fewer (a key is in the windows of many queries),
always both corners of the map; the gradient of a bias in full, where too many queries add to it for an output gradient
that only some of them get. Written from the definition of attention with the window arithmetic of
``natrain.ops.window`` alone; no kernel takes part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from natrain.bench.case import Case
from natrain.ops.window import axis_window

# Largest relative error (norm over all samples) that passes for right. float32 may be TF32's 10 bits of mantissa.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 3e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_QUERIES = 32
_MOST_KEYS = 8
_PAIRS_OF_KEYS = 2**24  # queries x neighbours that the gradients of sampled keys may cost
_BIAS_PAIRS = 2**18  # queries x neighbours that the gradient of a bias may cost
_CHUNK_ELEMENTS = 2**25


class WrongOutput(RuntimeError):
    """A contender's output is not the problem's: it has no time."""


@dataclass(frozen=True)
class Inputs:
    """qkv [B, *S, 3, N, D] as a projection makes it, d_out [B, *S, N, D], and rpb [N, 2k-1, ...] or None."""

    qkv: Tensor
    d_out: Tensor
    rpb: Tensor | None

    @property
    def q(self) -> Tensor:
        return self.qkv.select(-3, 0)

    @property
    def k(self) -> Tensor:
        return self.qkv.select(-3, 1)

    @property
    def v(self) -> Tensor:
        return self.qkv.select(-3, 2)


def random_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Normal numbers, none of which needs a gradient yet; the bias is float32 (float64 for it)."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    qkv = random(*case.shape[:-2], 3, *case.shape[-2:])
    d_out = random(*case.shape)
    bias_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    rpb = random(case.heads, *case.window.rpb_shape, dtype=bias_dtype) if case.has_rpb else None
    return Inputs(qkv, d_out, rpb)


@dataclass(frozen=True)
class Truth:
    """``at_queries`` and ``at_keys`` index [B, T, N, D]; the values are float64, [samples, D].

    ``d_rpb`` [N, 2k-1, ...] is that of ``bias_inputs``: the inputs themselves, or with an output gradient that is zero
    but at sampled queries, since every query adds to it. Both are None without a bias.
    """

    at_queries: tuple[Tensor, Tensor, Tensor]
    at_keys: tuple[Tensor, Tensor, Tensor]
    out: Tensor
    d_q: Tensor
    d_k: Tensor
    d_v: Tensor
    bias_inputs: Inputs | None
    d_rpb: Tensor | None

    def forward_error(self, out: Tensor) -> float:
        """Relative error of ``out`` [B, *S, N, D]: norm of the difference over norm of the truth, at the samples."""
        return _relative(out, self.at_queries, self.out)

    def backward_error(self, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> float:
        """The largest relative error of the three gradients."""
        return max(
            _relative(d_q, self.at_queries, self.d_q),
            _relative(d_k, self.at_keys, self.d_k),
            _relative(d_v, self.at_keys, self.d_v),
        )

    def bias_error(self, d_rpb: Tensor) -> float:
        """Relative error of the gradient of the bias, found with ``bias_inputs``."""
        return _distance(d_rpb, self.d_rpb)


def _relative(found: Tensor, places: tuple[Tensor, ...], truth: Tensor) -> float:
    return _distance(_tokens(found)[places], truth)


def _distance(found: Tensor, truth: Tensor) -> float:
    found = found.double()
    error = ((found - truth).norm() / truth.norm()).item()
    return error if math.isfinite(error) else math.inf


def _tokens(x: Tensor) -> Tensor:
    """[B, *S, N, D] as [B, T, N, D]."""
    return x.flatten(1, -3)


@torch.no_grad()
def sample_truth(case: Case, inputs: Inputs, seed: int = 0) -> Truth:
    """The truth at seeded random places of ``inputs``."""
    generator = torch.Generator().manual_seed(seed)
    table = _Table(case, inputs.q.device)
    window = case.window
    # A key near the border of an undilated axis is in up to 1.5 times as many windows as one in the middle.
    reached = math.prod(min(1.5 * k, length) for k, length in zip(window.kernel_size, case.spatial, strict=True))
    num_keys = int(min(_MOST_KEYS, max(1, _PAIRS_OF_KEYS // (reached * window.num_neighbors))))
    at_queries = _places(case, _QUERIES, generator, inputs.q.device)
    at_keys = _places(case, num_keys, generator, inputs.q.device)

    scale = case.head_dim**-0.5
    solved = [_solve(table, inputs, part, scale) for part in _chunks(case, at_queries)]
    out, d_q = (torch.cat(found) for found in zip(*[(s.out, s.d_q) for s in solved], strict=True))
    d_k, d_v = _key_gradients(case, table, inputs, at_keys, scale)
    bias = (None, None) if inputs.rpb is None else _bias_gradient(case, table, inputs, generator, scale)
    return Truth(at_queries, at_keys, out, d_q, d_k, d_v, *bias)


def _places(case: Case, count: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random (image, token, head), the first of them at the two corners of the map."""
    limits = (case.batch, case.tokens, case.heads)
    image, token, head = (torch.randint(limit, (count,), generator=generator) for limit in limits)
    token[0] = 0
    token[1:2] = case.tokens - 1
    return image.to(device), token.to(device), head.to(device)


class _Table:
    """Neighbours of any list of tokens, axis by axis."""

    def __init__(self, case: Case, device: torch.device) -> None:
        window = case.window
        self.spatial, self.rpb_shape = case.spatial, window.rpb_shape
        self.axes = [
            axis_window(length, k, d, s, causal, device)
            for length, k, d, s, causal in zip(
                case.spatial, window.kernel_size, window.dilation, window.stride, window.is_causal, strict=True
            )
        ]

    def neighbors(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(keys, whether each is one, bias index), each [Q, K], of tokens [Q]."""
        positions = torch.unravel_index(tokens, self.spatial)
        count = tokens.numel()
        keys = bias = torch.zeros(count, 1, dtype=torch.int64, device=tokens.device)
        valid = torch.ones(count, 1, dtype=torch.bool, device=tokens.device)
        for axis, length, width, position in zip(self.axes, self.spatial, self.rpb_shape, positions, strict=True):
            keys = (keys[:, :, None] * length + axis.keys[position][:, None]).flatten(1)
            bias = (bias[:, :, None] * width + axis.bias[position][:, None]).flatten(1)
            own = torch.ones_like(axis.keys[position], dtype=torch.bool) if axis.valid is None else axis.valid[position]
            valid = (valid[:, :, None] & own[:, None]).flatten(1)
        return keys, valid, bias

    def queries_of(self, token: Tensor) -> Tensor:
        """The tokens whose window holds ``token``."""
        found = torch.zeros(1, dtype=torch.int64, device=token.device)
        for axis, length, position in zip(
            self.axes, self.spatial, torch.unravel_index(token, self.spatial), strict=True
        ):
            holds = axis.keys == position
            if axis.valid is not None:
                holds &= axis.valid
            found = (found[:, None] * length + holds.any(1).nonzero().flatten()).flatten()
        return found


@dataclass(frozen=True)
class _Solved:
    """Float64, of Q queries: neighbours, bias indices, probabilities and d_scores [Q, K], out and d_q [Q, D]."""

    keys: Tensor
    valid: Tensor
    bias: Tensor
    probs: Tensor
    d_scores: Tensor
    out: Tensor
    d_q: Tensor


def _solve(table: _Table, inputs: Inputs, places: tuple[Tensor, Tensor, Tensor], scale: float) -> _Solved:
    image, token, head = places
    keys, valid, bias = table.neighbors(token)
    rows = image[:, None], keys, head[:, None]
    q, d_out = (_tokens(x)[places].double() for x in (inputs.q, inputs.d_out))
    k, v = (_tokens(x)[rows].double() for x in (inputs.k, inputs.v))
    scores = scale * torch.einsum("qd,qkd->qk", q, k)
    if inputs.rpb is not None:
        scores = scores + inputs.rpb.detach().flatten(1).double()[head[:, None], bias]
    probs = scores.masked_fill(~valid, -math.inf).softmax(-1)
    out = torch.einsum("qk,qkd->qd", probs, v)
    d_probs = torch.einsum("qd,qkd->qk", d_out, v)
    d_scores = probs * (d_probs - (d_out * out).sum(-1, keepdim=True))
    return _Solved(keys, valid, bias, probs, d_scores, out, scale * torch.einsum("qk,qkd->qd", d_scores, k))


def _key_gradients(
    case: Case, table: _Table, inputs: Inputs, at_keys: tuple[Tensor, Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """d_k and d_v [samples, D] of keys: sums over the queries whose window holds them, all solved together."""
    image, token, head = at_keys
    queries = [table.queries_of(each) for each in token]
    counts = torch.tensor([len(each) for each in queries], device=token.device)
    sample = torch.arange(len(token), device=token.device).repeat_interleave(counts)
    d_k, d_v = torch.zeros(2, len(token), case.head_dim, dtype=torch.float64, device=token.device)
    for key, *places in _chunks(case, (sample, image[sample], torch.cat(queries), head[sample])):
        solved = _solve(table, inputs, tuple(places), scale)
        slot = (solved.keys == token[key, None]) & solved.valid
        for total, shares, rows in ((d_v, solved.probs, inputs.d_out), (d_k, scale * solved.d_scores, inputs.q)):
            share = (shares * slot).sum(1, keepdim=True)
            total.index_add_(0, key, share * _tokens(rows)[tuple(places)].double())
    return d_k, d_v


def _bias_gradient(
    case: Case, table: _Table, inputs: Inputs, generator: torch.Generator, scale: float
) -> tuple[Inputs, Tensor]:
    """``bias_inputs`` and ``d_rpb`` of the truth."""
    sizes, device = (case.batch, case.tokens, case.heads), inputs.q.device
    total, count = math.prod(sizes), max(1, _BIAS_PAIRS // case.window.num_neighbors)
    if count >= total:
        chosen = torch.arange(total)
    else:
        chosen = torch.randint(total, (count,), generator=generator).unique()
        d_out, places = torch.zeros_like(inputs.d_out), torch.unravel_index(chosen.to(device), sizes)
        _tokens(d_out)[places] = _tokens(inputs.d_out)[places]
        inputs = replace(inputs, d_out=d_out)
    d_rpb = torch.zeros(inputs.rpb.shape, dtype=torch.float64, device=device)
    width = d_rpb[0].numel()
    for places in _chunks(case, torch.unravel_index(chosen.to(device), sizes)):
        solved = _solve(table, inputs, places, scale)
        index = places[2][:, None] * width + solved.bias
        d_rpb.view(-1).index_add_(0, index[solved.valid], solved.d_scores[solved.valid])
    return inputs, d_rpb


def _chunks(case: Case, places: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    size = max(1, _CHUNK_ELEMENTS // (case.window.num_neighbors * case.head_dim))
    return list(zip(*(index.split(size) for index in places), strict=True))
