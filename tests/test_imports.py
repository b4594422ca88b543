"""Imports go only downward: a room may import the rooms below it, never one above or beside it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOMS = [
    {"errors"},
    {"env"},
    {"jit"},
    {"ops"},
    {"layers"},
    {"models"},
    {"data", "compat", "viz", "export"},
    {"training"},
    {"bench"},
    {"report"},
    {"cli"},
]
HEIGHT = {room: height for height, rooms in enumerate(ROOMS) for room in rooms}
# The package itself offers the operators and registers the models; ``python -m natrain`` is the command line.
DOORS = {"__init__": HEIGHT["models"], "__main__": HEIGHT["cli"]}


def room_of(path: Path, package: Path) -> str:
    first = path.relative_to(package).parts[0]
    return first.removesuffix(".py")


def imported_modules(source: str) -> set[str]:
    """Every module name that an import statement mentions, also inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test and readers see the room"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def violations(path: Path, package: Path, source: str) -> list[str]:
    room = room_of(path, package)
    height = DOORS.get(room, HEIGHT.get(room))
    assert height is not None, f"{room} is a new room: give it a place in ROOMS"
    wrong = []
    for module in imported_modules(source):
        parts = module.split(".")
        if parts[0] != package.name or len(parts) < 2 or parts[1] not in HEIGHT or parts[1] == room:
            continue
        if HEIGHT[parts[1]] > height or (HEIGHT[parts[1]] == height and room not in DOORS):
            wrong.append(f"{path.relative_to(package)} imports {module}")
    return wrong


def test_imports_go_downward(repository):
    package = repository / "natrain"
    found = [
        violation
        for path in sorted(package.rglob("*.py"))
        if "configs" not in path.parts
        for violation in violations(path, package, path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "is_wrong"),
    [
        ("ops/registry.py", "from natrain.models import nat", True),
        ("data/loader.py", "def f():\n    import natrain.training.run", True),
        ("training/run.py", "from natrain import cli", True),
        ("errors.py", "from natrain.env import NAME", True),
        ("training/run.py", "from natrain.data import build_datamodule", False),
        ("ops/registry.py", "from natrain.ops.problem import Problem\nimport natrain", False),
        ("__init__.py", "from natrain.models import list_models", False),
        ("__init__.py", "from natrain.training import train", True),
    ],
)
def test_the_check_itself(repository, file, source, is_wrong):
    package = repository / "natrain"
    assert bool(violations(package / file, package, source)) is is_wrong


def test_help_imports_neither_hydra_nor_lightning(repository):
    """Answering what the commands are takes no training library."""
    code = (
        "import sys, natrain.cli\n"
        "try: natrain.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'hydra', 'lightning', 'pytorch_lightning', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
