"""Hugging Face's Dinat, unmodified, on natrain: against the same model on loops over the definition.

Its last releases that work with any NATTEN are 4.53.x; from 4.55 on transformers itself swaps axes in Dinat's heads.
They need older packages than the rest of the environment has, so they live in a folder of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

REPOSITORY_PACKAGES = ["transformers==4.52.4", "tokenizers<0.22", "huggingface_hub<1", "regex", "requests", "filelock"]

PROGRAM = """
import torch
from transformers import DinatBackbone, DinatConfig, DinatForImageClassification
import transformers.models.dinat.modeling_dinat as theirs

from tests.ops import oracle

config = DinatConfig(
    embed_dim=8, depths=[2, 1, 1, 1], num_heads=[1, 2, 4, 8], kernel_size=3, dilations=[[1, 4], [2], [1], [1]],
    num_labels=5, layer_scale_init_value=0.1, drop_path_rate=0.0,
)
torch.manual_seed(0)
model = DinatForImageClassification(config).double().eval()
for name, parameter in model.named_parameters():
    torch.nn.init.normal_(parameter, std=0.3)
# 40x24 pixels: 10x6 tokens, then 5x3, 3x2, 2x1: dilation 4 and all later stages are padded by Hugging Face itself.
images = torch.randn(2, 3, 40, 24, dtype=torch.float64, requires_grad=True)
logits = model(images).logits
(gradient,) = torch.autograd.grad(logits.square().sum(), images)
assert type(theirs.natten2dav).__module__ != "natten" and theirs.natten2dav.__module__ == "natrain.compat.v014"


def spec(kernel_size, dilation):
    return {"kernel_size": (kernel_size,) * 2, "dilation": (dilation,) * 2, "stride": (1, 1), "is_causal": (False,) * 2}


def dense_qkrpb(query, key, rpb, kernel_size, dilation):
    scores = oracle.dense_scores(query.movedim(1, -2), key.movedim(1, -2), rpb, spec(kernel_size, dilation), 1.0)
    return scores.unflatten(2, query.shape[2:-1])


def dense_av(attn, value, kernel_size, dilation):
    return (attn.flatten(2, 3) @ value.flatten(2, 3)).unflatten(2, value.shape[2:-1])


theirs.natten2dqkrpb, theirs.natten2dav = dense_qkrpb, dense_av
expected = model(images).logits
torch.testing.assert_close(logits, expected)
torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), images)[0])
backbone = DinatBackbone(config)
assert [tuple(m.shape[1:]) for m in backbone(torch.randn(1, 3, 40, 24)).feature_maps] == [(64, 2, 1)]
print("agrees", tuple(logits.shape))
"""


@pytest.fixture(scope="session")
def old_transformers(pytestconfig):
    """A folder with a transformers whose Dinat works; installed once and kept in pytest's cache."""
    folder = pytestconfig.cache.mkdir("transformers-4.52.4")
    if not (folder / "complete").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
        done = subprocess.run([*pip, *REPOSITORY_PACKAGES], capture_output=True, text=True, timeout=900)
        if done.returncode:
            pytest.skip(f"transformers 4.52.4 cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        (folder / "complete").touch()
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="transformers 4.52.4 and its packages end at Python 3.13")
def test_dinat(old_transformers, tmp_path, repository):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(old_transformers), str(repository)])}
    command = [sys.executable, "-m", "natrain.compat", "--natten", "0.14", str(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "agrees (2, 5)"
