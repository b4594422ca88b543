"""What a problem costs at the least, and a guess of what it takes: bytes, FLOPs, seconds. Pure arithmetic, no device.

The guess plans sweeps (which sizes, how long); it never enters a result. Its rates describe one H200 and come from the
naive kernels' first measurements (docs/performance.md); slower devices scale by their copy bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from natrain.bench.case import Case

DIRECTIONS = ("forward", "backward")
# Products of queries, keys, values or their gradients: q.k and p.v; again q.k, d_out.v, and one a gradient.
_PRODUCTS = {"forward": 2, "backward": 5}
_FEATURES = {"forward": 4, "backward": 8}  # q, k, v, out; with d_out and three gradients
_LEAST_WEIGHT_MOVES = {"forward": 2, "backward": 5}  # see ``unfused_floor_bytes``
# Of a kernel for the softmax by itself, which reads scores and writes weights, and one for its derivative.
_WEIGHT_MOVES = {"forward": 4, "backward": 7}


def flops(case: Case, direction: str) -> int:
    """Useful ones: 2 per multiply-add of a query with a neighbour, whatever a kernel computes besides.

    Backward counts 2.5 times the forward's, the scores once more, as FlashAttention's and this project's tables do.
    """
    pairs = case.batch * case.tokens * case.heads * case.window.num_neighbors
    return 2 * pairs * case.head_dim * _PRODUCTS[direction]


def feature_bytes(case: Case) -> int:
    """Of q, or k, v, out."""
    return case.batch * case.tokens * case.heads * case.head_dim * case.dtype.itemsize


def weight_bytes(case: Case) -> int:
    """Of the attention weights that an unfused kernel stores."""
    return case.batch * case.tokens * case.heads * case.window.num_neighbors * case.dtype.itemsize


def floor_bytes(case: Case, direction: str) -> int:
    """What any kernel must move: q, k, v, out; backward q, k, v, out, d_out and the three gradients."""
    return _FEATURES[direction] * feature_bytes(case)


def unfused_floor_bytes(case: Case, direction: str) -> int:
    """And the weights, at the least: written and read once forward; backward read for d_v and for the derivative of the
    softmax, whose result is written, and read for d_q and for d_k."""
    return floor_bytes(case, direction) + _LEAST_WEIGHT_MOVES[direction] * weight_bytes(case)


@dataclass(frozen=True)
class Rates:
    """Multiply-adds a second in 16 and in 32 bits, share of the copy bandwidth, seconds a call costs anyway."""

    macs_16: float
    macs_32: float
    bandwidth_share: float
    fixed_s: float
    is_unfused: bool


COPY_BYTES_PER_S = 3.9e12
RATES = {
    "naive": Rates(7.5e12, 6.0e12, 0.8, 12e-6, True),
    "gemm": Rates(60e12, 30e12, 0.7, 12e-6, True),
    "fused": Rates(120e12, 50e12, 0.5, 6e-6, False),
}
FASTEST = Rates(250e12, 120e12, 1.0, 2e-6, False)
# Anything else (a peer, somebody's kernel, the reference) is taken to be as slow as the slowest of ours.

# Multiply-adds a second of one core of a server's processor, forward and backward: small layers of float32 and bfloat16
# took 0.3 to 3 times that long. Somebody's kernel is taken to be as fast as ours.
_CPU_MACS_PER_S = {"cpu": (12e9, 15e9), "reference": (0.17e9, 0.3e9)}
_CPU_DENSE_MACS_PER_S = (6e9, 15e9)  # of all pairs of tokens, which these compute:
_DENSE = ("sdpa", "dense")
_CPU_FIXED_S = 3e-4


def seconds(case: Case, rates: Rates, direction: str) -> float:
    """Arithmetic and memory in turn, as a kernel that overlaps neither: an upper guess."""
    bytes_ = floor_bytes(case, direction) + rates.is_unfused * _WEIGHT_MOVES[direction] * weight_bytes(case)
    macs = flops(case, direction) / 2
    rate = rates.macs_16 if case.dtype in (torch.float16, torch.bfloat16) else rates.macs_32
    return rates.fixed_s + macs / rate + bytes_ / (rates.bandwidth_share * COPY_BYTES_PER_S)


def kernel_seconds(case: Case, kernel: str, direction: str, device: str, threads: int = 1) -> float:
    """A guess for one call of ``kernel``, on a CPU with so many threads."""
    if device == "cuda":
        return seconds(case, RATES.get(kernel, RATES["naive"]), direction)
    macs = flops(case, direction) / 2
    rates = _CPU_MACS_PER_S.get(kernel, _CPU_MACS_PER_S["cpu"])
    if kernel in _DENSE:
        macs *= case.tokens / case.window.num_neighbors
        rates = _CPU_DENSE_MACS_PER_S
    return _CPU_FIXED_S + macs / (threads * rates[DIRECTIONS.index(direction)])
