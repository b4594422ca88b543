"""The naive kernels: one group of threads per query (or key), every attention weight in memory; csrc/naive holds them.

Limits: any rank, head dim, window and dtype of float64, float32, float16, bfloat16 (16 bits accumulate in float32).
Attention weights are stored in q's dtype, their rows padded to 16 bytes inside an operator.
"""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from natrain.jit import cuda
from natrain.jit.build import BuildSpec
from natrain.jit.driver import CudaKernel
from natrain.ops.dropout import drop_threshold
from natrain.ops.geometry import (
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
    window_defines,
)
from natrain.ops.problem import Problem, Window
from natrain.ops.reference import accumulate_dtype
from natrain.ops.registry import Limits, UnfusedAttentionKernel, register

_DTYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.float16: "natrain::float16",
    torch.bfloat16: "natrain::bfloat16",
}


def kernel_spec(primitive: str, defines: dict[str, object], arch: str) -> BuildSpec:
    """What to compile for one specialisation of csrc/naive/<primitive>.cu."""
    return cuda.kernel_spec(f"naive/{primitive}.cu", f"natrain_naive_{primitive}", defines, arch)


def problem_defines(
    dtype: torch.dtype,
    window: Window,
    head_dim: int,
    vector: int,
    weight_vector: int,
    lanes: int,
    offset: str,
    has_rpb: bool,
) -> dict[str, object]:
    """The constants of csrc/naive/problem.cuh; lengths, dilation, heads and strides stay run-time arguments."""
    return {
        "NATRAIN_DTYPE": _DTYPES[dtype],
        **window_defines(window),
        "NATRAIN_HEAD_DIM": head_dim,
        "NATRAIN_VECTOR": vector,
        "NATRAIN_WEIGHT_VECTOR": weight_vector,
        "NATRAIN_LANES": lanes,
        "NATRAIN_OFFSET": offset,
        "NATRAIN_HAS_RPB": int(has_rpb),
    }


def row_defines(dtype: torch.dtype, num_neighbors: int, pitch: int) -> tuple[dict[str, object], int]:
    """The constants of csrc/naive/weight_rows.cuh, and how many threads share a row."""
    vector = weights_pitch(1, dtype)
    # Two vectors a lane keep more bytes in flight than one, and waste fewer lanes of a short row.
    lanes = lanes_of_row(-(-pitch // (2 * vector)), 1, most=32)
    defines = {
        "NATRAIN_DTYPE": _DTYPES[dtype],
        "NATRAIN_NEIGHBORS": num_neighbors,
        "NATRAIN_PITCH": pitch,
        "NATRAIN_WEIGHT_VECTOR": vector,
        "NATRAIN_LANES": lanes,
    }
    return defines, lanes


@functools.cache
def _problem_kernel(primitive: str, device: int, *constants) -> CudaKernel:
    return _load(primitive, problem_defines(*constants), device)


@functools.cache
def _row_kernel(primitive: str, device: int, *constants) -> tuple[CudaKernel, int]:
    defines, lanes = row_defines(*constants)
    return _load(primitive, defines, device), lanes


def _load(primitive: str, defines: dict[str, object], device: int) -> CudaKernel:
    return cuda.load(f"naive/{primitive}.cu", f"natrain_naive_{primitive}", defines, device)


def _run_rows(primitive: str, weights: Tensor, num_neighbors: int, form: str, *arguments) -> None:
    """Launch a kernel on every row of padded ``weights`` [.., P]; its struct begins with the number of rows."""
    rows = weights.numel() // weights.shape[-1]
    if not rows:
        return
    kernel, lanes = _row_kernel(primitive, weights.get_device(), weights.dtype, num_neighbors, weights.shape[-1])
    grid = -(-rows * lanes // MAX_THREADS)
    kernel.launch(grid, MAX_THREADS, struct.pack("q" + form, rows, *arguments), weights.get_device())


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
    head_dim, heads = row.shape[-1], row.shape[-2]
    rows = [x for x in tensors if x is not weights]
    vector = access_width(head_dim, *rows)
    weight_vector = access_width(weights.shape[-1], weights)
    lanes = lanes_of_row(head_dim, vector)
    layouts = [Layout.of(x) for x in tensors]
    device = row.get_device()
    kernel = _problem_kernel(
        primitive, device, row.dtype, window, head_dim, vector, weight_vector, lanes, offset_type(*layouts),
        rpb is not None,
    )  # fmt: skip
    spatial, dilation = three_axes(row.shape[1:-2], 1), three_axes(window.dilation, 1)
    tiling = choose_tiling(
        spatial, dilation, three_axes(window.kernel_size, 1), heads, head_dim * row.element_size(), lanes
    )
    pointers = [x.data_ptr() for x in tensors]
    if primitive == "qk":
        pointers.insert(2, 0 if rpb is None else rpb.data_ptr())
    numbers = [number for layout in layouts for number in layout.packed]
    if primitive == "qk":
        numbers.append(weights.shape[-1])
    arguments = struct.pack(
        f"16i{len(scalars)}d{len(pointers)}Q{len(numbers)}q",
        *spatial, *dilation, *tiling.tile, *tiling.tiles, heads, tiling.head_tile, tiling.head_tiles, row.shape[0],
        *scalars, *pointers, *numbers,
    )  # fmt: skip
    kernel.launch(row.shape[0] * tiling.blocks_per_image, tiling.threads, arguments, device)


def _qk(window: Window, q: Tensor, k: Tensor, rpb: Tensor | None, scale: float, fill: float, scores: Tensor) -> None:
    if rpb is not None:
        rpb = rpb.to(accumulate_dtype(q.dtype)).contiguous()
    _run("qk", window, scores, q, (q, k, scores), (scale, fill), rpb)


def _rpb_grad(window: Window, weights: Tensor) -> Tensor:
    """[N, 2k-1, ...] in the accumulator's dtype; ``weights`` [B, *S, N, K or P]."""
    batch, *spatial, heads, _ = weights.shape
    acc = accumulate_dtype(weights.dtype)
    shape = (heads, *window.rpb_shape)
    entries = Tensor.numel(torch.empty(window.rpb_shape, device="meta"))
    if not weights.numel():
        return torch.zeros(shape, dtype=acc, device=weights.device)
    layout, device = Layout.of(weights), weights.get_device()
    kernel = _problem_kernel("rpb_grad", device, weights.dtype, window, 1, 1, 1, 1, offset_type(layout), False)
    z, y, x = three_axes(spatial, 1)
    warps = -(-entries // 32)
    entry_blocks = -(-warps * 32 // MAX_THREADS)
    threads = -(-warps // entry_blocks) * 32
    chunks = choose_chunks(batch, z * y, x, heads * entry_blocks)
    count = chunks.count[0] * chunks.count[1] * chunks.count[2]
    partial = torch.empty(count, *shape, dtype=acc, device=weights.device)
    arguments = struct.pack(
        "16i6i2Q5q",
        z, y, x, *three_axes(window.dilation, 1), 1, 1, 1, 1, 1, 1, heads, 1, 1, batch,
        *chunks.size, *chunks.count, weights.data_ptr(), partial.data_ptr(), *layout.packed,
    )  # fmt: skip
    kernel.launch(count * heads * entry_blocks, threads, arguments, device)
    return partial.sum(0)


class NaiveKernel(UnfusedAttentionKernel):
    """The readable family: all four primitives, and attention out of them over padded weights."""

    name = "naive"
    summary = "CUDA, one group of threads per query; any rank, head dim and dtype, derivatives of any order"
    priority = 50
    limits = Limits(
        devices=frozenset({"cuda"}),
        dtypes=frozenset(_DTYPES),
        unfused=True,
        double_backward=True,
        forward_ad=True,
    )

    def extra_reasons(self, problem: Problem) -> list[str]:
        return cuda.reasons_against(problem.capability)

    def qk(self, problem: Problem, q: Tensor, k: Tensor, rpb: Tensor | None, scale: float, fill: float) -> Tensor:
        scores = q.new_empty(*q.shape[:-1], problem.window.num_neighbors)
        _qk(problem.window, contiguous_rows(q), contiguous_rows(k), rpb, scale, fill, scores)
        return scores

    def av(self, problem: Problem, weights: Tensor, v: Tensor) -> Tensor:
        return self._weighted("av", problem, weights, v)

    def inverse(self, problem: Problem, weights: Tensor, x: Tensor) -> Tensor:
        return self._weighted("inverse", problem, weights, x)

    @staticmethod
    def _weighted(primitive: str, problem: Problem, weights: Tensor, x: Tensor) -> Tensor:
        weights, x = contiguous_rows(weights), contiguous_rows(x)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        _run(primitive, problem.window, weights, out, (weights, x, out), (1.0,))
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
        seed: Tensor | None,
        scale: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        window, num_neighbors = problem.window, problem.window.num_neighbors
        q, k, v = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v)
        probs = self.empty_probs(q, window)
        lse = q.new_empty(q.shape[:-1], dtype=accumulate_dtype(q.dtype))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        _qk(window, q, k, rpb, scale, -float("inf"), probs)
        _run_rows("softmax", probs, num_neighbors, "3Q", probs.data_ptr(), probs.data_ptr(), lse.data_ptr())
        weights = self._dropped(probs, num_neighbors, seed, dropout_p)
        _run("av", window, weights, out, (weights, v, out), (1.0,))
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
        _run("inverse", window, weights, d_v, (weights, d_out, d_v), (1.0,))
        d_scores = torch.empty_like(probs)
        _qk(window, d_out, v, None, 1.0, 0.0, d_scores)
        if seed is not None:
            self._drop(d_scores, d_scores, num_neighbors, seed, dropout_p)
        if d_lse is not None:
            d_lse = d_lse.contiguous()
        _run_rows(
            "softmax_grad", probs, num_neighbors, "4Q",
            probs.data_ptr(), d_scores.data_ptr(), 0 if d_lse is None else d_lse.data_ptr(), d_scores.data_ptr(),
        )  # fmt: skip
        _run("av", window, d_scores, d_q, (d_scores, k, d_q), (scale,))
        _run("inverse", window, d_scores, d_k, (d_scores, q, d_k), (scale,))
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
