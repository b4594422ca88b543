"""Fixtures of the tests of kernels: memory that shows what nobody wrote, compilers, torch's float32 precision."""

from __future__ import annotations

import subprocess

import pytest
import torch

from natrain.jit import cuda, nvrtc


@pytest.fixture
def nan_filled_memory():
    """Deterministic mode: uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tf32():
    """float32 products in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache of compiled kernels."""
    monkeypatch.setenv("NATRAIN_CACHE", str(tmp_path))


@pytest.fixture(params=["nvcc", "nvrtc"])
def compiler(request, monkeypatch):
    """Each way to compile CUDA; skips what the machine lacks."""
    cuda.find_nvcc.cache_clear()
    if request.param == "nvrtc":
        monkeypatch.setenv("NATRAIN_NVCC", "nvrtc")
        if not nvrtc.is_available():
            pytest.skip("no NVRTC: torch's CUDA wheels are not installed")
    elif cuda.find_nvcc() is None:
        pytest.skip("no nvcc: neither CUDA_HOME, PATH nor pip's packages have one")
    yield request.param
    cuda.find_nvcc.cache_clear()


@pytest.fixture
def ptxas_report(tmp_path):
    """A function: what ptxas says of a kernel's registers and spills, compiled for sm_90a from its BuildSpec."""
    nvcc = cuda.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: neither CUDA_HOME, PATH nor pip's packages have one")

    def report(spec) -> str:
        options = [*(f"-I{path}" for path in spec.include_dirs), *(f"-D{k}={v}" for k, v in spec.defines), *spec.flags]
        command = [nvcc, "-cubin", "-arch=sm_90a", "-Xptxas", "-v", "-o", tmp_path / "k.cubin", *options, *spec.sources]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr

    return report
