"""The problems of docs/performance.md, and attention on them as calls that ``measure`` can time.

Peer figures: NATTEN 0.17.5 naive on one H100 80GB (torch 2.11, CUDA events, cold second-level cache), forward and
backward in ms; 16-bit is float16, without a bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import natrain
from natrain.bench.measure import on_timing_stream


@dataclass(frozen=True)
class Layer:
    """One attention layer; ``natten_naive_ms`` is {dtype name: (forward, backward)}."""

    name: str
    batch: int
    spatial: tuple[int, ...]
    heads: int
    head_dim: int
    kernel_size: int
    dilation: int
    natten_naive_ms: dict[str, tuple[float, float]]


LAYERS = (
    Layer("56/1", 128, (56, 56), 2, 32, 7, 1, {"float16": (2.12, 3.25), "float32": (2.88, 8.49)}),
    Layer("56/8", 128, (56, 56), 2, 32, 7, 8, {"float16": (2.55, 4.40), "float32": (3.53, 14.3)}),
    Layer("28/1", 128, (28, 28), 4, 32, 7, 1, {"float16": (1.04, 1.64), "float32": (1.50, 4.34)}),
    Layer("28/4", 128, (28, 28), 4, 32, 7, 4, {}),
    Layer("14/1", 128, (14, 14), 8, 32, 7, 1, {"float16": (0.53, 0.86), "float32": (0.76, 2.26)}),
    Layer("14/2", 128, (14, 14), 8, 32, 7, 2, {}),
    Layer("7/1", 128, (7, 7), 16, 32, 7, 1, {"float16": (0.31, 0.54), "float32": (0.46, 1.27)}),
    Layer("64 k13", 8, (64, 64), 8, 64, 13, 1, {"float16": (6.25, 8.38), "float32": (10.4, 21.4)}),
    Layer("128 k13", 4, (128, 128), 8, 64, 13, 1, {}),
    Layer("4096 k127", 8, (4096,), 8, 64, 127, 1, {"float16": (3.39, 7.25), "float32": (5.68, 13.0)}),
    Layer("16384 k255", 2, (16384,), 8, 64, 255, 1, {}),
)


@dataclass(frozen=True)
class Calls:
    """Attention on one layer: ``forward`` keeps what backward needs, ``backward`` runs on what one forward kept."""

    forward: Callable[[], torch.Tensor]
    backward: Callable[[], tuple[torch.Tensor, ...]]


def calls(layer: Layer, kernel: str, dtype: torch.dtype, has_rpb: bool, seed: int = 0) -> Calls:
    """Random packed qkv, bias and output gradient of ``layer`` on the current CUDA device.

    The first image and the bias are the same numbers for every batch.
    """
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device="cuda", generator=generator)

    na_dim = len(layer.spatial)
    rpb = random(layer.heads, *[2 * layer.kernel_size - 1] * na_dim, dtype=torch.float32).requires_grad_()
    image = (1, *layer.spatial, 3, layer.heads, layer.head_dim)
    qkv = torch.cat([random(*image), random(layer.batch - 1, *image[1:])]).requires_grad_()
    d_out = random(layer.batch, *layer.spatial, layer.heads, layer.head_dim)
    inputs = (qkv, rpb) if has_rpb else (qkv,)
    attend = getattr(natrain, f"na{na_dim}d_qkvpacked")

    def forward() -> torch.Tensor:
        return attend(qkv, layer.kernel_size, layer.dilation, rpb=rpb if has_rpb else None, kernel=kernel)

    with on_timing_stream():
        out = forward()
    return Calls(forward, lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True))


def floor_ms(layer: Layer, dtype: torch.dtype, bytes_per_s: float) -> tuple[float, float]:
    """Least time, forward and backward, of an unfused kernel without a bias: each step's tensors moved once.

    Forward: q, k, v, out; the weights written by qk, read and written by the softmax, read by av. Backward: v, k, q,
    d_out twice, three gradients; the weights read for d_v, written as d_probs, three times in the softmax's
    derivative, read for d_q and for d_k.
    """
    row = math.prod(layer.spatial) * layer.batch * layer.heads * dtype.itemsize
    features = row * layer.head_dim
    weights = row * layer.kernel_size ** len(layer.spatial)
    return tuple(1e3 * count / bytes_per_s for count in (4 * features + 4 * weights, 8 * features + 7 * weights))
