"""C++ for this machine's processor: finding the compiler, its flags, and loading what it made beside torch's OpenMP."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from natrain import env
from natrain.errors import invalid
from natrain.jit.build import BuildError, BuildSpec, build, run_ninja

COMPILERS = ("g++", "clang++", "c++")
REMEDY = "install a C++ compiler (apt install g++; dnf install gcc-c++; xcode-select --install), or NATRAIN_CXX=PATH"

# Spelt out instead of -march=native: a home folder is shared by machines of one level, whatever else they differ in.
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt")
LEVELS = {
    "avx512": (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl"),
    "avx2": _AVX2,
    "portable": (),
}


def cpu_level() -> str:
    """The instructions to compile for: NATRAIN_CPU_LEVEL, else the best that torch finds on this processor.

    Raises:
        ValueError: NATRAIN_CPU_LEVEL is none of ``LEVELS``.
    """
    asked = env.read("NATRAIN_CPU_LEVEL")
    if asked is not None and asked not in LEVELS:
        raise invalid("NATRAIN_CPU_LEVEL", asked, f"one of {', '.join(LEVELS)}", "unset NATRAIN_CPU_LEVEL")
    return asked or {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "portable")


def find_compiler() -> str | None:
    """Absolute path of the C++ compiler, or None."""
    return _which((env.read("NATRAIN_CXX"),) if env.read("NATRAIN_CXX") else COMPILERS)


@functools.lru_cache
def _which(names: tuple[str, ...]) -> str | None:
    found = next(filter(None, map(shutil.which, names)), None)
    return found and os.path.abspath(found)  # it runs in the folder of a build


def why_no_compiler() -> str:
    """What ``find_compiler`` looked for in vain, in words."""
    asked = env.read("NATRAIN_CXX")
    return f"NATRAIN_CXX={asked!r} is no program" if asked else f"no C++ compiler ({', '.join(COMPILERS)} on PATH)"


@dataclass(frozen=True)
class HostToolchain:
    """Makes one shared object out of all translation units."""

    level: str
    name: str = "C++"
    artifact: str = "kernel.so"
    remedy: str = 'another compiler (NATRAIN_CXX=clang++), or the kernel without a build (kernel="reference")'

    def target(self) -> str:
        return " ".join((sys.platform, platform.machine(), self.level, *self._flags()))

    def _flags(self) -> tuple[str, ...]:
        numeric = ("-ffp-contract=fast", "-fno-trapping-math")
        return (*LEVELS[self.level], "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", *numeric, "-fopenmp")

    def identity(self) -> str:
        compiler = find_compiler()
        if compiler is None:
            raise BuildError(f"{why_no_compiler()}. Try: {REMEDY}")
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
        return f"{compiler}: {version}"

    def compile(self, spec: BuildSpec, folder: Path) -> None:
        identity = self.identity()
        compiler = identity.partition(":")[0]
        # gcc's OpenMP calls are left open: load() resolves them to the runtime that torch has already started, since a
        # second one would bring its own threads. clang's calls need clang's own runtime.
        open_mp = ["-fopenmp"] if "clang" in identity else []
        objects = [f"{Path(source).stem}.o" for source in spec.copied_sources()]
        steps = [
            (target, [source], [compiler, *self._flags(), *spec.options(), "-c", source, "-o", target])
            for target, source in zip(objects, spec.copied_sources(), strict=True)
        ]
        steps.append((self.artifact, objects, [compiler, "-shared", *open_mp, *objects, "-o", self.artifact]))
        run_ninja(folder, steps)


def load(spec: BuildSpec) -> ctypes.CDLL:
    """Build if need be, and load into this process.

    Raises:
        BuildError: it cannot be built, or what was built cannot be loaded (cut off, or made for another system).
    """
    artifact = build(spec)
    _share_openmp()
    try:
        return ctypes.CDLL(str(artifact))
    except OSError as error:
        raise BuildError(
            f"{spec.name} is compiled but cannot be loaded: {error}. Try: natrain kernels clear {spec.name}, "
            "or a NATRAIN_CACHE of its own for this machine"
        ) from None


@functools.lru_cache(maxsize=1)
def _share_openmp() -> None:
    """Let libraries loaded from now on find the OpenMP runtime that torch runs on."""
    maps = Path("/proc/self/maps")
    mapped = _mapped_files(maps.read_text()) if maps.is_file() else set()
    loaded = sorted(path for path in mapped if "libgomp" in path or "libiomp5" in path)
    torchs = [path for path in loaded if "/torch/" in path] or loaded or ["libgomp.so.1"]
    ctypes.CDLL(torchs[0], mode=ctypes.RTLD_GLOBAL)


def _mapped_files(maps: str) -> set[str]:
    """What is mapped, from the text of /proc/self/maps: lines of five columns, then a path, which may hold spaces."""
    lines = [line.split(maxsplit=5) for line in maps.splitlines()]
    return {line[5] for line in lines if len(line) == 6 and not line[5].endswith(" (deleted)")}
