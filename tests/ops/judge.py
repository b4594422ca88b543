"""What the tests of the CUDA kernels judge by: the inputs of a problem; its outputs by a kernel, by the float64 oracle
and by the composition in the kernel's own dtype; the rule that compares the three."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

import natrain
from natrain.ops import reference
from natrain.ops.problem import Window
from tests.ops import oracle
from tests.ops.grid import Case

# What the sum of a few hundred rounded terms may add to twice the error of the same-dtype composition.
ATOL = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ATOL_TF32 = 2**-10


@dataclass
class Inputs:
    """Leaves q, k, v (and rpb), the key mask, and the gradients that come from above."""

    q: Tensor
    k: Tensor
    v: Tensor
    rpb: Tensor | None
    key_mask: Tensor | None
    d_out: Tensor
    d_lse: Tensor

    @staticmethod
    def draw(case: Case, dtype, device="cuda", kv_heads=None, value_dim=None, masked=0.0, seed=0) -> Inputs:
        """The same numbers for every dtype and device; ``masked``: share of keys that nobody may attend to."""
        generator = torch.Generator().manual_seed(seed)
        heads, kv_heads, value_dim = case.heads, kv_heads or case.heads, value_dim or case.head_dim

        def normal(*shape):
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        def leaf(*shape):
            return normal(*shape).to(device, dtype).requires_grad_()

        tokens = (case.batch, *case.spatial)
        q, k, v = leaf(*tokens, heads, case.head_dim), leaf(*tokens, kv_heads, case.head_dim), None
        v = leaf(*tokens, kv_heads, value_dim)
        rpb = leaf(heads, *[2 * size - 1 for size in case.kernel_size]) if case.has_rpb else None
        mask = (torch.rand(tokens, generator=generator) >= masked).to(device) if masked else None
        d_out, d_lse = normal(*tokens, heads, value_dim).to(device, dtype), normal(*tokens, heads).to(device, dtype)
        return Inputs(q, k, v, rpb, mask, d_out, d_lse)

    def to(self, dtype, device) -> Inputs:
        """A copy whose leaves are leaves again."""
        moved = {}
        for field in fields(self):
            x = getattr(self, field.name)
            if x is not None and x.is_floating_point():
                x = x.detach().to(device, dtype).requires_grad_(x.requires_grad)
            moved[field.name] = None if x is None else x.to(device)
        return replace(self, **moved)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.rpb) if x is not None]

    @property
    def names(self) -> list[str]:
        return ["out", "lse", "d_q", "d_k", "d_v", *(["d_rpb"] if self.rpb is not None else [])]

    def grads(self, out: Tensor, lse: Tensor) -> list[Tensor]:
        """[out, lse, gradients], of a loss that reaches both outputs."""
        d_lse = self.d_lse.to(lse.dtype)
        # A query that sees no key has lse -inf, and nothing to derive.
        d_lse = torch.where(lse.detach().isinf(), 0, d_lse)
        return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), self.leaves, (self.d_out, d_lse))]


def outputs(case: Case, inputs: Inputs, kernel: str, **options) -> list[Tensor]:
    """out, lse and the gradient of every leaf by ``kernel``."""
    if inputs.key_mask is not None:
        options["key_mask"] = inputs.key_mask
    out, lse = case.function()(
        inputs.q, inputs.k, inputs.v, **case.window, rpb=inputs.rpb, return_lse=True, kernel=kernel, **options
    )
    return inputs.grads(out, lse)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(probs, lse) along the last axis; zeros and -inf where every score is -inf."""
    lse = scores.logsumexp(-1)
    is_empty = lse.detach() == -math.inf
    return torch.exp(scores - lse.masked_fill(is_empty, 0)[..., None]), lse


def truth(case: Case, inputs: Inputs) -> list[Tensor]:
    """The dense oracle in float64 on the CPU, on the numbers that the inputs' dtype holds."""
    inputs = inputs.to(torch.float64, "cpu")
    q, k, v = inputs.q, inputs.k, inputs.v
    repeats = q.shape[-2] // k.shape[-2]
    k, v = k.repeat_interleave(repeats, -2), v.repeat_interleave(repeats, -2)
    scores = oracle.dense_scores(q, k, inputs.rpb, case.window, case.head_dim**-0.5)
    if inputs.key_mask is not None:
        scores = scores.masked_fill(~inputs.key_mask.flatten(1)[:, None, None], -math.inf)
    probs, lse = _softmax(scores)
    out = torch.einsum("bnij,bjnd->bind", probs, v.reshape(v.shape[0], -1, *v.shape[-2:]))
    return inputs.grads(out.reshape(*q.shape[:-1], v.shape[-1]), lse.transpose(1, 2).reshape(q.shape[:-1]))


class _Tf32(torch.autograd.Function):
    """A factor of a product as the tensor core sees it: the nearest number with 10 bits of mantissa."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class _Tf32Gradient(torch.autograd.Function):
    """A product whose gradient is a factor of other products."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Tf32.apply(gradient)


def same_dtype(case: Case, inputs: Inputs, is_tf32: bool = False) -> list[Tensor]:
    """The unfused composition in plain PyTorch: weights and gradients stored in the dtype, softmax in float32.

    ``is_tf32``: the factors of every product rounded to TF32. Torch's own setting would leave it to cuBLAS, which
    computes the small products of a small problem in float32 all the same.
    """
    factor = _Tf32.apply if is_tf32 else lambda x: x
    product = _Tf32Gradient.apply if is_tf32 else lambda x: x
    window = Window(case.kernel_size, case.dilation, case.stride, case.is_causal)
    repeats = inputs.q.shape[-2] // inputs.k.shape[-2]
    k, v = inputs.k.repeat_interleave(repeats, -2), inputs.v.repeat_interleave(repeats, -2)
    scores = product(reference.qk(factor(inputs.q), factor(k), inputs.rpb, window, case.head_dim**-0.5)).float()
    if inputs.key_mask is not None:
        heads = torch.ones_like(inputs.q[..., :1])
        is_key = reference.qk(heads, inputs.key_mask[..., None, None].to(heads).expand_as(heads), None, window, 1.0)
        scores = scores.masked_fill(is_key == 0, -math.inf)
    probs, lse = _softmax(scores)
    return inputs.grads(product(reference.av(factor(probs.to(v.dtype)), factor(v), window)), lse)


def judge(names: list[str], mine: list[Tensor], same: list[Tensor], exact: list[Tensor], atol: float) -> None:
    """Largest error at most twice that of ``same``, and direction (cosine) and signed bias: outliers must not hide a
    drift. ``atol`` is relative to the largest value."""
    for name, *results in zip(names, mine, same, exact, strict=True):
        x, y, z = (result.cpu().double() for result in results)
        assert torch.equal(x.isfinite(), z.isfinite()), f"{name}: finite in other places"
        x, y, z = (value.masked_fill(~z.isfinite(), 0) for value in (x, y, z))
        largest, average = z.abs().max().clamp(min=1e-30), z.abs().mean().clamp(min=1e-30)
        error, allowed = (x - z).abs().max(), 2 * (y - z).abs().max() + atol * largest
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"
        if z.any():
            cosine = torch.cosine_similarity(x.flatten(), z.flatten(), dim=0)
            assert cosine >= 1 - atol, f"{name}: cosine {cosine:.6f}"
        bias, allowed = (x - z).mean().abs() / average, 2 * (y - z).mean().abs() / average + atol
        assert bias <= allowed, f"{name}: bias {bias:.1e} > {allowed:.1e}"


def check_tf32(case: Case, kernel: str, device: str = "cuda") -> None:
    """A kernel in TF32 by the same rule; torch allows it now."""
    inputs = Inputs.draw(case, torch.float32, device)
    mine = outputs(case, inputs, kernel)
    torch.set_float32_matmul_precision("highest")
    same = same_dtype(case, inputs, is_tf32=True)
    judge(inputs.names, mine, same, truth(case, inputs), ATOL_TF32)


def check_one_key(kernel: str, dtype: torch.dtype, device: str = "cuda") -> None:
    """Where a window holds one key, out is v and the gradient of v that of out; q and k get what is left of two equal
    numbers: 21 bits of them, which no rule relative to the result can judge."""
    shape = (2, 5, 6, 2, 16)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    d_out = torch.randn_like(v)
    out, lse = natrain.na2d(q, k, v, 1, return_lse=True, kernel=kernel)
    d_q, d_k, d_v = torch.autograd.grad(out, (q, k, v), d_out)
    is_float = dtype == torch.float32
    # Of a weight and a value tensor cores see 21 bits each; in 16 bits the weight's rounding cancels in out.
    torch.testing.assert_close(out, v, rtol=2**-19 if is_float else 1e-6, atol=0)
    torch.testing.assert_close(d_v, d_out, rtol=2**-19 if is_float else ATOL[dtype], atol=0)
    # In 16 bits lse is the log of a rounded weight.
    exact = (q.double() * k.double()).sum(-1) / 4
    torch.testing.assert_close(lse.double(), exact, rtol=0, atol=2e-6 if is_float else ATOL[dtype])
    cancelled = (d_out * v).abs().float().sum(-1).max()
    for gradient, factor in ((d_q, k), (d_k, q)):
        assert gradient.abs().max() <= 2**-20 * cancelled * factor.abs().max()


def requested_bytes(which: str) -> int:
    """Of CUDA memory, what tensors asked for, "current" or "peak": what the allocator gives depends on its past too."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]
