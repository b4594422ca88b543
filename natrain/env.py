"""Every environment variable natrain reads: name, default, meaning."""

from __future__ import annotations

import os
from dataclasses import dataclass

from natrain.errors import nearest


@dataclass(frozen=True)
class Variable:
    """``default`` is what an unset (or empty) variable means, in the words a reader needs."""

    name: str
    default: str
    meaning: str


VARIABLES = (
    Variable(
        "NATRAIN_CACHE",
        "$XDG_CACHE_HOME/natrain, else ~/.cache/natrain",
        "folder of compiled kernels; nobody but you may write to it",
    ),
    Variable("NATRAIN_CXX", "the first of g++, clang++, c++ on PATH", "C++ compiler of the cpu kernel"),
    Variable(
        "NATRAIN_CPU_LEVEL",
        "the best this processor has",
        "instructions of the cpu kernel: avx512, avx2 or portable",
    ),
    Variable("NATRAIN_DEBUG", "off", "any value: the command line shows tracebacks, as --traceback does"),
    Variable("NATRAIN_PYTHON", "the first python3 that is new enough", "interpreter of scripts/setup.sh"),
    Variable(
        "NATRAIN_NVCC",
        "nvcc of CUDA_HOME, PATH or pip's packages; without any, the NVRTC of torch's wheels",
        'nvcc of the CUDA kernels; "nvrtc" takes NVRTC even where there is a toolkit',
    ),
    Variable("NATRAIN_TEST_DATA", "shared/data beside the clone", "folder of real images that some tests read"),
)


def read(name: str) -> str | None:
    """The value of a variable of the list above; None when it is unset or empty."""
    assert any(variable.name == name for variable in VARIABLES), f"{name} is missing in natrain.env.VARIABLES"
    return os.environ.get(name) or None


def misspelt() -> dict[str, str | None]:
    """``NATRAIN_*`` variables of this process that natrain does not know, each with the nearest name it does."""
    known = [variable.name for variable in VARIABLES]
    return {name: nearest(name, known) for name in os.environ if name.startswith("NATRAIN_") and name not in known}
