"""Threads of a processor that computes: how many, and on which cores, so that a time says what it was taken on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from natrain.errors import invalid


def cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def threads_each(asked: int | None, word: str, processes: int = 1) -> int:
    """Threads of each of ``processes`` at once, no two on one core; by default torch's number, or their share of cores.

    Args:
        word: how the caller's threads are typed, ``"--threads "`` say.

    Raises:
        ValueError: there are fewer cores.
    """
    available = len(cores())
    if processes > available:
        raise invalid("devices", processes, f"at most {available}, the cores of this process", f"devices={available}")
    most = available // processes
    if asked is None:
        return min(most, torch.get_num_threads())
    if not 1 <= asked <= most:
        shared = "" if processes == 1 else f" ({available} cores for {processes} processes)"
        raise invalid(word.rstrip(" ="), asked, f"1 to {most}, a core for each{shared}", f"{word}{most}")
    return asked


@contextmanager
def pinned(threads: int, slot: int = 0) -> Iterator[None]:
    """Computes with so many threads on as many cores: those after the cores of the ``slot`` processes before it.

    Where the system cannot pin (macOS), only the number of threads is set.
    """
    before, own = cores(), cores()[slot * threads : (slot + 1) * threads]
    threads_before = torch.get_num_threads()
    _pin(own)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        _pin(before)
        torch.set_num_threads(threads_before)


def computing_on(device: str, asked: int | None, word: str) -> AbstractContextManager[None]:
    """``pinned`` on a CPU, see ``threads_each``; a GPU's times do not depend on it.

    Raises:
        ValueError: there are fewer cores, or a GPU computes.
    """
    if device != "cpu" and asked is not None:
        raise invalid(word.rstrip(" ="), asked, "no threads on a GPU", f"device=cpu {word}{asked}")
    return pinned(threads_each(asked, word)) if device == "cpu" else nullcontext()


def _pin(to: list[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, to)
