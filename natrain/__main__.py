"""``python -m natrain``: the same as the ``natrain`` command."""

import sys

from natrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
