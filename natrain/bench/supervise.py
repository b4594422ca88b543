"""Processes that measure: one sweep a folder, none outlives the command that started it, a crash does not end it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from natrain.errors import invalid

_WAIT_S = 5.0  # for the processes of a killed sweep to be gone
_PR_SET_PDEATHSIG = 1


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """The folder for this process and those that it gives the descriptor to, until the last of them has ended.

    Raises:
        ValueError: another sweep is at work in it, or it cannot be written to.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise invalid("out", str(folder), f"a folder that can be made and written to ({error})", "out=NEW") from None
    try:
        deadline = time.monotonic() + _WAIT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = os.pread(descriptor, 20, 0).decode()
                    allowed = f"a folder that no other process measures into (now: process {holder})"
                    raise invalid("out", str(folder), allowed, "out=NEW, or wait for it") from None
                time.sleep(0.05)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def die_with(parent: int) -> None:
    """Ends this process as soon as ``parent``, which started it, ends in whatever way; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def crash_of(code: int) -> str | None:
    """How a process crashed, by its exit code; None where it ended by itself or was asked to end."""
    asked = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return None if code >= 0 or -code in asked else signal.Signals(-code).name
