"""What the README shows runs, and its table is the registry's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from natrain.cli.kernels import kernel_table
from tests.data.helpers import write_folder

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
# Two steps of a small model on small images stand for the training that the README shows.
SMALL = (
    "model=nat_cifar data.img_size=32 global_batch=4 data.workers=0 schedule.warmup_epochs=0 trainer.max_steps=2 "
    "trainer.accelerator=cpu"
)


def environment() -> dict[str, str]:
    """This interpreter's commands first; nothing of the pytest that runs this."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "COV_"))}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def bash(command: str, folder: Path) -> str:
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def commands() -> list[str]:
    return [line for language, block in BLOCKS if language == "bash" for line in block.splitlines() if line.strip()]


def test_every_block_is_of_a_kind_that_is_run():
    assert {language for language, _ in BLOCKS} == {"bash", "python"}
    assert all(line.startswith(("natrain ", "bash scripts/")) for line in commands())


@pytest.mark.slow
def test_the_commands_run_in_order(tmp_path):
    write_folder(tmp_path / "images")
    image = next((tmp_path / "images" / "val").rglob("*.jpg"))
    said = ""
    for line in commands():
        if line.startswith("natrain "):
            line = line.replace("DIR", str(tmp_path / "images")).replace("IMAGE", str(image))
            said += bash(f"{line} {SMALL}" if line.startswith("natrain train") else line, tmp_path)
    for produced in ("config.yaml", "metrics.csv", "curves.png", "checkpoints/best.ckpt"):
        assert (tmp_path / "runs" / "first" / produced).is_file()
    assert "images: 6" in said
    assert {"cat", "dog"} <= set(said.split())


@pytest.mark.slow
def test_the_two_scripts_run(repository, tmp_path):
    if not list((repository / ".venv").glob("natrain-*")):
        pytest.skip("needs the .venv that scripts/test.sh makes; making another one takes minutes")
    scripts = [line.partition("#")[0].strip() for line in commands() if line.startswith("bash ")]
    assert scripts == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]
    begin_s = time.monotonic()
    said = bash(f"{scripts[0]} trainer.accelerator=cpu run_dir={tmp_path}/run", repository)
    assert time.monotonic() - begin_s < 180
    assert float(re.search(r"^accuracy: top-1 ([\d.]+) %", said, re.M)[1]) >= 97
    evaluate = re.search(r"^evaluate: (.*)$", said, re.M)[1]
    assert "images: 360" in bash(evaluate, tmp_path)
    assert (
        bash(f"{scripts[1]} -q -n 0 tests/test_imports.py -k downward", repository)
        .splitlines()[-1]
        .startswith("1 passed")
    )
    nothing = subprocess.run(
        ["bash", "scripts/test.sh", "-n", "0", "tests/test_imports.py", "-k", "no_such_test"],
        cwd=repository,
        env=environment(),
        capture_output=True,
    )
    assert nothing.returncode != 0


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "python"])
def test_the_python_blocks_run(block, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_table_of_kernels_is_the_registrys():
    shown = re.search(r"<!-- kernels: .*? -->\n(.*?)\n<!-- end of kernels -->", README, re.S)[1]
    assert shown == kernel_table(), (
        f"replace the table in README.md by the output of `natrain kernels`:\n{kernel_table()}"
    )


def test_the_files_it_names_exist(repository):
    for name in re.findall(r"`((?:configs|docs|natrain|tests|scripts)/[\w./]*)`", README):
        assert (repository / name).exists(), name
