"""torch.export programs: natrain's operators kept, or aten operators only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from natrain.export.graph import trace


def write(
    model: nn.Module,
    input: dict[str, Any],
    path: Path,
    metadata: dict[str, str],
    precision: str,
    device: str,
    decompose: bool,
) -> None:
    """A file for ``torch.export.load``; with kept operators, ``import natrain`` comes first there."""
    program = trace(model, input, decompose=decompose, precision=precision, device=device)
    torch.export.save(program, path, extra_files={f"{key}.json": value for key, value in metadata.items()})


def load(path: Path, device: str) -> Callable[[Tensor], Tensor]:
    """The program as a function."""
    return torch.export.load(path).module()
