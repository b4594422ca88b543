"""The generated grid every kernel is tested on: seeded, small, with the shapes that break tilings."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

import natrain

MAX_TOKENS = 400  # keeps the dense oracle (tokens squared) quick


@dataclass(frozen=True)
class Case:
    """One problem of the grid; ``str`` is its test id."""

    batch: int
    spatial: tuple[int, ...]
    heads: int
    head_dim: int
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    is_causal: tuple[bool, ...]
    has_rpb: bool
    kv_heads: int | None = None
    value_dim: int | None = None
    has_key_mask: bool = False

    @property
    def na_dim(self) -> int:
        return len(self.spatial)

    @property
    def window(self) -> dict:
        """Keyword arguments of ``natrain.na*d``."""
        return {name: getattr(self, name) for name in ("kernel_size", "dilation", "stride", "is_causal")}

    @property
    def num_neighbors(self) -> int:
        return math.prod(self.kernel_size)

    def __str__(self) -> str:
        def x(values) -> str:
            return "x".join(str(int(value)) for value in values)

        return (
            f"{x(self.spatial)}-k{x(self.kernel_size)}-d{x(self.dilation)}-s{x(self.stride)}-c{x(self.is_causal)}"
            f"-b{self.batch}-n{self.heads}-h{self.head_dim}-rpb{int(self.has_rpb)}"
            + (f"-kv{self.kv_heads}" if self.kv_heads else "")
            + (f"-v{self.value_dim}" if self.value_dim else "")
            + ("-mask" if self.has_key_mask else "")
        )

    def tensors(self, dtype=torch.float64, device="cpu", requires_grad=True, seed=0):
        """(q, k, v, rpb or None) of this case, leaves; the same numbers for every dtype and device."""
        generator = torch.Generator().manual_seed(seed)

        def leaf(*shape):
            x = torch.randn(*shape, dtype=torch.float64, generator=generator).to(device, dtype)
            return x.requires_grad_(requires_grad)

        tokens, kv_heads = (self.batch, *self.spatial), self.kv_heads or self.heads
        q, k = leaf(*tokens, self.heads, self.head_dim), leaf(*tokens, kv_heads, self.head_dim)
        v = leaf(*tokens, kv_heads, self.value_dim or self.head_dim)
        return q, k, v, leaf(self.heads, *[2 * size - 1 for size in self.kernel_size]) if self.has_rpb else None

    def key_mask(self, device="cpu"):
        """bool [B, *spatial] or None: a fifth of the keys masked, and in the last image all but the last key."""
        if not self.has_key_mask:
            return None
        mask = torch.rand(self.batch, *self.spatial, generator=torch.Generator().manual_seed(2)) > 0.2
        mask[-1].fill_(False).view(-1)[-1] = True
        return mask.to(device)

    def function(self, suffix: str = ""):
        """``natrain.na{rank}d{suffix}``."""
        return getattr(natrain, f"na{self.na_dim}d{suffix}")


def _case(
    spatial, kernel_size, dilation=1, stride=1, is_causal=False, batch=2, heads=2, head_dim=8, has_rpb=True, **features
):
    def each(value):
        return value if isinstance(value, tuple) else (value,) * len(spatial)

    window = (each(kernel_size), each(dilation), each(stride), each(is_causal))
    return Case(batch, spatial, heads, head_dim, *window, has_rpb, **features)


CHOSEN = [
    _case((7,), 7),  # window = axis: plain attention
    _case((13,), 13, heads=1, head_dim=40),
    _case((14,), 2, dilation=7),  # length == kernel * dilation, even kernel
    _case((15,), 4, dilation=3, stride=4),  # blocked, groups of equal length
    _case((29,), 5, dilation=4, stride=3),  # groups of unequal length
    _case((31,), 6, stride=2, is_causal=True),
    _case((23,), 7, dilation=3, stride=5, is_causal=True, heads=24, head_dim=8),
    _case((7, 7), 7),
    _case((7, 7), 7, batch=1, heads=3, head_dim=32),
    _case((14, 14), 7, dilation=2, heads=1, head_dim=32, batch=1),  # a DiNAT layer: groups of exactly 7x7
    _case((9, 13), (3, 5), dilation=(2, 1)),
    _case((11, 8), (4, 8), heads=1, head_dim=128),  # even kernels, one as long as its axis
    _case((12, 10), (6, 5), stride=(6, 5)),  # blocked attention
    _case((10, 17), (5, 4), dilation=(2, 3), stride=(3, 2), is_causal=(True, False)),
    _case((17, 5), (13, 2), dilation=(1, 2), is_causal=(False, True), has_rpb=False),
    _case((16, 16), 2, dilation=8, heads=1),
    _case((1, 19), (1, 3)),  # an axis of length 1
    _case((4, 5, 6), (3, 3, 3)),
    _case((5, 6, 7), (2, 3, 7), dilation=(2, 2, 1), stride=(2, 1, 3), heads=1),
    _case((7, 4, 5), (7, 3, 4), is_causal=(True, False, True), head_dim=16),
    _case((6, 3, 8), (3, 3, 2), dilation=(2, 1, 4), is_causal=(False, True, False), heads=3),
]

# Fewer heads of k and v, a head_dim of v's own, a key mask: not every kernel has them.
FEATURES = [
    _case((9, 8), 3, heads=4, kv_heads=2),
    _case((23,), 5, dilation=2, heads=6, head_dim=16, kv_heads=1, has_rpb=False),
    _case((6, 5, 4), (3, 3, 2), heads=3, kv_heads=1, is_causal=(False, True, False)),
    _case((11, 13), (5, 4), value_dim=24),
    _case((8, 9), 7, head_dim=32, value_dim=16, stride=(2, 1)),
    _case((14, 14), 7, has_key_mask=True),
    _case((31,), 6, stride=2, is_causal=True, has_key_mask=True),
    _case((4, 7, 6), (3, 3, 3), dilation=(1, 2, 2), has_key_mask=True, has_rpb=False),
    _case((13, 10), (3, 5), dilation=(2, 1), heads=4, kv_heads=2, value_dim=40, has_key_mask=True),
    _case((17,), 17, heads=6, head_dim=24, kv_heads=3, value_dim=8, has_key_mask=True, batch=3),
]


def _draw(rng: random.Random) -> Case:
    """A random case within the token budget; every axis draws its own window."""
    na_dim = rng.choice([1, 2, 2, 3])
    largest = {1: 61, 2: 19, 3: 8}[na_dim]
    while True:
        spatial = tuple(rng.randint(2, largest) for _ in range(na_dim))
        if math.prod(spatial) <= MAX_TOKENS:
            break
    kernel_size = tuple(rng.randint(2, min(13, length)) for length in spatial)
    dilation = tuple(rng.randint(1, min(8, length // k)) for length, k in zip(spatial, kernel_size, strict=True))
    return Case(
        batch=rng.choice([1, 2, 3]),
        spatial=spatial,
        heads=rng.choice([1, 2, 3, 5]),
        head_dim=rng.choice([8, 16, 24, 32, 40, 64]),
        kernel_size=kernel_size,
        dilation=dilation,
        stride=tuple(rng.choice([1, rng.randint(1, k)]) for k in kernel_size),
        is_causal=tuple(rng.random() < 0.3 for _ in range(na_dim)),
        has_rpb=rng.random() < 0.7,
    )


def grid(count: int = 40, seed: int = 0) -> list[Case]:
    """The chosen cases and ``count`` drawn ones; equal arguments give equal cases."""
    rng = random.Random(seed)
    return CHOSEN + [_draw(rng) for _ in range(count)]


# Short windows in one line, without a bias: what fused does backward in one pass.
LINES = [
    Case(5, (200,), 2, 32, (3,), (1,), (1,), (False,), False),
    Case(2, (67,), 1, 64, (7,), (1,), (1,), (False,), False),
    Case(2, (45,), 2, 40, (4,), (3,), (1,), (False,), False),  # even, groups of one length
    Case(2, (91,), 2, 16, (9,), (2,), (4,), (False,), False),  # groups of two lengths
    Case(2, (64,), 2, 32, (6,), (1,), (2,), (True,), False),
    Case(1, (130,), 1, 128, (21,), (1,), (1,), (False,), False),
    Case(1, (17,), 1, 8, (17,), (1,), (1,), (False,), False),
    Case(4, (300,), 1, 32, (101,), (1,), (1,), (False,), False),  # groups of columns with nothing but pairs
    Case(3, (150,), 1, 16, (45,), (1,), (6,), (False,), False),
    Case(2, (3, 2, 50), 2, 24, (1, 1, 5), (1, 1, 2), (1, 1, 1), (False, False, True), False),
]
