"""A small dilated NAT on odd sizes, and a process that has torch but no natrain."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import timm
import torch

import natrain  # noqa: F401

INPUT = {"in_chans": 2, "img_size": (9, 7), "mean": (0.1, 0.2), "std": (1.0, 2.0), "crop_pct": 1.0}


def small_model(seed: int = 0, **kwargs) -> torch.nn.Module:
    """One attention block of dilation 2 on 9x7 tokens, biases far from zero, dropout that evaluation must not apply."""
    torch.manual_seed(seed)
    arguments = dict(depths=(1,), kernel_size=3, dilations=2, in_chans=2, num_classes=4, img_size=(9, 7), drop_rate=0.5)
    model = timm.create_model("nat_digits", **{**arguments, **kwargs})
    for name, parameter in model.named_parameters():
        if name.endswith("rpb"):
            torch.nn.init.normal_(parameter)
    # Large logits, so that 1e-4 is not passed by everything being small.
    torch.nn.init.normal_(model.head.weight, std=3.0)
    return model


def images_of(batch: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 2, 9, 7, generator=torch.Generator().manual_seed(seed))


def logits_of(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the model says in torch, with the kernel it has (``auto``: not the one that exports are made of)."""
    with torch.inference_mode():
        return model.eval()(images)


def run_without_natrain(code: str, folder: Path) -> str:
    """The output of ``code`` in a process that cannot import natrain, started in ``folder``."""
    blocker = """
    import sys
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "natrain":
                raise ImportError("natrain is not on this machine")
    sys.meta_path.insert(0, Blocker())
    """
    source = textwrap.dedent(blocker) + textwrap.dedent(code) + "\nassert 'natrain' not in sys.modules\n"
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", source], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
