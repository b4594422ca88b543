"""TF32 follows torch, whichever of its settings was used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from natrain.ops import precision

MATMUL = "torch.backends.cuda.matmul"
OLD = {
    "pass": False,
    'torch.set_float32_matmul_precision("high")': True,
    'torch.set_float32_matmul_precision("medium")': True,
    'torch.set_float32_matmul_precision("high"); torch.set_float32_matmul_precision("highest")': False,
    f"{MATMUL}.allow_tf32 = True": True,
    f"{MATMUL}.allow_tf32 = True; {MATMUL}.allow_tf32 = False": False,
    "torch.backends.cudnn.allow_tf32 = False": False,
}
NEW = {
    f'{MATMUL}.fp32_precision = "tf32"': True,
    f'{MATMUL}.fp32_precision = "ieee"': False,
    'torch.backends.fp32_precision = "tf32"': True,
    f'torch.backends.fp32_precision = "tf32"; {MATMUL}.fp32_precision = "ieee"': False,
    'torch.backends.cudnn.conv.fp32_precision = "tf32"': False,
}
# Torch remembers every setting, so that each gets a process; a fork spares importing torch again.
SCRIPT = """
import json, os, sys, torch
from natrain.ops.precision import is_tf32_allowed, tf32_products
def within(is_allowed):
    with tf32_products(is_allowed):
        return is_tf32_allowed()
for settings in json.load(sys.stdin):
    sys.stdout.flush()
    if not os.fork():
        exec(settings)
        found = is_tf32_allowed()
        assert within(True) and is_tf32_allowed() == found, settings
        assert not within(False) and is_tf32_allowed() == found, settings
        print(json.dumps([settings, found]))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_any_of_torchs_settings_is_read_and_comes_back():
    expected = {**OLD, **(NEW if hasattr(torch.backends.cuda.matmul, "fp32_precision") else {})}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps([*expected]), capture_output=True, text=True, check=True
    )
    assert dict(json.loads(line) for line in run.stdout.splitlines()) == expected


def test_torch_without_the_newest_setting(monkeypatch):
    monkeypatch.setattr(precision, "_fp32_precision", None)
    before = torch.get_float32_matmul_precision()
    try:
        for name, allowed in (("high", True), ("highest", False)):
            torch.set_float32_matmul_precision(name)
            assert precision.is_tf32_allowed() is allowed
    finally:
        torch.set_float32_matmul_precision(before)
