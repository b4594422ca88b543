"""The fused CUDA kernels (csrc/fused): forward and backward on tensor cores that never hold the attention weights.

Limits: any rank and window; float16, bfloat16 and float32 (in TF32 where torch allows it, else as three TF32 products);
head dims that are multiples of 8 up to 256. A call finds its launches by problem and strides, packs its addresses and
launches; everything else is decided once (fused_forward_plan.py, fused_gradient_plan.py) and kept.

Backward launches two kernels, or one for short windows in one dimension. Two allocate 8 bytes a query and head between
them, and with a bias one table of it for every block. Results do not depend on the order of blocks: every run gives the
same bits.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from natrain.jit import cuda
from natrain.jit.build import BuildSpec
from natrain.jit.driver import CudaKernel, can_overlap
from natrain.ops.dropout import drop_threshold
from natrain.ops.fused_device import device_ahead, device_of
from natrain.ops.fused_forward_plan import choose_plan, demands_of_forward
from natrain.ops.fused_gradient_plan import (
    choose_gradient_plan,
    demands_of_kv,
    demands_of_q,
    demands_of_qkv,
    least_gradient_cost,
)
from natrain.ops.fused_plan import Demands, Device, Plan, Space
from natrain.ops.geometry import ACCESS_BYTES, Layout, offset_type, window_defines
from natrain.ops.naive_specs import DTYPES
from natrain.ops.precision import is_tf32_allowed
from natrain.ops.problem import Problem
from natrain.ops.registry import FusedKernel, Limits, register

MAX_HEAD_DIM = 256
# Bytes that the tables of a bias gradient may take, one a block.
MAX_BIAS_WORKSPACE = 2**28

# Two passes of such rows take that much of what is estimated (five problems on an H200: 0.61 to 0.73).
_WIDE_FLOAT32 = 0.7

# After struct Geometry: scale, keep_scale, drop_threshold and the addresses.
_FORWARD = struct.Struct("=2fI4x8Q")
_BACKWARD = struct.Struct("=2fI16Q")


@dataclass(frozen=True)
class _Constants:
    """What is compiled into the kernels of a problem besides their plans."""

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    offset: str
    has_rpb: bool
    has_key_mask: bool
    has_dropout: bool
    tf32_terms: int

    def defines(self) -> dict[str, object]:
        return {
            "NATRAIN_DTYPE": DTYPES[self.dtype],
            "NATRAIN_HEAD_DIM": self.head_dim,
            "NATRAIN_VALUE_DIM": self.value_dim,
            "NATRAIN_OFFSET": self.offset,
            "NATRAIN_HAS_RPB": int(self.has_rpb),
            "NATRAIN_HAS_KEY_MASK": int(self.has_key_mask),
            "NATRAIN_HAS_DROPOUT": int(self.has_dropout),
            "NATRAIN_TF32_TERMS": self.tf32_terms,
        }


@dataclass(frozen=True)
class _Part:
    """One kernel of a problem: what to compile, how to launch it."""

    entry: str
    plan: Plan
    geometry: bytes
    defines: tuple[tuple[str, object], ...]

    @property
    def source(self) -> tuple[str, str]:
        return f"fused/{self.entry}.cu", f"natrain_fused_{self.entry}"

    def load(self, device: int) -> CudaKernel:
        return _load(*self.source, self.defines, device)


@functools.cache
def _load(source: str, name: str, defines: tuple[tuple[str, object], ...], device: int) -> CudaKernel:
    return cuda.load(source, name, dict(defines), device)


def device_for(problem: Problem, device: Device) -> Device:
    """``device`` as the plans of ``problem`` are kept for it: what they depend on besides shapes goes into its name."""
    if not device.tuned_as:
        return device
    terms = _constants(problem, "int").tf32_terms
    grouped = problem.heads // problem.kv_heads
    return replace(device, tuned_as=f"{device.tuned_as}, {problem.dtype}, {terms} terms, {grouped} heads a key")


def _space(problem: Problem) -> Space:
    return Space.of(
        problem.spatial,
        problem.window,
        problem.batch,
        problem.heads,
        problem.kv_heads,
        problem.dtype,
        problem.has_rpb,
    )


def _part(entry: str, problem: Problem, constants: _Constants, plan: Plan, geometry: bytes, **more: int) -> _Part:
    defines = {**window_defines(problem.window), **constants.defines(), **plan.defines(), **more}
    return _Part(entry, plan, geometry, tuple(sorted(defines.items())))


# By kernel; see ``taking``.
_taken: dict[str, Plan] = {}


def _plan(kernel: str, space: Space, demands: Demands, device: Device, bias_entries: int = 0) -> Plan:
    if plan := _taken.get(kernel):
        return plan
    if kernel == "forward":
        return choose_plan(space, demands, device)
    return choose_gradient_plan(space, demands, device, bias_entries)


def forward_part(problem: Problem, constants: _Constants, device: Device) -> _Part:
    space, device = _space(problem), device_for(problem, device)
    plan = _plan("forward", space, demands_of_forward(problem), device)
    return _part("forward", problem, constants, plan, plan.geometry(space))


def can_take_one_pass(problem: Problem) -> bool:
    """Whether csrc/fused/backward_qkv.cu has all that the problem asks for."""
    has_more = problem.has_rpb or problem.has_key_mask or problem.has_dropout or problem.is_grouped
    return not has_more and problem.head_dim + problem.value_dim <= 256


def one_pass_plan(problem: Problem, device: Device) -> Plan | None:
    """The plan of backward_qkv.cu, None where two passes are the faster way or the only one.

    Which way is faster is a matter of the problem and the GPU: by the least estimates, whatever plans were measured.
    """
    if not can_take_one_pass(problem) or not _taken.keys().isdisjoint(("backward_q", "backward_kv")):
        return None
    if taken := _taken.get("backward_qkv"):
        return taken
    space, untuned = _space(problem), replace(device, tuned_as="")
    one, *two = (
        least_gradient_cost(space, demands, untuned)
        for demands in (demands_of_qkv(problem), demands_of_q(problem), demands_of_kv(problem, 3))
    )
    is_wide_float = problem.dtype == torch.float32 and max(problem.head_dim, problem.value_dim) > 64
    if one >= sum(two) * (_WIDE_FLOAT32 if is_wide_float else 1):
        return None
    return choose_gradient_plan(space, demands_of_qkv(problem), device)


def backward_parts(problem: Problem, constants: _Constants, device: Device) -> list[_Part]:
    """The kernels of backward in their order.

    backward_qkv.cu where it is the faster one, else backward_q.cu, then backward_kv.cu once, or for each gradient where
    both would not fit the registers.
    """
    device = device_for(problem, device)
    if one_pass := one_pass_plan(problem, device):
        geometry = one_pass.geometry(_space(problem)) + struct.pack("i", 0)
        return [_part("backward_qkv", problem, constants, one_pass, geometry, NATRAIN_IS_GROUPED=0)]
    entries = math.prod(problem.window.rpb_shape) if problem.has_rpb else 0
    plan = _plan("backward_q", _space(problem), demands_of_q(problem), device, entries)
    # Tables of the bias gradient that blocks leave for a head.
    partials = plan.grid // problem.heads
    geometry = plan.geometry(_space(problem)) + struct.pack("i", partials)
    grouped = {"NATRAIN_IS_GROUPED": int(problem.is_grouped)}
    bias = {"NATRAIN_BIAS_GRAD": int(problem.has_rpb), **grouped}
    parts = [_part("backward_q", problem, constants, plan, geometry, **bias)]
    # Blocks belong to a head of k and v, and go over the heads of q that share it.
    space = replace(_space(problem), heads=problem.kv_heads)
    wide = problem.head_dim + problem.value_dim > 256
    for gradients in (1, 2) if wide else (3,):
        plan = _plan("backward_kv", space, demands_of_kv(problem, gradients), device)
        of_kv = struct.unpack("16i", plan.geometry(space))
        geometry = struct.pack(
            "17i", *of_kv[:10], problem.heads // problem.kv_heads, *of_kv[11:], partials,
        )  # fmt: skip
        # The first that runs adds up the bias gradient.
        bias = {"NATRAIN_BIAS_GRAD": int(problem.has_rpb and gradients != 2), "NATRAIN_GRADIENTS": gradients, **grouped}
        parts.append(_part("backward_kv", problem, constants, plan, geometry, **bias))
    return parts


def _constants(problem: Problem, offset: str) -> _Constants:
    is_float = problem.dtype == torch.float32
    return _Constants(
        problem.dtype,
        problem.head_dim,
        problem.value_dim,
        offset,
        problem.has_rpb,
        problem.has_key_mask,
        problem.has_dropout,
        0 if not is_float else 1 if is_tf32_allowed() else 3,
    )


def _is_readable(x: Tensor) -> bool:
    """Whether every row of D can be fetched by 16-byte accesses where it lies."""
    width = ACCESS_BYTES // x.element_size()
    layout = Layout.of(x)
    is_aligned = not any(stride % width for stride in layout.packed) and x.data_ptr() % ACCESS_BYTES == 0
    return is_aligned and (x.stride(-1) == 1 or x.shape[-1] == 1)


def _readable(x: Tensor) -> Tensor:
    return x if _is_readable(x) else x.clone(memory_format=torch.contiguous_format)


def _as_bias(rpb: Tensor) -> Tensor:
    return rpb if rpb.dtype is torch.float32 and rpb.is_contiguous() else rpb.float().contiguous()


@dataclass(frozen=True)
class _Launch:
    """A launch but for the bytes between ``head`` and ``tail``."""

    kernel: CudaKernel
    grid: int
    threads: int
    shared_bytes: int
    head: bytes
    tail: bytes
    overlaps: bool  # the launch before it

    @staticmethod
    def of(part: _Part, tensors: Sequence[Tensor], device: int, overlaps: bool = False) -> _Launch:
        numbers = [number for x in tensors for number in Layout.of(x).packed]
        plan = part.plan
        tail = struct.pack(f"{len(numbers)}q", *numbers)
        return _Launch(part.load(device), plan.grid, plan.threads, plan.shared_bytes, part.geometry, tail, overlaps)

    def __call__(self, middle: bytes, device: int) -> None:
        arguments = self.head + middle + self.tail
        self.kernel.launch(self.grid, self.threads, arguments, device, self.shared_bytes, self.overlaps)


class _Ready(NamedTuple):
    """A forward or backward but for addresses.

    ``results``: what it allocates, each as a tensor without memory: torch makes one like another in half the time that
    it takes from a shape and a dtype.
    """

    launches: tuple[_Launch, ...]
    results: tuple[Tensor, ...]


def _as_whole(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    whole = torch.empty(1, dtype=dtype, device=like.device).expand(shape)
    # Its memory would outlive a CUDA graph's pool, if that was where the first call took it from.
    whole.untyped_storage().resize_(0)
    return whole


def _allocated(pattern: Tensor) -> Tensor:
    return torch.empty_like(pattern, memory_format=torch.contiguous_format)


# Keyed by all that a launch depends on but addresses; emptied when shapes keep changing. None: a tensor must be copied.
_launches: dict[tuple, _Ready | None] = {}
_MOST_LAUNCHES = 4096


@contextmanager
def launching(launches: dict) -> Iterator[None]:
    """Calls launch what ``launches`` remembers, and remember there what it does not hold yet."""
    global _launches
    before, _launches = _launches, launches
    try:
        yield
    finally:
        _launches = before


def launches() -> dict:
    """What calls have planned so far, for ``launching``."""
    return _launches


@contextmanager
def taking(kernel: str, plan: Plan) -> Iterator[None]:
    """Let ``kernel`` (forward, backward_q, backward_kv or backward_qkv) take ``plan``, and plan everything anew.

    backward_qkv takes the place of the other two: their plans call for two passes, any other for one if it can be.
    """
    with launching({}):
        _taken[kernel] = plan
        try:
            yield
        finally:
            del _taken[kernel]


def forget_plans() -> None:
    """Choose anew for what comes: another plan may be the fastest known."""
    _launches.clear()
    choose_plan.cache_clear()
    choose_gradient_plan.cache_clear()


def _remember(key: tuple, value: _Ready | None) -> _Ready | None:
    if len(_launches) >= _MOST_LAUNCHES:
        _launches.clear()
    _launches[key] = value
    return value


class FusedCuda(FusedKernel):
    """One kernel forward, one or two backward."""

    name = "fused"
    summary = "CUDA tensor cores, fused; any rank and window, trainable bias, one backward"
    priority = 20
    limits = Limits(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.float32, torch.float16, torch.bfloat16}),
        min_capability=(8, 0),
        max_head_dim=MAX_HEAD_DIM,
        head_dim_multiple=8,
        gqa=True,
        value_dim=True,
        key_mask=True,
    )

    def extra_reasons(self, problem: Problem) -> list[str]:
        reasons = cuda.reasons_against(problem.capability)
        reasons += [f"{name} 0 (at least 8)" for name in ("head_dim", "value_dim") if getattr(problem, name) == 0]
        # Symbolic sizes cannot be planned for; the launch will be, of the sizes that come.
        if reasons or problem.is_symbolic or not problem.batch or not problem.heads:
            return reasons
        device = Device(problem.capability) if problem.capability else Device()
        try:
            parts = [forward_part(problem, _constants(problem, "int"), device)]
            if problem.needs_grad:
                parts += backward_parts(problem, _constants(problem, "int"), device)
        except ValueError:
            return [f"shared memory of capability {device.capability} (too little for this window and head_dim)"]
        if problem.needs_grad and problem.has_rpb:
            workspace = 4 * parts[1].plan.grid * math.prod(problem.window.rpb_shape)
            if workspace > MAX_BIAS_WORKSPACE:
                reasons.append(f"bias gradient's workspace {workspace >> 20} MiB (at most {MAX_BIAS_WORKSPACE >> 20})")
        return reasons

    def build_specs(self, problem: Problem, arch: str) -> list[BuildSpec]:
        device = device_ahead(divmod(int("".join(filter(str.isdigit, arch))), 10))
        span = problem.num_tokens * max(problem.heads * problem.head_dim, problem.kv_heads * problem.value_dim)
        # A packed projection's image spans three times as much as a tensor of its own.
        constants = _constants(problem, "int" if 3 * span < 2**31 else "long long")
        parts = [forward_part(problem, constants, device)]
        if problem.needs_grad:
            parts += backward_parts(problem, constants, device)
        return [cuda.kernel_spec(*part.source, dict(part.defines), arch) for part in parts]

    def forward(self, problem, q, k, v, rpb, key_mask, seed, scale, dropout_p):
        if not q.numel() or not v.numel():
            return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)
        device = q.get_device()
        addresses = q.data_ptr(), k.data_ptr(), v.data_ptr()
        key = (
            problem, device, (addresses[0] | addresses[1] | addresses[2]) % ACCESS_BYTES,
            q.dtype is torch.float32 and is_tf32_allowed(), q.stride(), k.stride(), v.stride(),
        )  # fmt: skip
        found = _launches.get(key, self)
        if found is self:
            found = _remember(key, self._plan_forward(problem, q, k, v, device))
        if found is None:
            return self.forward(
                problem, _readable(q), _readable(k), _readable(v), rpb, key_mask, seed, scale, dropout_p
            )
        out, lse = map(_allocated, found.results)
        rpb = None if rpb is None else _as_bias(rpb)
        key_mask = None if key_mask is None else key_mask.contiguous()
        middle = _FORWARD.pack(
            scale, 1 / (1 - dropout_p), drop_threshold(dropout_p), *addresses, out.data_ptr(), lse.data_ptr(),
            0 if rpb is None else rpb.data_ptr(), 0 if key_mask is None else key_mask.data_ptr(),
            0 if seed is None else seed.data_ptr(),
        )  # fmt: skip
        found.launches[0](middle, device)
        return out, lse

    @staticmethod
    def _plan_forward(problem: Problem, q: Tensor, k: Tensor, v: Tensor, device: int):
        tensors = (q, k, v)
        if not all(map(_is_readable, tensors)):
            return None
        # out has no gaps, and may be wider than any of them.
        out = Layout(0, (0, 0, 0), 0, problem.num_tokens * problem.heads * problem.value_dim)
        offset = offset_type(*map(Layout.of, tensors), out)
        part = forward_part(problem, _constants(problem, offset), device_of(device))
        results = _as_whole(q, (*q.shape[:-1], v.shape[-1]), q.dtype), _as_whole(q, q.shape[:-1], torch.float32)
        return _Ready((_Launch.of(part, tensors, device),), results)

    def backward(
        self, problem, d_out, d_lse, q, k, v, rpb, key_mask, out, lse, seed, scale, dropout_p, d_q, d_k, d_v
    ):  # fmt: skip
        if not q.numel() or not v.numel():
            return None if rpb is None else torch.zeros_like(rpb, dtype=torch.float32)
        device = q.get_device()
        tensors = q, k, v, out, d_out, d_q, d_k, d_v
        addresses = [x.data_ptr() for x in tensors]
        alignment = 0
        for address in addresses:
            alignment |= address
        key = (
            problem, device, alignment % ACCESS_BYTES, q.dtype is torch.float32 and is_tf32_allowed(),
            *[x.stride() for x in tensors],
        )  # fmt: skip
        found = _launches.get(key, self)
        if found is self:
            found = _remember(key, self._plan_backward(problem, tensors, device))
        if found is None:
            readable = [_readable(x) for x in (d_out, q, k, v, out)]
            written = [_readable(x) for x in (d_q, d_k, d_v)]
            d_rpb = self.backward(
                problem, readable[0], d_lse, *readable[1:4], rpb, key_mask, readable[4], lse, seed, scale, dropout_p,
                *written,
            )  # fmt: skip
            for to, x in zip((d_q, d_k, d_v), written, strict=True):
                if to is not x:
                    to.copy_(x)
            return d_rpb
        results = [_allocated(pattern) for pattern in found.results]
        statistics = results[0] if results else None
        partial = d_rpb = None
        if rpb is not None:
            rpb = _as_bias(rpb)
            d_rpb, partial = torch.empty_like(rpb), results[1]
        key_mask = None if key_mask is None else key_mask.contiguous()
        d_lse = None if d_lse is None else d_lse.contiguous()
        optional = (statistics, partial, d_rpb, rpb, key_mask, seed)
        middle = _BACKWARD.pack(
            scale, 1 / (1 - dropout_p), drop_threshold(dropout_p), *addresses[:5], lse.data_ptr(),
            0 if d_lse is None else d_lse.data_ptr(), *addresses[5:],
            *[0 if x is None else x.data_ptr() for x in optional],
        )  # fmt: skip
        for launch in found.launches:
            launch(middle, device)
        return d_rpb

    @staticmethod
    def _plan_backward(problem: Problem, tensors: Sequence[Tensor], device: int):
        if not all(map(_is_readable, tensors)):
            return None
        offset = offset_type(*map(Layout.of, tensors))
        problem = replace(problem, needs_grad=True)
        parts = backward_parts(problem, _constants(problem, offset), device_of(device))
        overlaps = can_overlap(device)
        launches = [_Launch.of(part, tensors, device, overlaps and index > 0) for index, part in enumerate(parts)]
        # The statistics of queries, and a table of the bias for every block.
        results = []
        if len(parts) > 1:
            results.append((problem.batch, problem.heads, problem.num_tokens, 2))
        if problem.has_rpb:
            results.append((parts[0].plan.grid, math.prod(problem.window.rpb_shape)))
        return _Ready(tuple(launches), tuple(_as_whole(tensors[0], shape, torch.float32) for shape in results))


register(FusedCuda())
