"""The emulator itself: fragments against numpy as the PTX manual draws them, and mistakes that must show."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.emulator.emulator import EmulatedKernel, EmulationError, load_file

KERNELS = Path(__file__).parent / "kernels"
LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4


def _launch(file: str, name: str, *arrays: np.ndarray, numbers: str = "", values=(), block=32, shared_bytes=0, seed=0):
    kernel = load_file(KERNELS / f"{file}.cu", name)
    arguments = struct.pack(f"{len(arrays)}Q{numbers}", *(array.ctypes.data for array in arrays), *values)
    if len(arguments) % 8:
        arguments += bytes(8 - len(arguments) % 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmulatedKernel, "seed", seed)
        kernel.launch(1, block, arguments, shared_bytes=shared_bytes)


def _words(matrix: np.ndarray) -> np.ndarray:
    """Pairs of 16-bit values along the last axis as 32-bit words, the first in the lower half."""
    return np.ascontiguousarray(matrix).view(np.uint32)


def _bits(x: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(16-bit patterns, values) of ``x`` rounded to ``dtype``."""
    rounded = torch.from_numpy(x).to(dtype)
    return rounded.view(torch.int16).numpy().view(np.uint16), rounded.double().numpy()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_products(dtype):
    rng = np.random.default_rng(0)
    (a_bits, a), (b_bits, b) = _bits(rng.normal(size=(16, 16)), dtype), _bits(rng.normal(size=(8, 16)), dtype)
    c = rng.normal(size=(16, 8)).astype(np.float32)
    a_words, b_words = _words(a_bits), _words(b_bits)  # [16, 8], [8 columns, 8]
    rows = [GROUP, GROUP + 8, GROUP, GROUP + 8]
    fragment_a = np.stack([a_words[row, MEMBER + 4 * (i // 2)] for i, row in enumerate(rows)], 1)
    fragment_b = np.stack([b_words[GROUP, MEMBER + 4 * i] for i in range(2)], 1)
    places = [(GROUP + 8 * (i // 2), 2 * MEMBER + i % 2) for i in range(4)]
    d = np.stack([c[place] for place in places], 1)
    _launch("fragments", f"product_{str(dtype)[6:]}", fragment_a.copy(), fragment_b.copy(), d)
    expected = c + a @ b.T
    for i, place in enumerate(places):
        np.testing.assert_allclose(d[:, i], expected[place], rtol=1e-5, atol=1e-5)


def test_tf32_products():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(16, 8)).astype(np.float32), rng.normal(size=(8, 8)).astype(np.float32)
    c = rng.normal(size=(16, 8)).astype(np.float32)
    rows = [GROUP, GROUP + 8, GROUP, GROUP + 8]
    fragment_a = np.stack([a[row, MEMBER + 4 * (i // 2)] for i, row in enumerate(rows)], 1)
    fragment_b = np.stack([b[MEMBER + 4 * i, GROUP] for i in range(2)], 1)
    places = [(GROUP + 8 * (i // 2), 2 * MEMBER + i % 2) for i in range(4)]
    d = np.stack([c[place] for place in places], 1)
    _launch("fragments", "product_tf32", fragment_a, fragment_b, d)
    # The tensor core reads 10 bits of mantissa.
    cut = [(x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64) for x in (a, b)]
    for i, place in enumerate(places):
        np.testing.assert_allclose(d[:, i], (c + cut[0] @ cut[1])[place], rtol=1e-5, atol=1e-5)


def test_matrix_loads():
    rows = np.arange(256, dtype=np.uint16).reshape(32, 8)
    registers = np.zeros((4, 32, 4), np.uint32)
    _launch("fragments", "load_matrices", rows, registers, shared_bytes=512)
    for matrix in range(4):
        m = rows[8 * matrix : 8 * matrix + 8]
        plain, transposed = _words(m)[GROUP, MEMBER], _words(m.T)[GROUP, MEMBER]
        assert (registers[0, :, matrix] == plain).all() and (registers[1, :, matrix] == transposed).all()
        if matrix < 2:
            assert (registers[2, :, matrix] == plain).all() and (registers[3, :, matrix] == transposed).all()


def test_conversions_are_those_of_torch():
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.normal(size=4000) * 10.0 ** rng.integers(-9, 6, 4000), [0, -0.0, 65519.9, 65520, np.inf]])
    halfway = (np.arange(1, 60000, 7) + 0.5) * 2.0**-24
    x = np.concatenate([x, halfway, -halfway, 1 + (np.arange(2050) + 0.5) / 1024]).astype(np.float32)
    to = np.zeros((4, len(x)), np.uint32)
    _launch("fragments", "convert", x, to, numbers="i", values=(len(x),))
    for row, dtype in enumerate((torch.float16, torch.bfloat16)):
        assert (to[row] == torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)).all()
    assert (to[3].view(np.float32) == torch.from_numpy(x).half().float().numpy()).all()
    finite = np.isfinite(x)
    spacing = 2.0 ** (np.floor(np.log2(np.abs(x[finite]) + 1e-38)) - 10)
    tf32 = to[2].view(np.float32)[finite]
    assert (np.abs(tf32 - x[finite]) <= spacing / 2).all() and not (to[2] & 0x1FFF).any()


def _reverse(name: str, seed: int = 0, shared_bytes: int = 512) -> np.ndarray:
    """What kernel ``name`` of mistakes.cu makes of 0 .. 127, turned round."""
    # numpy aligns to 16 bytes.
    x, out = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
    _launch("mistakes", name, x, out, block=128, shared_bytes=shared_bytes, seed=seed)
    return out[::-1]


@pytest.mark.parametrize("seed", range(4))
def test_a_correct_kernel_runs_in_any_order(seed):
    assert (_reverse("correct", seed) == np.arange(128)).all()


@pytest.mark.parametrize("name", ["without_barrier", "without_wait"])
def test_what_is_not_waited_for_is_nan(name):
    assert np.isnan(_reverse(name)).any()


def test_static_shared_memory_begins_as_nan():
    reversed_out = _reverse("static_shared")
    assert np.isnan(reversed_out[5]) and np.isfinite(np.delete(reversed_out, 5)).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lanes_end_early", r"(?s)deadlock in block 0.*__shfl_xor_sync at .*mistakes.cu:\d+.*has ended"),
        ("lanes_part", r"(?s)deadlock in block 0.*__syncthreads at .*mistakes.cu:\d+"),
        ("past_the_end", "past the end of its 512 bytes"),
        ("copy_past_the_end", r"cp_async_16: writes at 512 of 512 bytes"),
        ("misaligned", r"mistakes.cu:\d+.*not aligned"),
        ("outside_an_array", r"mistakes.cu:\d+.*index 4 is outside its array"),
    ],
)
def test_mistakes_are_errors_with_a_place(name, message):
    with pytest.raises(EmulationError, match=message):
        _reverse(name)
    assert (_reverse("correct") == np.arange(128)).all()


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
def test_whoever_leaves_a_guarded_tensor_is_killed(at_end):
    code = f"""
import ctypes, torch
from tests.emulator.guarded import guarded_like
x = guarded_like(torch.arange(40.0), at_end={at_end})
at = x.data_ptr()
assert ctypes.c_float.from_address(at).value == 0 and ctypes.c_float.from_address(at + 4 * 39).value == 39
print("inside", flush=True)
ctypes.c_float.from_address({"at + 4 * 40" if at_end else "at - 4"}).value
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=KERNELS.parents[2])
    assert result.stdout == "inside\n" and result.returncode == -signal.SIGSEGV, result.stderr
