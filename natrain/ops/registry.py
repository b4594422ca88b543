"""Kernels declare what they can do; choosing, explaining, testing and documenting come out of that.

A kernel is one object with a ``name``, a ``priority`` (lower is preferred by ``auto``) and ``limits``. There are three
ways to compute, one base class each:

- ``Kernel``: composed of torch operators, which torch differentiates (the reference).
- ``FusedKernel``: one forward and one backward that never hold the attention weights.
- ``UnfusedKernel``: four primitives that serve forward, backward and every higher derivative; an
  ``UnfusedAttentionKernel`` also runs attention as a whole, with weights in a layout of its own.

A package outside natrain adds one through the entry point group ``natrain.kernels`` (see natrain/ops/README.md).
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import EntryPoint, entry_points

import torch
from torch import Tensor

from natrain.errors import invalid, nearest
from natrain.jit.build import BuildSpec
from natrain.ops.problem import Problem, Window

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "natrain.kernels"


@dataclass(frozen=True)
class Limits:
    """What a kernel supports. None means: no limit."""

    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    na_dims: frozenset[int] = frozenset({1, 2, 3})
    min_capability: tuple[int, int] | None = None
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    rpb: bool = True
    causal: bool = True
    stride: bool = True
    dropout: bool = True
    deterministic: bool = True
    backward: bool = True
    gqa: bool = False
    value_dim: bool = False
    key_mask: bool = False
    unfused: bool = False
    double_backward: bool = False
    forward_ad: bool = False

    def reasons(self, problem: Problem) -> list[str]:
        """Why ``problem`` is outside these limits; empty when it is inside."""
        window = problem.window
        reasons = []
        if self.devices is not None and problem.device not in self.devices:
            reasons.append(f"device {problem.device} (has {_listed(self.devices)})")
        if self.dtypes is not None and problem.dtype not in self.dtypes:
            reasons.append(f"dtype {problem.dtype} (has {_listed(map(str, self.dtypes))})")
        if window.na_dim not in self.na_dims:
            reasons.append(f"rank {window.na_dim} (has {_listed(map(str, self.na_dims))})")
        if self.min_capability and problem.capability and problem.capability < self.min_capability:
            reasons.append(f"capability {problem.capability} (needs {self.min_capability} or newer)")
        if self.max_head_dim is not None and problem.head_dim > self.max_head_dim:
            reasons.append(f"head_dim {problem.head_dim} (at most {self.max_head_dim})")
        if problem.head_dim % self.head_dim_multiple:
            reasons.append(f"head_dim {problem.head_dim} (a multiple of {self.head_dim_multiple})")
        if problem.value_dim != problem.head_dim:
            reasons += self._reasons_against_value_dim(problem)
        for name, asked, supported in (
            ("rpb", problem.has_rpb, self.rpb),
            ("is_causal", any(window.is_causal), self.causal),
            ("stride", any(s > 1 for s in window.stride), self.stride),
            ("dropout_p", problem.has_dropout, self.dropout),
            ("key_mask", problem.has_key_mask, self.key_mask),
            (f"{problem.kv_heads} heads of k and v for {problem.heads} of q (GQA)", problem.is_grouped, self.gqa),
            ("deterministic algorithms", problem.deterministic and problem.needs_grad, self.deterministic),
            ("gradients", problem.needs_grad, self.backward),
            ("visible attention weights (na*d_qk, na*d_av)", problem.unfused, self.unfused),
        ):
            if asked and not supported:
                reasons.append(f"no {name}")
        return reasons

    def _reasons_against_value_dim(self, problem: Problem) -> list[str]:
        if not self.value_dim:
            return [f"no head_dim of v ({problem.value_dim}) other than q's ({problem.head_dim})"]
        reasons = []
        if self.max_head_dim is not None and problem.value_dim > self.max_head_dim:
            reasons.append(f"head_dim of v {problem.value_dim} (at most {self.max_head_dim})")
        if problem.value_dim % self.head_dim_multiple:
            reasons.append(f"head_dim of v {problem.value_dim} (a multiple of {self.head_dim_multiple})")
        return reasons


def _listed(names) -> str:
    return ", ".join(sorted(names))


class Kernel(ABC):
    """A way to compute neighborhood attention. Subclasses set the class attributes."""

    name: str
    summary: str
    priority: int
    limits: Limits

    def extra_reasons(self, problem: Problem) -> list[str]:
        """Reasons against ``problem`` that limits cannot say as data (no compiler, say)."""
        return []

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """Every reason why this kernel cannot solve ``problem``; empty when it can."""
        return self.limits.reasons(problem) or self.extra_reasons(problem)

    def build_specs(self, problem: Problem, arch: str) -> list[BuildSpec]:
        """What forward and backward of ``problem`` need compiled for ``arch``; empty where nothing is compiled.

        Asked on machines without the device, to compile ahead. ``arch``: "sm_90a" for CUDA, "avx512" for processors.
        """
        return []


class FusedKernel(Kernel):
    """Scores and probabilities live only inside the kernel."""

    @abstractmethod
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
    ) -> tuple[Tensor, Tensor]:
        """``(out, lse)``, both new and contiguous: [B, *S, N, Dv] in q's dtype, [B, *S, N] float32 (float64 for it).

        q [B, *S, N, D], k [B, *S, KV, D], v [B, *S, KV, Dv]: query head n uses k/v head n // (N // KV). They may have
        any strides (a packed projection is read in place), rpb [N, 2k-1, ...] and ``key_mask`` too. ``key_mask`` is
        bool [B, *S], True = may be attended to; a query whose keys are all masked has out 0 and lse -inf.
        """

    @abstractmethod
    def backward(
        self,
        problem: Problem,
        d_out: Tensor,
        d_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rpb: Tensor | None,
        key_mask: Tensor | None,
        out: Tensor,
        lse: Tensor,
        seed: Tensor | None,
        scale: float,
        dropout_p: float,
        d_q: Tensor,
        d_k: Tensor,
        d_v: Tensor,
    ) -> Tensor | None:
        """Write every element of ``d_q``, ``d_k``, ``d_v`` (uninitialised, any strides); return rpb's gradient.

        Masked keys, and queries whose keys are all masked (lse -inf), add zeros everywhere.
        """


class UnfusedKernel(Kernel):
    """Four primitives, bilinear, closed under differentiation (each one's gradient is made of the others).

    ``scores`` and ``weights`` are [B, *S, N, K], K in row-major order of the window; slots of a causal window that
    hold no key are ignored in weights. All heads are q's; ``v`` may have a head_dim of its own where limits say so.
    Key masks and fewer heads of k and v are added by torch operators around the primitives (attention.py).
    """

    @abstractmethod
    def qk(self, problem: Problem, q: Tensor, k: Tensor, rpb: Tensor | None, scale: float, fill: float) -> Tensor:
        """scale * q.k + rpb, in q's dtype; ``fill`` (-inf for scores, 0 for gradients) in the slots of no key."""

    @abstractmethod
    def av(self, problem: Problem, weights: Tensor, v: Tensor) -> Tensor:
        """Per query: the sum of weights * v over its neighbours."""

    @abstractmethod
    def inverse(self, problem: Problem, weights: Tensor, x: Tensor) -> Tensor:
        """Per key: the sum of weights * x over the queries whose window holds it."""

    @abstractmethod
    def rpb_grad(self, problem: Problem, weights: Tensor) -> Tensor:
        """[N, 2k-1, ...] float32 (float64 for it): the sum of weights over batch and queries by relative position."""


class UnfusedAttentionKernel(UnfusedKernel):
    """Primitives, and attention and its first derivative out of them without a copy or a change of layout between.

    Higher derivatives and forward mode come out of the four primitives.
    """

    @abstractmethod
    def empty_probs(self, q: Tensor, window: Window) -> Tensor:
        """Uninitialised probabilities as ``forward`` returns and ``backward`` reads them; ``q`` may be fake."""

    @abstractmethod
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
        """``(out, lse, probs)``, out and lse as ``FusedKernel.forward``; probs are those before dropout."""

    @abstractmethod
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
        """Write every element of ``d_q``, ``d_k``, ``d_v`` (uninitialised, any strides); return rpb's gradient."""


_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> Kernel:
    """Add a kernel; its name must be new."""
    if kernel.name in _KERNELS or kernel.name == "auto":
        raise invalid("name", kernel.name, "a kernel name not in use", f"another name than {sorted(_KERNELS)}")
    _KERNELS[kernel.name] = kernel
    _choose_cached.cache_clear()
    return kernel


@cache
def _pending() -> list[EntryPoint]:
    """Kernels of other packages that are not loaded yet."""
    return list(entry_points(group=ENTRY_POINT_GROUP))


_loading = threading.RLock()


def _load_entry_points() -> None:
    pending = _pending()
    with _loading:
        while pending:
            entry = pending.pop(0)  # first, since its module may ask for the kernels while it loads
            try:
                kernel = entry.load()
                register(kernel() if isinstance(kernel, type) else kernel)
            except Exception as error:
                pending.insert(0, entry)
                package = entry.dist.name if entry.dist else "its package"
                raise RuntimeError(
                    f'the kernel "{entry.name} = {entry.value}" of {package} cannot be loaded: {error}. '
                    f"Try: update {package}, or pip uninstall it"
                ) from error


def kernels() -> list[Kernel]:
    """Every kernel, in the order in which ``auto`` tries them."""
    _load_entry_points()
    return sorted(_KERNELS.values(), key=lambda kernel: (kernel.priority, kernel.name))


def list_kernels() -> list[str]:
    """Names of every kernel, in the order in which ``auto`` tries them."""
    return [kernel.name for kernel in kernels()]


def get_kernel(name: str) -> Kernel:
    """The kernel of that name.

    Raises:
        ValueError: there is none; the message names the nearest one.
    """
    _load_entry_points()
    if name not in _KERNELS:
        names = ["auto", *list_kernels()]
        raise invalid("kernel", name, f"one of {', '.join(names)}", f'kernel="{nearest(str(name), names) or "auto"}"')
    return _KERNELS[name]


@dataclass(frozen=True)
class Explanation:
    """Which kernel a problem gets, and why the others do not. Prints as a short table."""

    problem: Problem
    chosen: str | None
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [str(self.problem)]
        for name, reasons in self.reasons.items():
            verdict = "chosen" if name == self.chosen else "; ".join(reasons) if reasons else "possible"
            lines.append(f"  {name:<10} {verdict}")
        return "\n".join(lines)


def explain_problem(problem: Problem) -> Explanation:
    """What ``kernel="auto"`` does with ``problem``, with every kernel's reasons."""
    reasons = {kernel.name: kernel.unsupported_reasons(problem) for kernel in kernels()}
    chosen = next((name for name, against in reasons.items() if not against), None)
    return Explanation(problem, chosen, reasons)


def choose(problem: Problem, name: str = "auto") -> Kernel:
    """The kernel that solves ``problem``: the named one, or for ``"auto"`` the first without reasons against it.

    Raises:
        ValueError: unknown name; the named kernel cannot (with all its reasons: it is never silently replaced);
            or no kernel can (with every kernel's reasons).
    """
    return _choose(problem, name) if problem.is_symbolic else _choose_cached(problem, name)


def _choose(problem: Problem, name: str) -> Kernel:
    if name != "auto":
        kernel = get_kernel(name)
        reasons = kernel.unsupported_reasons(problem)
        if reasons:
            explanation = explain_problem(problem)
            raise invalid(
                "kernel",
                name,
                f"a kernel for {problem}; {name} does not support: {'; '.join(reasons)}",
                f'kernel="{explanation.chosen}"' if explanation.chosen else "another problem",
            )
        return kernel
    explanation = explain_problem(problem)
    if explanation.chosen is None:
        raise ValueError(f"no kernel supports this problem: {explanation}")
    _say_once(explanation.chosen, problem.device)
    return get_kernel(explanation.chosen)


_choose_cached = lru_cache(maxsize=4096)(_choose)


@cache
def _say_once(name: str, device: str) -> None:
    logger.info('kernel="auto" uses %s on %s: first in priority without a reason against it', name, device)
