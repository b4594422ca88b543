"""torch.export programs and AOTInductor packages: loaded by other processes, with and without natrain there."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from natrain.export import export
from natrain.export.graph import operators
from tests.export.helpers import INPUT, images_of, logits_of, run_without_natrain, small_model

RUN = """
import torch
program = {load}
for batch in (1, 5):
    images, wanted = torch.load(f"batch{{batch}}.pt")
    torch.testing.assert_close(program(images), wanted, atol=1e-4, rtol=0)
    print("batch", batch)
"""


def write_expected(model, folder) -> None:
    for batch in (1, 5):
        torch.save((images_of(batch), logits_of(model, images_of(batch))), folder / f"batch{batch}.pt")


def test_decomposed_program_runs_where_natrain_is_not(tmp_path):
    model = small_model()
    write_expected(model, tmp_path)
    assert export(model, INPUT, "torch-export", tmp_path / "model.pt2", decompose=True) <= 1e-4
    assert {name.split(".")[0] for name in operators(torch.export.load(tmp_path / "model.pt2"))} == {"aten"}
    said = run_without_natrain(RUN.format(load='torch.export.load("model.pt2").module()'), tmp_path)
    assert said.split() == ["batch", "1", "batch", "5"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_model_of_another_dtype_becomes_a_program_of_float32(dtype, tmp_path):
    model = small_model().to(dtype)
    assert export(model, INPUT, "torch-export", tmp_path / "model.pt2") <= 1e-4
    assert next(model.parameters()).dtype == dtype
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(images_of(2)), logits_of(model.float(), images_of(2)), atol=1e-4, rtol=0)


def test_kept_program_has_the_operator_with_kernel_auto(tmp_path):
    model = small_model(kernel="reference")
    write_expected(model, tmp_path)
    export(model, INPUT, "torch-export", tmp_path / "model.pt2", description={"class_names": ["a", "b", "c", "d"]})
    extra = {"natrain.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    calls = [node for node in program.graph.nodes if "natrain.attention" in str(node.target)]
    assert len(calls) == 1 and calls[0].args[-1] == "auto"
    assert json.loads(extra["natrain.json"]) == {"class_names": ["a", "b", "c", "d"]}
    code = "import natrain\n" + RUN.format(load='torch.export.load("model.pt2").module()')
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)


def test_half_precision_program_takes_and_gives_float32(tmp_path):
    model = small_model()
    difference = export(model, INPUT, "torch-export", tmp_path / "model.pt2", precision="bf16", decompose=True)
    assert 1e-4 < difference < 0.02 * logits_of(model, images_of(8)).abs().max()
    program = torch.export.load(tmp_path / "model.pt2")
    assert program.state_dict["model.head.weight"].dtype == torch.bfloat16
    assert program.module()(images_of(2)).dtype == torch.float32


def test_exporting_leaves_the_model_alone(tmp_path):
    model = small_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, INPUT, "torch-export", tmp_path / "model.pt2", precision="fp16", decompose=True)
    assert model.training and model.levels[0].blocks[0].attn.kernel == "auto"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype


@pytest.mark.slow
def test_compiled_package_runs_where_natrain_is_not(tmp_path):
    model = small_model()
    write_expected(model, tmp_path)
    description = {"class_names": ["a", "b", "c", "d"]}
    assert export(model, INPUT, "aoti", tmp_path / "model.pt2", description=description) <= 1e-4
    load = 'torch._inductor.aoti_load_package("model.pt2")'
    said = run_without_natrain(RUN.format(load=load) + "print(program.get_metadata()['natrain'])", tmp_path)
    assert said.splitlines() == ["batch 1", "batch 5", json.dumps(description)]
