"""Launch geometry: every query in exactly one block, accesses aligned, 64-bit offsets where 32 would wrap."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from natrain.ops.geometry import (
    MAX_THREADS,
    Layout,
    access_width,
    choose_chunks,
    choose_tiling,
    contiguous_rows,
    lanes_of_row,
    offset_type,
    weights_pitch,
)


@pytest.mark.parametrize(
    "spatial, dilation, kernel_size, heads, row_bytes, lanes, wide",
    [
        ((1, 56, 56), (1, 1, 1), (1, 7, 7), 2, 64, 4, 2),
        ((1, 56, 56), (1, 8, 8), (1, 7, 7), 2, 64, 4, 2),
        ((1, 7, 7), (1, 1, 1), (1, 7, 7), 16, 128, 8, 2),
        ((1, 1, 4099), (1, 1, 3), (1, 1, 127), 1, 2, 1, 2),
        ((5, 7, 11), (2, 1, 3), (2, 7, 3), 3, 600, 8, 2),
        ((1, 1, 1), (1, 1, 1), (1, 1, 1), 1, 4, 1, 1),
    ],
)
def test_every_token_and_head_lies_in_exactly_one_block(spatial, dilation, kernel_size, heads, row_bytes, lanes, wide):
    """Walks blocks and units as csrc/naive/problem.cuh does, in plain integers."""
    tiling = choose_tiling(spatial, dilation, kernel_size, heads, row_bytes, lanes, wide)
    assert tiling.threads <= MAX_THREADS and tiling.threads % 32 == 0
    seen = set()
    for block in range(tiling.blocks_per_image):
        rest, places = block, []
        for axis in (2, 1, 0):
            across = tiling.tiles[axis] * dilation[axis]
            places.append((rest % across % dilation[axis], rest % across // dilation[axis]))
            rest //= across
        first_head = rest * tiling.head_tile
        places = places[::-1]
        axes = []
        for axis in range(3):
            group, tile = places[axis]
            width = tiling.tile[axis] * (wide if axis == 2 else 1)
            positions = range(tile * width, (tile + 1) * width)
            axes.append([p * dilation[axis] + group for p in positions if p * dilation[axis] + group < spatial[axis]])
        units = math.prod(tiling.tile) * tiling.head_tile
        assert units * lanes <= tiling.threads
        for token in itertools.product(*axes):
            for head in range(first_head, min(first_head + tiling.head_tile, heads)):
                assert (token, head) not in seen
                seen.add((token, head))
    assert len(seen) == math.prod(spatial) * heads


@pytest.mark.parametrize("rows, columns, blocks", [(56, 56, 2), (1, 4096, 8), (5, 7, 1), (1, 1, 99), (5000, 64, 3)])
def test_chunks_cover_everything_once(rows, columns, blocks):
    sizes, counts = choose_chunks(rows, columns, blocks)
    for total, size, count in zip((rows, columns), sizes, counts, strict=True):
        assert size * (count - 1) < total <= size * count


def test_accesses_stay_aligned():
    x = torch.empty(2, 5, 3, 40, dtype=torch.float16)
    assert access_width(40, x) == 8
    assert access_width(33, x) == 1
    assert access_width(36, x[..., :36]) == 4  # rows of 40, of which 36 are read: the last access must end inside
    assert access_width(32, x[..., 4:36]) == 4  # starts 8 bytes into an aligned row
    assert access_width(32, x.float()) == 4
    packed = torch.empty(2, 5, 3, 3, 20, dtype=torch.float16)[..., 1, :, :]
    assert access_width(20, packed) == 4


def test_rows_of_weights_start_at_16_bytes():
    assert weights_pitch(49, torch.float16) == 56
    assert weights_pitch(49, torch.float32) == 52
    assert weights_pitch(49, torch.float64) == 50
    assert weights_pitch(64, torch.bfloat16) == 64


@pytest.mark.parametrize(
    "head_dim, width, lanes", [(32, 8, 4), (32, 4, 8), (8, 8, 1), (33, 1, 8), (40, 8, 8), (1, 1, 1)]
)
def test_lanes_are_a_power_of_two(head_dim, width, lanes):
    assert lanes_of_row(head_dim, width) == lanes


def test_offsets_become_64_bit_when_an_image_needs_them():
    small = torch.empty(9, 2**10, 4, 32, device="meta")
    large = torch.empty(1, 2**25, 4, 32, device="meta")
    assert offset_type(Layout.of(small)) == "int"
    assert offset_type(Layout.of(small), Layout.of(large)) == "long long"


def test_expanded_rows_are_copied_and_others_are_not():
    x = torch.randn(2, 3, 4, 5)
    assert contiguous_rows(x.transpose(1, 2)).data_ptr() == x.data_ptr()
    expanded = torch.ones(()).expand(2, 3, 4, 5)
    assert contiguous_rows(expanded).stride(-1) == 1
