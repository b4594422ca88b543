"""torch.compile(fullgraph=True): no graph break in any family, eager's outputs and gradients, dynamic image sizes."""

from __future__ import annotations

import pytest
import timm
import torch

from tests.models.test_timm import FAMILIES, create, images

# Tracing costs seconds a block: two stages, and two blocks of different dilation, hold every kind of layer.
SHORT = {
    "nat": dict(depths=(2, 1), dilations=((1, 2), 1)),
    "dinat_s": dict(depths=(1, 1)),
    "isotropic": dict(depth=2),
    "vitrpb": dict(depth=1),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_fullgraph_in_training(family: str) -> None:
    model, x = create(family, **SHORT[family]).train(), images(family)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    # aot_eager traces forward and backward as inductor does, without its minutes of code generation.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["nat", "isotropic", "dinat_s"])
def test_fullgraph_with_dynamic_sizes(family: str) -> None:
    model = create(family, **SHORT[family]).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    height, width = FAMILIES[family][2]
    for size in ((2, 3, height, width), (3, 3, height + 13, width + 30)):
        x = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["shrink", "natten014"])
def test_fullgraph_of_the_padding_policies(policy: str) -> None:
    model, x = create("nat", na_padding=policy, depths=(1, 1), dilations=(4, 3)).eval(), torch.randn(2, 3, 40, 57)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_fullgraph_with_checkpointing_and_dropped_paths() -> None:
    model, x = create("nat", drop_path_rate=0.5, **SHORT["nat"]).train(), images("nat")
    model.set_grad_checkpointing()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_inductor() -> None:
    # One block: each C++ kernel that inductor writes takes seconds to compile.
    model, x = timm.create_model("nat_digits", depths=(1,), kernel_size=3).eval(), torch.randn(2, 1, 8, 9)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)
