"""torch.compile takes the interfaces as one graph, gradients included."""

from __future__ import annotations

import pytest
import torch

from natrain.compat import v014, v017, v020, v021


def old_pair(q, rpb):
    return v014.natten2dav(v014.natten2dqkrpb(q, q, rpb, 3, 1).softmax(-1), q, 3, 1)


def grouped_heads_and_additional_tokens(q, k, extra):
    out, lse = v021.na2d(q, k, k, 3, additional_keys=extra, additional_values=extra, return_lse=True)
    return out.sum(-1) + lse


IMAGE = (2, 9, 8, 8)
CASES = {
    "0.14 functions": (lambda: old_pair, [(1, 2, 8, 8, 4), (2, 5, 5)]),
    "0.14 module, padded": (lambda: v014.NeighborhoodAttention2D(8, 2, 3, 4), [IMAGE]),
    "0.17 module": (lambda: v017.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True), [IMAGE]),
    "0.20 module": (lambda: v020.NeighborhoodAttention2D(8, 2, 3, 2), [IMAGE]),
    "0.21 operators": (lambda: grouped_heads_and_additional_tokens, [(1, 8, 8, 4, 4), (1, 8, 8, 2, 4), (1, 5, 2, 4)]),
}


@pytest.mark.parametrize("case", CASES)
def test_full_graph(case):
    make, shapes = CASES[case]
    torch.manual_seed(0)
    function = make()
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    expected = function(*inputs)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
