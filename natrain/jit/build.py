"""One compiled artifact from a spec: key, lock, ninja, and an error that says what to type."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from natrain.jit import cache

logger = logging.getLogger(__name__)

INPUTS = "inputs"
_LOG = "log.txt"
_LOG_LINES = 25


class BuildError(RuntimeError):
    """A kernel could not be compiled; says what failed, how to repeat it, the compiler's last lines, what to type."""


class CompileFailed(Exception):
    """Raised by a toolchain: ``command`` repeats the failure inside the build's folder, ``log`` is what it printed."""

    def __init__(self, command: str, log: str) -> None:
        super().__init__(command)
        self.command, self.log = command, log


class Toolchain(Protocol):
    """How to compile. ``target`` is part of the key; the compiler is not, so that loading needs none."""

    name: str
    artifact: str  # file name of the result
    remedy: str  # what to type when a build fails

    def target(self) -> str:
        """What the machine code is for, and the flags that follow from it: processor features, sm_90a."""

    def identity(self) -> str:
        """Path and version of the compiler, for the manifest. Raises BuildError where there is none."""

    def compile(self, spec: BuildSpec, folder: Path) -> None:
        """Make ``folder / artifact`` from the copied sources. Raises CompileFailed."""


@dataclass(frozen=True)
class BuildSpec:
    """What to compile. ``sources`` are the translation units; ``include_dirs`` may hold nothing but headers and them.

    The key is the hash of all of this, of every file in ``include_dirs``, and of the toolchain's target: never of the
    place where natrain is installed.
    """

    name: str  # readable: the folder's name begins with it
    sources: tuple[Path, ...]
    include_dirs: tuple[Path, ...]
    defines: tuple[tuple[str, str], ...]
    flags: tuple[str, ...]
    toolchain: Toolchain

    def inputs(self) -> dict[str, Path]:
        """Every file the compiler can read, by its path inside the entry's folder."""
        files: dict[str, Path] = {}
        for directory in self.include_dirs:
            for path in sorted(directory.rglob("*")):
                if path.is_file():
                    files[f"{INPUTS}/{directory.name}/{path.relative_to(directory)}"] = path
        for path in self.sources:
            files.setdefault(f"{INPUTS}/{path.parent.name}/{path.name}", path)
        return files

    def key(self) -> str:
        digest = hashlib.sha256()
        for part in (self.name, *map(str, self.options()), self.toolchain.name, self.toolchain.target()):
            digest.update(part.encode() + b"\0")
        for name, path in self.inputs().items():
            content = path.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def options(self) -> list[str]:
        """Include folders (relative to the entry's folder), defines and flags, as gcc, nvcc and NVRTC spell them."""
        return [
            *(f"-I{INPUTS}/{directory.name}" for directory in self.include_dirs),
            *(f"-D{name}={value}" for name, value in self.defines),
            *self.flags,
        ]

    def copied_sources(self) -> list[str]:
        """The translation units, relative to the entry's folder."""
        return [f"{INPUTS}/{path.parent.name}/{path.name}" for path in self.sources]


def source_root() -> Path:
    """The folder csrc/: inside the installed package, or beside it in a clone."""
    package = Path(__file__).resolve().parents[1]
    return package / "csrc" if (package / "csrc").is_dir() else package.parent / "csrc"


def _entry(spec: BuildSpec) -> Path:
    return cache.folder() / f"{spec.name}-{spec.key()[:20]}"


def find_built(spec: BuildSpec) -> Path | None:
    """The artifact if it is compiled already; needs no compiler."""
    entry = _entry(spec)
    return entry / spec.toolchain.artifact if cache.is_complete(entry) else None


# A failed build is not tried again by the process that saw it fail.
_failures: dict[Path, BuildError] = {}


def build(spec: BuildSpec) -> Path:
    """The compiled artifact, compiled now if it was not yet; other processes that need it wait for this one.

    Raises:
        BuildError: there is no compiler, or it failed. The same error again without another try in this process, and
            in processes that waited for this one. Or the cache folder cannot be written.
        ValueError: the cache folder cannot be created, or is not safe to load code from.
    """
    entry = _entry(spec)
    artifact = entry / spec.toolchain.artifact
    if cache.is_complete(entry):
        return artifact
    if entry in _failures:
        raise _failures[entry]
    try:
        _build_once(spec, entry, asked_at_s=time.time())
    except BuildError as error:
        _failures[entry] = error
        raise
    except OSError as error:
        raise BuildError(
            f"{spec.name} is not compiled yet, and cannot be compiled into {entry.parent}: {error}. "
            "Try: NATRAIN_CACHE=DIR of a folder that can be written and has room"
        ) from None
    return artifact


def _build_once(spec: BuildSpec, entry: Path, asked_at_s: float) -> None:
    with cache.locked(entry):
        if not cache.is_complete(entry):
            _raise_if_failed_since(entry, asked_at_s)
            _compile(spec, entry)


def _raise_if_failed_since(entry: Path, asked_at_s: float) -> None:
    message = entry.with_name(entry.name + cache.FAILED) / _LOG
    if message.is_file() and message.stat().st_mtime >= asked_at_s:
        raise BuildError(message.read_text())


def _compile(spec: BuildSpec, entry: Path) -> None:
    compiler = spec.toolchain.identity()
    cache.remove_leftovers(entry)
    part = cache.new_folder(entry)
    inputs = spec.inputs()
    for name, path in inputs.items():
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, part / name)
    logger.info("compiling %s with %s (once; kept in %s)", spec.name, spec.toolchain.name, entry)
    started_s = time.perf_counter()
    try:
        spec.toolchain.compile(spec, part)
    except CompileFailed as failure:
        raise _failed(spec, entry, part, compiler, failure) from None
    manifest = {
        "name": spec.name,
        "artifact": spec.toolchain.artifact,
        "toolchain": spec.toolchain.name,
        "target": spec.toolchain.target(),
        "options": spec.options(),
        "compiler": compiler,
        "inputs": list(inputs),
        "build_s": round(time.perf_counter() - started_s, 2),
    }
    cache.publish(part, entry, manifest)


def _failed(spec: BuildSpec, entry: Path, part: Path, compiler: str, failure: CompileFailed) -> BuildError:
    """Keep the folder of a failed build, so that its command can be repeated, and say how."""
    kept = entry.with_name(entry.name + cache.FAILED)
    shutil.rmtree(kept, ignore_errors=True)
    part.rename(kept)
    message = "\n".join(
        [
            f"compiling {spec.name} failed ({compiler}).",
            f"To repeat it: cd {shlex.quote(str(kept))} && {failure.command}",
            "The compiler's last lines:",
            *("  " + line for line in failure.log.strip().splitlines()[-_LOG_LINES:]),
            f"Try: {spec.toolchain.remedy}",
        ]
    )
    (kept / _LOG).write_text(message)
    return BuildError(message)


def run_ninja(folder: Path, steps: Sequence[tuple[str, Sequence[str], Sequence[str]]]) -> None:
    """Run compile steps ``(output, inputs, command)`` inside ``folder`` by ninja, in parallel where they allow it.

    Raises:
        CompileFailed: a command failed, or there is no ninja.
    """
    lines = ["rule run", "  command = $run", "  description = $out"]
    for output, inputs, command in steps:
        lines += [f"build {output}: run {' '.join(inputs)}", f"  run = {shlex.join(command).replace('$', '$$')}"]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    try:
        result = subprocess.run([_ninja()], cwd=folder, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise CompileFailed("ninja", f"{error}\nninja is missing: pip install ninja") from None
    if result.returncode:
        failed = next((c for o, _, c in steps if f"FAILED: {o}" in result.stdout.replace("[code=1] ", "")), None)
        raise CompileFailed(shlex.join(failed) if failed else "ninja", result.stdout + result.stderr)


def _ninja() -> str:
    """ninja of the pip package, else of PATH."""
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        return "ninja"
