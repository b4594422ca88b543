"""The cache of compiled kernels: keys, locks, killed builds, failures, and folders that are not safe to load from."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from natrain import env, jit
from natrain.jit import cache, host

COMPILER = host.find_compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason=f"no C++ compiler: {host.REMEDY}")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A cache of this test alone."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("NATRAIN_CACHE", str(folder))
    return folder


def write_sources(folder: Path, body: str = "return VALUE + ADDED;") -> None:
    (folder / "include").mkdir(parents=True, exist_ok=True)
    (folder / "include" / "added.h").write_text("#define ADDED 1\n")
    visible = 'extern "C" __attribute__((visibility("default")))'
    (folder / "answer.cpp").write_text(f'#include "added.h"\n{visible} int answer() {{ {body} }}\n')


def make_spec(folder: Path, value: int = 41, level: str = "portable", flags: tuple[str, ...] = ()) -> jit.BuildSpec:
    return jit.BuildSpec(
        name="answer",
        sources=(folder / "answer.cpp",),
        include_dirs=(folder / "include",),
        defines=(("VALUE", str(value)),),
        flags=flags,
        toolchain=host.HostToolchain(level),
    )


def wrap_compiler(folder: Path, monkeypatch, before: str) -> Path:
    """Put a compiler in charge that notes every translation unit in the returned file and runs ``before`` first."""
    log, script = folder / "compiled", folder / "counting-compiler"
    compiles = f'case " $* " in *" -c "*) echo $$ >> {log}; {before};; esac'
    script.write_text(f'#!/bin/sh\n{compiles}\nexec {shlex.quote(COMPILER)} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("NATRAIN_CXX", str(script))
    return log


def start_build(folder: Path) -> subprocess.Popen:
    """A process, leader of its own group, that builds make_spec(folder) and prints the answer."""
    code = (
        "import ctypes, sys; from pathlib import Path; from tests.test_jit import make_spec; from natrain import jit\n"
        "print(ctypes.CDLL(str(jit.build(make_spec(Path(sys.argv[1]))))).answer())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        start_new_session=True,
    )


@needs_compiler
def test_builds_once_and_loads_without_a_compiler(home, tmp_path, monkeypatch):
    write_sources(tmp_path / "src")
    log = wrap_compiler(tmp_path, monkeypatch, "true")
    spec = make_spec(tmp_path / "src")
    assert jit.find_built(spec) is None
    artifact = jit.build(spec)
    assert ctypes.CDLL(str(artifact)).answer() == 42
    monkeypatch.setenv("NATRAIN_CXX", "/no/such/compiler")
    assert jit.build(spec) == jit.find_built(spec) == artifact
    assert len(log.read_text().split()) == 1
    (manifest,) = cache.entries()
    assert manifest["name"] == "answer" and manifest["folder"] == str(artifact.parent)
    assert COMPILER is not None and "counting-compiler" in manifest["compiler"]
    # The entry holds its own inputs, so what is loaded can be read.
    assert sorted(manifest["inputs"]) == ["inputs/include/added.h", "inputs/src/answer.cpp"]
    assert all((artifact.parent / name).is_file() for name in manifest["inputs"])


def test_key_holds_everything_that_changes_the_code_and_not_the_place(tmp_path):
    write_sources(tmp_path / "src")
    spec = make_spec(tmp_path / "src")
    shutil.copytree(tmp_path / "src", tmp_path / "elsewhere" / "src")
    assert make_spec(tmp_path / "elsewhere" / "src").key() == spec.key()
    changed = [
        make_spec(tmp_path / "src", value=40),
        make_spec(tmp_path / "src", level="avx2"),
        make_spec(tmp_path / "src", flags=("-O1",)),
        dataclasses.replace(spec, name="question"),
    ]
    keys = {spec.key(), *(other.key() for other in changed)}
    assert len(keys) == 1 + len(changed)
    (tmp_path / "src" / "include" / "added.h").write_text("#define ADDED 2\n")
    keys.add(spec.key())
    write_sources(tmp_path / "src", body="return 0;")
    keys.add(spec.key())
    assert len(keys) == 3 + len(changed)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("with_locks", [True, False])
def test_many_processes_at_once(home, tmp_path, monkeypatch, with_locks):
    """Eight share one build; where a file system has no locks every one builds and every one is right."""
    write_sources(tmp_path / "src")
    log = wrap_compiler(tmp_path, monkeypatch, "sleep 1")
    if not with_locks:
        (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['fcntl'] = None\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    processes = [start_build(tmp_path / "src") for _ in range(8 if with_locks else 3)]
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert out.strip() == "42", error
    if with_locks:
        assert len(log.read_text().split()) == 1
    assert len(cache.entries()) == 1
    assert not list(home.glob("*.part-*"))


@needs_compiler
@pytest.mark.slow
def test_kill_9_during_a_build_leaves_nothing_that_blocks_or_lies(home, tmp_path, monkeypatch):
    write_sources(tmp_path / "src")
    log = wrap_compiler(tmp_path, monkeypatch, "sleep 600")
    victim = start_build(tmp_path / "src")
    deadline_s = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert log.exists(), "the compiler never started"
    os.killpg(victim.pid, signal.SIGKILL)
    victim.communicate()
    assert list(home.glob("*.part-*")) and jit.find_built(make_spec(tmp_path / "src")) is None
    log.unlink()
    wrap_compiler(tmp_path, monkeypatch, "true")
    out, error = start_build(tmp_path / "src").communicate(timeout=60)
    assert out.strip() == "42", error
    assert not list(home.glob("*.part-*"))


@needs_compiler
def test_failed_build_says_what_to_type_and_fails_once(home, tmp_path, monkeypatch):
    write_sources(tmp_path / "src", body="return undeclared_thing;")
    log = wrap_compiler(tmp_path, monkeypatch, "true")
    spec = make_spec(tmp_path / "src")
    with pytest.raises(jit.BuildError) as first:
        jit.build(spec)
    message = str(first.value)
    assert "compiling answer failed" in message and "undeclared_thing" in message and "Try: " in message
    command = re.search(r"^To repeat it: (.*)$", message, re.M).group(1)
    repeated = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert repeated.returncode != 0 and "undeclared_thing" in repeated.stderr
    compiled = len(log.read_text().split())
    with pytest.raises(jit.BuildError, match="undeclared_thing"):
        jit.build(spec)
    assert len(log.read_text().split()) == compiled
    write_sources(tmp_path / "src")
    assert ctypes.CDLL(str(jit.build(spec))).answer() == 42


@needs_compiler
@pytest.mark.slow
def test_processes_that_wait_for_a_failing_build_fail_with_it(home, tmp_path, monkeypatch):
    write_sources(tmp_path / "src", body="return undeclared_thing;")
    log = wrap_compiler(tmp_path, monkeypatch, "sleep 3")
    processes = [start_build(tmp_path / "src") for _ in range(3)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert all("undeclared_thing" in error and "Try: " in error for error in errors)
    assert len(log.read_text().split()) < 3


def test_without_a_compiler_the_error_says_what_to_install(home, tmp_path, monkeypatch):
    write_sources(tmp_path / "src")
    monkeypatch.setenv("NATRAIN_CXX", "/no/such/compiler")
    asked = "NATRAIN_CXX='/no/such/compiler' is no program"
    with pytest.raises(jit.BuildError, match=rf"{asked}\. Try: install a C\+\+ compiler"):
        jit.build(make_spec(tmp_path / "src"))
    monkeypatch.delenv("NATRAIN_CXX")
    assert host.why_no_compiler() == "no C++ compiler (g++, clang++, c++ on PATH)"


@needs_compiler
def test_a_compiler_named_by_a_relative_path_builds(home, tmp_path, monkeypatch):
    write_sources(tmp_path)
    (tmp_path / "own").symlink_to(COMPILER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NATRAIN_CXX", "./own")
    assert jit.build(make_spec(tmp_path)).is_file()


@needs_compiler
def test_what_was_cut_off_after_it_was_built_is_named_with_the_remedy(home, tmp_path):
    write_sources(tmp_path)
    spec = make_spec(tmp_path)
    jit.build(spec).write_bytes(b"")
    with pytest.raises(jit.BuildError, match="answer is compiled but .*kernel.so.* Try: natrain kernels clear answer"):
        host.load(spec)
    assert cache.clear([spec.name]) == 1
    assert host.load(spec).answer() == 42


def test_the_openmp_runtime_is_found_under_a_path_with_spaces():
    library = "/home/me/two words/torch/lib/libgomp.so.1"
    lines = (
        f"7f00-7f01 r-xp 0 08:01 42    {library}",
        "7f02-7f03 rw-p 0 00:00 0",
        "7f04-7f05 r--p 0 08:01 7 /b (deleted)",
    )
    assert host._mapped_files("\n".join(lines)) == {library}


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o702])
def test_refuses_a_folder_that_others_can_write_to(home, mode):
    home.mkdir()
    home.chmod(mode)
    with pytest.raises(ValueError, match=r"NATRAIN_CACHE=.*nobody else may write.*Try: chmod 700"):
        cache.folder()


def test_a_folder_that_cannot_be_created_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder, reason in (("file", "File exists"), ("file/below", "Not a directory")):
        monkeypatch.setenv("NATRAIN_CACHE", str(tmp_path / folder))
        with pytest.raises(ValueError, match=f"^NATRAIN_CACHE='{tmp_path / folder}' .*{reason}.*Try: NATRAIN_CACHE="):
            cache.folder()


@needs_compiler
def test_a_folder_that_cannot_be_written_is_named_and_still_read(home, tmp_path):
    write_sources(tmp_path)
    artifact = jit.build(make_spec(tmp_path))
    shutil.rmtree(home / "locks")
    (home / "locks").write_text("where a folder would have to be")
    assert jit.build(make_spec(tmp_path)) == artifact
    with pytest.raises(jit.BuildError, match=f"^answer is not compiled yet, .* into {home}: .*Try: NATRAIN_CACHE=DIR"):
        jit.build(make_spec(tmp_path, value=1))


def test_creates_its_folder_for_its_owner_alone(home, monkeypatch):
    previous = os.umask(0)
    try:
        assert stat.S_IMODE(cache.folder().stat().st_mode) == 0o700
    finally:
        os.umask(previous)


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("NATRAIN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "natrain"


def test_unknown_level_is_named(monkeypatch):
    monkeypatch.setenv("NATRAIN_CPU_LEVEL", "avx3")
    with pytest.raises(ValueError, match="NATRAIN_CPU_LEVEL='avx3'.*avx512, avx2, portable"):
        host.cpu_level()


def test_environment_is_listed_and_small(repository, monkeypatch):
    listed = {variable.name for variable in env.VARIABLES}
    assert len(listed) <= 8
    files = [*(repository / "natrain").rglob("*.py"), *(repository / "scripts").glob("*")]
    used = re.compile(r"(?:environ(?:\.get)?|getenv|read)\W{1,3}[\"'](NATRAIN_\w+)|\$\{?(NATRAIN_\w+)")
    texts = [path.read_text() for path in files if path.is_file() and path.name != "env.py"]
    read = {name for text in texts for names in used.findall(text) for name in names if name}
    assert read and read <= listed
    monkeypatch.setenv("NATRAIN_CASHE", "x")
    assert env.misspelt()["NATRAIN_CASHE"] == "NATRAIN_CACHE"
