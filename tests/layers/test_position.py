"""Axial rotary embedding against complex rotations, one query and key at a time; and what it is for: offsets only."""

from __future__ import annotations

import cmath

import pytest
import torch

from natrain.layers import NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d
from natrain.layers.position import rotary_angles, rotate


def turned(vector: list[float], place: tuple[int, ...]) -> list[complex]:
    """The channel pairs of one vector as complex numbers, each turned by its angle, axis after axis."""
    pairs = [complex(*vector[i : i + 2]) for i in range(0, len(vector), 2)]
    per_axis = len(pairs) // len(place)
    return [
        pair * cmath.exp(1j * place[number // per_axis] * 100 ** -(number % per_axis / per_axis))
        for number, pair in enumerate(pairs)
    ]


@pytest.mark.parametrize(("lengths", "head_dim"), [((9,), 8), ((5, 7), 12), ((2, 3, 4), 12)])
def test_every_token_turns_by_its_place(lengths, head_dim):
    torch.manual_seed(0)
    x = torch.randn(2, *lengths, 3, head_dim, dtype=torch.float64)
    got = rotate(x, rotary_angles(lengths, head_dim))
    for place in torch.cartesian_prod(*(torch.arange(n) for n in lengths)).view(-1, len(lengths)).tolist():
        for head in range(3):
            at = (1, *place, head)
            expected = [part for pair in turned(x[at].tolist(), tuple(place)) for part in (pair.real, pair.imag)]
            torch.testing.assert_close(got[at], torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_half_precision_is_rotated_in_float32():
    x = torch.randn(1, 200, 1, 8, dtype=torch.bfloat16)
    angles = rotary_angles((200,), 8)
    got = rotate(x, angles)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, rotate(x.float(), angles).bfloat16(), rtol=0, atol=0)


def make(pos: str = "rope", **changes) -> NeighborhoodAttention2d:
    torch.manual_seed(0)
    layer = NeighborhoodAttention2d(16, 2, (3, 5), (2, 1), pos=pos, kernel="reference", **changes)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer


def test_the_layer_attends_with_turned_queries_and_keys():
    """Scores of every query from complex arithmetic: Re(q_turned * conj(k_turned)), q to k over its window."""
    layer, x = make(), torch.randn(1, 7, 8, 16)
    q, k, v = layer.qkv(x)[0].unflatten(-1, (3, 2, 8)).unbind(-3)
    out = torch.zeros(7, 8, 2, 8)
    for y in range(7):
        rows = list(range(y % 2, 7, 2))
        first = min(max(y // 2 - 1, 0), len(rows) - 3)
        for x_ in range(8):
            left = min(max(x_ - 2, 0), 3)
            keys = [(row, column) for row in rows[first : first + 3] for column in range(left, left + 5)]
            for head in range(2):
                query = turned(q[y, x_, head].tolist(), (y, x_))
                scores = [
                    sum(a * b.conjugate() for a, b in zip(query, turned(k[at][head].tolist(), at), strict=True)).real
                    for at in keys
                ]
                probs = (torch.tensor(scores) * 8**-0.5).softmax(0)
                out[y, x_, head] = sum(p * v[at][head] for p, at in zip(probs, keys, strict=True))
    torch.testing.assert_close(layer(x)[0], layer.proj(out.flatten(-2)), rtol=1e-4, atol=1e-5)


def test_only_offsets_count():
    """A map repeated with a period: away from the borders a query one period on sees what the first one saw."""
    layer = make()
    tile = torch.randn(1, 4, 5, 16)
    out = layer(tile.repeat(1, 5, 4, 1))
    torch.testing.assert_close(out[:, 8:12, 5:10], out[:, 12:16, 10:15], rtol=1e-4, atol=1e-5)
    larger = tile.repeat(1, 2, 1, 1)
    assert not torch.allclose(make("none")(larger), layer(larger), atol=1e-3)


@pytest.mark.parametrize("layer_class", [NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d])
def test_gradients_reach_qkv_and_there_is_nothing_else_to_learn(layer_class):
    layer = layer_class(12, 1, 3, pos="rope", kernel="reference").double()
    assert {name for name, _ in layer.named_parameters()} == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    x = torch.randn(1, *(3,) * layer.na_dim, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("pos", ["rpb", "rope", "none"])
@pytest.mark.parametrize("na_padding", ["raise", "natten014"])
def test_attention_probs_are_those_of_the_forward_pass(pos, na_padding):
    layer = make(pos, na_padding=na_padding).eval()
    x = torch.randn(2, 7, 8, 16) if na_padding == "raise" else torch.randn(2, 4, 3, 16)
    probs, fit = layer.attention_probs(x)
    from natrain.ops import na2d_av

    padded = torch.nn.functional.pad(x, (0, 0, 0, fit.pad[1], 0, fit.pad[0]))
    v = layer.qkv(padded).unflatten(-1, (3, 2, 8))[..., 2, :, :]
    out = na2d_av(probs, v, fit.kernel_size, fit.dilation)[:, : x.shape[1], : x.shape[2]]
    torch.testing.assert_close(layer(x), layer.proj(out.flatten(-2)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]))


@pytest.mark.parametrize(
    ("dim", "pos", "said"),
    [(16, "rop", "Try: pos='rope'"), (12, "rope", "multiple of 4; it is 6"), (16, "sincos", "one of rpb, rope, none")],
)
def test_what_cannot_be_is_refused(dim, pos, said):
    with pytest.raises(ValueError) as raised:
        NeighborhoodAttention2d(dim, 2, 3, pos=pos)
    assert said in str(raised.value)
