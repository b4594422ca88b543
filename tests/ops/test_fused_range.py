"""Scores of any size, and rows of several formats, through the fused forward; emulated. No maximum is subtracted until
one must be.

Small scores take the fast way, large ones the second, careful pass: of a warp where the halo is resident, of the whole
block where it comes in chunks (then the images after it, whose fetch had begun, are right too).
"""

from __future__ import annotations

import pytest
import torch

import natrain
from natrain.ops.registry import get_kernel
from tests.emulator.fixture import emulated
from tests.ops import oracle

WINDOWS = {
    "resident": ((11, 10), (7, 5)),
    "chunks of columns": ((180,), (100,)),
    "chunks of lines": ((20, 18), (15, 15)),
}
# Of a value of size 1, after the rounding of its weight and of the sum; fp16 has three bits more.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 5e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spatial, kernel_size", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("scale", [0.0, 0.2, -0.2, 6.0, -6.0])
def test_scores_of_any_size(spatial, kernel_size, scale, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 3, *spatial, 1, 32, dtype=torch.float64, generator=generator).to(dtype).unbind()
    # One image of ordinary scores between others.
    q[1] *= 0.02
    rpb = torch.randn(1, *[2 * size - 1 for size in kernel_size], generator=generator)
    function = getattr(natrain, f"na{len(spatial)}d")
    with emulated(get_kernel("fused"), seed=1):
        out, lse = function(q, k, v, kernel_size, rpb=rpb, scale=scale, return_lse=True, kernel="fused")
    ones = (1,) * len(spatial)
    window = {"kernel_size": kernel_size, "dilation": ones, "stride": ones, "is_causal": (False,) * len(spatial)}
    truth, lse_truth = oracle.dense_attention(q.double(), k.double(), v.double(), rpb.double(), window, scale)
    tolerance = TOLERANCE[dtype]
    assert (out.double() - truth).abs().max() < tolerance * max(1, v.abs().max().item())
    # Scores in the hundreds have a float32's error of their own.
    assert ((lse.double() - lse_truth).abs() < tolerance + 1e-6 * lse_truth.abs()).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spatial, kernel_size", WINDOWS.values(), ids=WINDOWS)
def test_infinity_and_nan_reach_no_other_image(spatial, kernel_size, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 3, *spatial, 1, 32, generator=generator).to(dtype).unbind()
    function = getattr(natrain, f"na{len(spatial)}d")
    with emulated(get_kernel("fused")):
        clean = function(q, k, v, kernel_size, kernel="fused")
        k[1], v[1] = float("inf"), float("nan")
        dirty = function(q, k, v, kernel_size, kernel="fused")
    assert dirty[1].isnan().all()
    assert torch.equal(dirty[::2], clean[::2])


@pytest.mark.parametrize("head_dim, value_dim", [(96, 64), (24, 32), (72, 16)])
@pytest.mark.parametrize("spatial", [(4, 17), (5, 13), (3, 9)])
def test_rows_of_two_formats_in_one_stage(spatial, head_dim, value_dim):
    """Keys are padded, values permuted, which needs them to begin at a multiple of 128 bytes."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, *spatial, 1, head_dim, generator=generator).bfloat16().unbind()
    v = torch.randn(1, *spatial, 1, value_dim, generator=generator).bfloat16()
    with emulated(get_kernel("fused")):
        out = natrain.na2d(q, k, v, (3, 2), (1, 2), kernel="fused")
    window = {"kernel_size": (3, 2), "dilation": (1, 2), "stride": (1, 1), "is_causal": (False, False)}
    truth, _ = oracle.dense_attention(q.double(), k.double(), v.double(), None, window, head_dim**-0.5)
    assert (out.double() - truth).abs().max() < 0.02
