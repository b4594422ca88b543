"""Compile a CUDA source to a cubin with the NVRTC library out of torch's own wheels: no toolkit on the machine."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path


@functools.lru_cache(maxsize=1)
def find_nvrtc() -> Path | None:
    """The newest libnvrtc of the ``nvidia`` wheels beside torch, or None."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations) if spec and spec.submodule_search_locations else []
    found = [
        path
        for root in roots
        for pattern in ("cu1[0-9]/lib/libnvrtc.so.*", "cuda_nvrtc/lib/libnvrtc.so.*", "cu1[0-9]/bin/**/nvrtc64_*.dll")
        for path in Path(root).glob(pattern)
        if ".alt" not in path.name
    ]
    return max(found, key=lambda path: path.name) if found else None


@functools.lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL:
    path = find_nvrtc()
    if path is None:
        return ctypes.CDLL("libnvrtc.so")
    # NVRTC opens its builtins by bare name, which the loader finds only when they are loaded already.
    for builtins in path.parent.glob("*nvrtc-builtins*"):
        if ".alt" not in builtins.name:
            ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(path))


def is_available() -> bool:
    """Whether NVRTC can be loaded."""
    try:
        _nvrtc()
    except OSError:
        return False
    return True


@functools.lru_cache(maxsize=1)
def version() -> tuple[int, int]:
    """(major, minor) of the CUDA release NVRTC belongs to."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


class CompileError(RuntimeError):
    """NVRTC refused the source; the message is its log."""


def compile_cubin(source: str, name: str, options: Sequence[str]) -> bytes:
    """Machine code of ``source``.

    Args:
        source: the text of the translation unit; its includes are found through ``options``.
        name: what the log calls it.
        options: NVRTC's, for example ``["--gpu-architecture=sm_90a", "-I/path"]``.

    Raises:
        CompileError: with the compiler's log.
        OSError: there is no NVRTC.
    """
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    assert status == 0, f"nvrtcCreateProgram: {status}"
    try:
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
        if status:
            raise CompileError(_read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode())
        return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(size_of, read, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    read(program, buffer)
    return buffer.raw[: size.value]
