"""Plans of the fused kernels: every column of every row lies where the kernel looks for it, found by walking all tiles
in plain integers with the oracle's windows."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from natrain.bench.layers import LAYERS
from natrain.ops import fused, fused_search, fused_tiles, fused_walk
from natrain.ops.fused_forward_plan import choose_plan, forward_search
from natrain.ops.fused_gradient_plan import (
    choose_gradient_plan,
    demands_of_kv,
    demands_of_q,
    demands_of_qkv,
    gradient_search,
)
from natrain.ops.fused_measured import measured, measured_choice
from natrain.ops.fused_plan import Demands, Device, Plan, Space, shared_capacity
from natrain.ops.fused_tiles import Axis
from natrain.ops.problem import Problem, Window
from tests.ops import oracle


def _space(spatial, kernel_size, dilation=1, stride=1, is_causal=False, dtype=torch.half):
    def per_axis(value):
        return value if isinstance(value, tuple) else (value,) * len(spatial)

    window = Window(per_axis(kernel_size), per_axis(dilation), per_axis(stride), per_axis(is_causal))
    return Space.of(spatial, window, 3, 2, 2, dtype, has_rpb=True)


SPACES = [
    _space((56, 56), 7),
    _space((29, 30), (7, 5), dilation=(1, 3)),
    _space((17, 23), (5, 4), stride=(3, 2)),
    _space((17, 23), (5, 9), is_causal=(True, False)),
    _space((7, 7), 7),
    _space((150,), 63),
    _space((150,), 20, dilation=3, stride=7, is_causal=True),
    _space((6, 9, 11), (3, 5, 4), stride=(1, 2, 1)),
    _space((64, 64), 13),
    _space((90, 90), 63),
]


def _columns(axis, n: int, rows: str) -> list[tuple[int, int]]:
    """First column and one past the last of every row."""
    windows = [oracle.window_of(p, n, axis.kernel_size, axis.stride, axis.is_causal) for p in range(n)]
    if rows == "queries":
        return windows
    queries = [[i for i, (start, end) in enumerate(windows) if start <= key < end] for key in range(n)]
    if rows == "keys":
        return [(found[0], found[-1] + 1) for found in queries]
    of_both = [[row, *range(*windows[row]), *queries[row]] for row in range(n)]
    return [(min(found), max(found) + 1) for found in of_both]


def _sample(space: Space, demands: Demands, count: int = 12) -> list[Plan]:
    plans = list(forward_search(space, demands, Device()).plans())
    return random.Random(0).sample(plans, min(count, len(plans)))


@pytest.mark.parametrize("rows", ["queries", "keys", "both"])
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_boxes_and_chunks_hold_every_column(space, rows):
    demands = Demands((32, 32), (32,), 64, rows_are=rows)
    for plan in _sample(space, demands):
        for a, axis in enumerate(space.axes):
            tile, warps = plan.row_tile[a], plan.warps[a]
            for n in {-(-axis.length // axis.dilation), axis.length // axis.dilation}:
                columns = _columns(axis, n, rows)
                for row in range(n):
                    warp_first = row // tile * tile
                    box = columns[warp_first][0]
                    assert box <= columns[row][0] and columns[row][1] <= box + plan.box[a]
                    offset = box - columns[row // (tile * warps) * tile * warps][0]
                    if plan.resident or (a == 2 and not plan.chunked_x):
                        assert 0 <= offset and offset + plan.box[a] <= plan.chunk[a]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_classes_are_as_many_as_any_block_has(space):
    for plan in _sample(space, Demands.of_forward(32, 32, torch.bfloat16), 400):
        if plan.classes is None:
            continue
        _, axis, axis_x = space.axes
        rows_of_block, margin = plan.row_tile[1] * plan.warps[1], plan.classes.margin
        for n in {-(-axis.length // axis.dilation), axis.length // axis.dilation}:
            columns = _columns(axis, n, "queries")
            kinds = [(row - first, end - first) for row, (first, end) in enumerate(columns)]
            for block in range(0, n, rows_of_block):
                assert len(list(itertools.groupby(kinds[block : block + rows_of_block]))) <= plan.classes.y
            for row, (first, end) in enumerate(columns):
                box = columns[row // plan.row_tile[1] * plan.row_tile[1]][0]
                assert end - first <= plan.classes.lines and first - box <= margin
                # The box's last line is before the next class's first.
                assert box + plan.box[1] - first <= plan.classes.lines + margin
        assert plan.classes.x <= plan.warps[2]


def test_devices_of_one_family_have_the_shared_memory_of_the_family():
    """CUDA C++ Programming Guide: 99 KiB a block on 8.6, 8.9 and 12.x, a plan for more is refused by the driver."""
    for capability in ((8, 6), (8, 9), (12, 0), (12, 1)):
        assert shared_capacity(capability) == (100 * 1024, 99 * 1024)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_head_dim_has_a_plan_that_fits(capability, dtype):
    _, most = shared_capacity(capability)
    for head_dim in (8, 24, 32, 64, 72, 128, 256):
        if dtype is torch.float32 and head_dim == 256 and capability == (8, 6):
            continue  # two matrices of 16 rows and two of 16 columns, of 1 KB each, are more than it has
        for space in (_space((56, 56), 7, dtype=dtype), _space((300,), 127, dtype=dtype)):
            plan = choose_plan(space, Demands.of_forward(head_dim, head_dim, dtype), Device(capability))
            assert plan.shared_bytes <= most and plan.threads * plan.min_blocks <= 2048
            assert plan.grid == plan.splits * space.heads * math.prod(plan.tiles)


@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("space", [space for space in SPACES if measured_choice("forward", space, 32) is None], ids=str)
def test_the_search_finds_what_is_best_of_all(space, head_dim, batch):
    """Though it leaves most plans out."""
    space = replace(space, batch=batch)
    problem = Problem(
        batch, (56, 56), 2, head_dim, Window((7, 7), (1, 1), (1, 1), (False, False)), torch.half, "cuda", has_rpb=True
    )
    forward = Demands.of_forward(head_dim, head_dim, torch.half)
    ranked = min(forward_search(space, forward, Device()).plans(), key=fused_search.Search.rank)
    assert choose_plan(space, forward, Device()) == ranked
    for demands, entries in ((demands_of_q(problem), 169), (demands_of_kv(problem, 3), 0)):
        plans = gradient_search(space, demands, Device(), entries).plans()
        assert choose_gradient_plan(space, demands, Device(), entries) == min(plans, key=fused_search.Search.rank)


@pytest.mark.parametrize("batch, combinations", [(1, 3), (7, 1), (300, 5), (1024, 1), (64, 3000)])
def test_images_are_spread_as_if_all_splits_were_tried(batch, combinations):
    slots, setup = 132, 0.37
    times = []
    for splits in range(1, max(1, min(batch, -(-8 * slots // combinations))) + 1):
        waves = combinations * splits / slots
        times.append((math.ceil(waves) if waves < 4 else waves + 0.5) * (-(-batch // splits) + setup))
    assert fused_search._splits(batch, combinations, slots, setup) == (1 + times.index(min(times)), min(times))


def test_no_plan_says_so():
    space = _space((300,), 127, dtype=torch.float32)
    with pytest.raises(ValueError, match="shared memory"):
        choose_plan(space, Demands((4096, 4096), (4096,), 64), Device())


@pytest.mark.parametrize("has_rpb", [False, True])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_a_measured_plan_is_a_legal_one_and_taken(layer, has_rpb):
    problem = layer.case(torch.bfloat16, has_rpb).problem("cuda", (9, 0))
    heads = layer.heads
    space = Space.of(layer.spatial, problem.window, layer.batch, heads, heads, problem.dtype, has_rpb)
    entries = math.prod(problem.window.rpb_shape) if has_rpb else 0
    forward = Demands.of_forward(layer.head_dim, layer.head_dim, problem.dtype)
    chosen = {
        "forward": (choose_plan(space, forward, Device()), list(forward_search(space, forward, Device()).plans())),
    }
    for kernel, demands, sums in (
        ("backward_q", demands_of_q(problem), entries),
        ("backward_kv", demands_of_kv(problem, 3), 0),
    ):
        plans = list(gradient_search(space, demands, Device(), sums).plans())
        chosen[kernel] = choose_gradient_plan(space, demands, Device(), sums), plans
    for kernel, (plan, plans) in chosen.items():
        assert plan in measured(kernel, space, layer.head_dim, plans), kernel


def test_plans_are_the_same_while_torch_traces_and_under_a_default_device():
    """Under tensors that have no values; and what is cached then serves real calls."""
    layer = LAYERS[3]
    problem = replace(layer.case(torch.bfloat16, True).problem("cuda", (9, 0)), batch=3)
    space = replace(SPACES[1], batch=5)
    calls = [
        lambda: choose_plan(space, Demands.of_forward(32, 32, torch.float16), Device()),
        lambda: choose_gradient_plan(space, demands_of_kv(problem, 3), Device()),
        lambda: choose_gradient_plan(SPACES[5], demands_of_qkv(problem), Device()),
    ]
    outside = [call() for call in calls]
    for mode in (FakeTensorMode(), torch.device("meta")):
        for function in (choose_plan, choose_gradient_plan, fused_tiles.columns_of_rows, fused_tiles.box_extent):
            function.cache_clear()
        with mode:
            assert [call() for call in calls] == outside
        for rows in ("queries", "keys", "both"):
            first = fused_tiles.columns_of_rows(space.axes[1], 29, rows)[0]
            assert not isinstance(first, FakeTensor) and not first.is_meta


def test_blocks_of_few_images_walk():
    """Of a detector's first stage; not of a batch that gives every block many images, nor where it does not pay."""
    window = Window((7, 7), (1, 1), (1, 1), (False, False))
    problem = Problem(1, (200, 334), 4, 32, window, torch.half, "cuda", (9, 0), has_rpb=True)

    def plan(batch: int, **more) -> Plan:
        asked = replace(problem, batch=batch, **more)
        space = Space.of(asked.spatial, window, batch, 4, 4, torch.half, has_rpb=True)
        return choose_gradient_plan(space, demands_of_q(asked), Device((9, 0), 132), 13 * 13)

    alone = plan(1)
    assert alone.walk is not None and not alone.walk.is_over_groups
    along = alone.tiles[alone.walk.axis]
    assert alone.walk.runs <= along and alone.grid == math.prod(alone.tiles) * 4
    assert plan(128).walk is None
    assert plan(1, has_key_mask=True).walk is None and plan(1, has_dropout=True).walk is None


@pytest.mark.parametrize("rows", ["queries", "keys", "both"])
def test_the_tiles_of_a_stretch_are_alike(rows):
    """By the oracle's windows: every row sees the same from its place, and so does every key of a window's queries."""
    draw, found, sides = random.Random(3), 0, ("queries", "keys") if rows == "both" else (rows,)
    axes = [Axis(200, 4, 1, 2, False)]  # tiles of 11: its sides take turns
    for _ in range(150):
        length, dilation, kernel = draw.randrange(20, 160), draw.choice([1, 1, 2, 3]), draw.randrange(1, 14)
        if kernel * dilation <= length:
            axes.append(Axis(length, kernel, dilation, draw.randrange(1, kernel + 1), draw.random() < 0.3))
    for axis in axes:
        tile = 11 if axis is axes[0] else draw.choice([1, 2, 4, 8, 16, 48])
        stretch = fused_walk.stretch_of(axis, rows, tile)
        for n in set(axis.group_lengths):
            assert stretch.count == 0 or (stretch.first + stretch.count) * tile <= n
            for side in sides:
                columns = _columns(axis, n, side)
                kinds = {
                    tuple((start - first, end - first) for start, end in columns[first : first + tile])
                    for first in range(stretch.first * tile, (stretch.first + stretch.count) * tile, tile)
                }
                assert len(kinds) <= 1, (axis, tile, side)
        found += stretch.count > 2
    assert found > 30


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"clock_rate": 1_980_000, "memory_clock_rate": 2_619_000, "memory_bus_width": 5120}, 12.8),  # an H100 SXM
        ({"clock_rate": 1_980_000, "memory_clock_rate": 3_201_000, "memory_bus_width": 6016}, 18.4),  # an H200
        ({"clock_rate": 0, "memory_clock_rate": 3_201_000, "memory_bus_width": 6144}, 12.8),  # not said
        ({}, 12.8),  # torch 2.7
    ],
    ids=str,
)
def test_what_the_memory_moves_is_asked_of_the_gpu(more, expected, monkeypatch):
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="a GPU", **more)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    fused.device_of.cache_clear()
    assert fused.device_of(0) == Device((9, 0), 132, expected, "a GPU")
    fused.device_of.cache_clear()
    # Where a GPU is at hand, its plans are what is compiled ahead.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert fused.device_ahead((9, 0)).memory_bytes == expected and fused.device_ahead((8, 0)) == Device((8, 0))
    fused.device_of.cache_clear()

    # Compiling needs no GPU that can be used.
    def refused(index=None):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "get_device_capability", refused)
    assert fused.device_ahead((9, 0)) == Device()


def test_faster_memory_changes_what_is_best():
    """Under slow memory plans that move least are, however much more they compute."""
    space, demands = _space((22, 38), 3, dtype=torch.float32), Demands.of_forward(64, 64, torch.float32)
    slow, fast = (choose_plan(space, demands, Device(memory_bytes=moved)) for moved in (6.4, 25.6))
    assert slow.cost > fast.cost
    assert replace(slow, cost=0, cycles=0) != replace(fast, cost=0, cycles=0)
