"""The three policies for maps shorter than kernel_size * dilation, each against what its definition says by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from natrain.layers import NeighborhoodAttention1d, NeighborhoodAttention2d
from tests.layers.test_attention import by_loops, make


def test_raise_names_what_would_work() -> None:
    layer = NeighborhoodAttention2d(8, 2, 3, 4)
    with pytest.raises(ValueError) as error:
        layer(torch.zeros(1, 7, 20, 8))
    text = str(error.value)
    for part in (
        "(7, 20)",
        "(12, 12)",
        "dilations up to (2, 6)",
        "dilation=(2, 6)",
        "na_padding='shrink'",
        "natten014",
    ):
        assert part in text, text
    NeighborhoodAttention2d(8, 2, 3, (2, 4))(torch.zeros(1, 7, 20, 8))
    with pytest.raises(ValueError, match=r"kernel_size=\(2, 3\)"):
        NeighborhoodAttention2d(8, 2, 3)(torch.zeros(1, 2, 20, 8))


@pytest.mark.parametrize(
    ("lengths", "k", "d", "fits_k", "fits_d"),
    [
        ((7, 20), (3, 3), (4, 4), (3, 3), (2, 4)),  # dilation 4 needs 12 tokens: 7 // 3 = 2 fits
        ((3, 8), (3, 3), (5, 2), (3, 3), (1, 2)),  # a side as long as the kernel
        ((3, 9), (5, 5), (2, 1), (3, 5), (1, 1)),  # not even dilation 1: the whole side
        ((1, 5), (3, 5), (1, 1), (1, 5), (1, 1)),
    ],
)
def test_shrink_takes_a_smaller_dilation_then_the_whole_side(lengths, k, d, fits_k, fits_d) -> None:
    layer = make(2, 8, 2, k, d, na_padding="shrink", kernel="reference")
    x = torch.randn(2, *lengths, 8, dtype=torch.float64)
    with torch.no_grad():
        # by_loops looks a bias up by its offset in the layer's own table, of the full kernel size.
        torch.testing.assert_close(layer(x), by_loops(layer, x, fits_k, fits_d), rtol=1e-10, atol=1e-10)


def test_shrink_lowers_the_stride_with_the_kernel() -> None:
    layer = make(1, 4, 1, 5, stride=4, na_padding="shrink")
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_loops(layer, x, [3], [1]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lengths", [(5, 4), (5, 9), (8, 3)])
def test_natten014_pads_the_input_of_the_qkv_projection(lengths) -> None:
    k, d = (3, 3), (2, 2)
    layer = make(2, 8, 2, k, d, na_padding="natten014", kernel="reference")
    x = torch.randn(2, *lengths, 8, dtype=torch.float64)
    padded = torch.zeros(2, max(6, lengths[0]), max(6, lengths[1]), 8, dtype=torch.float64)
    padded[:, : lengths[0], : lengths[1]] = x
    with torch.no_grad():
        expected = by_loops(layer, padded, k, d)[:, : lengths[0], : lengths[1]]
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_natten014_pad_tokens_take_part_in_the_softmax() -> None:
    """A value bias reaches outputs through pad tokens although their input is zero: that is what 2022 did."""
    layer = NeighborhoodAttention1d(4, 1, 4, na_padding="natten014").double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.proj.weight.copy_(torch.eye(4))
        layer.qkv.weight[8:].copy_(torch.eye(4))
        layer.qkv.bias[8:] = 1.0
        x = torch.full((1, 3, 4), 2.0, dtype=torch.float64)
        # Equal scores: the mean of three values 2 + 1 and one pad value 0 + 1.
        torch.testing.assert_close(layer(x), torch.full_like(x, (3 * 3 + 1) / 4))


def test_pad_tokens_take_part_beside_a_key_mask() -> None:
    """The mask is about the caller's tokens; those that the policy appends stay keys."""
    layer = NeighborhoodAttention1d(4, 1, 4, na_padding="natten014").double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.proj.weight.copy_(torch.eye(4))
        layer.qkv.weight[8:].copy_(torch.eye(4))
        layer.qkv.bias[8:] = 1.0
        x = torch.full((1, 3, 4), 2.0, dtype=torch.float64)
        out = layer(x, torch.tensor([[True, False, True]]))
        torch.testing.assert_close(out, torch.full_like(x, (2 * 3 + 1) / 3))


@pytest.mark.parametrize("policy", ["raise", "shrink", "natten014"])
def test_policies_leave_maps_that_are_long_enough_alone(policy: str) -> None:
    layer = make(2, 8, 2, 3, 2, na_padding=policy)
    x = torch.randn(1, 6, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_loops(layer, x, [3, 3], [2, 2]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("policy", ["shrink", "natten014"])
def test_gradients_flow_through_short_maps(policy: str) -> None:
    layer = make(2, 4, 1, 3, 3, na_padding=policy)
    x = torch.randn(1, 4, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    F.mse_loss(layer(x), torch.zeros_like(x)).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
