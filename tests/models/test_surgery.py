"""Surgery: bit-equal where nothing changes, PyTorch's bicubic interpolation of each bias, the published plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F

import natrain  # noqa: F401
from natrain.cli import main
from natrain.cli.surgery import parse_changes
from natrain.models.surgery import StagePlan, operate, replan, resize_bias
from natrain.models.weights import load_weights, save_weights
from tests.models.test_plans import plan_of

SMALL = dict(dim=8, depths=(1, 2), heads=2, kernel_size=[5, 3], dilations=[[1], [1, 2]])
INPUT = dict(img_size=[48, 56], in_chans=3, mean=[0.5] * 3, std=[0.5] * 3, crop_pct=0.9, interpolation="bicubic")


@pytest.fixture
def weights(tmp_path):
    """A small NAT with random weights, as a file of natrain and as read from it."""
    torch.manual_seed(0)
    model = timm.create_model("nat_mini", num_classes=3, **SMALL)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5) if name.endswith("rpb") else None
    from natrain.models.weights import Weights

    found = Weights(
        state=model.state_dict(),
        model_name="nat_mini",
        model_args=dict(SMALL),
        class_names=["ant", "bee", "cat"],
        input=INPUT,
        licence="mit",
        source="test",
        layout="natrain",
    )
    save_weights(found, tmp_path / "in.safetensors")
    return load_weights(tmp_path / "in.safetensors")


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("changes", [{}, {"kernel_size": [5, 3]}, {"img_size": (48, 56)}, {"img_size": [48, 56]}])
def test_nothing_changes_where_nothing_is_asked(weights, changes):
    same, table = operate(weights, **changes)
    assert_equal(same.state, weights.state)
    assert replace(same, state={}) == replace(weights, state={})
    assert "->" not in table


@pytest.mark.parametrize("sizes", [(7, 5), (5, 9), (3, 3), (6, 4)])
def test_biases_are_interpolated_as_pytorch_does(weights, sizes):
    changed, _ = operate(weights, kernel_size=list(sizes), img_size=160)
    for name, tensor in weights.state.items():
        if name.endswith("rpb"):
            side = 2 * sizes[int(name.split(".")[1])] - 1
            tensor = F.interpolate(tensor[None], size=(side, side), mode="bicubic", align_corners=False)[0]
        assert torch.equal(changed.state[name], tensor), name
    assert changed.model_args["kernel_size"] == list(sizes)
    assert changed.input == {**INPUT, "img_size": [160, 160]}
    model = changed.create_model()
    assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 3)


def test_a_bias_of_half_precision_keeps_its_type_and_its_middle():
    rpb = torch.randn(2, 13, 13, dtype=torch.bfloat16)
    larger = resize_bias(rpb, (2, 21, 21))
    assert larger.dtype == torch.bfloat16
    # Offset 0 lies in the middle before and after.
    torch.testing.assert_close(larger[:, 10, 10], rpb[:, 6, 6])


PUBLISHED = {
    "224": [(56, 7, (1, 8, 1)), (28, 7, (1, 4, 1, 4)), (14, 7, (1, 2) * 9), (7, 7, (1,) * 5)],
    "384": [(96, 7, (1, 13, 1)), (48, 7, (1, 6, 1, 6)), (24, 7, (1, 3) * 9), (12, 7, (1,) * 5)],
    "384_k11": [(96, 11, (1, 8, 1)), (48, 11, (1, 4, 1, 4)), (24, 11, (1, 2) * 9), (12, 11, (1,) * 5)],
    "ade512": [(128, 7, (1, 16, 1)), (64, 7, (1, 4, 1, 8)), (32, 7, (1, 2, 1, 3, 1, 4) * 3), (16, 7, (1, 2, 1, 2, 1))],
}


@pytest.mark.parametrize("new", ["224", "384", "384_k11"])
@pytest.mark.parametrize("old", ["224", "384", "384_k11"])
def test_planning_anew_turns_published_plans_into_published_plans(old, new):
    target = [StagePlan(*stage) for stage in PUBLISHED[new]]
    found = replan(
        [StagePlan(*stage) for stage in PUBLISHED[old]],
        [stage.tokens for stage in target],
        [stage.kernel_size for stage in target],
    )
    assert found == [stage.dilations for stage in target]


def test_gradual_plans_keep_their_shares():
    """ADE20K at 640 from 512: stages 1, 2 and 4 as published; in stage 3 by the rule (2, 3, 4 of 32 to 40 tokens)."""
    found = replan([StagePlan(*stage) for stage in PUBLISHED["ade512"]], [160, 80, 40, 20], [7] * 4)
    # 4 of 32 tokens is the largest dilation there, and so is 5 of 40; 2 of 16 the largest, and 2 of 20.
    assert found == [(1, 20, 1), (1, 5, 1, 10), (1, 2, 1, 3, 1, 5) * 3, (1, 2, 1, 2, 1)]


def test_a_window_larger_than_its_map_is_refused_and_the_fix_works(weights):
    with pytest.raises(ValueError, match=r"at most 6 in stage 2.*kernel_size=\[7, 6\]"):
        operate(weights, kernel_size=7)
    changed, _ = operate(weights, kernel_size=[7, 6])
    assert changed.create_model()(torch.zeros(1, 3, 48, 56)).shape == (1, 3)


def test_a_model_that_shrinks_its_windows_may_have_larger_ones():
    plan = replan([StagePlan(8, 7, (1, 3))], [8], [9], is_fitted=False)
    assert plan == [(1, 2)]


def test_vit_rpb_changes_its_map():
    torch.manual_seed(0)
    small = timm.create_model("vitrpb_small", dim=8, heads=2, depth=1, num_classes=3, img_size=(48, 64))
    torch.nn.init.normal_(small.layers[0].attn.rpb)
    from natrain.models.weights import Weights

    args = dict(dim=8, heads=2, depth=1, img_size=[48, 64])
    read = Weights(
        small.state_dict(), "vitrpb_small", args, None, {**INPUT, "img_size": [48, 64]}, None, "x", "natrain"
    )
    changed, table = operate(read, img_size=(80, 96))
    new = timm.create_model("vitrpb_small", **{**args, "img_size": (80, 96)}, num_classes=3)
    new.load_state_dict(changed.state)
    expected = F.interpolate(small.layers[0].attn.rpb[None], size=(9, 11), mode="bicubic")[0]
    assert torch.equal(new.layers[0].attn.rpb, expected)
    fresh = timm.create_model("vitrpb_small", **{**args, "img_size": (80, 96)})
    assert torch.equal(new.layers[0].attn.relative_position_index, fresh.layers[0].attn.relative_position_index)
    assert "3 -> 5" in table
    with pytest.raises(ValueError, match="global attention"):
        operate(read, kernel_size=7)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    """The issue's command, from a published file at 224 to kernel 11 at 384."""
    torch.manual_seed(0)
    source, out = tmp_path / "dinat_mini_in1k_224.pth", tmp_path / "out.safetensors"
    model = timm.create_model("dinat_mini")
    torch.save(model.state_dict(), source)
    assert main(["surgery", str(source), str(out), "kernel_size=11", "img_size=384"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == "1 56 -> 96 7 -> 11 13 -> 21 1,8,1".split()
    read = load_weights(out)
    assert (read.model_name, read.input["img_size"], read.model_args) == ("dinat_mini", [384, 384], {"kernel_size": 11})
    assert main(["surgery", str(source), str(out), "img_size=384"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[2].split() == "2 28 -> 48 7 13 (1,4)*2 -> (1,6)*2".split()
    assert plan_of(load_weights(out).create_model()) == [[1, 13, 1], [1, 6] * 2, [1, 3] * 3, [1] * 5]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("kernel=11", "Try: kernel_size=11"),
        ("kernel_size=0", "a whole number >= 1"),
        ("img_size=large", "Try: img_size=384"),
        ("img_size=[384", "Try: img_size=384"),
        ("dilations", "Try: dilations=in384"),
    ],
)
def test_words_that_make_no_sense(word, said):
    with pytest.raises(ValueError) as raised:
        parse_changes([word])
    assert said in str(raised.value)


def test_a_failed_operation_leaves_no_file(weights, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert main(["surgery", str(tmp_path / "in.safetensors"), str(out), "kernel_size=9"]) == 2
    assert not out.exists() and "Try: kernel_size=" in capsys.readouterr().err


def test_an_image_size_has_two_sides(weights):
    with pytest.raises(ValueError, match=r"img_size=\[64, 64, 64\] .*\[height, width\]"):
        operate(weights, img_size=[64, 64, 64])
