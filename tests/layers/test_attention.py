"""The attention layers against attention written out over every pair of tokens, in the test's own words."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from natrain.layers import (
    GlobalAttention2d,
    NeighborhoodAttention1d,
    NeighborhoodAttention2d,
    NeighborhoodAttention3d,
    TransformerBlock,
)

LAYERS = {1: NeighborhoodAttention1d, 2: NeighborhoodAttention2d, 3: NeighborhoodAttention3d}


def window_of(i: int, length: int, k: int, d: int) -> list[int]:
    """The k tokens of i's dilation group nearest to it, in order."""
    group = list(range(i % d, length, d))
    first = min(max(i // d - k // 2, 0), len(group) - k)
    return group[first : first + k]


def by_loops(layer: torch.nn.Module, x: torch.Tensor, k: list[int], d: list[int]) -> torch.Tensor:
    """Attention of every single query, with the layer's weights; x [B, *spatial, C], odd kernels, stride 1."""
    heads, channels = layer.num_heads, x.shape[-1]
    qkv = F.linear(x, layer.qkv.weight, layer.qkv.bias)
    q, keys, values = (t.unflatten(-1, (heads, -1)) for t in qkv.chunk(3, -1))
    out = torch.zeros_like(q)
    lengths = x.shape[1:-1]
    for place in itertools.product(*map(range, lengths)):
        windows = [window_of(i, n, kk, dd) for i, n, kk, dd in zip(place, lengths, k, d, strict=True)]
        neighbours = list(itertools.product(*windows))
        query = q[(slice(None), *place)] / math.sqrt(channels // heads)
        scores = []
        for key in neighbours:
            score = (query * keys[(slice(None), *key)]).sum(-1)
            if layer.rpb is not None:
                offset = [
                    (b - a) // dd + kk for a, b, kk, dd in zip(place, key, layer.window.kernel_size, d, strict=True)
                ]
                score = score + layer.rpb[(slice(None), *(o - 1 for o in offset))]
            scores.append(score)
        probs = torch.stack(scores).softmax(0)
        out[(slice(None), *place)] = sum(
            p[..., None] * values[(slice(None), *key)] for p, key in zip(probs, neighbours, strict=True)
        )
    return F.linear(out.flatten(-2), layer.proj.weight, layer.proj.bias)


def make(na_dim: int, *args, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    layer = LAYERS[na_dim](*args, **kwargs).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize(
    ("lengths", "k", "d", "heads"),
    [
        ((13,), (3,), (2,), 2),
        ((7,), (7,), (1,), 1),
        ((7, 11), (3, 5), (2, 1), 3),
        ((6, 9), (3, 3), (2, 3), 2),
        ((4, 5, 7), (3, 5, 3), (1, 1, 2), 2),
    ],
)
@pytest.mark.parametrize("pos", ["rpb", "none"])
def test_forward(lengths, k, d, heads, pos) -> None:
    layer = make(len(lengths), 6, heads, k, d, pos=pos, kernel="reference")
    x = torch.randn(2, *lengths, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_loops(layer, x, k, d), rtol=1e-10, atol=1e-10)


def test_parameters_carry_the_published_names_and_shapes() -> None:
    shapes = {name: tuple(p.shape) for name, p in NeighborhoodAttention2d(64, 2, (3, 7)).named_parameters()}
    assert shapes == {
        "rpb": (2, 5, 13),
        "qkv.weight": (192, 64),
        "qkv.bias": (192,),
        "proj.weight": (64, 64),
        "proj.bias": (64,),
    }
    assert "qkv.bias" not in NeighborhoodAttention1d(8, 2, 3, qkv_bias=False).state_dict()


def test_dropout_acts_on_training_alone() -> None:
    layer = make(2, 8, 2, 3, attn_drop=0.5)
    x = torch.randn(1, 6, 5, 8, dtype=torch.float64)
    plain = make(2, 8, 2, 3)
    torch.testing.assert_close(layer.eval()(x), plain(x))
    assert not torch.allclose(layer.train()(x), plain(x))


def test_scale_stride_and_causality_reach_the_operator() -> None:
    x = torch.randn(1, 6, 6, 8, dtype=torch.float64)
    standard = make(2, 8, 2, 3)(x)
    for change in ({"scale": 2.0}, {"stride": 3}, {"is_causal": (True, False)}):
        assert not torch.allclose(make(2, 8, 2, 3, **change)(x), standard), change
    causal = make(2, 8, 2, 3, is_causal=(True, False))
    later = x.clone()
    later[:, 4:] += 1
    torch.testing.assert_close(causal(later)[:, :4], causal(x)[:, :4])


@pytest.mark.parametrize("pos", ["rpb", "rope"])
def test_masked_tokens_change_nothing_elsewhere(pos) -> None:
    """Images of two sizes in one batch: what stands in the padding is seen by no token of an image."""
    block = TransformerBlock(8, make(2, 8, 2, 3, (2, 1), pos=pos), 2.0, layer_scale=0.5).double()
    mask = torch.ones(2, 8, 7, dtype=torch.bool)
    mask[1, 5:] = mask[1, :, 6:] = False
    x = torch.randn(2, 8, 7, 8, dtype=torch.float64)
    other = torch.where(mask[..., None], x, 100 * torch.randn_like(x))
    torch.testing.assert_close(block(other, mask)[mask], block(x, mask)[mask], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(block(other)[mask], block(x)[mask])
    torch.testing.assert_close(block(x, torch.ones_like(mask)), block(x))
    block.grad_checkpointing = True
    torch.testing.assert_close(block(x.requires_grad_(), mask), block(x.detach(), mask))


def test_blocked_attention_is_attention_inside_windows() -> None:
    """stride = kernel_size on a side the kernel divides: each window attends to itself, as in Swin without shift."""
    layer = make(1, 4, 1, 3, stride=3, pos="none")
    x = torch.randn(1, 9, 4, dtype=torch.float64)
    with torch.no_grad():
        apart = [by_loops(layer, part, [3], [1]) for part in x.split(3, 1)]
        torch.testing.assert_close(layer(x), torch.cat(apart, 1), rtol=1e-10, atol=1e-10)


def test_global_attention_is_neighborhood_attention_of_the_whole_map() -> None:
    torch.manual_seed(0)
    layer = GlobalAttention2d(8, 2, (5, 7)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    twin = NeighborhoodAttention2d(8, 2, (5, 7), kernel="reference").double()
    twin.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "relative_position_index"})
    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_loops(twin, x, [5, 7], [1, 1]), rtol=1e-10, atol=1e-10)
    assert layer.state_dict()["relative_position_index"].shape == (35, 35)


@pytest.mark.parametrize("layer", [NeighborhoodAttention2d(8, 2, 3), GlobalAttention2d(8, 2, (4, 6))])
def test_autocast_keeps_the_bias_in_float32(layer) -> None:
    x = torch.randn(2, 4, 6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and layer.rpb.grad.dtype == torch.float32 and layer.rpb.grad.abs().sum() > 0
    torch.testing.assert_close(out.float(), layer(x), rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dim=10, num_heads=3), "num_heads=3 .*divisor of dim"),
        (dict(dim=8, num_heads=0), "num_heads=0"),
        (dict(kernel_size=0), "kernel_size=0"),
        (dict(kernel_size=(3, 3, 3)), "kernel_size=.*tuple of 2"),
        (dict(dilation=0), "dilation=0"),
        (dict(stride=4), r"stride=4 .*kernel_size \(3\)"),
        (dict(attn_drop=1.0), r"attn_drop=1.0 .*\[0, 1\)"),
        (dict(proj_drop=float("nan")), "proj_drop=nan"),
        (dict(kernel="refrence"), 'refrence.*Try: kernel="reference"'),
        (dict(na_padding="shrnk"), "na_padding='shrnk'.*Try: na_padding='shrink'"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention2d(**{**dict(dim=8, num_heads=2, kernel_size=3), **arguments})


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"x.shape=.*2 spatial axes"):
        NeighborhoodAttention2d(8, 2, 3)(torch.zeros(2, 9, 8))
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(4, 6\).*img_size"):
        GlobalAttention2d(8, 2, (4, 6))(torch.zeros(2, 4, 5, 8))
