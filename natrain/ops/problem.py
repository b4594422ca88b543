"""The one descriptor of a neighborhood attention problem, and the checks that make one out of a caller's arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from natrain.errors import invalid

AXES = {1: ("x",), 2: ("y", "x"), 3: ("z", "y", "x")}


@dataclass(frozen=True)
class Window:
    """The shape of the neighbourhood: one entry an axis, in the order of the spatial axes."""

    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    is_causal: tuple[bool, ...]

    @property
    def na_dim(self) -> int:
        return len(self.kernel_size)

    @property
    def num_neighbors(self) -> int:
        """K: keys in a (not causal) window."""
        return math.prod(self.kernel_size)

    @property
    def rpb_shape(self) -> tuple[int, ...]:
        """Shape of the relative position bias without its leading heads axis."""
        return tuple(2 * k - 1 for k in self.kernel_size)


@dataclass(frozen=True)
class Problem:
    """Everything that selects a kernel and its configuration; hashable, printable, free of tensors.

    ``spatial``, ``batch`` in tokens and images; ``capability`` is CUDA's, None elsewhere; ``unfused`` when the caller
    asked for visible attention weights (``na*d_qk``, ``na*d_av``). ``kv_heads`` (a divisor of ``heads``) and
    ``value_dim`` are those of q where not given. ``is_symbolic``: true while
    torch.compile traces with dynamic shapes; such a problem cannot be hashed.
    """

    batch: int
    spatial: tuple[int, ...]
    heads: int
    head_dim: int
    window: Window
    dtype: torch.dtype
    device: str
    capability: tuple[int, int] | None = None
    has_rpb: bool = False
    has_dropout: bool = False
    needs_grad: bool = False
    deterministic: bool = False
    unfused: bool = False
    kv_heads: int | None = None
    value_dim: int | None = None
    has_key_mask: bool = False
    is_symbolic: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, default in (("kv_heads", self.heads), ("value_dim", self.head_dim)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        sizes = (self.batch, *self.spatial, self.heads, self.head_dim, self.kv_heads, self.value_dim)
        object.__setattr__(self, "is_symbolic", any(isinstance(size, torch.SymInt) for size in sizes))

    def __hash__(self) -> int:
        # Kernels and the registry look up by problem in every call: the hash of all fields is taken once.
        try:
            return self._hash
        except AttributeError:
            object.__setattr__(self, "_hash", hash(tuple(getattr(self, f.name) for f in fields(self))))
            return self._hash

    def __getstate__(self) -> dict[str, Any]:
        # Hashes of strings and dtypes are those of one process.
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    @property
    def is_grouped(self) -> bool:
        """Whether several heads of q share one of k and v."""
        return self.kv_heads != self.heads

    @property
    def num_tokens(self) -> int:
        return math.prod(self.spatial)

    def __str__(self) -> str:
        window = self.window
        parts = [
            f"na{window.na_dim}d {'x'.join(map(str, self.spatial))}",
            f"batch {self.batch}, heads {self.heads}, head_dim {self.head_dim}",
            *([f"kv_heads {self.kv_heads}"] if self.is_grouped else []),
            *([f"value_dim {self.value_dim}"] if self.value_dim != self.head_dim else []),
            f"kernel_size {window.kernel_size}, dilation {window.dilation}, stride {window.stride}",
        ]
        if any(window.is_causal):
            parts.append(f"is_causal {window.is_causal}")
        flags = ("has_rpb", "has_key_mask", "has_dropout", "needs_grad", "deterministic", "unfused")
        flags = [name for name in flags if getattr(self, name)]
        device = self.device + (" sm_{}{}".format(*self.capability) if self.capability else "")
        parts.append(" ".join([str(self.dtype).removeprefix("torch."), "on", device, *flags]))
        return "; ".join(parts)


def problem_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    rpb: Tensor | None,
    key_mask: Tensor | None,
    dropout_p: float,
    *,
    needs_grad: bool,
    unfused: bool,
) -> Problem:
    """The Problem of checked arguments: q [B, *S, N, D], k [B, *S, KV, D], v [B, *S, KV, Dv]."""
    batch, *spatial, heads, head_dim = q.shape
    return Problem(
        batch=batch,
        spatial=tuple(spatial),
        heads=heads,
        head_dim=head_dim,
        window=window,
        dtype=q.dtype,
        device=q.device.type,
        capability=torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else None,
        has_rpb=rpb is not None,
        has_dropout=dropout_p > 0,
        needs_grad=needs_grad,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        unfused=unfused,
        kv_heads=k.shape[-2],
        value_dim=v.shape[-1],
        has_key_mask=key_mask is not None,
    )


def _per_axis(argument: str, value: Any, na_dim: int, kind: type) -> tuple:
    """``value`` as a tuple of ``na_dim`` entries of ``kind``; a single value serves every axis."""
    example = {int: "7", bool: "True"}[kind]
    entries = (value,) * na_dim if not isinstance(value, Sequence) or isinstance(value, str) else tuple(value)
    # bool is an int in Python; a True kernel size would be a silent 1.
    fits = all(isinstance(entry, kind) and isinstance(entry, bool) == (kind is bool) for entry in entries)
    if len(entries) != na_dim or not fits:
        many = f"({', '.join([example] * na_dim)}{',' if na_dim == 1 else ''})"
        raise invalid(
            argument,
            value,
            f"one {kind.__name__}, or a tuple of {na_dim} (one per axis {', '.join(AXES[na_dim])})",
            f"{argument}={example} or {argument}={many}",
        )
    return entries


def check_window(spatial: Sequence[int], kernel_size: Any, dilation: Any, stride: Any, is_causal: Any) -> Window:
    """Canonicalise and check the window of a problem on axes of lengths ``spatial`` (tokens).

    Raises:
        ValueError: an entry has the wrong type or count; kernel_size or dilation below 1; stride outside
            [1, kernel_size]; kernel_size * dilation beyond the axis.
    """
    na_dim = len(spatial)
    window = Window(
        kernel_size=_per_axis("kernel_size", kernel_size, na_dim, int),
        dilation=_per_axis("dilation", dilation, na_dim, int),
        stride=_per_axis("stride", stride, na_dim, int),
        is_causal=_per_axis("is_causal", is_causal, na_dim, bool),
    )
    for axis, length, k, d, s in zip(
        AXES[na_dim], spatial, window.kernel_size, window.dilation, window.stride, strict=True
    ):
        if k < 1:
            raise invalid("kernel_size", kernel_size, f"at least 1 along axis {axis}", "kernel_size=7")
        if d < 1:
            raise invalid("dilation", dilation, f"at least 1 along axis {axis}", "dilation=1")
        if not 1 <= s <= k:
            raise invalid(
                "stride", stride, f"1 <= stride <= kernel_size ({k}) along axis {axis}", "stride=1 for standard windows"
            )
        if k * d > length:
            if not length:  # holds no window at all
                fix = "larger inputs"
            else:
                fits = f"dilation={int(length) // k}" if k <= length else f"kernel_size={int(length)}, dilation=1"
                fix = f"{fits} on that axis, or larger inputs"
            what, value = ("dilation", dilation) if k <= length else ("kernel_size", kernel_size)
            raise invalid(
                what,
                value,
                f"kernel_size * dilation <= {int(length)}, the length of axis {axis} "
                f"(kernel_size {k} * dilation {d} = {k * d})",
                fix,
            )
    return window


def check_heads_last(name: str, tensor: Tensor, na_dim: int, extra: str = "") -> None:
    """``tensor`` must be dense, floating point and [B, *spatial, {extra}heads, head_dim]."""
    if not isinstance(tensor, Tensor):
        raise invalid(name, type(tensor).__name__, "a torch.Tensor", f"{name}=torch.as_tensor(...)")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise invalid(
            f"{name}.layout",
            "nested" if tensor.is_nested else tensor.layout,
            "a dense tensor",
            f"{name}.to_dense(), or for images of several sizes torch.nested.to_padded_tensor and a key_mask",
        )
    layout = f"[B, {', '.join(AXES[na_dim])}, {extra}heads, head_dim]"
    if tensor.dim() != na_dim + 3 + bool(extra):
        raise invalid(
            f"{name}.shape",
            tuple(tensor.shape),
            f"{na_dim + 3 + bool(extra)} axes, {layout}",
            f"the function of another rank, or {name}.reshape to that layout",
        )
    if not tensor.is_floating_point():
        raise invalid(f"{name}.dtype", tensor.dtype, "a floating point dtype", f"{name}.float()")


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to on devices of that type; None where it is off."""
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has none to ask
        return None
    return torch.get_autocast_dtype(device)


def _are_cast_alike(x: Tensor, y: Tensor) -> bool:
    is_narrow = x.is_floating_point() and torch.float64 not in (x.dtype, y.dtype)  # all that autocast casts
    return is_narrow and autocast_dtype(y.device.type) is not None


def check_same(name: str, tensor: Tensor, q: Tensor, shape: Sequence[int] | None = None) -> None:
    """``tensor`` must share the dtype (as autocast casts it) and device of ``q`` and have ``shape`` (default: q's)."""
    if tensor.dtype != q.dtype and not _are_cast_alike(tensor, q):
        raise invalid(f"{name}.dtype", tensor.dtype, f"q's dtype, {q.dtype}", f"{name}.to(q.dtype)")
    if tensor.device != q.device:
        raise invalid(f"{name}.device", str(tensor.device), f"q's device, {q.device}", f"{name}.to(q.device)")
    expected = tuple(q.shape if shape is None else shape)
    if tuple(tensor.shape) != expected:
        raise invalid(f"{name}.shape", tuple(tensor.shape), f"{expected}", f"{name} of that shape")


def check_kv(k: Tensor, v: Tensor, q: Tensor) -> None:
    """k is [B, *S, KV, D] with KV a divisor of q's heads, v [B, *S, KV, Dv]; both of q's dtype and device."""
    heads, kv_heads = q.shape[-2], k.shape[-2]
    check_same("k", k, q, (*q.shape[:-2], kv_heads, q.shape[-1]))
    check_same("v", v, q, (*q.shape[:-2], kv_heads, v.shape[-1]))
    if kv_heads != heads and (not kv_heads or heads % kv_heads):
        raise invalid(
            "k.shape",
            tuple(k.shape),
            f"a divisor of q's {heads} heads; query head n uses head n // (heads // kv_heads) of k and v",
            f"{heads} heads, or 1",
        )


def check_key_mask(key_mask: Tensor | None, q: Tensor) -> None:
    """The mask is bool [B, *spatial] on q's device."""
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor):
        raise invalid("key_mask", type(key_mask).__name__, "a torch.Tensor or None", "key_mask=None")
    if key_mask.dtype != torch.bool:
        raise invalid(
            "key_mask.dtype", key_mask.dtype, "torch.bool, True where a key may be attended to", "key_mask.bool()"
        )
    if key_mask.device != q.device:
        raise invalid("key_mask.device", str(key_mask.device), f"q's device, {q.device}", "key_mask.to(q.device)")
    if tuple(key_mask.shape) != tuple(q.shape[:-2]):
        raise invalid(
            "key_mask.shape",
            tuple(key_mask.shape),
            f"{tuple(q.shape[:-2])} = [B, {', '.join(AXES[q.dim() - 3])}]",
            "key_mask.expand to that shape: one mask serves every head",
        )


def check_rpb(rpb: Tensor | None, q: Tensor, window: Window) -> None:
    """The bias is [heads, 2k-1, ...] on q's device, in q's dtype or float32 (kept so under autocast)."""
    if rpb is None:
        return
    if not isinstance(rpb, Tensor):
        raise invalid("rpb", type(rpb).__name__, "a torch.Tensor or None", "rpb=None")
    expected = (q.shape[-2], *window.rpb_shape)
    if tuple(rpb.shape) != expected:
        raise invalid(
            "rpb.shape",
            tuple(rpb.shape),
            f"{expected} = [heads, 2 * kernel_size - 1 per axis]",
            "natrain models resize a bias when the kernel size changes; else interpolate it to that shape",
        )
    if rpb.dtype not in (q.dtype, torch.float32):
        raise invalid("rpb.dtype", rpb.dtype, f"q's dtype ({q.dtype}) or torch.float32", "rpb.float()")
    if rpb.device != q.device:
        raise invalid("rpb.device", str(rpb.device), f"q's device, {q.device}", "rpb.to(q.device)")


def check_scale(scale: float | None, head_dim: int) -> float:
    """The factor on q.k; None means head_dim ** -0.5."""
    if scale is None:
        return head_dim**-0.5 if head_dim else 1.0
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise invalid("scale", scale, "a finite number or None (head_dim ** -0.5)", "scale=None")
    return float(scale)


def check_dropout(dropout_p: float) -> float:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p < 1:
        raise invalid("dropout_p", dropout_p, "a number in [0, 1)", "dropout_p=0.0 (and 0.0 in evaluation)")
    return float(dropout_p)
