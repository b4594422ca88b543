"""The contenders of a comparison: natrain's kernels by name; peers are in ``natrain.bench.peers``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

import natrain
from natrain.bench.case import Case
from natrain.bench.measure import on_timing_stream
from natrain.bench.truth import Inputs
from natrain.errors import invalid, nearest
from natrain.jit import BuildSpec
from natrain.ops.registry import get_kernel, list_kernels


class Work(Protocol):
    """One problem on one contender, on inputs of its own layout that were laid out before any time is taken."""

    def forward(self) -> Tensor:
        """The output, with what backward needs kept."""

    def inputs(self) -> Sequence[Tensor]:
        """What gets a gradient: q, k, v (or them packed), and the bias last where there is one."""

    def d_out(self) -> Tensor:
        """The gradient of the output, in its layout."""

    def heads_last(self, out: Tensor) -> Tensor:
        """An output as [B, *S, N, D]."""

    def split(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(d_q, d_k, d_v), each [B, *S, N, D], out of the gradients of ``inputs``."""

    def d_rpb(self, gradients: Sequence[Tensor]) -> Tensor | None:
        """That of the bias [N, 2k-1, ...] out of the gradients of ``inputs``; None where it has none of its own."""


class Arm(Protocol):
    """A contender: what it cannot do, what it needs compiled, and its work on a problem."""

    name: str

    def reasons(self, case: Case, device: str, direction: str) -> list[str]:
        """Why it cannot solve ``case`` here; empty when it can."""

    def build_specs(self, case: Case, arch: str) -> list[BuildSpec]:
        """What it launches, to be compiled ahead; empty where nothing is."""

    def work(self, case: Case, inputs: Inputs) -> Work: ...


def backward_of(work: Work) -> Callable[[], tuple[Tensor, ...]]:
    """A call of the backward alone, on what one forward kept.

    Backward runs on the stream of its forward: the one that is timed.
    """
    inputs, d_out = work.inputs(), work.d_out()
    if d_out.device.type == "cpu":
        out = work.forward()
    else:
        with on_timing_stream():
            out = work.forward()
    return lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True)


class _PackedWork:
    """natrain on a packed projection, read and differentiated in place."""

    def __init__(self, case: Case, inputs: Inputs, kernel: str) -> None:
        window = case.window
        needs_grad = get_kernel(kernel).limits.backward
        self._qkv = inputs.qkv.detach().requires_grad_(needs_grad)
        self._rpb = None if inputs.rpb is None else inputs.rpb.detach().requires_grad_(needs_grad)
        self._d_out = inputs.d_out
        self._attend = getattr(natrain, f"{case.op}_qkvpacked")
        self._arguments = (window.kernel_size, window.dilation, window.stride, window.is_causal)
        self._kernel = kernel

    def forward(self) -> Tensor:
        return self._attend(self._qkv, *self._arguments, rpb=self._rpb, kernel=self._kernel)

    def inputs(self) -> Sequence[Tensor]:
        return (self._qkv,) if self._rpb is None else (self._qkv, self._rpb)

    def d_out(self) -> Tensor:
        return self._d_out

    def heads_last(self, out: Tensor) -> Tensor:
        return out

    def split(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return gradients[0].unbind(-3)

    def d_rpb(self, gradients: Sequence[Tensor]) -> Tensor | None:
        return None if self._rpb is None else gradients[1]


class KernelArm:
    """A kernel of natrain, or of a package that registers one; ``name`` may differ from it (two commits of one)."""

    def __init__(self, kernel: str, name: str | None = None) -> None:
        self.kernel = get_kernel(kernel)
        self.name = name or kernel

    def reasons(self, case: Case, device: str, direction: str) -> list[str]:
        capability = torch.cuda.get_device_capability() if device == "cuda" else None
        # Forward is timed as training runs it, unless the kernel has nothing else.
        needs_grad = direction == "backward" or self.kernel.limits.backward
        return self.kernel.unsupported_reasons(case.problem(device, capability, needs_grad))

    def build_specs(self, case: Case, arch: str) -> list[BuildSpec]:
        capability = tuple(divmod(int("".join(filter(str.isdigit, arch))), 10))
        problem = case.problem("cuda", capability, self.kernel.limits.backward)
        if self.kernel.unsupported_reasons(problem):
            return []
        # Kernels of an older commit may not have the method; they are compiled when they are first called.
        return getattr(self.kernel, "build_specs", lambda *_: [])(problem, arch)

    def work(self, case: Case, inputs: Inputs) -> Work:
        return _PackedWork(case, inputs, self.kernel.name)


def find_arm(name: str) -> Arm:
    """The contender of that name.

    Raises:
        ValueError: there is none.
    """
    from natrain.bench.peers import PEERS

    if name in PEERS:
        return PEERS[name]
    if name in list_kernels():
        return KernelArm(name)
    names = [*list_kernels(), *PEERS]
    raise invalid("kernels", name, f"some of {', '.join(names)}", f"kernels={nearest(name, names) or names[0]}")
