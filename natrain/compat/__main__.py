"""``python -m natrain.compat [--natten VERSION] SCRIPT [ARGUMENT ...]``: run a program in which natten is natrain."""

from __future__ import annotations

import argparse
import atexit
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

from natrain.compat import DEFAULT_VERSION, install
from natrain.errors import invalid


def main(argv: list[str]) -> int:
    """Install the stand-in, then run SCRIPT as ``__main__`` with the arguments behind it."""
    parser = argparse.ArgumentParser(prog="python -m natrain.compat", description=__doc__, allow_abbrev=False)
    parser.add_argument("--natten", metavar="VERSION", default=DEFAULT_VERSION, help="the NATTEN the code is for")
    parser.add_argument("script", type=Path, help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script gets")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.script.is_file():
            raise invalid("SCRIPT", str(arguments.script), "a Python file", "python -m natrain.compat train.py")
        install(arguments.natten)
    except ValueError as error:
        print(f"natrain.compat: error: {error}", file=sys.stderr)
        return 2
    _reach_spawned_processes(arguments.natten)
    sys.argv = [str(arguments.script), *arguments.arguments]
    sys.path[0] = str(arguments.script.resolve().parent)
    runpy.run_path(str(arguments.script), run_name="__main__")
    return 0


def _reach_spawned_processes(version: str) -> None:
    """Let processes that the script spawns find natten too.

    Workers of a data loader import the script anew where processes are not forked (macOS, Windows, Python 3.14); of
    this process they get sys.path only. So its last entry is a folder whose natten.py puts the stand-in in its place.
    """
    folder = tempfile.mkdtemp(prefix="natrain-compat-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Path(folder, "natten.py").write_text(
        "import sys\n"
        "from natrain.compat.importing import interface_of, put_in_place\n"
        "del sys.modules['natten']\n"
        f"put_in_place(interface_of({version!r}))\n"
        "import natten\n"
    )
    sys.path.append(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
