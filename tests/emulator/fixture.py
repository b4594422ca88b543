"""Run CUDA kernel families on CPU tensors, as a context manager or a fixture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

from natrain.jit import cuda
from natrain.ops import registry
from tests.emulator import emulator


@contextmanager
def emulated(*kernels: registry.Kernel, seed: int = 0) -> Iterator[None]:
    """Let ``kernels`` accept CPU tensors, and their launches go to the emulator.

    Kernels and plans are kept per device number, which is -1 for the CPU: what was loaded here never meets a GPU.
    ``seed``: see ``EmulatedKernel``.
    """
    with mock.patch.object(cuda, "load", emulator.load), mock.patch.object(emulator.EmulatedKernel, "seed", seed):
        with mock.patch.object(cuda, "reasons_against", lambda capability: []):
            patches = [
                mock.patch.object(kernel, "limits", replace(kernel.limits, devices=kernel.limits.devices | {"cpu"}))
                for kernel in kernels
            ]
            for patch in patches:
                patch.start()
            registry._choose_cached.cache_clear()
            try:
                yield
            finally:
                for patch in patches:
                    patch.stop()
                registry._choose_cached.cache_clear()
