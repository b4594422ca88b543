"""CUDA kernels on the CPU: csrc/*.cu compiled by g++, a block's threads as fibers, warp collectives and all.

``load`` and ``EmulatedKernel.launch`` have the interfaces of ``natrain.jit.cuda.load`` and of
``natrain.jit.driver.CudaKernel``, so that the host code of a kernel family runs unchanged on CPU tensors
(tests/emulator/README.md).
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from natrain.jit.build import BuildError, BuildSpec, CompileFailed, build, source_root
from natrain.jit.host import find_compiler

DEVICE_SOURCES = Path(__file__).resolve().parent / "device"
_FLAGS = (
    "-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=fast", "-fvisibility=hidden",
    "-U_FORTIFY_SOURCE", "-w", "-DNATRAIN_EMULATED",
)  # fmt: skip
# A misaligned vector access or an index past a register array is an error; runtime.cpp has the handlers.
_CHECKS = ("-fsanitize=alignment,bounds", "-fno-sanitize-recover=all")


class EmulationError(RuntimeError):
    """A kernel did what a GPU forbids or hangs on; says what, where, in which block and thread."""


@dataclass(frozen=True)
class EmulatorToolchain:
    """Makes one shared object of a kernel called ``kernel``, or of the runtime, that all kernels share."""

    kernel: str
    name: str = "CUDA on the CPU"
    artifact: str = "kernel.so"
    remedy: str = "the error is in the kernel, or in what tests/emulator/device lacks of CUDA"

    def target(self) -> str:
        return " ".join((self.kernel, *_FLAGS, *_CHECKS))

    def identity(self) -> str:
        compiler = find_compiler()
        if compiler is None:
            raise BuildError("the emulator needs a C++ compiler")
        return compiler

    def compile(self, spec: BuildSpec, folder: Path) -> None:
        (source,) = spec.copied_sources()
        text = f'#include "{source}"\n' + (f"EMULATOR_KERNEL({self.kernel})\n" if self.kernel else "")
        (folder / "unit.cpp").write_text(text)
        compiler, checks = self.identity(), _CHECKS if self.kernel else ()
        for command in (
            [compiler, *_FLAGS, *checks, *spec.options(), "-include", "cuda.h", "-c", "unit.cpp", "-o", "unit.o"],
            # Linked without the checks, which would ask for their own handlers.
            [compiler, "-shared", "unit.o", "-o", self.artifact],
        ):
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if result.returncode:
                raise CompileFailed(" ".join(command), result.stderr)


def kernel_spec(source: Path, name: str, defines: Mapping[str, object]) -> BuildSpec:
    """What to compile: the kernel called ``name`` of the file ``source`` with macros ``defines``."""
    return BuildSpec(
        name=f"emulated_{name or 'runtime'}",
        sources=(source,),
        include_dirs=(DEVICE_SOURCES, source_root() / "include", source.parent),
        defines=tuple((key, str(value)) for key, value in sorted(defines.items())),
        flags=(),
        toolchain=EmulatorToolchain(name),
    )


@functools.cache
def _runtime() -> ctypes.CDLL:
    # Global, so that kernels find it.
    runtime = ctypes.CDLL(str(build(kernel_spec(DEVICE_SOURCES / "runtime.cpp", "", {}))), mode=ctypes.RTLD_GLOBAL)
    pointer = ctypes.c_void_p
    runtime.emulator_launch.argtypes = [pointer] * 3 + [ctypes.c_uint] * 3 + [ctypes.c_char_p, ctypes.c_uint]
    runtime.emulator_launch.restype = ctypes.c_char_p
    return runtime


class EmulatedKernel:
    """One kernel whose only parameter is a struct, as ``natrain.jit.driver.CudaKernel``.

    Attributes:
        seed: 0 runs warps, lanes and blocks in order; another number draws the order from it, so that a missing barrier
            shows.
    """

    seed = 0

    def __init__(self, library: Path, name: str) -> None:
        self.name = name
        self._runtime = _runtime()
        self._library = ctypes.CDLL(str(library))
        self._entry = ctypes.cast(self._library.emulated_kernel, ctypes.c_void_p)
        for bound in (self._library.emulated_shared_begin, self._library.emulated_shared_end):
            bound.restype = ctypes.c_void_p
        self._shared = self._library.emulated_shared_begin(), self._library.emulated_shared_end()

    def launch(
        self, grid: int, block: int, arguments: bytes, device: int = -1, shared_bytes: int = 0, overlaps: bool = False
    ) -> None:
        """Run ``grid`` blocks of ``block`` threads with ``shared_bytes`` of dynamic shared memory, all NaN at first.

        Raises:
            EmulationError: the kernel cannot run like this on a GPU.
        """
        expected = self._library.emulated_argument_bytes()
        if len(arguments) != expected:
            raise EmulationError(f"{self.name}: {len(arguments)} bytes of arguments for a struct of {expected}")
        # Copied: the struct may need more alignment than Python's bytes have.
        copied = ctypes.create_string_buffer(arguments, len(arguments) + 16)
        error = self._runtime.emulator_launch(
            self._entry, *self._shared, grid, block, shared_bytes, ctypes.cast(copied, ctypes.c_char_p), self.seed
        )
        if error is not None:
            raise EmulationError(f"{self.name}: {error.decode()}")


@functools.cache
def _loaded(source: Path, name: str, defines: tuple[tuple[str, object], ...]) -> EmulatedKernel:
    return EmulatedKernel(build(kernel_spec(source, name, dict(defines))), name)


def load_file(source: Path, name: str, defines: Mapping[str, object] | None = None) -> EmulatedKernel:
    """The kernel called ``name`` of any .cu file."""
    return _loaded(source, name, tuple(sorted((defines or {}).items())))


def load(source: str, name: str, defines: Mapping[str, object], device: int = -1) -> EmulatedKernel:
    """As ``natrain.jit.cuda.load``: the kernel called ``name`` of ``csrc/<source>``."""
    return load_file(source_root() / source, name, defines)
