"""``python -m natrain.compat [--natten VERSION] SCRIPT [ARGUMENT ...]``: run a program in which natten is natrain."""

from __future__ import annotations

import argparse
import runpy
import sys
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
    sys.argv = [str(arguments.script), *arguments.arguments]
    sys.path[0] = str(arguments.script.resolve().parent)
    runpy.run_path(str(arguments.script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
