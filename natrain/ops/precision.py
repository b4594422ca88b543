"""May float32 products on the GPU run in TF32 (10 bits of mantissa)? Torch's own setting, whichever one was used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Torch from 2.9 on keeps one state behind all three settings; its own readers of the older two raise where the newest
# was used.
_fp32_precision = getattr(torch._C, "_get_fp32_precision_getter", None)


def is_tf32_allowed() -> bool:
    """Whether torch lets float32 matrix products on CUDA use TF32 now.

    True after ``torch.set_float32_matmul_precision`` of "high" or "medium", ``torch.backends.cuda.matmul.allow_tf32 =
    True``, or, from torch 2.9 on, ``fp32_precision = "tf32"`` of ``torch.backends.cuda.matmul`` or ``torch.backends``.
    Asked when a kernel is launched, backward included.
    """
    if _fp32_precision is not None:
        return _fp32_precision("cuda", "matmul") == "tf32"
    return torch.backends.cuda.matmul.allow_tf32


@contextmanager
def tf32_products(is_allowed: bool) -> Iterator[None]:
    """Float32 products on CUDA may use TF32, or may not; afterwards torch's setting is what it was."""
    matmul, was_allowed = torch.backends.cuda.matmul, is_tf32_allowed()
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # how torch says that the newest setting was used
        before = _name_of(was_allowed)
    newest = getattr(matmul, "fp32_precision", None)
    torch.set_float32_matmul_precision(_name_of(is_allowed))
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        # Of two settings that differed the newest is what counts.
        if is_tf32_allowed() != was_allowed:
            matmul.fp32_precision = newest


def _name_of(is_allowed: bool) -> str:
    return "high" if is_allowed else "highest"
