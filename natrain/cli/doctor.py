"""Say what natrain finds on this machine: versions, devices, compilers, and which kernels work here and why not."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "torchvision", "timm", "lightning", "hydra-core", "omegaconf", "numpy", "pillow")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> int:
    import natrain

    _show("natrain", f"{natrain.__version__} in {os.path.dirname(natrain.__file__)}")
    _show("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        _show(package, _version(package))
    _devices()
    _compilers()
    _environment()
    print("\nkernels, for the first stage of nat_tiny at 224 pixels in training")
    _kernels()
    return 0


def _show(title: str, value: object) -> None:
    print(f"{title:12} {value}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return f"not installed (pip install {package})"


def _devices() -> None:
    import torch

    from natrain.jit.host import cpu_level

    _show("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, instructions {cpu_level()}")
    if not torch.cuda.is_available():
        _show("cuda", f"no device (torch was built for CUDA {torch.version.cuda or 'none'})")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"{device.major}.{device.minor}"
        _show(f"cuda:{index}", f"{device.name}, capability {capability}, {device.total_memory / 2**30:.0f} GiB")


def _compilers() -> None:
    from natrain.jit import cache
    from natrain.jit.cuda import find_nvcc
    from natrain.jit.host import find_compiler
    from natrain.jit.nvrtc import find_nvrtc

    _show("C++", find_compiler() or "not found (apt install g++)")
    _show("nvcc", find_nvcc() or "not found; NVRTC serves in its place")
    _show("NVRTC", find_nvrtc() or "not found")
    try:
        found = f"{cache.folder()} holds {len(cache.entries())} compiled kernels"
    except ValueError as error:
        found = str(error)
    _show("cache", found)


def _environment() -> None:
    from natrain import env

    for variable in env.VARIABLES:
        if (value := env.read(variable.name)) is not None:
            _show(variable.name, f"{value}  ({variable.meaning})")
    for name, nearest in env.misspelt().items():
        _show(name, f"unknown{f', did you mean {nearest}?' if nearest else ''}")


def _kernels() -> None:
    import torch

    from natrain.ops import explain

    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        for dtype in (torch.float32, torch.bfloat16):
            q = torch.empty(1, 56, 56, 2, 32, device=device, dtype=dtype, requires_grad=True)
            rpb = torch.empty(2, 13, 13, device=device, requires_grad=True)
            print(explain(q, q, q, 7, rpb=rpb))
