"""Say what natrain finds on this machine: versions, devices, compilers, and which kernels work here and why not."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "torchvision", "timm", "lightning", "hydra-core", "omegaconf", "numpy", "pillow")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> int:
    import torch

    import natrain

    print(f"natrain     {natrain.__version__} in {os.path.dirname(natrain.__file__)}")
    print(f"python      {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        print(f"{package:11} {_version(package)}")
    print(f"cores       {len(os.sched_getaffinity(0))} for this process, torch uses {torch.get_num_threads()} threads")
    print(f"CUDA        {_cuda()}")
    for name in ("c++", "nvcc", "ninja"):
        print(f"{name:11} {shutil.which(name) or 'not found'}")
    print("\nkernels")
    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        for dtype in (torch.float32, torch.bfloat16):
            print(_kernels(device, dtype))
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"no device (torch was built for CUDA {torch.version.cuda or 'none'})"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(names)}"


def _kernels(device: str, dtype) -> str:
    """Every kernel's verdict on training NAT's first stage at 224 pixels: 56x56 tokens, kernel 7, 2 heads of 32."""
    import torch

    from natrain.ops import explain

    q = torch.empty(1, 56, 56, 2, 32, device=device, dtype=dtype, requires_grad=True)
    rpb = torch.empty(2, 13, 13, device=device, requires_grad=True)
    return str(explain(q, q, q, 7, rpb=rpb))
