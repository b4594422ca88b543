"""Run today's worker on the natrain of another commit: at_commit.py FOLDER FILE JSON; FILE says why it cannot.

The measuring code must be the same for both, so ``natrain.bench`` is this folder's; kernels and all else are FOLDER's.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path


def main() -> int:
    here = Path(__file__).resolve().parent
    folder, file, job = sys.argv[1:]
    # Not this script's folder: its modules are natrain.bench's, and the package is FOLDER's.
    sys.path[0] = folder
    try:
        import natrain

        assert Path(natrain.__file__).is_relative_to(folder), natrain.__file__
        spec = importlib.util.spec_from_file_location(
            "natrain.bench", here / "__init__.py", submodule_search_locations=[str(here)]
        )
        sys.modules["natrain.bench"] = natrain.bench = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(natrain.bench)

        from natrain.bench import worker

        return worker.main(job)
    except Exception as error:  # whatever the older code lacks
        traceback.print_exc()
        Path(file).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        return 1


if __name__ == "__main__":
    sys.exit(main())
