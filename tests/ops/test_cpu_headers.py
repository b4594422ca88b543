"""The headers of device code, through the host's compiler, against their twins in Python."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import pytest
import torch

from natrain import jit
from natrain.jit import host
from natrain.ops.dropout import drop_threshold, keep_mask
from natrain.ops.window import window_bounds

pytestmark = pytest.mark.skipif(host.find_compiler() is None, reason=f"no C++ compiler: {host.REMEDY}")


def load(real: str, level: str) -> ctypes.CDLL:
    root = jit.source_root()
    spec = jit.BuildSpec(
        name="twins",
        sources=(Path(__file__).with_name("twins.cpp"),),
        include_dirs=(root / "include", root / "cpu"),
        defines=(("NATRAIN_REAL", real),),
        flags=("-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized"),
        toolchain=host.HostToolchain(level),
    )
    return host.load(spec)


@pytest.fixture(scope="module")
def twins() -> ctypes.CDLL:
    return load("float", "portable")


def levels() -> list[str]:
    """Instruction sets this processor can run."""
    return list(host.LEVELS)[list(host.LEVELS).index(host.cpu_level()) :]


@pytest.mark.parametrize("is_causal", [False, True])
def test_windows_equal_the_python_twin_exhaustively(twins, is_causal):
    """Lengths to 40, kernels to 13, every stride; dilation enters through the group lengths alone, tested below."""
    for n in range(1, 41):
        position = torch.arange(n)
        table = torch.empty(n, 4, dtype=torch.int32)
        for k in range(1, min(13, n) + 1):
            for s in range(1, k + 1):
                twins.windows(n, k, s, int(is_causal), ctypes.c_void_p(table.data_ptr()))
                start, end = window_bounds(position, torch.tensor(n), k, s, is_causal)
                assert torch.equal(table[:, 0].long(), start) and torch.equal(table[:, 1].long(), end), (n, k, s)
                holds = (start[:, None] <= position) & (position < end[:, None])
                first, count = holds.int().argmax(0), holds.sum(0)
                # Every key serves an interval of queries; where a window is causal and strided none may be left out.
                assert torch.equal(table[:, 2].long(), first), (n, k, s)
                assert torch.equal(table[:, 3].long(), first + count - 1), (n, k, s)


def test_group_lengths_count_the_tokens_of_each_group(twins):
    for length in range(1, 41):
        for dilation in range(1, min(8, length) + 1):
            for group in range(dilation):
                expected = len(range(group, length, dilation))
                assert twins.group_length(length, dilation, group) == expected, (length, dilation, group)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9999999])
def test_dropout_draws_the_python_twins_mask(twins, dropout_p):
    slots = 170
    row = torch.tensor([0, 1, 77, 2**32 - 1, 2**32, 2**40 + 12345])
    for seed in (0, 1, 2**31, 2**33 + 7, 2**63 - 2):
        expected = keep_mask(torch.tensor([seed]), row, slots, dropout_p)
        for i, r in enumerate(row.tolist()):
            kept = torch.empty(slots, dtype=torch.uint8)
            threshold = ctypes.c_uint(drop_threshold(dropout_p))
            twins.keeps(
                ctypes.c_longlong(seed), ctypes.c_longlong(r), slots, threshold, ctypes.c_void_p(kept.data_ptr())
            )
            assert torch.equal(kept.bool(), expected[i]), (seed, r)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("real,dtype", [("float", torch.float32), ("double", torch.float64)])
def test_exponential(real, dtype, level):
    """At most 2 units in the last place from the true value, 0 where that is subnormal, NaN kept."""
    library = load(real, level)
    info = torch.finfo(dtype)
    lowest = math.log(info.tiny)
    x = torch.cat(
        [
            torch.linspace(lowest * 1.2, 1, 40_003, dtype=dtype),
            -torch.logspace(-30, 0, 997, dtype=dtype),
            torch.tensor([0.0, -0.0, -math.inf, math.nan, 20, 80], dtype=dtype),
        ]
    )
    x = torch.nn.functional.pad(x, (0, -len(x) % 16))
    out = torch.empty_like(x)
    library.exponentials(ctypes.c_void_p(x.data_ptr()), len(x), ctypes.c_void_p(out.data_ptr()))
    truth = torch.tensor([math.exp(v) if v == v else v for v in x.tolist()], dtype=torch.float64)
    assert torch.isnan(out[torch.isnan(x)]).all() and torch.isnan(x).any()
    ordinary = x > lowest + 1e-3
    error = ((out.double() - truth).abs() / truth)[ordinary]
    assert error.max() <= 2 * info.eps
    assert (out[x < lowest - 1e-3] == 0).all()
