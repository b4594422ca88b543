"""Where log lines go: the console, above the progress bar, and the run folder."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from natrain.training.plan import global_rank


class Console(logging.Handler):
    """Prints above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


@contextmanager
def logging_to(path: Path | None) -> Iterator[None]:
    """Show what natrain logs on the console and append it to ``path``, if any; other ranks than 0 only warn."""
    root = logging.getLogger("natrain")
    handlers: list[logging.Handler] = [Console()]
    if global_rank() == 0 and path is not None:
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    level = root.level
    root.setLevel(logging.INFO if global_rank() == 0 else logging.WARNING)
    for handler in handlers:
        root.addHandler(handler)
    # Lightning's own notices (accelerators found, tips) say nothing that ours do not.
    others = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [other.level for other in others]
    for other in others:
        other.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Lightning 2.6 against newer torch; nothing a user can change.
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")
            warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
            yield
    finally:
        root.setLevel(level)
        for other, old in zip(others, levels, strict=True):
            other.setLevel(old)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
