"""What the naive kernels are compiled from: constants chosen on the host; csrc/naive/*.cuh say what each means."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from natrain.jit import cuda
from natrain.jit.build import BuildSpec
from natrain.ops.geometry import MAX_THREADS, Layout, access_width, lanes_of_row, weights_pitch, window_defines
from natrain.ops.problem import Problem, Window
from natrain.ops.reference import accumulate_dtype

DTYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.float16: "natrain::float16",
    torch.bfloat16: "natrain::bfloat16",
}

# Adjacent queries, or keys, that a thread works on at once: most of what one reads the other reads too.
POSITIONS = 2


def _min_blocks(primitive: str, dtype: torch.dtype) -> int:
    """Blocks that must fit a multiprocessor, which bounds the registers of a thread; measured on an H200.

    Straight-line code wants registers; the loops of ``inverse`` want warps, while its 16-bit rows need few registers.
    """
    return 5 if primitive == "inverse" and dtype.itemsize == 2 else 4


def kernel_spec(primitive: str, defines: dict[str, object], arch: str) -> BuildSpec:
    """What to compile for one specialisation of csrc/naive/<primitive>.cu."""
    return cuda.kernel_spec(f"naive/{primitive}.cu", f"natrain_naive_{primitive}", defines, arch)


def problem_defines(
    primitive: str,
    dtype: torch.dtype,
    window: Window,
    head_dim: int,
    vector: int,
    lanes: int,
    positions: int,
    offset: str,
    has_rpb: bool,
) -> dict[str, object]:
    """The constants of csrc/naive/problem.cuh; lengths, dilation, heads and strides stay run-time arguments."""
    return {
        "NATRAIN_DTYPE": DTYPES[dtype],
        **window_defines(window),
        "NATRAIN_HEAD_DIM": head_dim,
        "NATRAIN_VECTOR": vector,
        "NATRAIN_LANES": lanes,
        "NATRAIN_POSITIONS": positions,
        "NATRAIN_OFFSET": offset,
        "NATRAIN_HAS_RPB": int(has_rpb),
        "NATRAIN_THREADS": MAX_THREADS,
        "NATRAIN_MIN_BLOCKS": _min_blocks(primitive, dtype),
    }


def build_specs(problem: Problem, arch: str) -> list[BuildSpec]:
    """What forward and backward of ``problem`` on aligned tensors need compiled for ``arch``; no GPU is asked."""
    window, dtype = problem.window, problem.dtype
    shape = (problem.batch, *problem.spatial, problem.heads, problem.head_dim)
    row = torch.empty(shape, dtype=dtype, device="meta")
    vector = access_width(problem.head_dim, row)
    positions = positions_of(problem.spatial, window)
    # A packed projection's image spans three times as much as a tensor of its own.
    span = 3 * Layout.of(row).span
    weights_span = problem.num_tokens * problem.heads * weights_pitch(window.num_neighbors, dtype)
    offset = "int" if max(span, weights_span) < 2**31 else "long long"
    lanes = lanes_of_row(problem.head_dim, vector)
    constants = (dtype, window, problem.head_dim, vector, lanes, positions, offset)
    wanted = [("qk", problem_defines("qk", *constants, problem.has_rpb))]
    wanted += [(primitive, problem_defines(primitive, *constants, False)) for primitive in ("qk", "av", "inverse")]
    if problem.has_rpb:
        acc = accumulate_dtype(dtype) if problem.batch > 1 else dtype
        wanted.append(("rpb_grad", problem_defines("rpb_grad", acc, window, 1, 1, 1, 1, offset, False)))
    rows = row_defines(dtype, window.num_neighbors, weights_pitch(window.num_neighbors, dtype))[0]
    wanted += [(primitive, rows) for primitive in ("softmax", "softmax_grad", "dropout")]
    return list({spec.key(): spec for spec in (kernel_spec(*item, arch) for item in wanted)}.values())


def positions_of(spatial: Sequence[int], window: Window) -> int:
    """Adjacent queries along x that a thread works on: one where a dilation group has no two."""
    return POSITIONS if spatial[-1] > window.dilation[-1] else 1


def row_defines(dtype: torch.dtype, num_neighbors: int, pitch: int) -> tuple[dict[str, object], int]:
    """The constants of csrc/naive/weight_rows.cuh, and how many threads share a row."""
    vector = weights_pitch(1, dtype)
    # Two vectors a lane keep more bytes in flight than one, and waste fewer lanes of a short row.
    lanes = lanes_of_row(pitch, vector, 2, most=32)
    defines = {
        "NATRAIN_DTYPE": DTYPES[dtype],
        "NATRAIN_NEIGHBORS": num_neighbors,
        "NATRAIN_PITCH": pitch,
        "NATRAIN_WEIGHT_VECTOR": vector,
        "NATRAIN_LANES": lanes,
    }
    return defines, lanes
