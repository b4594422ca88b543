"""The folder of compiled kernels: one sub-folder an artifact, complete as soon as it exists.

An entry is built under another name and renamed into place with its manifest inside, so that a reader never sees half
of one, also where file locks do not work. The lock only keeps processes from doing the same work twice; the kernel
drops it when its owner dies, however it dies.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from natrain import env
from natrain.errors import invalid

MANIFEST = "manifest.json"
FAILED = ".failed"


def folder() -> Path:
    """The cache's root, created if need be.

    Raises:
        ValueError: it cannot be made, or somebody else owns it or may write to it: what lies in it is loaded as code.
    """
    named = env.read("NATRAIN_CACHE")
    try:
        root = Path(named or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "natrain").absolute()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home folder
        allowed = f"a folder that is there or can be made ({error})"
        raise invalid("NATRAIN_CACHE", named, allowed, "NATRAIN_CACHE=/tmp/natrain-own before the command") from None
    if sys.platform != "win32":
        status = root.stat()
        if status.st_uid not in (os.geteuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise invalid(
                "NATRAIN_CACHE",
                str(root),
                "a folder that you own and nobody else may write to, since compiled code is loaded from it",
                f"chmod 700 {root}, or NATRAIN_CACHE=$HOME/.cache/natrain-own",
            )
    return root


def is_complete(entry: Path) -> bool:
    return (entry / MANIFEST).is_file()


def entries() -> list[dict]:
    """The manifests of everything compiled so far, by name, each with its ``folder``."""
    found = [path.parent for path in folder().glob(f"*/{MANIFEST}")]
    return [{"folder": str(entry), **json.loads((entry / MANIFEST).read_text())} for entry in sorted(found)]


@contextmanager
def locked(entry: Path) -> Iterator[None]:
    """Hold the entry's lock; where the file system has no locks, go on without."""
    locks = entry.parent / "locks"
    locks.mkdir(mode=0o700, exist_ok=True)
    with open(locks / entry.name, "w") as lock:
        _flock(lock.fileno())
        yield


def _flock(descriptor: int) -> None:
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except (ImportError, OSError):
        # No lock: two processes may compile the same kernel, and the first rename wins.
        pass


def new_folder(entry: Path) -> Path:
    """An empty folder beside ``entry`` to build in."""
    part = entry.with_name(f"{entry.name}.part-{os.uname().nodename}-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(mode=0o700)
    return part


def publish(part: Path, entry: Path, manifest: dict) -> None:
    """Make a built folder the entry; when another process was first, keep its."""
    (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
    if entry.is_dir() and not is_complete(entry):
        shutil.rmtree(entry)
    try:
        part.rename(entry)
    except OSError:
        if not is_complete(entry):
            raise
        shutil.rmtree(part)


def remove_leftovers(entry: Path) -> None:
    """Delete what killed builds of this entry on this machine left."""
    for part in entry.parent.glob(f"{entry.name}.part-{os.uname().nodename}-*"):
        if not _is_alive(int(part.name.rpartition("-")[2])):
            shutil.rmtree(part, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def clear(names: Iterable[str] = ()) -> int:
    """Delete every entry, failed builds included, or those whose folder begins with one of ``names``; how many.

    Each leaves its place in one step, so that another process finds it whole or not at all, and compiles it again.
    """
    root, wanted = folder(), tuple(names)
    found = [path.parent for path in root.glob(f"*/{MANIFEST}")] + list(root.glob(f"*{FAILED}"))
    found = [entry for entry in found if not wanted or entry.name.startswith(wanted)]
    for entry in found:
        gone = new_folder(entry)
        entry.rename(gone)
        shutil.rmtree(gone)
    return len(found)
