"""The modules of each version against projections and a dense softmax written here, short inputs included."""

from __future__ import annotations

import pytest
import torch

from natrain.compat import switches, v014, v015, v017, v020
from tests.ops import oracle


@pytest.fixture(autouse=True)
def fresh_switches(monkeypatch):
    """Every test starts with NATTEN's own defaults."""
    monkeypatch.setattr(switches, "state", switches.State())


def randomise(module):
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def truth(module, x, kernel_size, dilation, pad=None, is_causal=False, stride=1):
    """What the module computes on ``x``, from its parameters; ``pad``: zeros behind each axis before qkv."""
    na_dim, lengths = x.dim() - 2, x.shape[1:-1]
    for axis, count in enumerate(pad or ()):
        zeros = torch.zeros(*x.shape[: axis + 1], count, *x.shape[axis + 2 :], dtype=x.dtype)
        x = torch.cat([x, zeros], axis + 1)
    qkv = (x @ module.qkv.weight.T + module.qkv.bias).unflatten(-1, (3, module.num_heads, -1))
    q, k, v = qkv.unbind(-3)
    sizes = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride, "is_causal": is_causal}
    spec = {name: size if isinstance(size, tuple) else (size,) * na_dim for name, size in sizes.items()}
    rpb = getattr(module, "rpb", None)
    out = oracle.dense_attention(q, k, v, rpb, spec, q.shape[-1] ** -0.5)[0].flatten(-2)
    out = out[(slice(None), *(slice(length) for length in lengths))]
    return out @ module.proj.weight.T + module.proj.bias


def random_input(*shape):
    return torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_014_has_a_bias_by_default_and_the_published_names():
    module = v014.NeighborhoodAttention2D(8, 2, 3)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == {
        "rpb": (2, 5, 5),
        "qkv.weight": (24, 8),
        "qkv.bias": (24,),
        "proj.weight": (8, 8),
        "proj.bias": (8,),
    }
    assert v014.NeighborhoodAttention1D(8, 2, 3, bias=False, qkv_bias=False).state_dict().keys() == {
        "qkv.weight",
        "proj.weight",
        "proj.bias",
    }


@pytest.mark.parametrize("size", [(9, 8), (9, 4), (3, 5)])
def test_014_pads_short_inputs_before_the_projection(size):
    """kernel 3 times dilation 2 needs 6 tokens; pad tokens carry qkv's bias and take part in the softmax."""
    module = randomise(v014.NeighborhoodAttention2D(8, 2, 3, 2))
    x = random_input(*size, 8)
    pad = [max(0, 6 - length) for length in size]
    torch.testing.assert_close(module(x), truth(module, x, 3, 2, pad))


def test_014_rank_1_and_dilation_none():
    module = randomise(v014.NeighborhoodAttention1D(8, 2, 5, None))
    x = random_input(4, 8)
    torch.testing.assert_close(module(x), truth(module, x, 5, 1, [1]))


def test_015_rank_3_pads_height_and_width_but_not_depth():
    module = randomise(v015.NeighborhoodAttention3D(8, 2, 3, 5, 2, 1))
    x = random_input(5, 4, 7, 8)
    torch.testing.assert_close(module(x), truth(module, x, (5, 3, 3), (1, 2, 2), [0, 2, 0]))
    with pytest.raises(RuntimeError, match="kernel_size"):
        module(random_input(4, 7, 7, 8))


@pytest.mark.parametrize("is_causal", [False, (True, False)])
def test_017_has_no_bias_by_default(is_causal):
    module = randomise(v017.NeighborhoodAttention2D(8, 2, (3, 5), (2, 1), is_causal))
    assert module.rpb is None
    x = random_input(7, 6, 8)
    torch.testing.assert_close(module(x), truth(module, x, (3, 5), (2, 1), is_causal=is_causal))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_017_with_a_bias(rank):
    module = randomise(getattr(v017, f"NeighborhoodAttention{rank}D")(8, 2, 3, rel_pos_bias=True))
    assert module.rpb.shape == (2, *(5,) * rank)
    x = random_input(*(5, 4, 3)[:rank], 8)
    torch.testing.assert_close(module(x), truth(module, x, 3, 1))


def test_017_raises_where_014_padded():
    with pytest.raises(RuntimeError, match="input's axes"):
        v017.NeighborhoodAttention2D(8, 2, 3, 2)(torch.randn(1, 9, 5, 8))


def test_017_even_sizes_need_fused_attention_and_no_bias():
    x = random_input(7, 6, 8)
    module = randomise(v017.NeighborhoodAttention2D(8, 2, (4, 2)))
    with pytest.raises(RuntimeError, match="odd"):
        module(x)
    switches.use_fused_na()
    torch.testing.assert_close(module(x), truth(module, x, (4, 2), 1))
    with pytest.raises(RuntimeError, match="odd"):
        v017.NeighborhoodAttention2D(8, 2, 4, rel_pos_bias=True).double()(x)


def test_017_attention_dropout_is_applied_unless_fused(caplog):
    """With qk and av as 0.17 ran by default it is dropout; its fused attention has none and logs an error."""
    module = randomise(v017.NeighborhoodAttention2D(8, 2, 3, attn_drop=0.5))
    x = random_input(7, 6, 8)
    torch.testing.assert_close(module(x), truth(module, x, 3, 1))
    module.train()
    draws = torch.stack([module(x) for _ in range(400)]).detach()
    standard_error = draws.std(0) / 400**0.5
    assert (standard_error > 0).all()
    # 672 values: five standard errors are passed by chance once in 2,600 tests; a missing rescale by 1/2 fails most.
    assert ((draws.mean(0) - truth(module, x, 3, 1)).abs() < 5 * standard_error).all()
    switches.use_fused_na()
    torch.testing.assert_close(module(x), truth(module, x, 3, 1))
    assert "NOT applied" in caplog.text


def test_020_has_stride_and_no_bias():
    module = randomise(v020.NeighborhoodAttention2D(8, 2, kernel_size=4, stride=(2, 1), dilation=1, is_causal=True))
    x = random_input(7, 6, 8)
    torch.testing.assert_close(module(x), truth(module, x, 4, 1, is_causal=True, stride=(2, 1)))
    assert "rpb" not in module.state_dict()


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: v014.NeighborhoodAttention2D(8, 2, 4), AssertionError, "odd"),
        (lambda: v014.NeighborhoodAttention2D(8, 2, 1), AssertionError, "odd"),
        (lambda: v014.NeighborhoodAttention2D(8, 2, 3, -1), AssertionError, "dilation"),
        (lambda: v014.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True), TypeError, "rel_pos_bias"),
        (lambda: v017.NeighborhoodAttention2D(8, 2, 3, bias=True), TypeError, "bias"),
        (lambda: v017.NeighborhoodAttention2D(8, 2, 3, is_causal=True, rel_pos_bias=True), NotImplementedError, "bias"),
        (lambda: v017.NeighborhoodAttention2D(8, 2, (3, 3, 3)), ValueError, "kernel_size"),
        (lambda: v017.NeighborhoodAttention2D(8, 2, 3)(torch.zeros(1, 9, 8)), ValueError, "x.shape"),
        (
            lambda: v017.NeighborhoodAttention2D(8, 2, 3, use_experimental_ops=True)(torch.zeros(1, 9, 9, 8)),
            NotImplementedError,
            "use_fused_na",
        ),
        (lambda: v020.NeighborhoodAttention2D(8, 3, 3), ValueError, "num_heads"),
        (lambda: v020.NeighborhoodAttention2D(8, 2, 1), ValueError, ">= 2"),
        (lambda: v020.NeighborhoodAttention2D(8, 2, 3)(torch.zeros(1, 9, 9, 6)), ValueError, "x.shape"),
        (lambda: v020.NeighborhoodAttention2D(8, 2, 3)(torch.zeros(1, 9, 2, 8)), ValueError, "input's axes"),
    ],
)
def test_errors_are_of_the_type_that_natten_raised(call, kind, says):
    with pytest.raises(kind, match=says):
        call()
