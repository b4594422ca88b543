"""AOTInductor packages: the decomposed graph compiled to machine code, run by torch alone, from Python or C++."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from natrain.errors import invalid
from natrain.export.graph import trace


def check_install() -> None:
    """ValueError unless there is a C++ compiler, which AOTInductor calls."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        allowed = "a form whose compiler is installed; aoti needs one for C++"
        raise invalid("--to", "aoti", allowed, "apt install g++") from error


def write(
    model: nn.Module,
    input: dict[str, Any],
    path: Path,
    metadata: dict[str, str],
    precision: str,
    device: str,
    decompose: bool,
) -> None:
    """A package for ``torch._inductor.aoti_load_package``."""
    assert decompose, "compiled code cannot call operators of a package that is not there"
    program = trace(model, input, decompose=True, precision=precision, device=device)
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs={"aot_inductor.metadata": metadata}
    )


def load(path: Path, device: str) -> Callable[[Tensor], Tensor]:
    """The package as a function."""
    return torch._inductor.aoti_load_package(str(path))
