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
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if is_allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
