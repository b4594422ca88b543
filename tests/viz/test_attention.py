"""The attention shown against dense attention over all tokens, and the pictures' files."""

from __future__ import annotations

import pytest
import timm
import torch
from PIL import Image

import natrain  # noqa: F401
from natrain.cli import main
from natrain.layers import GlobalAttention2d
from natrain.models.published import SHIPPED
from natrain.viz import attention_map
from natrain.viz.attention import find_layer
from tests.models.published import axis_neighbours

SMALL = dict(dim=16, depths=(1, 2), heads=2, kernel_size=3, dilations=[[1], [1, 2]], num_classes=0)
DIGITS = str(SHIPPED / "nat_digits.safetensors")


def dense(model, layer, image, dilation: int, k: int = 3) -> torch.Tensor:
    """Probabilities [N, Y, X, Y, X] of every query: full scores, plus bias, masked outside of the windows."""
    caught = []
    handle = layer.register_forward_hook(lambda module, inputs, output: caught.append(inputs[0]))
    model(image[None])
    handle.remove()
    x = caught[0][0]
    height, width = x.shape[:2]
    q, k_, _ = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).unbind(-3)
    scores = torch.einsum("yxnd,uvnd->nyxuv", q, k_) * layer.head_dim**-0.5
    (mask_y, index_y), (mask_x, index_x) = axis_neighbours(height, k, dilation), axis_neighbours(width, k, dilation)
    scores = scores + layer.rpb[:, index_y[:, None, :, None], index_x[None, :, None, :]]
    return (
        scores.masked_fill(~(mask_y[:, None, :, None] & mask_x[None, :, None, :]), -torch.inf)
        .flatten(3)
        .softmax(-1)
        .unflatten(-1, (height, width))
    )


@pytest.mark.parametrize(("name", "dilation"), [("0.0", 1), ("1.0", 1), ("1.1", 2)])
def test_the_map_is_that_of_dense_attention(name, dilation):
    torch.manual_seed(0)
    model = timm.create_model("nat_mini", **SMALL).eval()
    image = torch.randn(3, 50, 70)
    _, layer = find_layer(model, name)
    torch.nn.init.normal_(layer.rpb)
    with torch.no_grad():
        expected = dense(model, layer, image, dilation)
    for pixel in [(0, 0), (20, 69), (49, 31)]:
        maps, token = attention_map(model, layer, image, pixel)
        torch.testing.assert_close(maps, expected[(slice(None), *token)], rtol=1e-4, atol=1e-6)


def test_global_attention():
    torch.manual_seed(0)
    layer = GlobalAttention2d(8, 2, (3, 4)).eval()
    torch.nn.init.normal_(layer.rpb)
    x = torch.randn(1, 3, 4, 8)
    probs, _ = layer.attention_probs(x)
    v = layer.qkv(x).unflatten(-1, (3, 2, 4))[..., 2, :, :].flatten(1, 2)
    out = torch.einsum("byxnk,bknd->byxnd", probs, v).flatten(-2)
    torch.testing.assert_close(layer(x), layer.proj(out), rtol=1e-4, atol=1e-6)


def test_layers_by_name_and_number():
    model = timm.create_model("nat_digits")
    assert find_layer(model, None)[0] == "levels.1.blocks.0.attn"
    assert find_layer(model, "0.0") == find_layer(model, "levels.0.blocks.0.attn")
    with pytest.raises(ValueError, match="one of 0.0, 1.0"):
        find_layer(model, "2.0")


@pytest.mark.parametrize(
    "words",
    [
        ["attention", "IMAGE", "--checkpoint", DIGITS, "--layer", "0.0", "--query", "3,4"],
        ["rpb", DIGITS],
        ["rpb", DIGITS, "--layer", "1.0"],
        ["windows", "model=nat_digits"],
        ["windows", "model=dinat_isotropic_small", "dilations=[1,2]", "img_size=[224,256]", "--query", "0,0"],
    ],
)
def test_every_picture_is_drawn(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8), 200).save("IMAGE", "PNG")
    assert main(["viz", *words]) == 0
    with Image.open(tmp_path / f"{words[0]}.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 24)
    assert len(colours) > 20
    assert capsys.readouterr().out.endswith(f"written: {words[0]}.png\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["window", "model=nat_digits"], "Try: natrain viz windows"),
        (["windows", "model=nat_digitz"], "Try: model=nat_digits"),
        (["windows", "nat_digits"], "key=value"),
        (["windows", "model=nat_digits", "img_size=[8"], "img_size='[8'"),
        (["windows", "model=nat_digits", "img_size=8,8"], "img_size='8,8'"),
        (["windows", "model=nat_digits", "dilations=0.5"], "dilations=0.5"),
        (["windows", "model=nat_digits", "--query", "9,0"], "a pixel of the 8x8 image"),
        (["windows", "model=nat_digits", "--query", "9"], "row,column"),
        (["windows", "model=nat_digits", "--out", "x.txt"], "--out x.png"),
        (["rpb", DIGITS, "--layer", "9.9"], "one of 0.0, 1.0"),
        (["attention", "x.png"], "--checkpoint"),
        (["attention", "x.png", "--checkpoint", DIGITS], "a file; there is none"),
        (["rpb", DIGITS, DIGITS], "one CHECKPOINT"),
        (
            ["rpb", DIGITS, "--query", "1,1"],
            "--query='1,1' is not allowed: expected no option of rpb, which takes --layer",
        ),
        (["windows", "model=nat_digits", "--checkpoint", DIGITS], "windows, which takes --query and --out"),
    ],
)
def test_mistakes(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["viz", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
