"""Contenders from elsewhere: torch's attention functions, and NATTEN where it is installed.

Each gets its inputs in its own layout, laid out before any time is taken, and must compute neighborhood attention as it
is defined; ``dense`` alone does not: it is attention of every token to every token, what locality is measured against.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from natrain.bench.case import Case
from natrain.bench.truth import Inputs
from natrain.jit import BuildSpec
from natrain.ops.window import axis_window

_MOST_DENSE_TOKENS = 8192


def _leaf(x: Tensor) -> Tensor:
    return x.detach().contiguous().requires_grad_()


class _HeadsFirst:
    """Attention on q, k, v [B, N, T, D]."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case = case
        self.q, self.k, self.v = (_leaf(self._heads_first(x)) for x in (inputs.q, inputs.k, inputs.v))
        self._d_out = self._heads_first(inputs.d_out).contiguous()
        self.bias: Tensor | None = None

    @staticmethod
    def _heads_first(x: Tensor) -> Tensor:
        return x.flatten(1, -3).transpose(1, 2)

    def inputs(self) -> Sequence[Tensor]:
        return (self.q, self.k, self.v) if self.bias is None else (self.q, self.k, self.v, self.bias)

    def d_out(self) -> Tensor:
        return self._d_out

    def heads_last(self, out: Tensor) -> Tensor:
        return out.transpose(1, 2).unflatten(1, self.case.spatial)

    def split(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self.heads_last(gradient) for gradient in gradients[:3])

    def d_rpb(self, gradients: Sequence[Tensor]) -> Tensor | None:
        return None if self.bias is None else gradients[3]


def _axis_masks(case: Case, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Per axis [L, L]: whether a query has a key, and the index of their bias."""
    window, masks = case.window, []
    for length, k, d, s, causal in zip(
        case.spatial, window.kernel_size, window.dilation, window.stride, window.is_causal, strict=True
    ):
        axis = axis_window(length, k, d, s, causal, device)
        allowed = torch.zeros(length, length, dtype=torch.bool, device=device)
        valid = torch.ones_like(axis.keys, dtype=torch.bool) if axis.valid is None else axis.valid
        query, slot = valid.nonzero(as_tuple=True)
        allowed[query, axis.keys[query, slot]] = True
        bias = torch.zeros(length, length, dtype=torch.int64, device=device)
        bias[query, axis.keys[query, slot]] = axis.bias[query, slot]
        masks.append((allowed, bias))
    return masks


class _MaskedWork(_HeadsFirst):
    """scaled_dot_product_attention with the neighbourhood, and the bias of every pair, as its mask."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        allowed = torch.ones(1, 1, dtype=torch.bool, device=self.q.device)
        index = torch.zeros(1, 1, dtype=torch.int64, device=self.q.device)
        for (axis_allowed, axis_bias), width in zip(
            _axis_masks(case, self.q.device), case.window.rpb_shape, strict=True
        ):
            allowed, index = (
                combine(whole[:, None, :, None], part[None, :, None, :]).flatten(0, 1).flatten(1)
                for combine, whole, part in (
                    (torch.logical_and, allowed, axis_allowed),
                    (lambda whole, part, width=width: whole * width + part, index, axis_bias),
                )
            )
        values = torch.zeros(1, *index.shape, dtype=case.dtype, device=self.q.device)
        if inputs.rpb is not None:
            values = inputs.rpb.flatten(1)[:, index].to(case.dtype)
        self._mask = values.masked_fill(~allowed, -math.inf)
        if inputs.rpb is not None:
            self.bias = self._mask = self._mask.requires_grad_()

    def forward(self) -> Tensor:
        return F.scaled_dot_product_attention(self.q, self.k, self.v, attn_mask=self._mask)

    def d_rpb(self, gradients: Sequence[Tensor]) -> Tensor | None:
        return None  # a gradient of every pair of tokens in its place


class _DenseWork(_HeadsFirst):
    def forward(self) -> Tensor:
        return F.scaled_dot_product_attention(self.q, self.k, self.v)


@cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


class _FlexWork(_HeadsFirst):
    """torch's FlexAttention, compiled, tokens in row-major order."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        super().__init__(case, inputs)
        masks, spatial = _axis_masks(case, self.q.device), case.spatial
        strides = [math.prod(spatial[axis + 1 :]) for axis in range(len(spatial))]

        def coordinate(token: Tensor, axis: int) -> Tensor:
            return token // strides[axis] % spatial[axis]

        def is_neighbor(b, h, query, key):
            found = masks[0][0][coordinate(query, 0), coordinate(key, 0)]
            for axis in range(1, len(spatial)):
                found = found & masks[axis][0][coordinate(query, axis), coordinate(key, axis)]
            return found

        def with_bias(score, b, h, query, key):
            index = [bias[coordinate(query, axis), coordinate(key, axis)] for axis, (_, bias) in enumerate(masks)]
            return score + self.bias[(h, *index)]

        if inputs.rpb is not None:
            self.bias = _leaf(inputs.rpb)
        self._score = None if inputs.rpb is None else with_bias
        self._blocks = create_block_mask(is_neighbor, None, None, case.tokens, case.tokens, device=self.q.device)

    def forward(self) -> Tensor:
        return _compiled_flex()(self.q, self.k, self.v, score_mod=self._score, block_mask=self._blocks)


class _TorchPeer:
    def __init__(self, name: str, work: type, most_tokens: int | None, devices: tuple[str, ...], note: str) -> None:
        self.name, self._work, self._most_tokens, self._devices, self._note = name, work, most_tokens, devices, note

    def reasons(self, case: Case, device: str, direction: str) -> list[str]:
        reasons = []
        if device not in self._devices:
            reasons.append(f"device {device} ({self._note})")
        if self._most_tokens is not None and case.tokens > self._most_tokens:
            reasons.append(
                f"{case.tokens} tokens (its mask or its work grows with the square; at most {self._most_tokens})"
            )
        if self._work is _FlexWork and case.dtype == torch.float64:
            reasons.append("dtype float64")
        if self._work is _DenseWork and case.has_rpb:
            reasons.append("no bias")
        return reasons

    def build_specs(self, case: Case, arch: str) -> list[BuildSpec]:
        return []

    def work(self, case: Case, inputs: Inputs):
        return self._work(case, inputs)


class _NattenWork:
    """NATTEN's fused operators: q, k, v [B, *S, N, D], each of its own."""

    def __init__(self, case: Case, inputs: Inputs, version: tuple[int, int], backend: str | None) -> None:
        import natten

        self.q, self.k, self.v = (_leaf(x) for x in (inputs.q, inputs.k, inputs.v))
        self.bias = None if inputs.rpb is None else _leaf(inputs.rpb.to(case.dtype))
        self._d_out, window = inputs.d_out, case.window
        options = {"dilation": window.dilation, "is_causal": window.is_causal}
        if version >= (0, 20):
            function, options["stride"] = getattr(natten, case.op), window.stride
            if backend is not None:
                options["backend"] = backend
        else:
            function, options["rpb"] = getattr(natten.functional, case.op), self.bias
        self._call = lambda: function(self.q, self.k, self.v, window.kernel_size, **options)

    def forward(self) -> Tensor:
        return self._call()

    def inputs(self) -> Sequence[Tensor]:
        return (self.q, self.k, self.v) if self.bias is None else (self.q, self.k, self.v, self.bias)

    def d_out(self) -> Tensor:
        return self._d_out

    def heads_last(self, out: Tensor) -> Tensor:
        return out

    def split(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(gradients[:3])

    def d_rpb(self, gradients: Sequence[Tensor]) -> Tensor | None:
        return None if self.bias is None else gradients[3]


class _NattenUnfusedWork(_NattenWork):
    """NATTEN 0.17's primitives around torch's softmax: q, k, v [B, N, *S, D]; naive or GEMM kernels by its switch."""

    def __init__(self, case: Case, inputs: Inputs, has_gemm: bool) -> None:
        import natten
        from natten import functional

        self.q, self.k, self.v = (_leaf(x.movedim(-2, 1)) for x in (inputs.q, inputs.k, inputs.v))
        self.bias = None if inputs.rpb is None else _leaf(inputs.rpb.to(case.dtype))
        self._d_out, window = inputs.d_out.movedim(-2, 1).contiguous(), case.window
        scores, weighted = getattr(functional, f"{case.op}_qk"), getattr(functional, f"{case.op}_av")
        switch = getattr(natten, "enable_gemm_na" if has_gemm else "disable_gemm_na", lambda: None)
        options = (window.kernel_size, window.dilation)

        def call() -> Tensor:
            switch()
            found = scores(self.q * case.head_dim**-0.5, self.k, *options, is_causal=window.is_causal, rpb=self.bias)
            return weighted(found.softmax(-1), self.v, *options, is_causal=window.is_causal)

        self._call = call

    def heads_last(self, out: Tensor) -> Tensor:
        return out.movedim(1, -2)

    def split(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(gradient.movedim(1, -2) for gradient in gradients[:3])


def natten_version() -> tuple[int, int] | None:
    """(major, minor) of the natten that ``import natten`` finds, None where there is none."""
    if importlib.util.find_spec("natten") is None:
        return None
    import natten

    return tuple(int(part) for part in natten.__version__.split(".")[:2])


class _NattenPeer:
    def __init__(self, name: str, backend: str | None = None, unfused: bool | None = None) -> None:
        self.name, self._backend, self._has_gemm = name, backend, unfused

    def reasons(self, case: Case, device: str, direction: str) -> list[str]:
        version = natten_version()
        if version is None:
            return ["natten is not installed"]
        reasons = []
        is_new = version >= (0, 20)
        if self._backend is not None and not is_new:
            reasons.append(f"natten {version[0]}.{version[1]} has no backends (0.20 and later)")
        if self._has_gemm is not None and is_new:
            reasons.append(f"natten {version[0]}.{version[1]} has no unfused kernels (up to 0.17)")
        if is_new and case.has_rpb:
            reasons.append("no rpb since 0.20")
        if not is_new and max(case.window.stride) > 1:
            reasons.append("no stride before 0.20")
        return reasons

    def build_specs(self, case: Case, arch: str) -> list[BuildSpec]:
        return []

    def work(self, case: Case, inputs: Inputs):
        if self._has_gemm is not None:
            return _NattenUnfusedWork(case, inputs, self._has_gemm)
        return _NattenWork(case, inputs, natten_version(), self._backend)


PEERS = {
    peer.name: peer
    for peer in (
        _TorchPeer("flex", _FlexWork, None, ("cuda",), "its backward is CUDA's"),
        _TorchPeer("sdpa", _MaskedWork, _MOST_DENSE_TOKENS, ("cpu", "cuda"), ""),
        _TorchPeer("dense", _DenseWork, _MOST_DENSE_TOKENS, ("cpu", "cuda"), ""),
        _NattenPeer("natten"),
        _NattenPeer("natten-naive", unfused=False),
        _NattenPeer("natten-gemm", unfused=True),
        *(_NattenPeer(f"natten-{name}", name) for name in ("cutlass-fna", "hopper-fna", "blackwell-fna", "flex-fna")),
    )
}


def truth_case(arm: str, case: Case) -> Case:
    """The problem that an arm's output is judged by: ``dense`` attends to everything."""
    if arm != "dense":
        return case
    rank = len(case.spatial)
    window = replace(
        case.window, kernel_size=case.spatial, dilation=(1,) * rank, stride=(1,) * rank, is_causal=(False,) * rank
    )
    return replace(case, window=window)
