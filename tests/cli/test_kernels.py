"""``natrain kernels``: compiled ahead without a GPU, listed, cleared."""

from __future__ import annotations

import pytest
import timm
import torch

from natrain.cli import main
from natrain.jit import cache, cuda, nvrtc
from natrain.jit.build import find_built
from natrain.models.problems import attention_problems
from natrain.ops.problem import Window
from natrain.ops.registry import get_kernel


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NATRAIN_CACHE", str(tmp_path))


def test_the_problems_of_a_model_are_its_layers():
    """DiNAT-Tiny at 224 pixels (arXiv 2209.15001): 3, 4, 18, 5 layers, every other one dilated by 8, 4, 2, 1."""
    with torch.device("meta"):
        model = timm.create_model("dinat_tiny")
    found = attention_problems(model, (4, 3, 224, 224), torch.bfloat16, "cuda", (9, 0))
    assert {(p.spatial, p.heads, p.window.dilation[0]): count for p, count in found.items()} == {
        ((56, 56), 2, 1): 2,
        ((56, 56), 2, 8): 1,
        ((28, 28), 4, 1): 2,
        ((28, 28), 4, 4): 2,
        ((14, 14), 8, 1): 9,
        ((14, 14), 8, 2): 9,
        ((7, 7), 16, 1): 5,
    }
    for problem in found:
        assert problem.batch == 4 and problem.head_dim == 32 and problem.has_rpb and problem.needs_grad
        assert problem.dtype == torch.bfloat16 and problem.capability == (9, 0)
        assert problem.window.kernel_size == (7, 7)


def test_short_maps_are_padded_as_the_layer_does():
    with torch.device("meta"):
        model = timm.create_model("nat_mini", na_padding="natten014")
    found = attention_problems(model, (1, 3, 64, 64), torch.float32, "cuda", (8, 0))
    assert {problem.spatial for problem in found} == {(16, 16), (8, 8), (7, 7)}
    assert {problem.window for problem in found} == {Window((7, 7), (1, 1), (1, 1), (False, False))}


@pytest.mark.slow
def test_a_model_is_compiled_ahead_listed_and_cleared(capsys):
    if cuda.find_nvcc() is None and not nvrtc.is_available():
        pytest.skip("no CUDA compiler: neither nvcc nor the NVRTC of torch's CUDA wheels")
    assert main(["kernels", "build", "model=nat_digits", "dtype=bf16", "arch=90", "kernel=naive"]) == 0
    said = capsys.readouterr().out
    with torch.device("meta"):
        model = timm.create_model("nat_digits")
    size = model.pretrained_cfg["input_size"]
    specs = {}
    for problem in attention_problems(model, (128, *size), torch.bfloat16, "cuda", (9, 0)):
        specs |= {spec.key(): spec for spec in get_kernel("naive").build_specs(problem, "sm_90a")}
    assert said.startswith(f"{len(specs)} kernels for sm_90a, {len(specs)} of them to compile with ")
    assert all(find_built(spec) for spec in specs.values())
    main(["kernels", "build", "model=nat_digits", "dtype=bf16", "arch=sm_90a", "kernel=naive"])
    assert f"{len(specs)} kernels for sm_90a, 0 of them" in capsys.readouterr().out
    assert main(["kernels", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert sum("sm_90a" in line for line in listed) == len(specs) and listed[-1].startswith(f"{len(specs)} compiled")
    assert main(["kernels", "clear", "natrain_naive_softmax"]) == 0
    softmax = sum(spec.name.startswith("natrain_naive_softmax") for spec in specs.values())
    assert softmax >= 2 and capsys.readouterr().out.startswith(f"{softmax} compiled")
    assert main(["kernels", "clear"]) == 0
    assert capsys.readouterr().out.startswith(f"{len(specs) - softmax} compiled") and not cache.entries()


def test_a_kernel_that_does_not_compile_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv("NATRAIN_NVCC", "/bin/false")
    cuda.find_nvcc.cache_clear()
    try:
        assert main(["kernels", "build", "model=nat_digits", "arch=80", "kernel=naive"]) == 1
    finally:
        cuda.find_nvcc.cache_clear()
    assert "/bin/false does not run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "model=nat_tiny"], "arch=..."),
        (["build", "arch=90"], "model=..."),
        (["build", "model=nat_tyny", "arch=90"], "model=nat_tiny"),
        (["build", "model=nat_tiny", "arch=61"], "from 75 on"),
        (["build", "model=nat_tiny", "arch=new"], "arch=90"),
        (["build", "model=nat_tiny", "arch=90", "dtype=int8"], "dtype=bf16"),
        (["build", "model=nat_tiny", "arch=90", "kernel=cpu"], "device cuda (has cpu)"),
        (["build", "model=nat_tiny", "arch=90", "kernel=niave"], 'kernel="naive"'),
        (["build", "model=nat_tiny", "arch=90", "size=7"], "img_size=224"),
        (["build", "model=nat_tiny", "arch=90", "batch=0"], "batch=128"),
        (["biuld"], "natrain kernels build"),
        (["clear", "nothing"], "natrain kernels list"),
        (["list", "cpu"], "natrain kernels list"),
    ],
)
def test_bad_words_say_what_to_type(words, message, capsys):
    assert main(["kernels", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["list"], ["clear"], ["build", "model=nat_digits", "arch=portable", "dtype=fp32"]])
def test_a_cache_that_cannot_be_made(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NATRAIN_CACHE", str(tmp_path / "file"))
    assert main(["kernels", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"natrain: error: NATRAIN_CACHE='{tmp_path}/file' is not allowed") and said.count("\n") == 1
