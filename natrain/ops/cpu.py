"""The cpu kernel: fused forward and backward in vectorised C++ (csrc/cpu), compiled at first use by natrain.jit.host.

Limits: any rank, head dim and window; float32 and float64, and bfloat16 and float16 with float32 sums. One library for
each type of sum serves them all. Results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import functools
import logging
import struct
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from natrain.jit import BuildSpec, find_built, host, source_root
from natrain.ops.dropout import drop_threshold
from natrain.ops.problem import Problem
from natrain.ops.reference import accumulate_dtype
from natrain.ops.registry import FusedKernel, Limits, register

logger = logging.getLogger(__name__)

# Codes of csrc/cpu/problem.h.
_ELEMENTS = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 1, torch.float16: 2}
_REALS = {torch.float32: "float", torch.float64: "double"}
# Mirror struct Arguments there; every member has 8 bytes.
_SIZES = struct.Struct("3q15q2q")
_OPTIONS = struct.Struct("q2d3q2Q")
# struct TensorArgument of each rank: address, then strides of B, z, y, x and N; an axis that is missing has stride 0.
_TENSORS = {1: struct.Struct("Qq16x2q"), 2: struct.Struct("Qq8x3q"), 3: struct.Struct("Q5q")}
_NO_TENSOR = bytes(_TENSORS[3].size)


@functools.lru_cache
def build_spec(dtype: torch.dtype, level: str) -> BuildSpec:
    """What to compile for inputs of ``dtype`` on processors of ``level`` (see ``host.LEVELS``)."""
    real, root = _REALS[accumulate_dtype(dtype)], source_root()
    return BuildSpec(
        name=f"cpu-{real}-{level}",
        sources=(root / "cpu" / "attention.cpp",),
        include_dirs=(root / "cpu", root / "include"),
        defines=(("NATRAIN_REAL", real),),
        flags=(),
        toolchain=host.HostToolchain(level),
    )


@functools.lru_cache
def _library(dtype: torch.dtype):
    return host.load(build_spec(dtype, host.cpu_level()))


@functools.lru_cache
def _reasons(real: torch.dtype) -> tuple[str, ...]:
    """Empty where there is a compiler, or what it once made; asked, and said, once a process."""
    if host.find_compiler():
        return ()
    try:
        if find_built(build_spec(real, host.cpu_level())):
            return ()
    except ValueError:  # no cache that can be used, hence nothing compiled before
        pass
    reason = f"{host.why_no_compiler()}, and nothing compiled before: {host.REMEDY}"
    logger.warning("the fast cpu kernel is not available: %s", reason)
    return (reason,)


def _three(values: Sequence[int], missing: int) -> tuple[int, ...]:
    """``values`` of a problem's axes, with ``missing`` for the leading axes it lacks."""
    return (missing,) * (3 - len(values)) + tuple(int(value) for value in values)


@functools.lru_cache(maxsize=1024)
def _sizes(problem: Problem) -> bytes:
    """The members of struct Arguments that a problem decides."""
    window = problem.window
    return _SIZES.pack(
        problem.batch, problem.heads, problem.head_dim,
        *_three(problem.spatial, 1), *_three(window.kernel_size, 1), *_three(window.dilation, 1),
        *_three(window.stride, 1), *_three(window.is_causal, 0),
        3 - window.na_dim, _ELEMENTS[problem.dtype],
    )  # fmt: skip


def _tensor(x: Tensor | None, na_dim: int) -> bytes:
    """struct TensorArgument of [B, *S, N, ...]."""
    if x is None:
        return _NO_TENSOR
    return _TENSORS[na_dim].pack(x.data_ptr(), *x.stride()[: na_dim + 2])


def _rows(x: Tensor) -> Tensor:
    """``x`` itself unless its last axis has gaps (an expanded gradient): the kernel reads rows of adjacent elements."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _run(
    entry: str,
    problem: Problem,
    tensors: Sequence[Tensor | None],
    rpb: Tensor | None,
    d_rpb: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> None:
    na_dim = problem.window.na_dim
    options = _OPTIONS.pack(
        torch.get_num_threads(), scale, 1 / (1 - dropout_p),
        seed is not None, drop_threshold(dropout_p), 0 if seed is None else seed.item(),
        0 if rpb is None else rpb.data_ptr(), 0 if d_rpb is None else d_rpb.data_ptr(),
    )  # fmt: skip
    arguments = b"".join((_sizes(problem), options, *[_tensor(x, na_dim) for x in tensors]))
    if not getattr(_library(problem.dtype), entry)(arguments):
        raise MemoryError(f"no memory for the cpu kernel's scratch: {problem}. Try: fewer threads, or shorter axes")


def _equal(problem: Problem) -> Problem:
    """What the compiled kernel solves, once for each head of q that shares one of k and v; mostly ``problem``."""
    if problem.heads == problem.kv_heads and problem.head_dim == problem.value_dim:
        return problem
    return _evened(problem)


@functools.lru_cache(maxsize=1024)
def _evened(problem: Problem) -> Problem:
    width = max(problem.head_dim, problem.value_dim)
    return replace(problem, heads=problem.kv_heads, head_dim=width, value_dim=width)


def _widened(x: Tensor, width: int) -> Tensor:
    return _rows(x) if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _narrowed(x: Tensor, width: int) -> Tensor:
    # ``x`` itself where it is as wide: autograd forbids to change a view that is one of several results.
    return x if x.shape[-1] == width else x[..., :width].contiguous()


def _of_heads(x: Tensor | None, heads: slice, axis: int) -> Tensor | None:
    """A view of these heads of ``x``, which lie along ``axis``."""
    return x if x is None or heads.step == 1 else x.movedim(axis, 0)[heads].movedim(0, axis)


class CpuKernel(FusedKernel):
    """One forward, one backward, for every processor that has a C++ compiler.

    Fewer heads of k and v are read in place, in one pass for each head of q that shares one; a head_dim of v's own is
    evened out by zeros.
    """

    name = "cpu"
    summary = "vectorised C++ (AVX-512, AVX2, portable), fused; any rank, head dim and window, one backward"
    priority = 10
    limits = Limits(devices=frozenset({"cpu"}), dtypes=frozenset(_ELEMENTS), gqa=True, value_dim=True)

    def extra_reasons(self, problem: Problem) -> list[str]:
        if problem.is_grouped and problem.has_dropout:
            return ["no dropout_p where k and v have fewer heads than q"]
        return list(_reasons(accumulate_dtype(problem.dtype)))

    def build_specs(self, problem: Problem, arch: str) -> list[BuildSpec]:
        return [build_spec(problem.dtype, arch)]

    def forward(self, problem, q, k, v, rpb, key_mask, seed, scale, dropout_p):
        acc, part = accumulate_dtype(q.dtype), _equal(problem)
        q, k, v = (_widened(x, part.head_dim) for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[:-1], dtype=acc)
        if not out.numel():
            return _narrowed(out, problem.value_dim), lse
        if part is problem:
            rpb = None if rpb is None else rpb.to(acc).contiguous()
            tensors = (q, k, v, out, lse, None, None, None, None, None)
            _run("natrain_cpu_forward", problem, tensors, rpb, None, seed, scale, dropout_p)
            return out, lse
        for heads in self._passes(problem):
            q_part, out_part = (_of_heads(x, heads, -2) for x in (q, out))
            bias = None if rpb is None else rpb[heads].to(acc).contiguous()
            tensors = (q_part, k, v, out_part, _of_heads(lse, heads, -1), None, None, None, None, None)
            _run("natrain_cpu_forward", part, tensors, bias, None, seed, scale, dropout_p)
        return _narrowed(out, problem.value_dim), lse

    def backward(
        self, problem, d_out, d_lse, q, k, v, rpb, key_mask, out, lse, seed, scale, dropout_p, d_q, d_k, d_v
    ):  # fmt: skip
        acc, part = accumulate_dtype(q.dtype), _equal(problem)
        d_rpb = None if rpb is None else torch.zeros(rpb.shape, dtype=acc)
        q, k, v, d_out = (_widened(x, part.head_dim) for x in (q, k, v, d_out))
        if not q.numel():
            return d_rpb
        if part is problem:
            rpb = None if rpb is None else rpb.to(acc).contiguous()
            tensors = (q, k, v, None, lse, d_out, d_lse, d_q, d_k, d_v)
            _run("natrain_cpu_backward", problem, tensors, rpb, d_rpb, seed, scale, dropout_p)
            return d_rpb
        own_d_q = d_q if d_q.shape == q.shape else torch.empty_like(q)
        for heads in self._passes(problem):
            # The gradients of k and v are sums over the passes; the first one writes where nothing has to be widened.
            is_first = heads.start == 0
            d_kv = [
                x if is_first and x.shape == t.shape else torch.empty_like(t, memory_format=torch.contiguous_format)
                for x, t in ((d_k, k), (d_v, v))
            ]
            bias = None if rpb is None else rpb[heads].to(acc).contiguous()
            d_bias = None if rpb is None else torch.zeros_like(bias)
            q_part, d_out_part, d_q_part = (_of_heads(x, heads, -2) for x in (q, d_out, own_d_q))
            lse_part, d_lse_part = (_of_heads(x, heads, -1) for x in (lse, d_lse))
            tensors = (q_part, k, v, None, lse_part, d_out_part, d_lse_part, d_q_part, *d_kv)
            _run("natrain_cpu_backward", part, tensors, bias, d_bias, seed, scale, dropout_p)
            if rpb is not None:
                d_rpb[heads] = d_bias
            for x, computed in ((d_k, d_kv[0]), (d_v, d_kv[1])):
                if computed is not x:
                    computed = computed[..., : x.shape[-1]]
                    x.copy_(computed) if is_first else x.add_(computed)
        if own_d_q is not d_q:
            d_q.copy_(own_d_q[..., : d_q.shape[-1]])
        return d_rpb

    @staticmethod
    def _passes(problem: Problem) -> list[slice]:
        """The heads of q that meet every head of k and v once."""
        count = problem.heads // problem.kv_heads
        return [slice(first, None, count) for first in range(count)]


register(CpuKernel())
