"""Counter-based dropout: the stated hash, its statistics, and its place in attention."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import natrain
from natrain.jit import host
from natrain.ops.dropout import drop_threshold, keep_mask

NEEDS_COMPILER = pytest.mark.skipif(host.find_compiler() is None, reason=f"no C++ compiler: {host.REMEDY}")


def _hash(seed: int, row: int, slot: int) -> int:
    """The documented hash in plain integers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x21F0AAAD & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0xD35A2D97 & 0xFFFFFFFF
        return x ^ (x >> 15)

    low = mix((row ^ seed) & 0xFFFFFFFF)
    high = mix((low + (row >> 32) + (seed >> 32)) & 0xFFFFFFFF)
    word = mix(low ^ (slot * 0x9E3779B9 & 0xFFFFFFFF))
    return mix((word + high) & 0xFFFFFFFF)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1])
def test_mask_is_the_documented_hash(seed):
    rows = torch.tensor([0, 1, 77, 2**31 + 5, 2**40 + 3])
    mask = keep_mask(torch.tensor([seed]), rows, 11, 0.3)
    for i, row in enumerate(rows.tolist()):
        assert mask[i].tolist() == [_hash(seed, row, slot) >= drop_threshold(0.3) for slot in range(11)]


def test_share_of_dropped_slots_and_independence():
    """2.4 M slots at p = 0.3: four standard errors are 0.0012; neighbours in slot and row are uncorrelated."""
    mask = keep_mask(torch.tensor([9]), torch.arange(50_000), 49, 0.3).double()
    assert abs(1 - mask.mean().item() - 0.3) < 0.0012
    centred = mask - mask.mean()
    for shifted in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(shifted.mean().item() / 0.21) < 4 / 2.4e6**0.5


def test_attention_drops_with_the_mask_and_rescales():
    q, k, v = (torch.randn(2, 5, 6, 3, 8, dtype=torch.float64) for _ in range(3))
    seed = torch.tensor([42])
    out, _ = torch.ops.natrain.attention(
        q, k, v, None, None, seed, [3, 3], [1, 1], [1, 1], [False] * 2, 1.0, 0.4, "auto"
    )
    probs = natrain.na2d_qk(q, k, 3, scale=1.0).softmax(-1)
    batch, height, width, heads = 2, 5, 6, 3
    kept = torch.zeros_like(probs)
    for b in range(batch):
        for n in range(heads):
            for t in range(height * width):
                for slot in range(9):
                    row = (b * heads + n) * height * width + t
                    kept[b, t // width, t % width, n, slot] = _hash(42, row, slot) >= drop_threshold(0.4)
    torch.testing.assert_close(out, natrain.na2d_av(probs * kept / 0.6, v, 3))


def test_torch_seed_decides_the_mask_and_the_mean_is_kept():
    q = torch.zeros(1, 64, 64, 1, 4, dtype=torch.float64)
    v = torch.ones_like(q)

    def run(seed: int):
        torch.manual_seed(seed)
        return natrain.na2d(q, q, v, 7, dropout_p=0.5)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert abs(run(3).mean().item() - 1) < 4 / (64 * 64 * 49) ** 0.5


@NEEDS_COMPILER
def test_the_seed_is_a_tensor_of_the_graph():
    """Drawn by a torch operator and handed to ours: what a CUDA graph replays and a compiler keeps."""
    q = torch.randn(1, 9, 1, 4)
    graph = make_fx(lambda x: natrain.na1d(x, x, x, 3, dropout_p=0.5, kernel="cpu"))(q).graph
    (attention,) = [node for node in graph.nodes if "natrain.attention" in str(node.target)]
    seed = attention.args[5]
    assert "randint" in str(seed.target)
    assert not [x for x in graph.nodes if x.op == "get_attr"], "a constant would be the same mask in every step"


@pytest.mark.parametrize("kernel", ["reference", pytest.param("cpu", marks=NEEDS_COMPILER)])
def test_a_compiled_call_draws_as_an_eager_one_and_anew_each_time(kernel):
    q = torch.randn(1, 40, 1, 8)

    def run(x):
        return natrain.na1d(x, x, x, 9, dropout_p=0.5, kernel=kernel)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    outputs = []
    for function in (run, compiled):
        torch.manual_seed(7)
        outputs.append([function(q) for _ in range(2)])
    (first, second), (compiled_first, compiled_second) = outputs
    torch.testing.assert_close(compiled_first, first)
    torch.testing.assert_close(compiled_second, second)
    assert not torch.equal(first, second)
