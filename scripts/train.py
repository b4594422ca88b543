#!/usr/bin/env python
"""``python scripts/train.py key=value ...``: the same as ``natrain train key=value ...``."""

import sys

from natrain.cli import main

if __name__ == "__main__":
    # The processes that a run starts, one per device, repeat this script with other words: drop none, add "train" once.
    words = sys.argv[1:]
    sys.exit(main(words if words[:1] == ["train"] else ["train", *words]))
