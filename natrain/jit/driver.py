"""Load cubins and launch their kernels through the CUDA driver API, by ctypes: no host code, no second CUDA runtime.

torch owns the context and the streams; this module only borrows them. A loaded library is context-independent
(``cuLibraryLoadData``), so one load serves every device of the process.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_Parameters = ctypes.c_char_p * 1
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: this thread has not yet touched the device
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_GRANTED_SHARED = 48 * 1024  # bytes of shared memory a block gets without asking
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_MOST_CONFIGS = 1024
_OVERLAP_DRIVER = 12030  # the first whose graphs know overlapping launches
_OVERLAP_CAPABILITY = (9, 0)


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id, 4 bytes of padding and a union of 64 bytes."""

    _fields_ = [("id", ctypes.c_uint), ("padding", ctypes.c_uint), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15)]


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    ]


# Shared by all launches, which only read it.
_OVERLAPPING = ctypes.pointer(_LaunchAttribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1))


@functools.lru_cache(maxsize=1)
def _cuda() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if hasattr(ctypes, "WinDLL") else "libcuda.so.1")


@functools.cache
def can_overlap(device: int) -> bool:
    """Whether a kernel may start on ``device`` (none: -1) before the one that it follows has ended."""
    if device < 0:
        return False
    version = driver_version()
    capability = torch.cuda.get_device_capability(device)
    return version is not None and version >= _OVERLAP_DRIVER and capability >= _OVERLAP_CAPABILITY


@functools.cache
def driver_version() -> int | None:
    """CUDA release the driver speaks, 13000 for 13.0; None without a driver."""
    version = ctypes.c_int()
    try:
        status = _cuda().cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return None if status else version.value


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _cuda().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what} failed: CUDA driver error {status} ({(text.value or b'unknown').decode()})")


class CudaKernel:
    """One ``extern "C"`` kernel whose only parameter is a struct, passed as packed bytes.

    Attributes:
        name: the kernel's name, as a profiler shows it.
    """

    def __init__(self, library: ctypes.c_void_p, name: str) -> None:
        self.name = name
        self._library = library
        self._handle = ctypes.c_void_p()
        # The kernel in a device's context, which a launch of the library's handle would have to find every time.
        self._functions: dict[int, ctypes.c_void_p] = {}
        self._largest_shared: dict[int, int] = {}
        # What launches so far differed in besides their arguments, as the driver takes it. Never changed once made, so
        # that threads may share it; making one takes as long as the rest of a launch.
        self._configs: dict[tuple, Any] = {}
        _check(_cuda().cuLibraryGetKernel(ctypes.byref(self._handle), library, name.encode()), f"finding kernel {name}")

    def launch(
        self, grid: int, block: int, arguments: bytes, device: int, shared_bytes: int = 0, overlaps: bool = False
    ) -> None:
        """Run ``grid`` blocks of ``block`` threads on torch's current stream of ``device``; nothing when grid is 0.

        ``arguments`` are the bytes of the kernel's struct. The driver copies them before it returns. ``shared_bytes``:
        dynamic shared memory of a block. ``overlaps``: it may start as soon as the kernel before it lets it (where
        ``can_overlap``), and waits itself for what that one writes (programmatic dependent launch, CUDA C++
        Programming Guide).

        Raises:
            RuntimeError: the driver refuses, for example because no block of that device has so much shared memory.
        """
        if not grid:
            return
        if device == torch._C._cuda_getDevice():
            self._launch(grid, block, arguments, device, shared_bytes, overlaps)
        else:
            with torch.cuda.device(device):
                self._launch(grid, block, arguments, device, shared_bytes, overlaps)

    def _launch(self, grid: int, block: int, arguments: bytes, device: int, shared_bytes: int, overlaps: bool) -> None:
        function = self._functions.get(device)
        if function is None:
            function = self._find_function(device)
        if shared_bytes > self._largest_shared.get(device, _GRANTED_SHARED):
            status = _in_context(device, _cuda().cuFuncSetAttribute, function, _MAX_DYNAMIC_SHARED, shared_bytes)
            _check(status, f"asking for {shared_bytes} bytes of shared memory for {self.name}")
            self._largest_shared[device] = shared_bytes
        stream = torch._C._cuda_getCurrentRawStream(device)
        key = grid, block, shared_bytes, stream, overlaps
        config = self._configs.get(key)
        if config is None:
            if len(self._configs) >= _MOST_CONFIGS:
                self._configs.clear()
            attributes = (_OVERLAPPING, 1) if overlaps else (None, 0)
            made = _LaunchConfig((grid, 1, 1), (block, 1, 1), shared_bytes, stream, *attributes)
            config = self._configs[key] = ctypes.byref(made)
        # One parameter: the address of the struct, which is that of the bytes.
        status = _in_context(device, _cuda().cuLaunchKernelEx, config, function, _Parameters(arguments), None)
        if status:
            _check(status, f"launching {self.name}")

    def _find_function(self, device: int) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        status = _in_context(device, _cuda().cuKernelGetFunction, ctypes.byref(function), self._handle)
        _check(status, f"loading {self.name} on device {device}")
        self._functions[device] = function
        return function


def _in_context(device: int, call: Callable[..., int], *arguments) -> int:
    """The status of a driver call that needs a context; this thread's, or torch's if it has none yet."""
    status = call(*arguments)
    if status == _NO_CONTEXT:
        _bind_context(device)
        status = call(*arguments)
    return status


def _bind_context(device: int) -> None:
    """Make torch's context of ``device`` current in this thread."""
    context, handle = ctypes.c_void_p(), ctypes.c_int()
    _check(_cuda().cuDeviceGet(ctypes.byref(handle), device), f"finding device {device}")
    _check(_cuda().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), f"taking the context of device {device}")
    _check(_cuda().cuCtxSetCurrent(context), f"binding the context of device {device}")


@functools.cache
def load_library(cubin: Path) -> ctypes.c_void_p:
    """Load a cubin once per process.

    Raises:
        RuntimeError: the driver refuses it, for example because it was compiled for another architecture.
    """
    torch.cuda.init()
    library = ctypes.c_void_p()
    image = cubin.read_bytes()
    _check(
        _cuda().cuLibraryLoadData(ctypes.byref(library), image, None, None, 0, None, None, 0),
        f"loading {cubin} (try natrain kernels clear, and where its compiler is newer than the driver "
        "NATRAIN_NVCC=nvrtc from then on)",
    )
    return library


def load_kernel(cubin: Path, name: str) -> CudaKernel:
    """The kernel called ``name`` in ``cubin``."""
    return CudaKernel(load_library(cubin), name)
