"""CUDA kernels: from a source in csrc/ and its constants to something that launches.

Compiled by nvcc and ninja where a toolkit is, else by the NVRTC of torch's wheels; both make a cubin, which the driver
loads. The sources include no header but their own, so that either needs nothing else.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from natrain import env
from natrain.jit import nvrtc
from natrain.jit.build import BuildError, BuildSpec, CompileFailed, build, run_ninja, source_root
from natrain.jit.driver import CudaKernel, driver_version, load_kernel

MIN_CAPABILITY = (7, 5)  # CUDA 13 compiles for nothing older
MIN_DRIVER = 12000  # the first whose API loads a library for all contexts at once
REMEDY = "pip install nvidia-cuda-nvrtc (torch's CUDA wheels bring it), or CUDA_HOME=DIR of a CUDA toolkit"
OTHER_COMPILER = "NATRAIN_NVCC=nvrtc (the compiler of torch's CUDA wheels), or NATRAIN_NVCC=PATH of another nvcc"
_FLAGS = ("-std=c++17",)


@functools.lru_cache
def find_nvcc() -> Path | None:
    """nvcc of NATRAIN_NVCC, CUDA_HOME, PATH or pip's packages; None without any, or if NATRAIN_NVCC is "nvrtc"."""
    if asked := env.read("NATRAIN_NVCC"):
        # Absolute, since it runs in the folder of a build.
        return None if asked == "nvrtc" else Path(shutil.which(asked) or asked).absolute()
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return Path(home) / "bin" / "nvcc"
    if found := shutil.which("nvcc"):
        return Path(found).absolute()
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    found = [path for root in roots for path in Path(root).glob("cu1[3-9]/bin/nvcc")]
    return max(found, default=None)


def arch_of(capability: tuple[int, int]) -> str:
    """``sm_90a`` for (9, 0): from Hopper on, the target that has the architecture's own instructions."""
    major, minor = capability
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def reasons_against(capability: tuple[int, int] | None) -> list[str]:
    """Why no CUDA kernel can be compiled for a device of ``capability`` here; empty when one can."""
    reasons = []
    if capability is not None and capability < MIN_CAPABILITY:
        reasons.append(f"capability {capability} (needs {MIN_CAPABILITY} or newer)")
    driver = driver_version()
    if driver is not None and driver < MIN_DRIVER:
        reasons.append(f"driver for CUDA {driver // 1000} (needs {MIN_DRIVER // 1000} or newer)")
    if find_nvcc() is None and not nvrtc.is_available():
        reasons.append(f"no CUDA compiler ({REMEDY})")
    return reasons


@dataclass(frozen=True)
class CudaToolchain:
    """Makes one cubin for ``arch``; which compiler made it is not part of the key."""

    arch: str
    name: str = "CUDA"
    artifact: str = "kernel.cubin"
    remedy: str = OTHER_COMPILER

    def target(self) -> str:
        return self.arch

    def identity(self) -> str:
        if nvcc := find_nvcc():
            return f"{nvcc} {_nvcc_version(nvcc)}"
        if not nvrtc.is_available():
            raise BuildError(f"no CUDA compiler: neither nvcc nor NVRTC. Try: {REMEDY}")
        return "NVRTC {}.{}".format(*nvrtc.version())

    def compile(self, spec: BuildSpec, folder: Path) -> None:
        (source,) = spec.copied_sources()
        options = [f"-arch={self.arch}", *spec.options()]
        if nvcc := find_nvcc():
            command = [str(nvcc), "-cubin", "-Xptxas", "-v", "-o", self.artifact, *options, source]
            return run_ninja(folder, [(self.artifact, [source], command)])
        options = [f"-I{folder / option[2:]}" if option.startswith("-I") else option for option in options]
        try:
            cubin = nvrtc.compile_cubin((folder / source).read_text(), source, options)
        except nvrtc.CompileError as error:
            # NVRTC has no command line; nvcc's is the same but for its name.
            command = shlex.join(["nvcc", "-cubin", "-o", self.artifact, f"-arch={self.arch}", *spec.options(), source])
            raise CompileFailed(command, str(error)) from None
        (folder / self.artifact).write_bytes(cubin)


@functools.lru_cache
def _nvcc_version(nvcc: Path) -> str:
    try:
        return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[-2]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise BuildError(f"{nvcc} does not run ({error}). Try: {OTHER_COMPILER}") from None


def kernel_spec(source: str, name: str, defines: Mapping[str, object], arch: str) -> BuildSpec:
    """What to compile: ``csrc/<source>`` with macros ``defines`` for ``arch``; ``name`` is its kernel's."""
    path = source_root() / source
    return BuildSpec(
        name=name,
        sources=(path,),
        include_dirs=(source_root() / "include", path.parent),
        defines=tuple((key, str(value)) for key, value in sorted(defines.items())),
        flags=_FLAGS,
        toolchain=CudaToolchain(arch),
    )


def build_all(specs: Iterable[BuildSpec]) -> list[Path]:
    """Compile several kernels side by side, as many at once as there are processors; needs no GPU.

    Raises:
        BuildError: the first that failed.
    """
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(build, specs))


def load(source: str, name: str, defines: Mapping[str, object], device: int) -> CudaKernel:
    """The kernel called ``name`` of ``csrc/<source>``, compiled if it was not yet, ready to launch on ``device``.

    Raises:
        BuildError: there is no compiler, or it refused the source.
        RuntimeError: called while a CUDA graph is captured, in which nothing can be loaded.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name} is not loaded yet, and nothing can be loaded while a CUDA graph is captured. "
            "Try: one call with the same shapes before the capture, to warm up"
        )
    arch = arch_of(torch.cuda.get_device_capability(device))
    return load_kernel(build(kernel_spec(source, name, defines, arch)), name)
