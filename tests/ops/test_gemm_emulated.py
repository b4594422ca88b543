"""The gemm kernels without a GPU: their sources on the CPU emulator, against the float64 oracle and the reference."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import natrain
from natrain.ops import gemm, naive, reference, registry
from natrain.ops.gemm_plan import RowStep, choose_gemm_tiling, gemm_tilings
from natrain.ops.geometry import weights_pitch
from natrain.ops.problem import Window
from tests.emulator.fixture import emulated
from tests.emulator.guarded import guarded_like
from tests.ops import judge
from tests.ops.grid import CHOSEN, Case
from tests.ops.judge import Inputs

CASES = [CHOSEN[i] for i in (1, 3, 6, 9, 11, 12, 13, 14, 17, 18, 19)]
# float32 by three TF32 products is as exact as float32 here; 16 bits round weights and gradients.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-6}
LONG = Case(1, (330,), 1, 16, (197,), (1,), (1,), (False,), True)
# Planes of a causal window end before their slots do.
CAUSAL_PLANES = Case(1, (8, 10, 8), 1, 32, (5, 5, 3), (1, 1, 1), (1, 5, 1), (False, True, False), False)
LONG_CAUSAL = Case(1, (330,), 1, 8, (190,), (1,), (3,), (True,), True)


@pytest.fixture
def on_the_cpu():
    with emulated(registry.get_kernel("gemm"), registry.get_kernel("naive"), seed=7):
        yield


def take(monkeypatch, choose, choose_row_step=lambda *_: None) -> None:
    """Let gemm take the tilings of these functions, and plan everything anew."""

    def either(*problem):
        *problem, step = problem
        return choose_row_step(step, *problem[1:]) if step else choose(*problem)

    monkeypatch.setattr(gemm, "choose_gemm_tiling", either)
    plans = {}
    for module in (gemm, naive):
        monkeypatch.setattr(module, "plans", plans)


def check(case: Case, dtype: torch.dtype, tolerance: float | None = None, **variant) -> None:
    inputs = Inputs.draw(case, dtype, device="cpu", **variant)
    for name, x, z in zip(inputs.names, judge.outputs(case, inputs, "gemm"), judge.truth(case, inputs), strict=True):
        error = ((x.double() - z).norm() / z.norm()).item()
        assert error <= (tolerance or TOLERANCE[dtype]), f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_agrees_with_the_oracle(case, on_the_cpu):
    """out, lse and the gradients of q, k, v, rpb; a dtype a case in turn."""
    check(case, list(TOLERANCE)[CASES.index(case) % 3])


@pytest.mark.parametrize("case", [LONG, LONG_CAUSAL, CAUSAL_PLANES, *CASES[3:8:2], *CASES[9:]], ids=str)
def test_a_halo_larger_than_shared_memory_goes_in_chunks(case, on_the_cpu, monkeypatch):
    """With the least shared memory that any tiling takes, every primitive works on parts of a halo."""
    chunked = []

    def choose(*problem):
        *problem, _ = problem
        tilings = (choose_gemm_tiling(*problem, limit) for limit in range(1024, 64 * 1024, 512))
        tiling = next(filter(None, tilings))
        chunked.append(tiling.chunk < tiling.halo[0] * tiling.halo[1] * tiling.halo[2])
        return tiling

    take(monkeypatch, choose)
    check(case, torch.float16)
    assert any(chunked)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [CAUSAL_PLANES, LONG_CAUSAL], ids=str)
def test_every_slot_of_a_row_is_written(case, dtype, on_the_cpu, monkeypatch):
    """Scores of a buffer full of NaN, the halo in the smallest chunks there are."""

    def choose(*problem):
        return min(gemm_tilings(*problem), key=lambda tiling: (tiling.chunk, tiling.cost))

    take(monkeypatch, choose)
    q, k, *_ = case.tensors(dtype, requires_grad=False)
    window = Window(case.kernel_size, case.dilation, case.stride, case.is_causal)
    pitch = weights_pitch(window.num_neighbors, dtype)
    scores = torch.full((*q.shape[:-1], pitch), math.nan, dtype=dtype)
    registry.get_kernel("gemm").write_scores(window, q, k, None, 1.0, -7.0, scores)
    assert not scores.isnan().any()
    expected = reference.qk(q.double(), k.double(), None, window, 1.0)
    expected = expected.masked_fill(expected == -math.inf, -7.0)
    assert torch.allclose(scores[..., : window.num_neighbors].double(), expected, atol=2e-2, rtol=2e-3)
    assert (scores[..., window.num_neighbors :] == -7).all()


SLICED = [
    Case(2, (5, 9), 2, 128, (3, 3), (1, 1), (1, 1), (False, False), True),
    Case(1, (7, 6), 1, 64, (5, 3), (1, 2), (2, 1), (True, False), True),
    Case(1, (4, 5, 6), 1, 128, (3, 3, 3), (1, 1, 1), (1, 1, 1), (False, False, False), False),
    Case(1, (200,), 2, 128, (69,), (2,), (1,), (False,), True),
]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "case, dtype, slices",
    [
        *((case, torch.float32, slices) for case in SLICED for slices in (2, 4) if case.head_dim // slices >= 32),
        *((case, (torch.float16, torch.bfloat16)[index % 2], 2) for index, case in enumerate(SLICED[::2])),
    ],
    ids=str,
)
def test_a_wide_head_goes_in_slices(case, dtype, slices, whole, on_the_cpu, monkeypatch):
    """Every primitive, the halo as a whole or in chunks."""

    def choose(*problem):
        tilings = [
            tiling
            for tiling in gemm_tilings(*problem)
            if tiling.slices == slices and (tiling.chunk == math.prod(tiling.halo)) == whole
        ]
        assert tilings, f"{problem[0]} has no tiling of {slices} slices"
        return min(tilings, key=lambda tiling: tiling.cost)

    take(monkeypatch, choose, (lambda step, *problem: choose("qk", *problem, step)) if whole else lambda *_: None)
    check(case, dtype)


# Rows of 16 and of 5 slots, of more than a lane holds in registers, with planes that end early, of several widths.
STEPPED = [
    Case(2, (6, 7), 2, 16, (4, 4), (1, 1), (1, 1), (False, False), True),
    Case(1, (40,), 2, 8, (5,), (2,), (1,), (False,), True),
    Case(1, (17, 15), 2, 16, (13, 13), (1, 1), (1, 1), (False, False), True),
    Case(1, (150,), 1, 16, (129,), (1,), (1,), (True,), True),
    CAUSAL_PLANES,
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", STEPPED, ids=str)
def test_softmax_and_its_derivative_in_qk(case, dtype, on_the_cpu, monkeypatch):
    """Whole rows in shared memory, whatever else would be cheaper; with a gradient through lse."""
    steps = []

    def choose(step, *problem):
        steps.append(step)
        return min(gemm_tilings("qk", *problem, step), key=lambda tiling: tiling.cost)

    take(monkeypatch, choose_gemm_tiling, choose)
    check(case, dtype)
    assert set(steps) == {RowStep.SOFTMAX, RowStep.SOFTMAX_GRAD}


def test_dropout_comes_between_qk_and_the_derivative_of_the_softmax(on_the_cpu):
    """The mask is one for forward and backward: equal to naive's, which knows no row steps."""
    case = STEPPED[0]
    q, k, v, rpb = case.tensors(torch.float32)
    results = []
    for kernel in ("gemm", "naive"):
        torch.manual_seed(3)
        out = natrain.na2d(q, k, v, 4, rpb=rpb, dropout_p=0.4, kernel=kernel)
        results.append([out, *torch.autograd.grad(out, (q, k, v, rpb), torch.ones_like(out))])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_where_the_softmax_happens():
    """In qk for every layer of the zoo and most short windows of the frozen sweep; not where rows are long."""
    from natrain.bench import layers
    from natrain.bench.strata import frozen_cases

    def is_stepped(case, step):
        problem = ("qk", case.spatial, case.window, case.head_dim, case.dtype)
        return choose_gemm_tiling(*problem, row_step=step) is not None

    steps = (RowStep.SOFTMAX, RowStep.SOFTMAX_GRAD)
    zoo = [layer.case(torch.bfloat16, False) for layer in layers.LAYERS if layer.head_dim == 32]
    assert zoo and all(is_stepped(case, step) for case in zoo for step in steps)
    cases = {"short": [], "long": []}
    for case in frozen_cases():
        pitch = weights_pitch(case.window.num_neighbors, case.dtype)
        cases["long" if pitch * case.dtype.itemsize > 208 else "short"].append(case)
    assert not any(is_stepped(case, step) for case in cases["long"] for step in steps)
    assert sum(is_stepped(case, RowStep.SOFTMAX) for case in cases["short"]) > 0.9 * len(cases["short"]) > 50


@pytest.mark.parametrize("columns", [8, 16])
@pytest.mark.parametrize("case", CASES[2::4], ids=str)
def test_float32_is_multiplied_by_8_or_16_columns(case, columns, on_the_cpu, monkeypatch):
    def choose(primitive, *problem):
        tilings = list(gemm_tilings(primitive, *problem))
        if primitive != "qk":
            tilings = [tiling for tiling in tilings if tiling.columns == columns]
        return min(tilings, key=lambda tiling: tiling.cost)

    take(monkeypatch, choose)
    check(case, torch.float32)


def test_tf32_where_torch_allows_it(on_the_cpu):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        check(CASES[3], torch.float32, tolerance=2e-3)
        with pytest.raises(AssertionError, match="relative error"):
            check(CASES[3], torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("variant", [{"value_dim": 24}, {"value_dim": 8}], ids=str)
def test_value_dims_of_their_own(variant, on_the_cpu):
    check(Case(1, (6, 9), 2, 16, (3, 5), (2, 1), (1, 1), (False, False), True), torch.float16, **variant)


@pytest.mark.parametrize("case", [CHOSEN[4], CHOSEN[13]], ids=str)
def test_visible_weights_agree_with_the_reference(case, on_the_cpu):
    q, k, v, rpb = case.tensors(torch.float32, requires_grad=False)
    window = Window(**case.window)
    scores = case.function("_qk")(q, k, **case.window, rpb=rpb, kernel="gemm")
    torch.testing.assert_close(scores, reference.qk(q, k, rpb, window, case.head_dim**-0.5), rtol=1e-5, atol=1e-5)
    probs = scores.softmax(-1)
    out = case.function("_av")(probs, v, **case.window, kernel="gemm")
    torch.testing.assert_close(out, reference.av(probs, v, window), rtol=1e-5, atol=1e-5)


def test_misaligned_rows_go_to_naive(on_the_cpu):
    wide = torch.randn(2, 9, 10, 3, 1, 17, dtype=torch.float16)
    q, k, v = (x[..., 1:] for x in wide.unbind(-3))
    out = natrain.na2d(q, k, v, 3, kernel="gemm")
    assert torch.equal(out, natrain.na2d(q, k, v, 3, kernel="naive"))


def test_every_problem_of_the_frozen_sweep_has_a_tiling():
    from natrain.bench.strata import frozen_cases

    limited = functools.partial(choose_gemm_tiling, max_shared_bytes=99 * 1024)  # sm_86
    for case in frozen_cases():
        for primitive in ("qk", "av", "inverse"):
            tiling = limited(primitive, case.spatial, case.window, case.head_dim, case.dtype)
            assert tiling is not None and tiling.shared_bytes <= 99 * 1024, (primitive, case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_nan_reaches_only_rows_whose_window_holds_it(dtype, on_the_cpu):
    """Forward and backward, as the reference has it, though a tile multiplies every column by every row."""
    q, k, v = (torch.randn(2, 12, 12, 2, 32, dtype=dtype) for _ in range(3))
    k[0, 3, 4, 1], v[1, 7, 8, 0], q[1, 2, 2, 1] = float("nan"), float("inf"), float("nan")
    results = []
    for kernel in ("gemm", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = natrain.na2d(*leaves, 3, 2, kernel=kernel)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for mine, other in zip(*results, strict=True):
        assert not other.isfinite().all() and torch.equal(mine.isfinite(), other.isfinite())


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("case", [LONG, CASES[3], CASES[9]], ids=str)
def test_nothing_outside_a_tensor_is_touched(case, at_end, on_the_cpu):
    """The three products on tensors between pages that kill whoever touches them."""
    kernel, window = registry.get_kernel("gemm"), Window(**case.window)
    q, k, v, rpb = (None if x is None else x.detach() for x in case.tensors(torch.float16))
    q, k, v = (guarded_like(x, at_end=at_end) for x in (q, k, v))
    rpb = None if rpb is None else guarded_like(rpb.float(), at_end=at_end)
    weights = guarded_like(kernel.empty_probs(q, window).zero_(), at_end=at_end)
    out = guarded_like(torch.zeros_like(q), at_end=at_end)
    kernel.write_scores(window, q, k, rpb, 1.0, -4.0, weights)
    expected = reference.qk(q, k, None if rpb is None else rpb.half(), window, 1.0).masked_fill_(
        reference.qk(q, k, None, window, 1.0) == -float("inf"), -4.0
    )
    torch.testing.assert_close(weights[..., : window.num_neighbors], expected, rtol=1e-2, atol=5e-2)
    for primitive in ("av", "inverse"):
        kernel.write_sums(primitive, window, weights, v, out, 1.0)
        assert out.isfinite().all() and out.any()
