"""Run today's sweep on the natrain of another commit: at_commit.py FOLDER PLAN.yaml ...

The measuring code must be the same for both, so ``natrain.bench`` is this folder's; kernels and all else are FOLDER's.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main() -> int:
    here = Path(__file__).resolve().parent
    folder = sys.argv[1]
    # Not this script's folder: its modules are natrain.bench's, and the package is FOLDER's.
    sys.path[0] = folder

    import natrain

    assert Path(natrain.__file__).is_relative_to(folder), natrain.__file__
    spec = importlib.util.spec_from_file_location(
        "natrain.bench", here / "__init__.py", submodule_search_locations=[str(here)]
    )
    sys.modules["natrain.bench"] = natrain.bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(natrain.bench)

    from natrain.bench import sweep

    return sweep.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
