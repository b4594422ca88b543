"""The short way of an eager call: equal to the operator's, taken only where nobody watches, never past a check."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import natrain
from natrain.jit import host
from natrain.ops import eager, functional, reference, registry
from natrain.ops.registry import FusedKernel, Limits
from tests.ops.test_operators import Fused, Loops, Whole

NEEDS_COMPILER = pytest.mark.skipif(host.find_compiler() is None, reason=f"no C++ compiler: {host.REMEDY}")
KINDS = ["reference", "loops", "whole", "fused_test"]


@pytest.fixture(autouse=True)
def test_kernels(monkeypatch):
    registry.kernels()
    monkeypatch.setattr(registry, "_KERNELS", dict(registry._KERNELS))
    for kernel in (Loops(), Whole(), Fused()):
        registry.register(kernel)
    yield
    registry._choose_cached.cache_clear()


class Functions(TorchFunctionMode):
    """Changes nothing, but an operator is seen by it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _inputs(dtype=torch.float64, requires_grad=True):
    torch.manual_seed(0)
    q = torch.randn(2, 6, 5, 4, 8, dtype=dtype, requires_grad=requires_grad)
    k, v = (torch.randn(2, 6, 5, 2, 8, dtype=dtype, requires_grad=requires_grad) for _ in range(2))
    return q, k, v, torch.randn(4, 5, 5, dtype=dtype, requires_grad=requires_grad)


def _attend(q, k, v, rpb, **options):
    mask = torch.arange(60).view(2, 6, 5) % 7 > 0
    return natrain.na2d(q, k, v, 3, dilation=(2, 1), rpb=rpb, key_mask=mask, return_lse=True, **options)


@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_operator_and_short_way_are_equal_bit_by_bit(kernel, dropout_p):
    results = []
    for way in (contextlib.nullcontext(), Functions()):
        inputs = _inputs()
        with way:
            out, lse = _attend(*inputs, kernel=kernel, dropout_p=dropout_p)
            results.append((out, lse, *torch.autograd.grad((out.square().sum() + lse.sin().sum()), inputs)))
    for short, operator in zip(*results, strict=True):
        assert torch.equal(short, operator)


@pytest.mark.parametrize("kernel", ["whole", "fused_test"])
def test_packed_and_only_lse_used(kernel):
    results = []
    for way in (contextlib.nullcontext(), Functions()):
        torch.manual_seed(0)
        qkv = torch.randn(2, 7, 3, 2, 4, dtype=torch.float64, requires_grad=True)
        with way:
            _, lse = natrain.na1d_qkvpacked(qkv, 3, return_lse=True, kernel=kernel)
            results.append(torch.autograd.grad(lse.square().sum(), qkv)[0])
    assert torch.equal(*results) and results[0].abs().sum() > 0


@pytest.mark.parametrize("kernel", ["whole", "fused_test"])
def test_the_short_way_runs_no_operator_of_ours_and_a_mode_sees_one(kernel):
    inputs = _inputs()
    with torch.profiler.profile() as profile:
        out, _ = _attend(*inputs, kernel=kernel)
        out.sum().backward()
    assert not [event.name for event in profile.events() if event.name.startswith("natrain::")]
    with Names() as mode:
        out, _ = _attend(*inputs, kernel=kernel)
        out.sum().backward()
    assert [name for name in mode.names if name.startswith("natrain.attention")]
    assert [name for name in mode.names if name.startswith("natrain.attention") and "backward" in name]


@pytest.mark.parametrize("kernel", KINDS)
def test_fake_tensors_and_traces_see_the_operator(kernel):
    with FakeTensorMode():
        q, k, v, rpb = _inputs()
        out, lse = _attend(q, k, v, rpb, kernel=kernel)
        assert out.shape == q.shape and lse.shape == q.shape[:-1]
    inputs = _inputs(requires_grad=False)
    traced = make_fx(lambda *t: _attend(*t, kernel=kernel))(*inputs)
    torch.testing.assert_close(traced(*inputs), _attend(*inputs, kernel=kernel))
    if kernel in ("whole", "fused_test"):
        assert any("natrain.attention" in str(node.target) for node in traced.graph.nodes)


@pytest.mark.parametrize("budget", [reference.GATHER_BUDGET_BYTES, 512], ids=["whole", "in chunks"])
def test_functional_transforms_see_what_the_reference_is_made_of(budget, monkeypatch):
    monkeypatch.setattr(reference, "GATHER_BUDGET_BYTES", budget)
    inputs = _inputs()

    def loss(*tensors):
        out, lse = _attend(*tensors, kernel="reference")
        return out.square().sum() + lse.sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*(t.detach() for t in inputs))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kernel", ["loops", "whole", "fused_test"])
def test_other_kernels_refuse_torch_func_by_name(kernel):
    q = torch.randn(1, 7, 2, 4)
    for transform in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))):
        with pytest.raises(NotImplementedError, match=f'kernel="{kernel}".*torch.func.*Try: kernel="reference"'):
            transform(lambda x: natrain.na1d(x, x, x, 3, kernel=kernel).sum())(q)


@pytest.mark.parametrize("kernel", ["reference", "loops", "fused_test"])
def test_vmap_over_a_batch_of_inputs_and_over_gradients(kernel):
    q = torch.randn(3, 1, 7, 2, 4, dtype=torch.float64)
    mapped = torch.func.vmap(lambda x: natrain.na1d(x, x, x, 3, kernel=kernel))(q)
    torch.testing.assert_close(mapped, torch.stack([natrain.na1d(x, x, x, 3, kernel=kernel) for x in q]))
    x = q[0].clone().requires_grad_()
    out = natrain.na1d(x, x, x, 3, kernel=kernel)
    weights = torch.randn(4, *out.shape, dtype=torch.float64)
    (got,) = torch.autograd.grad(out, x, weights, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(out, x, w, retain_graph=True)[0] for w in weights]
    torch.testing.assert_close(got, torch.stack(expected))


@pytest.mark.parametrize("kernel", KINDS)
def test_autocast_casts_in_both_ways(kernel):
    results = []
    for way in (contextlib.nullcontext(), Functions()):
        inputs = _inputs(torch.float32)
        with way, torch.autocast("cpu", dtype=torch.bfloat16):
            out, lse = _attend(*inputs, kernel=kernel)
        assert out.dtype == torch.bfloat16
        results.append((out, lse, *torch.autograd.grad((out.float().sum() + lse.sum()), inputs)))
        assert all(grad.dtype == torch.float32 for grad in results[-1][2:])
    for short, operator in zip(*results, strict=True):
        assert torch.equal(short, operator)
    out, _ = _attend(*_inputs(torch.float32), kernel=kernel)
    assert out.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _attend(*_inputs(torch.float64), kernel=kernel)[0].dtype == torch.float64


@pytest.mark.parametrize("way", [contextlib.nullcontext, Functions], ids=["short", "operator"])
def test_autocast_casts_inputs_of_several_dtypes(way):
    """Norms and softmax leave float32 where a projection leaves 16 bits."""
    q, k, v, _ = (t.detach() for t in _inputs(torch.float32))
    mixed = q.requires_grad_(), k.bfloat16(), v.half()
    with way(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = natrain.na2d(*mixed, 3)
        scores = natrain.na2d_qk(k, k.bfloat16(), 3)
        summed = natrain.na2d_av(scores.float().softmax(-1), v.bfloat16(), 3)
        with pytest.raises(ValueError, match="k.dtype=torch.float64 is not allowed"):
            natrain.na2d(q, k.double(), v, 3)
    assert torch.equal(out, natrain.na2d(*(x.bfloat16() for x in mixed), 3)) and summed.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_what_was_checked_once_is_not_checked_again(monkeypatch):
    inputs = _inputs()
    unseen = {"scale": 0.7071, "kernel": "fused_test"}
    first = _attend(*inputs, **unseen)
    monkeypatch.setattr(functional, "check_window", lambda *args: pytest.fail("checked again"))
    for _ in range(2):
        assert torch.equal(first[0], _attend(*inputs, **unseen)[0])
    with torch.no_grad(), pytest.raises(pytest.fail.Exception):
        _attend(*inputs, **unseen)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"kernel_size": 3}, {"kernel_size": 3.0}),
        ({"kernel_size": (3, 1)}, {"kernel_size": (3, True)}),
        ({"dilation": 1}, {"dilation": True}),
        ({"is_causal": (False, True)}, {"is_causal": (0, 1)}),
        ({"scale": 1}, {"scale": True}),
        ({"dropout_p": 0}, {"dropout_p": False}),
        ({"kernel_size": (3, 3)}, {"kernel_size": ([3], 3)}),
        ({}, {"rpb": torch.zeros(2, 5, 5, dtype=torch.float64)}),
        ({}, {"k": torch.zeros(2, 6, 5, 2, 8)}),
        ({}, {"v": torch.zeros(2, 6, 4, 2, 8, dtype=torch.float64)}),
        ({}, {"key_mask": torch.ones(2, 6, dtype=torch.bool)}),
    ],
)
def test_arguments_equal_to_good_ones_are_still_refused(good, bad):
    q, k, v, rpb = _inputs(requires_grad=False)
    arguments = {"q": q, "k": k, "v": v, "kernel_size": 3, "rpb": None, "kernel": "fused_test"}
    for _ in range(2):
        natrain.na2d(**{**arguments, **good})
    with pytest.raises(ValueError, match="is not allowed"):
        natrain.na2d(**{**arguments, **bad})


def test_lists_and_inference_mode_and_no_grad():
    inputs = _inputs()
    expected, _ = _attend(*inputs, kernel="fused_test")
    assert expected.requires_grad
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert eager.is_plain()
            out, _ = _attend(*inputs, kernel="fused_test")
            assert not out.requires_grad and torch.equal(out, expected)
    q, k, v, _ = inputs
    listed = natrain.na2d(q, k, v, [3, 3], dilation=[2, 1], kernel="fused_test")
    assert torch.equal(listed, natrain.na2d(q, k, v, (3, 3), dilation=(2, 1), kernel="fused_test"))


@pytest.mark.parametrize("kernel", ["whole", "fused_test", pytest.param("cpu", marks=NEEDS_COMPILER)])
def test_lazily_negated_tensors(kernel):
    """A view whose memory holds the negative, as parts of complex conjugates are."""
    plain = torch.randn(1, 9, 2, 4, dtype=torch.float64)
    q, negated = -plain, torch._neg_view(plain)
    assert negated.is_neg()
    got = natrain.na1d(negated, negated, negated, 3, kernel=kernel)
    torch.testing.assert_close(got, natrain.na1d(q, q, q, 3, kernel=kernel))
    q.requires_grad_()
    outputs = natrain.na1d(q, q, q, 3, return_lse=True, kernel=kernel)
    weights = [torch.randn_like(x) for x in outputs]
    expected = torch.autograd.grad(outputs, q, [-w for w in weights], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(outputs, q, [torch._neg_view(w) for w in weights]), expected)


def test_a_kernel_registered_later_is_taken():
    q, k, v, _ = _inputs(requires_grad=False)
    natrain.na2d(q, k, v, 3)

    class First(FusedKernel):
        name, summary, priority = "first", "fills with seven", -1
        limits = Limits(gqa=True)

        def forward(self, problem, q, *_):
            return torch.full_like(q, 7.0), q.new_zeros(q.shape[:-1])

        def backward(self, *_):
            raise AssertionError

    registry.register(First())
    assert (natrain.na2d(q, k, v, 3) == 7).all()


def test_deterministic_mode_is_asked_for_in_every_call():
    class Loose(Fused):
        name, limits = "loose", Limits(gqa=True, key_mask=True, deterministic=False)

    registry.register(Loose())
    inputs = _inputs()
    _attend(*inputs, kernel="loose")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match="no deterministic algorithms"):
            _attend(*inputs, kernel="loose")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout_again(kernel, use_reentrant):
    grads = []
    for is_checkpointed in (False, True):
        inputs = _inputs()
        torch.manual_seed(5)

        def attend(*tensors):
            out, lse = _attend(*tensors, kernel=kernel, dropout_p=0.4)
            return out.square() + lse[..., None]

        out = checkpoint(attend, *inputs, use_reentrant=use_reentrant) if is_checkpointed else attend(*inputs)
        grads.append(torch.autograd.grad(out.sum(), inputs) if not use_reentrant else _backward(out, inputs))
    for plain, checkpointed in zip(*grads, strict=True):
        assert torch.equal(plain, checkpointed)


def _backward(out, inputs):
    """Reentrant checkpoints know ``backward`` only."""
    out.sum().backward()
    return [t.grad for t in inputs]
