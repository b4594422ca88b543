"""What every operator takes besides tensors, and what its derivatives share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from natrain.ops.problem import Problem, Window, problem_of
from natrain.ops.registry import Kernel, get_kernel, kernels

# The operators by name; natrain/ops/library.py defines them.
ops = torch.ops.natrain


@dataclass(frozen=True)
class Run:
    """The arguments of an operator that are no tensors."""

    window: Window
    scale: float = 1.0
    dropout_p: float = 0.0
    kernel: str = "auto"

    @staticmethod
    def of(kernel_size, dilation, stride, is_causal, scale, dropout_p, kernel) -> Run:
        window = Window(tuple(kernel_size), tuple(dilation), tuple(stride), tuple(is_causal))
        return Run(window, scale, dropout_p, kernel)

    @property
    def window_args(self) -> tuple:
        window = self.window
        return list(window.kernel_size), list(window.dilation), list(window.stride), list(window.is_causal)

    @property
    def args(self) -> tuple:
        """In the order of the schemas of attention."""
        return *self.window_args, self.scale, self.dropout_p, self.kernel

    def problem(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rpb: Tensor | None,
        key_mask: Tensor | None,
        *,
        needs_grad: bool,
        unfused: bool = False,
    ) -> Problem:
        return problem_of(q, k, v, self.window, rpb, key_mask, self.dropout_p, needs_grad=needs_grad, unfused=unfused)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse(kernel: str, what: str, capability: str) -> NotImplementedError:
    """The error of a kernel that lacks a derivative; names the kernels of its devices whose limits have it."""
    devices = get_kernel(kernel).limits.devices

    def serves(other: Kernel) -> bool:
        return devices is None or other.limits.devices is None or bool(devices & other.limits.devices)

    able = [f'kernel="{k.name}"' for k in kernels() if getattr(k.limits, capability) and serves(k)]
    return NotImplementedError(f'kernel="{kernel}" has no {what}. Try: {" or ".join(able)}')
