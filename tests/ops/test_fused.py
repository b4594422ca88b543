"""The fused CUDA kernels against the float64 oracle, on the device: grid, dtypes, features, every gradient.

Deterministic mode fills uninitialised memory with NaN, so that an element nobody wrote shows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import natrain
from natrain.ops import fused
from natrain.ops.registry import get_kernel
from tests.ops import judge
from tests.ops.grid import CHOSEN, LINES, Case, grid
from tests.ops.judge import ATOL, Inputs, requested_bytes
from tests.ops.walked import WALKS, walking

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_filled_memory")]

GRID = grid(40)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAT = Case(2, (20, 27), 2, 32, (7, 7), (1, 1), (1, 1), (False, False), True)
DINAT = Case(2, (28, 28), 2, 32, (7, 7), (4, 4), (1, 1), (False, False), True)


def check(case: Case, dtype: torch.dtype, atol: float | None = None, **variant) -> None:
    """All outputs and gradients of one problem by the rule of ``judge``."""
    inputs = Inputs.draw(case, dtype, **variant)
    mine = judge.outputs(case, inputs, "fused")
    exact = judge.truth(case, inputs)
    judge.judge(inputs.names, mine, judge.same_dtype(case, inputs), exact, ATOL[dtype] if atol is None else atol)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", [NAT, DINAT, *GRID], ids=str)
def test_error_is_at_most_twice_the_same_dtype_composition(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", LINES, ids=str)
def test_backward_in_one_pass(case, dtype):
    with fused.launching({}):
        check(case, dtype)
        # Which way is taken depends on the shared memory that a GPU has.
        if torch.cuda.get_device_capability() == (9, 0):
            assert [len(ready.launches) for ready in fused.launches().values()] == [1, 1]


@pytest.mark.parametrize("walked", WALKS, ids=str)
def test_blocks_walk(walked):
    with walking(walked):
        check(walked.case, walked.dtype)


def test_cuda_graph_trees_own_what_the_first_call_allocates():
    """They run it in a pool of theirs, and refuse tensors there that outlive it."""
    qkv = torch.randn(2, 14, 14, 3, 2, 32, device="cuda", dtype=torch.float16, requires_grad=True)
    rpb = torch.randn(2, 13, 13, device="cuda", requires_grad=True)

    def loss(qkv, rpb):
        return natrain.na2d_qkvpacked(qkv, 7, rpb=rpb, kernel="fused").float().square().mean()

    expected = torch.autograd.grad(loss(qkv, rpb), (qkv, rpb))
    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    with fused.launching({}):
        for _ in range(4):
            grads = [x.clone() for x in torch.autograd.grad(compiled(qkv, rpb), (qkv, rpb))]
    for mine, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("case", [NAT, *GRID[::3], *LINES[1::2]], ids=str)
def test_tf32_where_torch_allows_it(case, tf32):
    judge.check_tf32(case, "fused")


@pytest.mark.parametrize("head_dim", [8, 16, 24, 40, 64, 72, 96, 128, 136, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_head_dim(head_dim, dtype):
    check(Case(2, (9, 14), 2, head_dim, (3, 5), (2, 1), (1, 1), (False, False), True), dtype)


@pytest.mark.parametrize(
    "variant",
    [
        {"kv_heads": 2},
        {"kv_heads": 1, "value_dim": 16},
        {"value_dim": 64},
        {"value_dim": 8},
        {"masked": 0.3},
        {"masked": 0.97},
        {"kv_heads": 2, "value_dim": 48, "masked": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, (11, 13), 4, 32, (5, 7), (2, 1), (1, 1), (False, False), True),
        Case(3, (61,), 4, 24, (9,), (2,), (3,), (True,), False),
    ],
    ids=str,
)
def test_grouped_heads_value_dim_and_key_mask(case, dtype, variant):
    check(case, dtype, **variant)


@pytest.mark.parametrize(
    ("spatial", "kernel_size"),
    [((78,), 65), ((300,), 255), ((1100,), 1023), ((33, 31), (31, 13)), ((12, 11, 13), (9, 9, 11))],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_large_windows(spatial, kernel_size, dtype):
    sizes = kernel_size if isinstance(kernel_size, tuple) else (kernel_size,)
    ones = (1,) * len(spatial)
    check(Case(1, spatial, 1, 32, sizes, ones, ones, (False,) * len(spatial), True), dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_window_of_one_key_passes_values_on(dtype):
    judge.check_one_key("fused", dtype)


@st.composite
def problems(draw):
    """Any problem within the kernel's limits and the oracle's budget of tokens."""
    na_dim = draw(st.integers(1, 3))
    longest = {1: 150, 2: 21, 3: 9}[na_dim]
    spatial = tuple(draw(st.lists(st.integers(1, longest), min_size=na_dim, max_size=na_dim)))
    kernel_size = tuple(draw(st.integers(1, length)) for length in spatial)
    # A window of one key has a test of its own: gradients of q and k are what is left of two equal numbers.
    assume(math.prod(kernel_size) > 1)
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    case = Case(
        batch=draw(st.integers(1, 5)),
        spatial=spatial,
        heads=kv_heads * draw(st.sampled_from([1, 1, 2, 3])),
        head_dim=8 * draw(st.sampled_from([1, 2, 3, 4, 4, 5, 8])),
        kernel_size=kernel_size,
        dilation=tuple(draw(st.integers(1, length // k)) for length, k in zip(spatial, kernel_size, strict=True)),
        stride=tuple(draw(st.one_of(st.just(1), st.integers(1, k))) for k in kernel_size),
        is_causal=tuple(draw(st.booleans()) for _ in spatial),
        has_rpb=draw(st.booleans()),
    )
    value_dim = draw(st.sampled_from([None, None, 8, 24, 64]))
    return case, {"kv_heads": kv_heads, "value_dim": value_dim, "masked": draw(st.sampled_from([0.0, 0.0, 0.4]))}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_problems(dtype):
    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(problems())
    def run(problem):
        case, variant = problem
        check(case, dtype, **variant)

    run()


@pytest.mark.parametrize("case", [NAT, *CHOSEN[::3]], ids=str)
def test_runs_repeat_bit_by_bit(case):
    inputs = Inputs.draw(case, torch.float16)
    first, second = (judge.outputs(case, inputs, "fused") for _ in range(2))
    for name, a, b in zip(inputs.names, first, second, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("head_dim", [32, 256])
def test_an_early_start_changes_nothing(head_dim, monkeypatch):
    """backward_kv behind a backward_q that still runs, also of two launches; eager and from a graph."""
    case = Case(64, (14, 14), 4, head_dim, (7, 7), (1, 1), (1, 1), (False, False), True)
    results = []
    for is_early in (False, True):
        monkeypatch.setattr(fused, "can_overlap", lambda device, is_early=is_early: is_early)
        monkeypatch.setattr(fused, "_launches", {})
        inputs = judge.Inputs.draw(case, torch.bfloat16)
        results.append(judge.outputs(case, inputs, "fused"))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = judge.outputs(case, inputs, "fused")
        for x in captured:
            x.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        results.append(captured)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("case", [NAT, *CHOSEN[::4]], ids=str)
def test_dropout_draws_the_documented_mask(case):
    """Against the reference in float64 on the same numbers; a mask of another draw would be far off."""
    inputs = Inputs.draw(case, torch.float32)
    results = []
    for kernel, x in (("fused", inputs), ("reference", inputs.to(torch.float64, "cuda"))):
        torch.manual_seed(5)
        results.append(judge.outputs(case, x, kernel, dropout_p=0.3))
    for name, mine, other in zip(inputs.names, *results, strict=True):
        error = (mine - other).norm() / other.norm()
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_packed_projection_is_read_in_place(dtype):
    """One packed gradient, equal to the unpacked form's; results, lse, and lse with delta are all that is allocated."""
    qkv = torch.randn(8, 28, 28, 3, 4, 32, device="cuda", dtype=dtype, requires_grad=True)
    d_out = torch.randn(8, 28, 28, 4, 32, device="cuda", dtype=dtype)
    (packed,) = torch.autograd.grad(natrain.na2d_qkvpacked(qkv, 7, kernel="fused"), qkv, d_out)
    q, k, v = (x.contiguous().detach().requires_grad_() for x in qkv.unbind(-3))
    unpacked = torch.autograd.grad(natrain.na2d(q, k, v, 7, kernel="fused"), (q, k, v), d_out)
    assert torch.equal(packed, torch.stack(unpacked, dim=-3))
    assert packed.is_contiguous()

    del packed, unpacked, q, k, v
    rows, slack = 8 * 28 * 28 * 4, 2**16
    before = requested_bytes("current")
    torch.cuda.reset_peak_memory_stats()
    out = natrain.na2d_qkvpacked(qkv, 7, kernel="fused")
    out_and_lse = rows * (32 * dtype.itemsize + 4)
    assert requested_bytes("peak") - before <= out_and_lse + slack
    torch.autograd.grad(out, qkv, d_out)
    gradient_and_statistics = rows * (3 * 32 * dtype.itemsize + 8)
    assert requested_bytes("peak") - before <= out_and_lse + gradient_and_statistics + slack


def test_strided_and_expanded_tensors():
    """Transposed heads, a sliced channel, a shared batch and an expanded output gradient: bitwise what copies give."""
    base = torch.randn(1, 3, 10, 11, 56, device="cuda", dtype=torch.float16).expand(2, -1, -1, -1, -1)
    q, k, v = (base[..., i : i + 32].movedim(1, 3).detach().requires_grad_() for i in (0, 8, 24))
    assert not q.is_contiguous()
    strided = torch.autograd.grad(natrain.na2d(q, k, v, 5, 2, kernel="fused").sum(), (q, k, v))
    q, k, v = (x.detach().contiguous().requires_grad_() for x in (q, k, v))
    copied = torch.autograd.grad(natrain.na2d(q, k, v, 5, 2, kernel="fused").sum(), (q, k, v))
    for a, b in zip(strided, copied, strict=True):
        assert torch.equal(a, b)


def test_rows_that_begin_off_sixteen_bytes():
    """Views that no 16-byte access may touch are read right all the same."""
    base = torch.randn(2, 10, 11, 3, 33, device="cuda", dtype=torch.float16)
    views = [base[..., i : i + 32] for i in (0, 1, 1)]
    mine = natrain.na2d(*views, 5, 2, kernel="fused")
    assert torch.equal(mine, natrain.na2d(*(x.contiguous() for x in views), 5, 2, kernel="fused"))


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_bad_number_reaches_no_other_image_head_or_dilation_group(value):
    """Nor beyond the tokens whose windows touch it, by more than a tile."""
    qkv = torch.randn(3, 24, 24, 3, 2, 32, device="cuda", dtype=torch.float16)
    d_out = torch.randn(3, 24, 24, 2, 32, device="cuda", dtype=torch.float16)

    def run(qkv):
        qkv = qkv.detach().requires_grad_()
        out = natrain.na2d_qkvpacked(qkv, 3, 2, kernel="fused")
        return out.detach(), torch.autograd.grad(out, qkv, d_out)[0]

    clean = run(qkv)
    for part in range(3):
        bad = qkv.clone()
        bad[1, 10, 7, part, 1, 5] = value
        for before, after in zip(clean, run(bad), strict=True):
            after = after.clone()
            # That image, head and dilation group, put back.
            region = (1, slice(0, None, 2), slice(1, None, 2), ..., 1, slice(None))
            assert not torch.equal(after[region], before[region])
            after[region] = before[region]
            assert torch.equal(after, before)


def test_many_heads_and_empty_batch():
    """Beyond 65,535 batch * heads, where a grid's second axis would end; and nothing at all."""
    q, k, v = (torch.randn(4500, 15, 15, 8, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3))
    results = {}
    for kernel in ("fused", "reference"):
        out = natrain.na1d(q, k, v, 3, kernel=kernel)
        results[kernel] = [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))]
    for mine, other in zip(*results.values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-2)
    empty = torch.empty(0, 7, 7, 2, 32, device="cuda", requires_grad=True)
    rpb = torch.randn(2, 5, 5, device="cuda", requires_grad=True)
    out = natrain.na2d(empty, empty, empty, 3, rpb=rpb, kernel="fused")
    d_empty, d_rpb = torch.autograd.grad(out.sum(), (empty, rpb))
    assert d_empty.shape == empty.shape and not d_rpb.any()


@pytest.mark.slow
def test_beyond_two_to_the_31_elements():
    """One image of 2^31 and more elements (64-bit offsets inside an image), judged on its far end, gradients too."""
    length, heads, head_dim = 2**19 + 37, 64, 64
    assert length * heads * head_dim > 2**31
    q = torch.randn(1, length, heads, head_dim, device="cuda", dtype=torch.float16)
    far = q[:, -64:].detach().clone().requires_grad_()
    expected = natrain.na1d(far, far, far, 5, kernel="reference")
    (d_expected,) = torch.autograd.grad(expected.sum(), far)
    q.requires_grad_()
    out = natrain.na1d(q, q, q, 5, kernel="fused")
    torch.testing.assert_close(out[:, -32:], expected[:, -32:], rtol=2e-3, atol=2e-3)
    (d_q,) = torch.autograd.grad(out.sum(), q)
    torch.testing.assert_close(d_q[:, -32:], d_expected[:, -32:], rtol=1e-2, atol=1e-2)


def test_compiles_into_one_graph():
    q, k, v, rpb = NAT.tensors(torch.float32, "cuda")

    def loss(q, k, v, rpb):
        return natrain.na2d(q, k, v, 7, rpb=rpb, kernel="fused").square().sum()

    eager = torch.autograd.grad(loss(q, k, v, rpb), (q, k, v, rpb))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k, v, rpb), (q, k, v, rpb))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_training_step_replays_in_a_cuda_graph():
    """Forward, dropout and backward captured once; other inputs and another seed are seen by the replay."""
    qkv = torch.randn(2, 14, 14, 3, 4, 32, device="cuda", dtype=torch.float16, requires_grad=True)
    rpb = torch.randn(4, 13, 13, device="cuda", requires_grad=True)
    seed = torch.ones(1, dtype=torch.int64, device="cuda")
    arguments = ([7, 7], [1, 1], [1, 1], [False, False], 0.2, 0.25, "fused")

    def step():
        out, _ = torch.ops.natrain.attention_qkvpacked(qkv, rpb, None, seed, *arguments)
        return out, *torch.autograd.grad(out.float().square().sum(), (qkv, rpb))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        qkv.normal_()
        seed.fill_(77)
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


def test_checkpointing_draws_the_same_mask_again():
    inputs = Inputs.draw(NAT, torch.float16)

    def attend(q, k, v):
        return natrain.na2d(q, k, v, 7, rpb=inputs.rpb, dropout_p=0.2, kernel="fused")

    grads = []
    for run in (attend, lambda *x: torch.utils.checkpoint.checkpoint(attend, *x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(run(inputs.q, inputs.k, inputs.v), inputs.leaves, inputs.d_out))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_autocast_casts_q_k_v_and_keeps_the_bias():
    inputs = Inputs.draw(NAT, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        out = natrain.na2d(inputs.q, inputs.k, inputs.v, 7, rpb=inputs.rpb, kernel="fused")
    assert out.dtype == torch.bfloat16
    *_, d_rpb = torch.autograd.grad(out, inputs.leaves, inputs.d_out.bfloat16())
    assert d_rpb.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spatial", "small", "large"),
    [((65536,), 33, 255), ((512, 512), 7, 31), ((32, 64, 64), 3, 9)],
    ids=["1-D", "2-D", "3-D"],
)
def test_memory_is_linear_in_tokens_and_independent_of_the_window(spatial, small, large):
    """Forward: out and lse. Backward: three gradients, at most 8 bytes a query and head, nothing near a fourth."""
    rows = math.prod(spatial) * 2
    tensor, statistics = rows * 32 * 2, rows * 4
    qkv = torch.randn(1, *spatial, 3, 2, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    d_out = torch.randn(1, *spatial, 2, 32, device="cuda", dtype=torch.bfloat16)
    for kernel_size in (small, large):
        function = getattr(natrain, f"na{len(spatial)}d_qkvpacked")
        before = requested_bytes("current")
        torch.cuda.reset_peak_memory_stats()
        out = function(qkv, kernel_size, kernel="fused")
        assert requested_bytes("peak") - before <= tensor + statistics + 2**16
        torch.autograd.grad(out, qkv, d_out)
        assert requested_bytes("peak") - before <= 5 * tensor + 2 * statistics


@pytest.mark.slow
def test_a_training_run_stays_beside_the_reference():
    """2,000 steps in bf16: a student learns the targets of a fixed teacher; both kernels' losses stay together."""
    generator = torch.Generator("cuda").manual_seed(0)
    teacher = torch.randn(2, 5, 5, device="cuda", generator=generator)
    losses = {}
    for kernel in ("fused", "reference"):
        weight = torch.randn(64, 192, device="cuda", generator=generator.manual_seed(1)).div_(8).requires_grad_()
        rpb = torch.zeros(2, 5, 5, device="cuda", requires_grad=True)
        optimizer = torch.optim.AdamW([weight, rpb], lr=1e-3)
        generator.manual_seed(2)
        losses[kernel] = []
        for _ in range(2000):
            x = torch.randn(2, 8, 8, 64, device="cuda", generator=generator)
            packed = x.unflatten(-1, (2, 32)).unsqueeze(-3).expand(-1, -1, -1, 3, -1, -1)
            target = natrain.na2d_qkvpacked(packed, 3, rpb=teacher, kernel="reference")
            qkv = (x.bfloat16() @ weight.bfloat16()).unflatten(-1, (3, 2, 32))
            loss = (natrain.na2d_qkvpacked(qkv, 3, rpb=rpb, kernel=kernel).float() - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[kernel].append(loss.detach())
    mine, other = (torch.stack(values).view(20, 100).mean(1) for values in losses.values())
    assert other[-1] < 0.5 * other[0]
    torch.testing.assert_close(mine, other, rtol=0.02, atol=0)


def test_the_named_kernel_is_the_one_that_runs_and_auto_prefers_it():
    qkv = torch.randn(2, 14, 14, 3, 4, 32, device="cuda", requires_grad=True)
    rpb = torch.randn(4, 13, 13, device="cuda", requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        natrain.na2d_qkvpacked(qkv, 7, rpb=rpb).sum().backward()
        torch.cuda.synchronize()
    names = {event.key for event in profile.key_averages()}
    for entry in ("forward", "backward_q", "backward_kv"):
        assert f"natrain_fused_{entry}" in names
    q, k, v = qkv.detach().unbind(-3)
    assert natrain.explain(q, k, v, 7, rpb=rpb).chosen == "fused"
    assert natrain.explain(q.double(), k.double(), v.double(), 7).chosen == "naive"
    assert natrain.explain(*(x[..., :30] for x in (q, k, v)), 7).chosen == "naive"


def test_a_device_that_cannot_is_refused_with_the_reason():
    problem = natrain.ops.problem.Problem(
        2, (14, 14), 2, 30, natrain.ops.problem.Window((7, 7), (1, 1), (1, 1), (False, False)),
        torch.float64, "cuda", (7, 5),
    )  # fmt: skip
    reasons = "; ".join(get_kernel("fused").unsupported_reasons(problem))
    assert "float64" in reasons and "capability" in reasons and "head_dim 30" in reasons
    assert not get_kernel("fused").unsupported_reasons(
        replace(problem, head_dim=32, value_dim=32, dtype=torch.float16, capability=(9, 0))
    )
