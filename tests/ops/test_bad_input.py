"""Every wrong argument of the operators: one error with the argument, its value, what is allowed, what to type."""

from __future__ import annotations

import math

import pytest
import torch

import natrain

Q = torch.randn(2, 8, 9, 2, 4)


def _nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([Q[0], Q[1, :7]], layout=layout)


@pytest.mark.parametrize(
    ("changes", "argument", "allowed", "fix"),
    [
        ({"q": torch.randn(2, 8, 2, 4)}, "q.shape=(2, 8, 2, 4)", "5 axes, [B, y, x, heads, head_dim]", "another rank"),
        ({"q": None}, "q='NoneType'", "a torch.Tensor", "torch.as_tensor"),
        ({"q": [1.0]}, "q='list'", "a torch.Tensor", "torch.as_tensor"),
        ({"k": Q[:1].to_sparse()}, "k.layout=torch.sparse_coo", "a dense tensor", "k.to_dense()"),
        ({"q": _nested(torch.strided)}, "q.layout='nested'", "a dense tensor", "to_padded_tensor and a key_mask"),
        ({"v": _nested(torch.jagged)}, "v.layout='nested'", "a dense tensor", "to_padded_tensor and a key_mask"),
        ({"q": Q.int()}, "q.dtype=torch.int32", "a floating point dtype", "q.float()"),
        ({"k": Q.double()}, "k.dtype=torch.float64", "q's dtype, torch.float32", "k.to(q.dtype)"),
        ({"v": Q.half()}, "v.dtype=torch.float16", "q's dtype", "v.to(q.dtype)"),
        ({"k": Q.to("meta")}, "k.device='meta'", "q's device, cpu", "k.to(q.device)"),
        ({"v": Q[:, :7]}, "v.shape=(2, 7, 9, 2, 4)", "(2, 8, 9, 2, 4)", "v of that shape"),
        ({"k": Q[..., :3]}, "k.shape=(2, 8, 9, 2, 3)", "(2, 8, 9, 2, 4)", "k of that shape"),
        ({"v": Q[:, :, :, :1]}, "v.shape=(2, 8, 9, 1, 4)", "(2, 8, 9, 2, 4)", "v of that shape"),
        (
            {"k": torch.cat([Q, Q[..., :1, :]], -2), "v": torch.cat([Q, Q[..., :1, :]], -2)},
            "k.shape=(2, 8, 9, 3, 4)",
            "a divisor of q's 2 heads",
            "2 heads, or 1",
        ),
        ({"key_mask": 1}, "key_mask='int'", "a torch.Tensor or None", "key_mask=None"),
        ({"key_mask": torch.ones(2, 8, 9)}, "key_mask.dtype=torch.float32", "torch.bool", "key_mask.bool()"),
        (
            {"key_mask": torch.ones(2, 8, dtype=torch.bool)},
            "key_mask.shape=(2, 8)",
            "(2, 8, 9) = [B, y, x]",
            "key_mask.expand",
        ),
        (
            {"key_mask": torch.ones(2, 8, 9, dtype=torch.bool, device="meta")},
            "key_mask.device='meta'",
            "q's device, cpu",
            "key_mask.to(q.device)",
        ),
        ({"kernel_size": 0}, "kernel_size=0", "at least 1 along axis y", "kernel_size=7"),
        ({"kernel_size": (3, -1)}, "kernel_size=(3, -1)", "at least 1 along axis x", "kernel_size=7"),
        ({"kernel_size": 3.0}, "kernel_size=3.0", "one int, or a tuple of 2", "kernel_size=(7, 7)"),
        ({"kernel_size": True}, "kernel_size=True", "one int", "kernel_size=7"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size=(3, 3, 3)", "tuple of 2 (one per axis y, x)", "kernel_size=(7, 7)"),
        ({"kernel_size": 9}, "kernel_size=9", "kernel_size * dilation <= 8, the length of axis y", "kernel_size=8"),
        ({"kernel_size": 3, "dilation": 3}, "dilation=3", "<= 8, the length of axis y", "dilation=2"),
        ({"dilation": 0}, "dilation=0", "at least 1", "dilation=1"),
        ({"stride": 4}, "stride=4", "1 <= stride <= kernel_size (3)", "stride=1"),
        ({"stride": 0}, "stride=0", "1 <= stride", "stride=1"),
        ({"is_causal": 1}, "is_causal=1", "one bool, or a tuple of 2", "is_causal=(True, True)"),
        (
            {"rpb": torch.zeros(2, 3, 3)},
            "rpb.shape=(2, 3, 3)",
            "(2, 5, 5) = [heads, 2 * kernel_size - 1",
            "interpolate",
        ),
        ({"rpb": torch.zeros(2, 5, 5).half()}, "rpb.dtype=torch.float16", "or torch.float32", "rpb.float()"),
        ({"rpb": torch.zeros(2, 5, 5, device="meta")}, "rpb.device='meta'", "q's device", "rpb.to(q.device)"),
        ({"rpb": 0.0}, "rpb='float'", "a torch.Tensor or None", "rpb=None"),
        ({"scale": math.nan}, "scale=nan", "a finite number or None", "scale=None"),
        ({"scale": math.inf}, "scale=inf", "a finite number", "scale=None"),
        ({"dropout_p": 1.0}, "dropout_p=1.0", "a number in [0, 1)", "dropout_p=0.0"),
        ({"dropout_p": -0.1}, "dropout_p=-0.1", "a number in [0, 1)", "dropout_p=0.0"),
        ({"dropout_p": math.nan}, "dropout_p=nan", "a number in [0, 1)", "dropout_p=0.0"),
    ],
)
def test_one_clear_error(changes, argument, allowed, fix):
    arguments = {"q": Q, "k": Q, "v": Q, "kernel_size": 3, **changes}
    with pytest.raises(ValueError) as caught:
        natrain.na2d(**arguments)
    message = str(caught.value)
    assert message.startswith(f"{argument} is not allowed")
    assert allowed in message and fix in message.split("Try: ")[1]


def test_an_empty_axis_is_not_answered_with_an_empty_window():
    with pytest.raises(ValueError, match=r"kernel_size=1 .*<= 0, the length of axis x.*Try: larger inputs$"):
        natrain.na1d(*[torch.randn(1, 0, 2, 4)] * 3, 1)


def test_packed_and_unfused_forms_check_too():
    with pytest.raises(ValueError, match=r"qkv.shape=\(2, 8, 9, 2, 2, 4\).*\[B, y, x, 3, heads, head_dim\]"):
        natrain.na2d_qkvpacked(torch.stack([Q, Q], dim=-3), 3)
    with pytest.raises(ValueError, match=r"qkv.shape=.*6 axes"):
        natrain.na2d_qkvpacked(Q, 3)
    with pytest.raises(ValueError, match=r"k.dtype=torch.float64"):
        natrain.na2d_qk(Q, Q.double(), 3)
    with pytest.raises(ValueError, match=r"probs.shape=\(2, 8, 9, 2, 8\) is not allowed: expected \(2, 8, 9, 2, 9\)"):
        natrain.na2d_av(torch.rand(2, 8, 9, 2, 8), Q, 3)
    with pytest.raises(ValueError, match="probs='float'"):
        natrain.na2d_av(1.0, Q, 3)


@pytest.mark.parametrize("name", ["na1d", "na2d", "na3d", "na2d_qkvpacked", "na2d_qk", "na3d_av"])
def test_public_functions_are_documented(name):
    document = getattr(natrain, name).__doc__
    for word in ("Args:", "kernel_size:", "dilation:", "Returns:", "Raises:"):
        assert word in document
    assert "{" not in document
