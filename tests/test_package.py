"""The wheel, installed away from the clone, holds everything and trains."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SHIPPED = ("natrain", "configs", "csrc")


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that what an earlier build left in the clone cannot slip in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SHIPPED:
        shutil.copytree(repository / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source], cwd=out)
    (built,) = out.glob("natrain-*.whl")
    return built


def run(command: list[str | Path], **options: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_package_configs_and_sources(wheel, repository):
    packed = set(zipfile.ZipFile(wheel).namelist())
    for name in SHIPPED:
        inside = "" if name == "natrain" else "natrain/"
        for path in (repository / name).rglob("*"):
            if (
                path.is_file()
                and "__pycache__" not in path.parts
                and (name != "natrain" or path.suffix in (".py", ".safetensors"))
            ):
                assert inside + path.relative_to(repository).as_posix() in packed


@pytest.mark.slow
def test_the_wheel_works_outside_the_clone(wheel, repository, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel])
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    where = run([sys.executable, "-c", "import natrain; print(natrain.__file__)"], cwd=work, env=environment)
    assert Path(where.strip()).is_relative_to(site)
    natrain = site / "bin" / "natrain"
    assert "dinat_s_tiny" in run([natrain, "models", "dinat_s*"], cwd=work, env=environment)
    words = ["model=nat_digits", "data=digits", "recipe=digits", "trainer.max_steps=2", "trainer.accelerator=cpu"]
    said = run([natrain, "train", *words, "name=two-steps"], cwd=work, env=environment)
    checkpoint = work / "runs" / "two-steps" / "checkpoints" / "best.ckpt"
    assert f"checkpoint={checkpoint}" in said
    assert "images: 360" in run([natrain, "eval", f"checkpoint={checkpoint}"], cwd=work, env=environment)
