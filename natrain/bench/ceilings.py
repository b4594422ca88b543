"""What the device can do at most, measured in the same session as the kernels: a copy and a matrix product."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from natrain.bench.case import DTYPES
from natrain.bench.measure import measure

_COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}
_PRODUCT_SIZE = {"cuda": 8192, "cpu": 512}


def copy_bytes_per_s(device: str) -> float:
    """Bytes read plus bytes written a second by a copy too large for any cache."""
    source = torch.ones(_COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    timing = measure({"copy": lambda: target.copy_(source)}, runs=5, device=device)["copy"]
    return 2 * source.numel() * source.element_size() / (timing.median_ms / 1e3)


def product_flops_per_s(device: str, dtypes: Iterable[str]) -> dict[str, float]:
    """FLOPs a second of torch's product of two square matrices, by dtype; float32 with TF32 where it is allowed."""
    size, found = _PRODUCT_SIZE[device], {}
    for name in dtypes:
        a, b = torch.randn(2, size, size, device=device).to(DTYPES[name])
        timing = measure({"product": lambda a=a, b=b: a @ b}, runs=5, warm_cache=True, device=device)["product"]
        found[name] = 2 * size**3 / (timing.median_ms / 1e3)
    return found
