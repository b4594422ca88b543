"""Named dilation plans against the papers' tables, and every plan on images of the size it is made for."""

from __future__ import annotations

import pytest
import timm
import torch

import natrain  # noqa: F401
from natrain.models import NAT, DiNATs
from natrain.models.plans import DINAT, DINATS

# As the tables print them: one string a stage; "*" repeats a pattern over the rest of its stage.
TABLE = {
    ("dinat_tiny", "in224", 224, 7): "1,8,1 | 1,4,1,4 | 1,2* | 1*",
    ("dinat_large", "in384", 384, 7): "1,13,1 | 1,6,1,6 | 1,3* | 1*",
    ("dinat_large", "in384_k11", 384, 11): "1,8,1 | 1,4,1,4 | 1,2* | 1*",
    ("dinat_mini", "coco800", 800, 7): "1,28,1 | 1,7,1,14 | 1,3,1,5,1,7* | 1,3,1,3,1",
    ("dinat_base", "ade512", 512, 7): "1,16,1 | 1,4,1,8 | 1,2,1,3,1,4* | 1,2,1,2,1",
    ("dinat_large", "ade640", 640, 7): ("1,20,1 | 1,5,1,10 | 1,2,1,3,1,4,1,5,1,2,1,3,1,4,1,5,1,5 | 1,2,1,2,1"),
    # No crop is stated for this row; at 640 pixels the largest windows take 11 * 14 of 160 tokens.
    ("dinat_large", "mask2former_k11", 640, 11): "1,14,1 | 1,4,1,7 | 1,2,1,3,1,2,1,3,1,2,1,3,1,2,1,3,1,3 | 1*",
    ("dinat_s_tiny", "in224", 224, 7): "1,8 | 1,4 | 1,2* | 1,1",
    ("dinat_s_large", "in384", 384, 7): "1,13 | 1,6 | 1,3* | 1,1",
    ("dinat_s_small", "coco800", 800, 7): "1,28 | 1,14 | 1,3,1,5,1,7* | 1,3",
    ("dinat_s_base", "ade512", 512, 7): "1,16 | 1,8 | 1,2,1,3,1,4* | 1,2",
}


def expand(text: str, depth: int) -> list[int]:
    pattern = [int(word) for word in text.strip().removesuffix("*").split(",")]
    return [pattern[block % len(pattern)] for block in range(depth)] if text.strip().endswith("*") else pattern


def plan_of(model: torch.nn.Module) -> list[list[int]]:
    return [[block.attn.window.dilation[0] for block in stage.blocks] for stage in model.trunk]


@pytest.mark.parametrize(("name", "plan", "size", "kernel_size"), TABLE)
def test_every_row_of_the_tables(name, plan, size, kernel_size):
    with torch.device("meta"):
        model = timm.create_model(name, dilations=plan, img_size=size, kernel_size=kernel_size)
    stages = TABLE[name, plan, size, kernel_size].split("|")
    depths = [len(stage.blocks) for stage in model.trunk]
    assert plan_of(model) == [expand(text, depth) for text, depth in zip(stages, depths, strict=True)]


def test_no_plan_is_untested():
    assert {plan for name, plan, *_ in TABLE if not name.startswith("dinat_s_t")} >= {*DINAT, *DINATS}
    assert (NAT.plans, DiNATs.plans) == (DINAT, DINATS)


@pytest.mark.parametrize(
    ("model", "plan", "said"),
    [
        ("nat_mini", "coco8000", "Try: dilations='coco800'"),
        ("dinat_s_tiny", "ade640", "one of in224, in384, coco800, ade512"),
        ("dinat_mini", "ade640", "a plan for 4 stages of (3, 4, 6, 5) blocks"),
        ("nat_cifar", "coco800", "a plan for 3 stages"),
        ("nat_isotropic_small", "in384", "no plans are published for this family"),
    ],
)
def test_names_that_do_not_fit_are_refused(model, plan, said):
    with pytest.raises(ValueError) as raised:
        timm.create_model(model, dilations=plan)
    assert said in str(raised.value)
