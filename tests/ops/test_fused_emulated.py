"""The fused kernels without a GPU: sources, plans and host code as they are, blocks and tensor cores emulated.

What registers and time decide is tests/ops/test_fused.py's, on the device; so is the rest of the grid.
"""

from __future__ import annotations

import pytest
import torch

import natrain
from natrain.ops import fused
from natrain.ops.fused_gradient_plan import demands_of_qkv, gradient_search
from natrain.ops.fused_plan import Space
from natrain.ops.precision import tf32_products
from natrain.ops.problem import Problem, Window
from natrain.ops.registry import get_kernel
from tests.emulator.fixture import emulated
from tests.ops import judge
from tests.ops.grid import CHOSEN, LINES, Case, grid
from tests.ops.judge import ATOL, Inputs

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAT = Case(2, (12, 9), 2, 32, (7, 7), (1, 1), (1, 1), (False, False), True)
GROUPED = Case(2, (7, 9), 4, 24, (3, 5), (2, 1), (1, 1), (False, False), True)
SEQUENCE = Case(3, (41,), 2, 16, (9,), (2,), (3,), (True,), False)


def check(case: Case, dtype: torch.dtype, seed: int = 0, **variant) -> None:
    inputs = Inputs.draw(case, dtype, "cpu", **variant)
    with emulated(get_kernel("fused"), seed=seed):
        mine = judge.outputs(case, inputs, "fused")
    judge.judge(inputs.names, mine, judge.same_dtype(case, inputs), judge.truth(case, inputs), ATOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", [NAT, CHOSEN[13]], ids=str)
def test_forward_and_every_gradient(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", LINES, ids=str)
def test_backward_in_one_pass(case, dtype):
    with fused.launching({}):
        check(case, dtype)
        assert [len(ready.launches) for ready in fused.launches().values()] == [1, 1]


@pytest.mark.parametrize(
    ("case", "stages"),
    [(LINES[i], stages) for i in (0, 3, 7) for stages in (1, 2, 3) if (i, stages) != (7, 3)],  # which is too large
    ids=str,
)
def test_a_block_of_one_pass_goes_over_images(case, stages, monkeypatch):
    """Stages are used again, and gradients leave through one that is fetched next; some warps have no row."""
    device = fused.Device((9, 0), 1)
    monkeypatch.setattr(fused, "device_of", lambda index: device)
    window = Window(*case.window.values())
    problem = Problem(case.batch, case.spatial, case.heads, case.head_dim, window, torch.bfloat16, "cpu")
    heads = case.heads
    space = Space.of(case.spatial, window, case.batch, heads, heads, torch.bfloat16, False)
    plans = gradient_search(space, demands_of_qkv(problem), device).plans()
    plans = [plan for plan in plans if plan.stages == stages and plan.splits < case.batch and plan.threads > 32]
    with fused.taking("backward_qkv", min(plans, key=lambda plan: plan.cost)):
        check(case, torch.bfloat16, seed=stages)
        assert len(list(fused.launches().values())[-1].launches) == 1


@pytest.mark.parametrize("value_dim", [8, 72])
def test_backward_in_one_pass_of_another_value_dim(value_dim):
    with fused.launching({}):
        check(LINES[3], torch.float16, value_dim=value_dim)
        assert [len(ready.launches) for ready in fused.launches().values()] == [1, 1]


@pytest.mark.parametrize("case", CHOSEN[3:21:3], ids=str)
def test_the_shapes_that_break_tilings(case):
    check(case, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", grid(40), ids=str)
def test_the_whole_grid(case, dtype):
    check(case, dtype)


# Several warps that share columns, one warp alone, rows that registers do not hold, a window in chunks.
TF32_CASES = [
    NAT,
    Case(2, (20,), 1, 32, (3,), (1,), (1,), (False,), True),
    Case(1, (9, 10), 1, 128, (3, 3), (1, 1), (1, 1), (False, False), False),
    Case(1, (260,), 1, 64, (201,), (1,), (1,), (False,), True),
    LINES[1],  # backward in one pass
    LINES[5],  # also of rows that registers do not hold
]


@pytest.mark.parametrize("case", TF32_CASES, ids=str)
def test_every_factor_is_rounded_to_tf32_once(case):
    """Forward and d_v of inputs that are rounded already are the same bits; everything is as near as TF32 can be."""
    names = ("q", "k", "v", "d_out")
    torch.manual_seed(0)
    inputs = dict(zip(names, case.tensors(torch.float32, requires_grad=False), strict=False))
    inputs["d_out"], rpb = torch.randn_like(inputs["v"]), case.tensors(torch.float32, requires_grad=False)[3]
    results = []
    with emulated(get_kernel("fused")), tf32_products(True):
        for change in (torch.clone, _to_tf32):
            q, k, v, d_out = (change(inputs[name]) for name in names)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out = case.function()(*leaves, **case.window, rpb=rpb, kernel="fused")
            results.append([out, *torch.autograd.grad(out, leaves, d_out)])
    (out, *_, d_v), (of_rounded, *_, d_v_of_rounded) = results
    assert torch.equal(out, of_rounded) and torch.equal(d_v, d_v_of_rounded)
    leaves = [inputs[name].double().requires_grad_() for name in names[:3]]
    expected = case.function()(*leaves, **case.window, rpb=None if rpb is None else rpb.double(), kernel="reference")
    expected = [expected, *torch.autograd.grad(expected, leaves, inputs["d_out"].double())]
    for mine, truth in zip(results[0], expected, strict=True):
        error = ((mine.double() - truth).norm() / truth.norm()).item()
        assert 1e-5 < error < 1e-3


def _to_tf32(x: torch.Tensor) -> torch.Tensor:
    """The nearest value with 10 bits of mantissa, ties away from zero."""
    return (x.view(torch.int32).add(0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("head_dim", [8, 72, 136, 256])
def test_head_dims(head_dim):
    check(Case(1, (5, 9), 1, head_dim, (3, 5), (1, 1), (1, 1), (False, False), True), torch.bfloat16)


@pytest.mark.parametrize(
    "variant",
    [{"kv_heads": 2, "masked": 0.3}, {"value_dim": 40}, {"kv_heads": 1, "value_dim": 8, "masked": 0.97}],
    ids=str,
)
@pytest.mark.parametrize("case", [GROUPED, SEQUENCE], ids=str)
def test_grouped_heads_value_dim_and_key_mask(case, variant):
    check(case, torch.bfloat16, **variant)


@pytest.mark.parametrize(("spatial", "kernel_size"), [((300,), 255), ((20, 19), 17), ((7, 8, 9), 5)], ids=str)
def test_halos_that_come_in_chunks(spatial, kernel_size):
    ones = (1,) * len(spatial)
    check(
        Case(1, spatial, 1, 16, (kernel_size,) * len(spatial), ones, ones, (False,) * len(spatial), True), torch.float16
    )


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", [NAT, CHOSEN[14], LINES[0]], ids=str)
def test_no_barrier_is_missing(case, seed):
    """Warps, lanes and blocks take turns at random."""
    check(case, torch.float16, seed=seed)


@pytest.mark.parametrize("case", [GROUPED, SEQUENCE], ids=str)
def test_dropout_draws_the_documented_mask(case):
    inputs = Inputs.draw(case, torch.float32, "cpu")
    results = []
    for kernel, x in (("fused", inputs), ("reference", inputs.to(torch.float64, "cpu"))):
        torch.manual_seed(5)
        with emulated(get_kernel("fused")):
            results.append(judge.outputs(case, x, kernel, dropout_p=0.3))
    for name, mine, other in zip(inputs.names, *results, strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm(), name


def test_packed_and_misaligned_tensors():
    """Read in place, written in place; rows off sixteen bytes are copied. Bitwise what contiguous tensors give."""
    base = torch.randn(2, 9, 7, 3, 2, 33, dtype=torch.float16)
    with emulated(get_kernel("fused")):
        for packed in (base[..., :32].contiguous(), base[..., 1:]):
            packed = packed.detach().requires_grad_()
            d_out = torch.randn(1, dtype=torch.float16).expand(2, 9, 7, 2, 32)
            out = natrain.na2d_qkvpacked(packed, (5, 3), kernel="fused")
            (d_packed,) = torch.autograd.grad(out, packed, d_out)
            q, k, v = (x.detach().contiguous().requires_grad_() for x in packed.unbind(-3))
            expected = natrain.na2d(q, k, v, (5, 3), kernel="fused")
            grads = torch.autograd.grad(expected, (q, k, v), d_out.contiguous())
            assert torch.equal(out, expected) and torch.equal(d_packed, torch.stack(grads, -3))


def test_the_images_of_a_tile_may_be_shared_among_blocks(monkeypatch):
    """However many blocks take the images of a tile: the same gradients, the bias's within rounding."""
    inputs = Inputs.draw(Case(5, (9, 8), 1, 8, (5, 3), (1, 1), (1, 1), (False, False), True), torch.float32, "cpu")
    case = Case(5, (9, 8), 1, 8, (5, 3), (1, 1), (1, 1), (False, False), True)
    results = []
    for multiprocessors in (1, 500):
        device = fused.Device((9, 0), multiprocessors)
        monkeypatch.setattr(fused, "device_of", lambda index, device=device: device)
        monkeypatch.setattr(fused, "_launches", {})
        with emulated(get_kernel("fused")):
            results.append(judge.outputs(case, inputs, "fused"))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_inference_mode_prepared_serves_outside_of_it():
    """Results of the second call are tensors like any other, though the first one's cannot be recorded."""
    q = torch.randn(2, 9, 8, 1, 16)
    with emulated(get_kernel("fused")), fused.launching({}):
        with torch.inference_mode():
            first = natrain.na2d(q, q, q, 3, kernel="fused")
        with torch.no_grad():
            second = natrain.na2d(q, q, q, 3, kernel="fused")
        assert len(fused.launches()) == 1 and first.is_inference() and not second.is_inference()
    assert torch.equal(first, second)
    weight = torch.ones(16, requires_grad=True)
    (second * weight).sum().backward()
    torch.testing.assert_close(weight.grad, second.sum((0, 1, 2, 3)))


def test_nothing_to_do():
    empty = torch.empty(0, 7, 7, 2, 32, requires_grad=True)
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    with emulated(get_kernel("fused")):
        out = natrain.na2d(empty, empty, empty, 3, rpb=rpb, kernel="fused")
        d_empty, d_rpb = torch.autograd.grad(out.sum(), (empty, rpb))
    assert d_empty.shape == empty.shape and not d_rpb.any()


def test_compiles_into_one_graph_of_any_size():
    """torch.compile with symbolic sizes: one graph serves several batches and sides."""

    def attend(q, k, v):
        return natrain.na2d(q, k, v, 3, kernel="fused")

    with emulated(get_kernel("fused")):
        compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
        for batch, side in ((2, 6), (3, 9)):
            tensors = [torch.randn(batch, side, side + 1, 2, 16, requires_grad=True) for _ in range(3)]
            d_out = torch.randn(batch, side, side + 1, 2, 16)
            results = []
            for function in (attend, compiled):
                out = function(*tensors)
                results.append([out, *torch.autograd.grad(out, tensors, d_out)])
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_window_of_one_key_passes_values_on(dtype):
    with emulated(get_kernel("fused")):
        judge.check_one_key("fused", dtype, "cpu")
