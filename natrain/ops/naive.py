"""The naive kernels: one group of threads per query (or key), every attention weight in memory; csrc/naive holds them.

Limits: any rank, head dim, window and dtype of float64, float32, float16, bfloat16 (16 bits accumulate in float32).
Attention weights are stored in q's dtype, their rows padded to 16 bytes inside an operator.
"""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from natrain.jit import BuildSpec, cuda
from natrain.jit.driver import CudaKernel
from natrain.ops.dropout import drop_threshold
from natrain.ops.geometry import (
    ACCESS_BYTES,
    MAX_THREADS,
    Layout,
    access_width,
    choose_chunks,
    choose_tiling,
    contiguous_rows,
    lanes_of_row,
    offset_type,
    three_axes,
    weights_pitch,
)
from natrain.ops.naive_specs import DTYPES, build_specs, positions_of, problem_defines, row_defines
from natrain.ops.problem import Problem, Window
from natrain.ops.reference import accumulate_dtype
from natrain.ops.registry import Limits, UnfusedAttentionKernel, register


@functools.cache
def _problem_kernel(primitive: str, device: int, *constants) -> CudaKernel:
    return _load(primitive, problem_defines(primitive, *constants), device)


@functools.cache
def _row_kernel(primitive: str, device: int, *constants) -> tuple[CudaKernel, int]:
    defines, lanes = row_defines(*constants)
    return _load(primitive, defines, device), lanes


def _load(primitive: str, defines: dict[str, object], device: int) -> CudaKernel:
    return cuda.load(f"naive/{primitive}.cu", f"natrain_naive_{primitive}", defines, device)


@dataclass(frozen=True)
class Plan:
    """A launch but for its scalars and addresses, which go between ``head`` and ``tail``."""

    kernel: CudaKernel
    grid: int
    threads: int
    middle: struct.Struct
    head: bytes = b""
    tail: bytes = b""
    shared_bytes: int = 0

    def launch(self, device: int, *middle: float) -> None:
        arguments = self.head + self.middle.pack(*middle) + self.tail
        self.kernel.launch(self.grid, self.threads, arguments, device, self.shared_bytes)


# Keyed by all that a plan depends on; emptied when shapes keep changing.
plans: dict[tuple, Plan] = {}
_MOST_PLANS = 4096


def remember(key: tuple, plan: Plan) -> Plan:
    if len(plans) >= _MOST_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


def _run_rows(primitive: str, weights: Tensor, num_neighbors: int, form: str, *arguments: float) -> None:
    """Launch a kernel on every row of padded ``weights`` [.., P]; its struct begins with the number of rows."""
    device = weights.get_device()
    key = (primitive, weights.shape, weights.dtype, num_neighbors, device)
    plan = plans.get(key) or remember(key, _plan_rows(primitive, weights, num_neighbors, form))
    plan.launch(device, *arguments)


def _plan_rows(primitive: str, weights: Tensor, num_neighbors: int, form: str) -> Plan:
    rows, pitch = weights.numel() // weights.shape[-1], weights.shape[-1]
    kernel, lanes = _row_kernel(primitive, weights.get_device(), weights.dtype, num_neighbors, pitch)
    return Plan(kernel, -(-rows * lanes // MAX_THREADS), MAX_THREADS, struct.Struct(form), struct.pack("q", rows))


def _run(
    primitive: str,
    window: Window,
    weights: Tensor,
    row: Tensor,
    tensors: tuple[Tensor, ...],
    scalars: tuple[float, ...],
    rpb: Tensor | None = None,
) -> None:
    """Launch qk, av or inverse.

    Args:
        weights: [B, *S, N, K or P]; written by qk, else read.
        row: the tensor whose units (queries or keys of one head) the launch goes over.
        tensors: all of the struct's tensors, in its order; the order of their layouts too.
        scalars: its leading float64 members.
    """
    if not row.numel():
        return
    device = row.get_device()
    addresses = [x.data_ptr() for x in tensors]
    key = (primitive, window, row.shape, row.dtype, weights.shape[-1], rpb is None, device)
    key += tuple(x.stride() for x in tensors) + tuple(address % ACCESS_BYTES for address in addresses)
    plan = plans.get(key) or remember(key, _plan(primitive, window, weights, row, tensors, rpb is not None))
    if primitive == "qk":
        addresses.insert(2, 0 if rpb is None else rpb.data_ptr())
    plan.launch(device, *scalars, *addresses)


def _plan(
    primitive: str, window: Window, weights: Tensor, row: Tensor, tensors: tuple[Tensor, ...], has_rpb: bool
) -> Plan:
    batch, *axes, heads, head_dim = row.shape
    vector = access_width(head_dim, *(x for x in tensors if x is not weights))
    lanes = lanes_of_row(head_dim, vector)
    layouts = [Layout.of(x) for x in tensors]
    spatial, dilation = three_axes(axes, 1), three_axes(window.dilation, 1)
    positions = positions_of(axes, window)
    kernel = _problem_kernel(
        primitive,
        row.get_device(),
        row.dtype,
        window,
        head_dim,
        vector,
        lanes,
        positions,
        offset_type(*layouts),
        has_rpb,
    )
    row_bytes = head_dim * row.element_size()
    tiling = choose_tiling(spatial, dilation, three_axes(window.kernel_size, 1), heads, row_bytes, lanes, positions)
    head = struct.pack(
        "16i",
        *spatial, *dilation, *tiling.tile, *tiling.tiles, heads, tiling.head_tile, tiling.head_tiles, batch,
    )  # fmt: skip
    numbers = [number for layout in layouts for number in layout.packed]
    numbers += [weights.shape[-1]] if primitive == "qk" else []
    middle = struct.Struct("2d4Q" if primitive == "qk" else "d3Q")
    tail = struct.pack(f"{len(numbers)}q", *numbers)
    return Plan(kernel, batch * tiling.blocks_per_image, tiling.threads, middle, head, tail)


def _rpb_grad(window: Window, weights: Tensor) -> Tensor:
    """[N, 2k-1, ...] in the accumulator's dtype; ``weights`` [B, *S, N, K or P]."""
    shape = (weights.shape[-2], *window.rpb_shape)
    acc = accumulate_dtype(weights.dtype)
    if not weights.numel():
        return weights.new_zeros(shape, dtype=acc)
    if weights.shape[0] > 1:
        weights = weights.sum(0, keepdim=True, dtype=acc)
    device = weights.get_device()
    key = ("rpb_grad", window, weights.shape, weights.stride(), weights.dtype, device)
    plan = plans.get(key) or remember(key, _plan_rpb_grad(window, weights))
    chunks = plan.grid * plan.threads // (shape[0] * _threads_of_entries(window))
    partial = weights.new_empty(chunks, *shape, dtype=acc)
    plan.launch(device, weights.data_ptr(), partial.data_ptr())
    return partial.sum(0)


def _threads_of_entries(window: Window) -> int:
    """Threads that cover a head's table of bias entries once, in blocks of equal size."""
    warps = -(-math.prod(window.rpb_shape) // 32)
    return -(-warps // -(-warps * 32 // MAX_THREADS)) * 32 * -(-warps * 32 // MAX_THREADS)


def _plan_rpb_grad(window: Window, weights: Tensor) -> Plan:
    _, *axes, heads, _ = weights.shape
    layout, device = Layout.of(weights), weights.get_device()
    kernel = _problem_kernel("rpb_grad", device, weights.dtype, window, 1, 1, 1, 1, offset_type(layout), False)
    z, y, x = three_axes(axes, 1)
    blocks = -(-_threads_of_entries(window) // MAX_THREADS)
    size, count = choose_chunks(z * y, x, heads * blocks)
    head = struct.pack(
        "16i4i", z, y, x, *three_axes(window.dilation, 1), 1, 1, 1, 1, 1, 1, heads, 1, 1, 1, *size, *count
    )
    grid = math.prod(count) * heads * blocks
    threads = _threads_of_entries(window) // blocks
    return Plan(kernel, grid, threads, struct.Struct("2Q"), head, struct.pack("5q", *layout.packed))


class NaiveKernel(UnfusedAttentionKernel):
    """The readable family: all four primitives, and attention out of them over padded weights."""

    name = "naive"
    summary = "CUDA, one group of threads per query; any rank, head dim and dtype, derivatives of any order"
    priority = 50
    limits = Limits(
        devices=frozenset({"cuda"}),
        dtypes=frozenset(DTYPES),
        value_dim=True,
        unfused=True,
        double_backward=True,
        forward_ad=True,
    )

    def extra_reasons(self, problem: Problem) -> list[str]:
        return cuda.reasons_against(problem.capability)

    def build_specs(self, problem: Problem, arch: str) -> list[BuildSpec]:
        return build_specs(problem, arch)

    def write_scores(
        self, window: Window, q: Tensor, k: Tensor, rpb: Tensor | None, scale: float, fill: float, scores: Tensor
    ) -> None:
        """qk into ``scores`` [B, *S, N, K or P]; rows of q and k are contiguous."""
        if rpb is not None:
            rpb = rpb.to(accumulate_dtype(q.dtype)).contiguous()
        _run("qk", window, scores, q, (q, k, scores), (scale, fill), rpb)

    def write_probs(
        self, window: Window, q: Tensor, k: Tensor, rpb: Tensor | None, scale: float, probs: Tensor, lse: Tensor
    ) -> None:
        """The softmax of qk into ``probs`` [B, *S, N, P], the logs of its sums into ``lse`` [B, *S, N]."""
        self.write_scores(window, q, k, rpb, scale, -math.inf, probs)
        _run_rows("softmax", probs, window.num_neighbors, "3Q", probs.data_ptr(), probs.data_ptr(), lse.data_ptr())

    def write_d_scores(
        self, window: Window, d_out: Tensor, v: Tensor, probs: Tensor, d_lse: Tensor | None, d_scores: Tensor
    ) -> None:
        """The gradient of scores, without dropout, into ``d_scores`` [B, *S, N, P]; ``d_lse`` contiguous."""
        self.write_scores(window, d_out, v, None, 1.0, 0.0, d_scores)
        self._softmax_grad(window, probs, d_lse, d_scores)

    @staticmethod
    def _softmax_grad(window: Window, probs: Tensor, d_lse: Tensor | None, d_scores: Tensor) -> None:
        """In place of the gradient of probs."""
        _run_rows(
            "softmax_grad", probs, window.num_neighbors, "4Q",
            probs.data_ptr(), d_scores.data_ptr(), 0 if d_lse is None else d_lse.data_ptr(), d_scores.data_ptr(),
        )  # fmt: skip

    def write_sums(self, primitive: str, window: Window, weights: Tensor, x: Tensor, out: Tensor, scale: float) -> None:
        """``scale`` times av or inverse into ``out``; ``weights`` [B, *S, N, K or P]; rows are contiguous."""
        _run(primitive, window, weights, out, (weights, x, out), (scale,))

    def qk(self, problem: Problem, q: Tensor, k: Tensor, rpb: Tensor | None, scale: float, fill: float) -> Tensor:
        scores = q.new_empty(*q.shape[:-1], problem.window.num_neighbors)
        self.write_scores(problem.window, contiguous_rows(q), contiguous_rows(k), rpb, scale, fill, scores)
        return scores

    def av(self, problem: Problem, weights: Tensor, v: Tensor) -> Tensor:
        return self._weighted("av", problem, weights, v)

    def inverse(self, problem: Problem, weights: Tensor, x: Tensor) -> Tensor:
        return self._weighted("inverse", problem, weights, x)

    def _weighted(self, primitive: str, problem: Problem, weights: Tensor, x: Tensor) -> Tensor:
        weights, x = contiguous_rows(weights), contiguous_rows(x)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        self.write_sums(primitive, problem.window, weights, x, out, 1.0)
        return out

    def rpb_grad(self, problem: Problem, weights: Tensor) -> Tensor:
        return _rpb_grad(problem.window, contiguous_rows(weights))

    def empty_probs(self, q: Tensor, window: Window) -> Tensor:
        """[B, *S, N, P]: rows of K, padded."""
        return q.new_empty(*q.shape[:-1], weights_pitch(window.num_neighbors, q.dtype))

    def forward(
        self,
        problem: Problem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rpb: Tensor | None,
        key_mask: Tensor | None,
        seed: Tensor | None,
        scale: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        window, num_neighbors = problem.window, problem.window.num_neighbors
        q, k, v = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v)
        probs = self.empty_probs(q, window)
        lse = q.new_empty(q.shape[:-1], dtype=accumulate_dtype(q.dtype))
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        self.write_probs(window, q, k, rpb, scale, probs, lse)
        weights = self._dropped(probs, num_neighbors, seed, dropout_p)
        self.write_sums("av", window, weights, v, out, 1.0)
        return out, lse, probs

    def backward(
        self,
        problem: Problem,
        d_out: Tensor,
        d_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        probs: Tensor,
        seed: Tensor | None,
        scale: float,
        dropout_p: float,
        d_q: Tensor,
        d_k: Tensor,
        d_v: Tensor,
    ) -> Tensor | None:
        window, num_neighbors = problem.window, problem.window.num_neighbors
        q, k, v, d_out = (contiguous_rows(x) for x in (q, k, v, d_out))
        weights = self._dropped(probs, num_neighbors, seed, dropout_p)
        self.write_sums("inverse", window, weights, d_out, d_v, 1.0)
        d_scores = torch.empty_like(probs)
        if d_lse is not None:
            d_lse = d_lse.contiguous()
        if seed is None:
            self.write_d_scores(window, d_out, v, probs, d_lse, d_scores)
        else:
            self.write_scores(window, d_out, v, None, 1.0, 0.0, d_scores)
            self._drop(d_scores, d_scores, num_neighbors, seed, dropout_p)
            self._softmax_grad(window, probs, d_lse, d_scores)
        self.write_sums("av", window, d_scores, k, d_q, scale)
        self.write_sums("inverse", window, d_scores, q, d_k, scale)
        return _rpb_grad(window, d_scores) if problem.has_rpb else None

    def _dropped(self, probs: Tensor, num_neighbors: int, seed: Tensor | None, dropout_p: float) -> Tensor:
        if seed is None:
            return probs
        out = torch.empty_like(probs)
        self._drop(probs, out, num_neighbors, seed, dropout_p)
        return out

    @staticmethod
    def _drop(weights: Tensor, out: Tensor, num_neighbors: int, seed: Tensor, dropout_p: float) -> None:
        """Scale and drop padded contiguous ``weights`` [B, *S, N, P] into ``out``, which may be the same."""
        tokens, heads = weights.shape[1:-2].numel(), weights.shape[-2]
        _run_rows(
            "dropout", weights, num_neighbors, "2qdQ3Q",
            tokens, heads, 1 / (1 - dropout_p), drop_threshold(dropout_p),
            seed.data_ptr(), weights.data_ptr(), out.data_ptr(),
        )  # fmt: skip


register(NaiveKernel())
