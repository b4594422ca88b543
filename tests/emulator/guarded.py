"""Tensors between forbidden pages: a kernel that reads or writes past their end, or before their begin, is killed."""

from __future__ import annotations

import ctypes
import math
import mmap

import torch

_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def guarded_like(x: torch.Tensor, *, at_end: bool) -> torch.Tensor:
    """A contiguous copy of ``x`` that ends, or begins, exactly at a page that nobody may touch."""
    size = x.numel() * x.element_size()
    pages = math.ceil(size / _PAGE)
    memory = mmap.mmap(-1, (pages + 2) * _PAGE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for forbidden in (begin, begin + (pages + 1) * _PAGE):
        if _libc.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(_PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = (pages + 1) * _PAGE - size if at_end else _PAGE
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape).copy_(x)
