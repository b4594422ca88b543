"""The problems of docs/performance.md, attention on them as calls that ``measure`` can time, and what others took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import natrain
from natrain.bench.case import Case
from natrain.bench.measure import on_timing_stream
from natrain.ops.problem import Window


@dataclass(frozen=True)
class Layer:
    """One attention layer."""

    name: str
    batch: int
    spatial: tuple[int, ...]
    heads: int
    head_dim: int
    kernel_size: int
    dilation: int

    def case(self, dtype: torch.dtype, has_rpb: bool) -> Case:
        """The layer in the words of sweeps and their results."""
        rank = len(self.spatial)
        window = Window((self.kernel_size,) * rank, (self.dilation,) * rank, (1,) * rank, (False,) * rank)
        return Case(self.spatial, self.batch, self.heads, self.head_dim, window, dtype, has_rpb)


LAYERS = (
    Layer("56/1", 128, (56, 56), 2, 32, 7, 1),
    Layer("56/8", 128, (56, 56), 2, 32, 7, 8),
    Layer("28/1", 128, (28, 28), 4, 32, 7, 1),
    Layer("28/4", 128, (28, 28), 4, 32, 7, 4),
    Layer("14/1", 128, (14, 14), 8, 32, 7, 1),
    Layer("14/2", 128, (14, 14), 8, 32, 7, 2),
    Layer("7/1", 128, (7, 7), 16, 32, 7, 1),
    Layer("64 k13", 8, (64, 64), 8, 64, 13, 1),
    Layer("128 k13", 4, (128, 128), 8, 64, 13, 1),
    Layer("4096 k127", 8, (4096,), 8, 64, 127, 1),
    Layer("16384 k255", 2, (16384,), 8, 64, 255, 1),
)

# Milliseconds, (forward, backward), on one H100 80GB with torch 2.11: CUDA events, cold second-level cache, no bias.
# NATTEN 0.17.5, the last release with naive and gemm kernels, by dtype.
NATTEN_NAIVE_MS = {
    "56/1": {"fp16": (2.12, 3.25), "fp32": (2.88, 8.49)},
    "56/8": {"fp16": (2.55, 4.40), "fp32": (3.53, 14.3)},
    "28/1": {"fp16": (1.04, 1.64), "fp32": (1.50, 4.34)},
    "14/1": {"fp16": (0.53, 0.86), "fp32": (0.76, 2.26)},
    "7/1": {"fp16": (0.31, 0.54), "fp32": (0.46, 1.27)},
    "64 k13": {"fp16": (6.25, 8.38), "fp32": (10.4, 21.4)},
    "4096 k127": {"fp16": (3.39, 7.25), "fp32": (5.68, 13.0)},
}
NATTEN_GEMM_MS = {
    "56/1": {"fp16": (1.38, 3.47), "fp32": (1.32, 3.77)},
    "56/8": {"fp16": (1.66, 3.69), "fp32": (1.67, 4.12)},
    "28/1": {"fp16": (0.71, 1.77), "fp32": (0.68, 1.90)},
    "14/1": {"fp16": (0.36, 0.91), "fp32": (0.35, 0.97)},
    "7/1": {"fp16": (0.22, 0.49), "fp32": (0.23, 0.55)},
    "64 k13": {"fp16": (1.13, 2.69), "fp32": (1.33, 3.23)},
    "4096 k127": {"fp16": (0.34, 0.71), "fp32": (0.48, 1.18)},
}
# The fastest of NATTEN 0.17.5 and 0.21.7, FlexAttention and dense attention in 16 bits, forward and backward each; none
# trains a bias.
BEST_PEER_MS = {
    "56/1": (0.53, 2.50),
    "56/8": (0.24, 0.82),
    "28/1": (0.268, 0.68),
    "28/4": (0.141, 0.42),
    "14/1": (0.057, 0.177),
    "14/2": (0.073, 0.219),
    "7/1": (0.036, 0.082),
    "64 k13": (0.31, 0.88),
    "128 k13": (0.63, 1.82),
    "4096 k127": (0.11, 0.43),
    "16384 k255": (0.19, 0.65),
}


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
