"""The one window arithmetic in Python against the definition and against what 'nearest' means."""

from __future__ import annotations

import pytest
import torch

from natrain.ops.window import axis_window, window_bounds
from tests.ops.oracle import axis_neighbors, window_of

LENGTHS, KERNELS, DILATIONS = range(1, 41), range(1, 14), range(1, 9)


@pytest.mark.parametrize("is_causal", [False, True])
def test_bounds_equal_the_definition_exhaustively(is_causal):
    checked = 0
    for n in LENGTHS:
        position = torch.arange(n)
        for k in range(1, min(13, n) + 1):
            for s in range(1, k + 1):
                start, end = window_bounds(position, torch.tensor(n), k, s, is_causal)
                expected = [window_of(p, n, k, s, is_causal) for p in range(n)]
                assert list(zip(start.tolist(), end.tolist(), strict=True)) == expected, (n, k, s)
                checked += 1
    assert checked == sum(min(13, n) * (min(13, n) + 1) // 2 for n in LENGTHS)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dilation", DILATIONS)
def test_axis_tables_equal_the_definition(dilation, is_causal):
    """Every length and kernel, with the strides 1, 2, and k; bounds above cover the other strides."""
    for length in LENGTHS:
        for k in (k for k in KERNELS if k * dilation <= length):
            for s in sorted({1, min(2, k), k}):
                table = axis_window(length, k, dilation, s, is_causal)
                for i, expected in enumerate(axis_neighbors(length, k, dilation, s, is_causal)):
                    valid = slice(None) if table.valid is None else table.valid[i]
                    got = list(zip(table.keys[i][valid].tolist(), table.bias[i][valid].tolist(), strict=True))
                    assert got == expected, (length, k, dilation, s, i)


def test_odd_windows_hold_the_nearest_keys():
    """Stride 1, odd kernel: no key outside the window is nearer than one inside (NAT, section 3.1)."""
    for n in LENGTHS:
        for k in range(1, min(13, n) + 1, 2):
            table = axis_window(n, k, 1, 1, False)
            for i in range(n):
                inside = set(table.keys[i].tolist())
                assert len(inside) == k
                farthest = max(abs(j - i) for j in inside)
                assert all(abs(j - i) >= farthest for j in set(range(n)) - inside)


def test_offsets_stay_inside_the_bias_table():
    for length, k, dilation, s, causal in [(40, 13, 3, 13, False), (40, 12, 3, 7, True), (39, 5, 7, 5, False)]:
        table = axis_window(length, k, dilation, s, causal)
        assert 0 <= int(table.bias.min()) and int(table.bias.max()) <= 2 * k - 2
