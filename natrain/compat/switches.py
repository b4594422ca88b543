"""NATTEN's process-wide switches and feature queries: which of natrain's kernels they choose, and honest answers.

The state is one per process, as theirs. What only tuned their kernels (tiles, auto-tuner, KV parallelism, memory
preference) is remembered and answered, and changes nothing here: natrain chooses its configurations itself.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from natrain.compat.arguments import refuse
from natrain.ops import list_kernels
from natrain.ops.registry import FusedKernel, get_kernel, kernels

logger = logging.getLogger("natten")


class MemoryUsagePreference(Enum):
    Default = 0
    Strict = 1
    Unrestricted = 2


@dataclass
class State:
    """What the switches hold; defaults as NATTEN's. ``kv_parallelism`` None: not set, off in 0.17, on from 0.20."""

    deterministic: bool = False
    fused: bool = False
    kv_parallelism: bool | None = None
    use_flex: bool = False
    force_flex: bool = False
    memory: MemoryUsagePreference = MemoryUsagePreference.Default
    tiled: bool = True
    gemm: bool = True
    flex_compile: bool = False
    flex_compile_backprop: bool = False
    autotune: dict[str, Any] = field(default_factory=dict)


state = State()


def unfused_kernel(device: torch.device) -> str:
    """The ``kernel=`` of ``na*d_qk`` and ``na*d_av``: auto, or the naive one on CUDA after ``use_gemm_na(False)``."""
    wants_naive = not state.gemm and device.type == "cuda" and "naive" in list_kernels()
    return "naive" if wants_naive else "auto"


# ---------------------------------------------------------------------------------------------------------------------
# feature queries


def get_device_cc(device_index: Any = None) -> int:
    """Compute capability of a CUDA device as one number: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device_index)
    return major * 10 + minor


def _has_capability(device_index: Any, least: int) -> bool:
    return torch.cuda.is_available() and get_device_cc(device_index) >= least


def has_cuda() -> bool:
    """Whether CUDA tensors are served: wherever torch sees a device."""
    return torch.cuda.is_available()


def has_half(device_index: Any = None) -> bool:
    """Whether float16 runs on that CUDA device. (natrain computes it on the CPU too, where NATTEN had none.)"""
    return _has_capability(device_index, 50)


def has_bfloat(device_index: Any = None) -> bool:
    """Whether bfloat16 runs on that CUDA device."""
    return _has_capability(device_index, 80)


def _offers(name_or_type: str | type, device_index: Any) -> bool:
    """Whether a kernel of that name or base class is registered and takes that CUDA device."""
    if not torch.cuda.is_available():
        return False
    capability = torch.cuda.get_device_capability(device_index)
    for kernel in kernels():
        matches = kernel.name == name_or_type if isinstance(name_or_type, str) else isinstance(kernel, name_or_type)
        limits = kernel.limits
        on_cuda = limits.devices is None or "cuda" in limits.devices
        if matches and on_cuda and (limits.min_capability is None or limits.min_capability <= capability):
            return True
    return False


def has_gemm(device_index: Any = None) -> bool:
    """Whether natrain's unfused tensor-core kernel ``gemm`` is there and takes that CUDA device."""
    return _offers("gemm", device_index)


def has_fna(device_index: Any = None) -> bool:
    """Whether a fused CUDA kernel is there; ``na*d`` compute everywhere, fused or not."""
    return _offers(FusedKernel, device_index)


def has_tf32_gemm(device_index: Any = None) -> bool:
    """Whether ``gemm`` takes float32 on that device, through TF32."""
    return _has_gemm_dtype(torch.float32, device_index)


def has_fp64_gemm(device_index: Any = None) -> bool:
    """Whether ``gemm`` takes float64 on that device."""
    return _has_gemm_dtype(torch.float64, device_index)


def _has_gemm_dtype(dtype: torch.dtype, device_index: Any) -> bool:
    if not has_gemm(device_index) or get_device_cc(device_index) < 80:
        return False
    dtypes = get_kernel("gemm").limits.dtypes
    return dtypes is None or dtype in dtypes


# ---------------------------------------------------------------------------------------------------------------------
# fused and unfused


def use_fused_na(
    mode: bool = True, kv_parallel: bool = True, use_flex_attention: bool = False, force_flex_attention: bool = False
) -> None:
    """Let the modules of 0.17 take the rules of ``na*d`` (even sizes, no attention dropout) instead of qk and av."""
    state.fused = mode
    state.use_flex = mode and use_flex_attention
    state.force_flex = mode and force_flex_attention
    use_kv_parallelism_in_fused_na(mode and kv_parallel)


def is_fused_na_enabled() -> bool:
    return state.fused


def use_flex_attention() -> None:
    use_fused_na(True, use_flex_attention=True)


def force_flex_attention() -> None:
    use_fused_na(True, use_flex_attention=True, force_flex_attention=True)


def should_use_flex_attention() -> bool:
    return state.use_flex


def should_force_flex_attention() -> bool:
    return state.force_flex


def use_gemm_na(mode: bool = True) -> None:
    """False makes qk and av take natrain's ``naive`` kernel on CUDA; True leaves the choice to ``auto``."""
    state.gemm = bool(mode)


def is_gemm_na_enabled() -> bool:
    return state.gemm


def use_tiled_na(mode: bool = True) -> None:
    """Remembered only: natrain's naive kernel has one version."""
    state.tiled = bool(mode)


def is_tiled_na_enabled() -> bool:
    return state.tiled


def use_tf32_in_gemm_na(mode: bool = True) -> None:
    """TF32 follows torch's own setting, which this leaves alone; a call that disagrees with it says so once."""
    if mode != is_tf32_in_gemm_na_enabled():
        wanted = "tf32" if mode else "ieee"
        warnings.warn(
            f"natrain's kernels follow torch's TF32 setting; type torch.backends.cuda.matmul.fp32_precision = "
            f'"{wanted}" for what use_tf32_in_gemm_na({mode}) asks',
            stacklevel=2,
        )


def is_tf32_in_gemm_na_enabled() -> bool:
    """torch's setting for float32 matrix products on CUDA."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


def _setter(use, is_enabled, mode: bool, name: str):
    def switch() -> bool:
        use(mode)
        return is_enabled()

    switch.__name__ = switch.__qualname__ = name
    switch.__doc__ = f"``{use.__name__}({mode})``; returns the state."
    return switch


enable_gemm_na = _setter(use_gemm_na, is_gemm_na_enabled, True, "enable_gemm_na")
disable_gemm_na = _setter(use_gemm_na, is_gemm_na_enabled, False, "disable_gemm_na")
enable_tiled_na = _setter(use_tiled_na, is_tiled_na_enabled, True, "enable_tiled_na")
disable_tiled_na = _setter(use_tiled_na, is_tiled_na_enabled, False, "disable_tiled_na")
enable_tf32 = _setter(use_tf32_in_gemm_na, is_tf32_in_gemm_na_enabled, True, "enable_tf32")
disable_tf32 = _setter(use_tf32_in_gemm_na, is_tf32_in_gemm_na_enabled, False, "disable_tf32")


# ---------------------------------------------------------------------------------------------------------------------
# determinism, memory, tuning


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Remembered; natrain's kernels follow ``torch.use_deterministic_algorithms``, and a warning says so."""
    state.deterministic = mode
    if mode and not torch.are_deterministic_algorithms_enabled():
        warnings.warn("natrain's kernels follow torch.use_deterministic_algorithms(True); call that", stacklevel=2)


def are_deterministic_algorithms_enabled() -> bool:
    return state.deterministic


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    """Remembered only.

    Raises:
        RuntimeError: NATTEN's deterministic mode is on.
    """
    if mode and torch.are_deterministic_algorithms_enabled():
        return
    if mode and state.deterministic:
        raise _refuse_with_determinism("kv_parallelism")
    state.kv_parallelism = bool(mode)


def _refuse_with_determinism(what: str) -> Exception:
    fix = "natten.use_deterministic_algorithms(False)"
    return refuse(RuntimeError, what, True, "False in NATTEN's deterministic mode", fix)


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    return bool(state.kv_parallelism)


def set_memory_usage_preference(pref: str = "default") -> None:
    """Remembered only.

    Raises:
        ValueError: none of default, strict, unrestricted.
    """
    choices = {choice.name.lower(): choice for choice in MemoryUsagePreference}
    if pref not in choices:
        raise refuse(ValueError, "pref", pref, f"one of {', '.join(choices)}", 'pref="default"')
    state.memory = choices[pref]


def get_memory_usage_preference() -> MemoryUsagePreference:
    return state.memory


def is_memory_usage_default() -> bool:
    return state.memory is MemoryUsagePreference.Default


def is_memory_usage_strict() -> bool:
    return state.memory is MemoryUsagePreference.Strict


def is_memory_usage_unrestricted() -> bool:
    return state.memory is MemoryUsagePreference.Unrestricted


def use_autotuner(
    forward_pass: bool | None = None,
    backward_pass: bool | None = None,
    thorough_mode_forward: bool | None = None,
    thorough_mode_backward: bool | None = None,
    warmup_steps_forward: int | None = None,
    warmup_steps_backward: int | None = None,
    steps_forward: int | None = None,
    steps_backward: int | None = None,
) -> None:
    """Remembered only.

    Raises:
        ValueError: a flag that is no bool, a count that is no int.
        RuntimeError: a pass is asked for in NATTEN's deterministic mode.
    """
    asked = dict(locals())
    if (forward_pass or backward_pass) and torch.are_deterministic_algorithms_enabled():
        return
    for name, value in asked.items():
        kind = int if "steps" in name else bool
        if value is not None and not isinstance(value, kind):
            raise refuse(ValueError, name, value, f"a {kind.__name__} or None", f"{name}=None")
    if (forward_pass or backward_pass) and state.deterministic:
        raise _refuse_with_determinism("use_autotuner")
    state.autotune.update({name: value for name, value in asked.items() if value is not None})


def disable_autotuner() -> None:
    state.autotune.clear()


def is_autotuner_enabled() -> bool:
    return is_autotuner_enabled_for_forward() or is_autotuner_enabled_for_backward()


def is_autotuner_enabled_for_forward() -> bool:
    return bool(state.autotune.get("forward_pass"))


def is_autotuner_enabled_for_backward() -> bool:
    return bool(state.autotune.get("backward_pass"))


def is_autotuner_thorough_for_forward() -> bool:
    return bool(state.autotune.get("thorough_mode_forward"))


def is_autotuner_thorough_for_backward() -> bool:
    return bool(state.autotune.get("thorough_mode_backward"))


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> None:
    """Remembered only: FlexAttention is none of natrain's kernels."""
    state.flex_compile = bool(mode)
    state.flex_compile_backprop = bool(mode and backprop)


def allow_flex_compile_backprop(mode: bool = True) -> None:
    allow_flex_compile(state.flex_compile, mode)


def disable_flex_compile() -> None:
    allow_flex_compile(False)


def disable_flex_compile_backprop() -> None:
    allow_flex_compile(state.flex_compile, False)


def is_flex_compile_allowed() -> bool:
    return state.flex_compile


def is_flex_compile_backprop_allowed() -> bool:
    return state.flex_compile_backprop
