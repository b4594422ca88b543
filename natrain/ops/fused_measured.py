"""Plans of the fused kernels that were measured to be the fastest, for the layers that are measured.

Taken by ``choose_plan`` and ``choose_gradient_plan`` before their models of cost are asked. From
``scripts/bench_plans.py`` on an H100 (bfloat16, 20 to 30 plans a layer); docs/performance.md has the times. Layers of
one's own: ``natrain kernels tune`` (fused_tuned.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from natrain.ops.fused_tiles import Space

# Kernel -> (lengths of a dilation group, kernel size, head dim) -> (row tile, warps, stages, kind of table, step, is
# the halo resident).
# DiNAT's layers at 224 pixels have groups of 7x7.
_Key = tuple[tuple[int, int, int], tuple[int, int, int], int]
_Choice = tuple[tuple[int, int, int], tuple[int, int, int], int, int, tuple[int, int, int], bool]
_NAT_56, _NAT_28, _NAT_14, _NAT_7 = (((1, side, side), (1, 7, 7), 32) for side in (56, 28, 14, 7))
_PLANE_64, _PLANE_128 = (((1, side, side), (1, 13, 13), 64) for side in (64, 128))
_LINE_4096, _LINE_16384 = ((1, 1, 4096), (1, 1, 127), 64), ((1, 1, 16384), (1, 1, 255), 64)
_PLANS: dict[str, dict[_Key, _Choice]] = {
    "forward": {
        _NAT_56: ((1, 8, 2), (1, 1, 7), 2, 2, (1, 14, 8), True),
        _NAT_28: ((1, 8, 2), (1, 4, 2), 2, 1, (1, 14, 8), True),
        _NAT_14: ((1, 8, 2), (1, 2, 7), 3, 1, (1, 12, 8), True),
        _NAT_7: ((1, 2, 8), (1, 4, 1), 2, 1, (1, 8, 8), True),
        _PLANE_64: ((1, 4, 4), (1, 2, 4), 1, 1, (1, 16, 16), True),
        _PLANE_128: ((1, 4, 4), (1, 3, 4), 1, 1, (1, 16, 16), True),
        _LINE_4096: ((1, 1, 16), (1, 1, 8), 2, 2, (1, 1, 144), True),
        _LINE_16384: ((1, 1, 16), (1, 1, 4), 2, 0, (1, 1, 64), False),
    },
    "backward_q": {
        _NAT_56: ((1, 8, 2), (1, 1, 4), 2, 1, (1, 14, 8), True),
        _NAT_28: ((1, 8, 2), (1, 2, 7), 2, 2, (1, 14, 8), True),
        _NAT_14: ((1, 8, 2), (1, 2, 7), 2, 2, (1, 12, 8), True),
        _NAT_7: ((1, 2, 8), (1, 4, 1), 2, 2, (1, 8, 8), True),
        _PLANE_64: ((1, 4, 4), (1, 2, 4), 1, 1, (1, 16, 16), True),
        _PLANE_128: ((1, 4, 4), (1, 2, 4), 1, 1, (1, 16, 16), True),
        _LINE_4096: ((1, 1, 16), (1, 1, 4), 1, 2, (1, 1, 144), True),
        _LINE_16384: ((1, 1, 16), (1, 1, 2), 1, 0, (1, 1, 64), False),
    },
    "backward_kv": {
        _NAT_56: ((1, 2, 8), (1, 7, 1), 2, 1, (1, 11, 16), True),
        _NAT_28: ((1, 2, 8), (1, 7, 1), 2, 1, (1, 11, 16), True),
        _NAT_14: ((1, 1, 16), (1, 7, 1), 2, 1, (1, 10, 16), True),
        _NAT_7: ((1, 2, 8), (1, 4, 1), 2, 1, (1, 8, 8), True),
        _PLANE_64: ((1, 1, 16), (1, 2, 1), 1, 1, (1, 2, 32), False),
        _PLANE_128: ((1, 1, 16), (1, 2, 1), 1, 1, (1, 2, 32), False),
        _LINE_4096: ((1, 1, 16), (1, 1, 4), 2, 0, (1, 1, 64), False),
        _LINE_16384: ((1, 1, 16), (1, 1, 2), 1, 0, (1, 1, 64), False),
    },
}
# Where a bias changes what is best.
_WITH_BIAS: dict[str, dict[_Key, _Choice]] = {
    "forward": {_LINE_4096: ((1, 1, 16), (1, 1, 4), 2, 0, (1, 1, 64), False)},
    "backward_q": {
        _NAT_56: ((1, 8, 2), (1, 1, 4), 1, 2, (1, 14, 8), True),
        _NAT_28: ((1, 8, 2), (1, 1, 7), 2, 1, (1, 14, 8), True),
        _NAT_14: ((1, 8, 2), (1, 1, 7), 2, 1, (1, 12, 8), True),
        _NAT_7: ((1, 2, 8), (1, 4, 1), 2, 1, (1, 8, 8), True),
        _PLANE_64: ((1, 4, 4), (1, 2, 4), 2, 1, (1, 4, 16), False),
        _PLANE_128: ((1, 4, 4), (1, 2, 4), 2, 1, (1, 4, 16), False),
        _LINE_4096: ((1, 1, 16), (1, 1, 3), 1, 0, (1, 1, 64), False),
        _LINE_16384: ((1, 1, 16), (1, 1, 3), 1, 0, (1, 1, 64), False),
    },
    "backward_kv": {
        _PLANE_64: ((1, 2, 8), (1, 4, 1), 1, 1, (1, 2, 32), False),
        _PLANE_128: ((1, 4, 4), (1, 2, 1), 1, 1, (1, 2, 32), False),
        _LINE_16384: ((1, 1, 16), (1, 1, 4), 2, 0, (1, 1, 64), False),
    },
}
# In float32 as TF32, on an H200, 15 plans a layer with a bias.
_FLOAT32: dict[str, dict[_Key, _Choice]] = {
    "forward": {
        _NAT_56: ((1, 8, 2), (1, 1, 7), 1, 1, (1, 14, 8), True),
        _NAT_28: ((1, 8, 2), (1, 1, 7), 1, 1, (1, 14, 8), True),
        _NAT_14: ((1, 16, 1), (1, 1, 14), 2, 1, (1, 14, 8), True),
    },
    "backward_q": {_NAT_14: ((1, 8, 2), (1, 1, 7), 2, 1, (1, 12, 8), True)},
    "backward_kv": {
        _NAT_56: ((1, 2, 8), (1, 4, 1), 1, 1, (1, 11, 16), True),
        _NAT_28: ((1, 2, 8), (1, 2, 2), 2, 1, (1, 4, 16), False),
        _NAT_14: ((1, 1, 16), (1, 7, 1), 2, 1, (1, 10, 16), True),
    },
}


def measured_choice(kernel: str, space: Space, head_dim: int) -> _Choice | None:
    """What was measured to be best, if this problem was; the arguments are those of ``measured``."""
    if any(axis.stride > 1 or axis.is_causal for axis in space.axes):
        return None
    lengths, kernel_size = zip(*((axis.group_lengths[0], axis.kernel_size) for axis in space.axes), strict=True)
    key = lengths, kernel_size, head_dim
    if space.itemsize == 4:
        return _FLOAT32.get(kernel, {}).get(key)
    wanted = _PLANS.get(kernel, {}).get(key)
    return _WITH_BIAS.get(kernel, {}).get(key, wanted) if space.has_rpb else wanted


def measured(kernel: str, space: Space, head_dim: int, plans: Iterable) -> list:
    """Of ``plans`` those that are the measured one (they differ in their chunks at most), or none.

    Args:
        kernel: forward, backward_q, backward_kv or backward_qkv.
        head_dim: the larger one, of keys and of values.
    """
    wanted = measured_choice(kernel, space, head_dim)
    return [
        plan
        for plan in plans
        if (plan.row_tile, plan.warps, plan.stages, plan.start_table, plan.step, plan.resident) == wanted
    ]
