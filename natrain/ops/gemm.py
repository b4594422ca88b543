"""The gemm kernels: qk, av and inverse as products of the tensor core over a tile and its halo; csrc/gemm holds them.

Limits: float16, bfloat16, float32 from sm_80 on, head dims in multiples of 8, any rank and window. float32 is TF32
where torch allows it, else three TF32 products that keep 21 bits of each factor. Softmax and its derivative happen in
qk, before rows of weights leave a block, where whole rows fit there; else they, as dropout and the bias gradient, are
naive's kernels. So is a primitive whose tensors are not aligned to 16 bytes, or whose halo does
not fit into shared memory.
"""

from __future__ import annotations

import functools
import math
import struct

import torch
from torch import Tensor

from natrain.jit import BuildSpec, cuda
from natrain.jit.driver import CudaKernel
from natrain.ops.fused_plan import shared_capacity
from natrain.ops.gemm_plan import GemmTiling, RowStep, choose_gemm_tiling
from natrain.ops.geometry import (
    ACCESS_BYTES,
    Layout,
    access_width,
    offset_type,
    three_axes,
    weights_pitch,
    window_defines,
)
from natrain.ops.naive import NaiveKernel, Plan, plans, remember
from natrain.ops.naive_specs import DTYPES
from natrain.ops.precision import is_tf32_allowed
from natrain.ops.problem import Problem, Window
from natrain.ops.registry import Limits, register


def gemm_defines(
    primitive: str,
    dtype: torch.dtype,
    window: Window,
    head_dim: int,
    tiling: GemmTiling,
    terms: int,
    offset: str,
    has_rpb: bool,
    row_step: RowStep = RowStep.NONE,
) -> dict[str, object]:
    """The constants of csrc/gemm/*.cuh; lengths, dilation, heads and strides stay run-time arguments."""
    defines = {
        "NATRAIN_RANK": window.na_dim,
        "NATRAIN_DTYPE": DTYPES[dtype],
        **window_defines(window),
        "NATRAIN_HEAD_DIM": head_dim,
        "NATRAIN_PITCH": weights_pitch(window.num_neighbors, dtype),
        "NATRAIN_OFFSET": offset,
        "NATRAIN_BY_KEY": int(primitive == "inverse"),
        "NATRAIN_HAS_RPB": int(has_rpb),
        "NATRAIN_ROW_STEP": int(row_step),
        "NATRAIN_IS_STAGED": int(tiling.is_staged),
        "NATRAIN_SLICES": tiling.slices,
        "NATRAIN_COLUMNS": tiling.columns,
        "NATRAIN_CHUNK": tiling.chunk,
        "NATRAIN_HELD": tiling.held,
        "NATRAIN_BIAS_BYTES": tiling.bias_bytes,
        "NATRAIN_MIN_BLOCKS": tiling.min_blocks,
        "NATRAIN_TERMS": terms,
        "NATRAIN_SHARED_BYTES": tiling.shared_bytes,
    }
    for name, values in (("ROW", tiling.row), ("WARPS", tiling.warps), ("HALO", tiling.halo), ("BOX", tiling.box)):
        for axis, value in zip("ZYX", values, strict=True):
            defines[f"NATRAIN_{name}_{axis}"] = value
    return defines


@functools.cache
def _kernel(primitive: str, device: int, *constants) -> CudaKernel:
    return cuda.load(f"gemm/{primitive}.cu", f"natrain_gemm_{primitive}", gemm_defines(primitive, *constants), device)


def _terms(dtype: torch.dtype) -> int:
    return 3 if dtype == torch.float32 and not is_tf32_allowed() else 1


def _plan(
    primitive: str,
    window: Window,
    row: Tensor,
    tensors: tuple[Tensor, ...],
    terms: int,
    has_rpb: bool,
    row_step: RowStep,
) -> Plan | None:
    """None where naive's kernel takes the primitive, or the row step."""
    batch, *axes, heads, head_dim = row.shape
    whole = ACCESS_BYTES // row.element_size()
    if access_width(whole, *tensors) < whole or head_dim % whole:
        return None
    device = row.get_device()
    capability = torch.cuda.get_device_capability(device) if row.is_cuda else None
    shared = shared_capacity(capability)[1]
    tiling = choose_gemm_tiling(primitive, tuple(axes), window, head_dim, row.dtype, has_rpb, shared, row_step)
    if tiling is None:
        return None
    layouts = [Layout.of(x) for x in tensors]
    kernel = _kernel(
        primitive, device, row.dtype, window, head_dim, tiling, terms, offset_type(*layouts), has_rpb, row_step
    )  # fmt: skip
    dilation = three_axes(window.dilation, 1)
    head = struct.pack("11i4x", *three_axes(axes, 1), *dilation, *tiling.tiles, heads, batch)
    middle = struct.Struct("2d7Q" if primitive == "qk" else "d3Q")
    tail = struct.pack("15q", *(number for layout in layouts for number in layout.packed))
    blocks = batch * heads * math.prod(t * d for t, d in zip(tiling.tiles, dilation, strict=True))
    if primitive != "qk":
        blocks *= tiling.slices
    return Plan(kernel, blocks, tiling.threads, middle, head, tail, tiling.shared_bytes)


class GemmKernel(NaiveKernel):
    """qk, av and inverse on tensor cores, the rest of unfused attention as in naive."""

    name = "gemm"
    summary = "CUDA tensor cores, implicit matrix products over tiles, every attention weight in memory"
    priority = 40
    limits = Limits(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.float32, torch.float16, torch.bfloat16}),
        min_capability=(8, 0),
        head_dim_multiple=8,
        value_dim=True,
        unfused=True,
        double_backward=True,
        forward_ad=True,
    )

    def write_scores(
        self, window: Window, q: Tensor, k: Tensor, rpb: Tensor | None, scale: float, fill: float, scores: Tensor
    ) -> None:
        padded = self._padded(scores, window)
        plan = self._find_plan("qk", window, q, (q, k, padded), rpb is not None)
        if plan is None:
            return super().write_scores(window, q, k, rpb, scale, fill, scores)
        self._launch_qk(plan, q, k, rpb, scale, fill, padded)
        if padded is not scores:
            scores.copy_(padded[..., : window.num_neighbors])

    def write_probs(
        self, window: Window, q: Tensor, k: Tensor, rpb: Tensor | None, scale: float, probs: Tensor, lse: Tensor
    ) -> None:
        plan = self._find_plan("qk", window, q, (q, k, probs), rpb is not None, RowStep.SOFTMAX)
        if plan is None:
            return super().write_probs(window, q, k, rpb, scale, probs, lse)
        self._launch_qk(plan, q, k, rpb, scale, -math.inf, probs, lse=lse)

    def write_d_scores(
        self, window: Window, d_out: Tensor, v: Tensor, probs: Tensor, d_lse: Tensor | None, d_scores: Tensor
    ) -> None:
        plan = self._find_plan("qk", window, d_out, (d_out, v, d_scores), False, RowStep.SOFTMAX_GRAD)
        if plan is None:
            return super().write_d_scores(window, d_out, v, probs, d_lse, d_scores)
        self._launch_qk(plan, d_out, v, None, 1.0, 0.0, d_scores, probs, None, d_lse)

    @staticmethod
    def _launch_qk(
        plan: Plan,
        q: Tensor,
        k: Tensor,
        rpb: Tensor | None,
        scale: float,
        fill: float,
        scores: Tensor,
        probs: Tensor | None = None,
        lse: Tensor | None = None,
        d_lse: Tensor | None = None,
    ) -> None:
        if rpb is not None:
            rpb = rpb.float().contiguous()
        optional = (0 if x is None else x.data_ptr() for x in (probs, lse, d_lse))
        addresses = (q.data_ptr(), k.data_ptr(), 0 if rpb is None else rpb.data_ptr(), scores.data_ptr(), *optional)
        plan.launch(q.get_device(), scale, fill, *addresses)

    def write_sums(self, primitive: str, window: Window, weights: Tensor, x: Tensor, out: Tensor, scale: float) -> None:
        padded = self._padded(weights, window)
        plan = self._find_plan(primitive, window, out, (padded, x, out), False)
        if plan is None:
            return super().write_sums(primitive, window, weights, x, out, scale)
        if padded is not weights:
            padded[..., : window.num_neighbors] = weights
        plan.launch(out.get_device(), scale, padded.data_ptr(), x.data_ptr(), out.data_ptr())

    @staticmethod
    def _padded(weights: Tensor, window: Window) -> Tensor:
        """``weights`` if its rows are padded and aligned, else an empty tensor whose rows are."""
        pitch = weights_pitch(window.num_neighbors, weights.dtype)
        whole = ACCESS_BYTES // weights.element_size()
        if weights.shape[-1] == pitch and access_width(whole, weights) == whole:
            return weights
        return weights.new_empty(*weights.shape[:-1], pitch)

    @staticmethod
    def _find_plan(
        primitive: str,
        window: Window,
        row: Tensor,
        tensors: tuple[Tensor, ...],
        has_rpb: bool,
        row_step: RowStep = RowStep.NONE,
    ) -> Plan | None:
        if not row.numel():
            return None
        terms, device = _terms(row.dtype), row.get_device()
        key = ("gemm", primitive, row_step, window, row.shape, row.dtype, terms, has_rpb, device)
        key += tuple(x.stride() for x in tensors) + tuple(x.data_ptr() % ACCESS_BYTES for x in tensors)
        if key not in plans:
            remember(key, _plan(primitive, window, row, tensors, terms, has_rpb, row_step))
        return plans[key]

    def build_specs(self, problem: Problem, arch: str) -> list[BuildSpec]:
        """Of aligned tensors; with both precisions of float32, since torch's setting may change."""
        window, dtype = problem.window, problem.dtype
        # A packed projection's image spans three times as much as a tensor of its own.
        span = problem.num_tokens * problem.heads
        span *= max(3 * problem.head_dim, problem.value_dim, weights_pitch(window.num_neighbors, dtype))
        offset = "int" if span < 2**31 else "long long"
        _, shared = shared_capacity(divmod(int("".join(filter(str.isdigit, arch))), 10))

        def tiling_of(primitive: str, head_dim: int, has_rpb: bool, step: RowStep) -> GemmTiling | None:
            return choose_gemm_tiling(primitive, problem.spatial, window, head_dim, dtype, has_rpb, shared, step)

        dims = (problem.head_dim, problem.value_dim)
        wanted = {(name, dim, False, RowStep.NONE) for name in ("av", "inverse") for dim in dims}
        # What naive's kernels need not do: the softmax where qk does, the products but for those without a tiling.
        spared = {"natrain_naive_qk", "natrain_naive_av", "natrain_naive_inverse"}
        steps = {
            RowStep.SOFTMAX: ("softmax", problem.head_dim, problem.has_rpb),
            RowStep.SOFTMAX_GRAD: ("softmax_grad", problem.value_dim, False),
        }
        for step, (name, dim, has_rpb) in steps.items():
            # Dropout comes between d_out . v and the derivative of the softmax.
            is_between = problem.has_dropout and step == RowStep.SOFTMAX_GRAD
            is_taken = not is_between and tiling_of("qk", dim, has_rpb, step) is not None
            wanted.add(("qk", dim, has_rpb, step if is_taken else RowStep.NONE))
            spared |= {f"natrain_naive_{name}"} if is_taken else set()
        specs = []
        for primitive, head_dim, has_rpb, step in sorted(wanted):
            tiling = tiling_of(primitive, head_dim, has_rpb, step)
            if tiling is None:
                spared.discard(f"natrain_naive_{primitive}")
                continue
            for terms in (1, 3) if dtype == torch.float32 else (1,):
                defines = gemm_defines(primitive, dtype, window, head_dim, tiling, terms, offset, has_rpb, step)
                specs.append(cuda.kernel_spec(f"gemm/{primitive}.cu", f"natrain_gemm_{primitive}", defines, arch))
        return specs + [spec for spec in super().build_specs(problem, arch) if spec.name not in spared]


register(GemmKernel())
