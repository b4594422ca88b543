"""The CSV of a sweep: one line a run, appended whole or not at all, so that a killed sweep goes on where it was."""

from __future__ import annotations

import csv
import errno
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from natrain.bench.case import WORDS
from natrain.errors import invalid

COLUMNS = (
    "plan", *WORDS, "arm", "direction", "status", "reason", "median_ms", "low_ms", "high_ms", "runs", "timer", "cache",
    "threads", "clock_mhz", "peak_mib", "error", "device", "torch", "commit", "session", "utc",
)  # fmt: skip
# "ok"; "unsupported": the kernel said so before it ran; "failed": it raised, or its output was wrong.
STATUSES = ("ok", "unsupported", "failed")


def _line(values: list) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(["" if value is None else value for value in values])
    return text.getvalue().encode()


def append(path: Path, row: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> None:
    """Add one row; missing columns stay empty. Several processes may append to one file at once."""
    unknown = set(row) - set(columns)
    assert not unknown, f"no such columns: {unknown}"
    values = [row.get(column) for column in columns]
    values[columns.index("reason")] = " ".join(str(row.get("reason") or "").split())[:500]
    line = _line(values)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        # One write to a file opened for appending is one place in it, also beside other writers.
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, or the file may not grow", str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start(path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Make the file with its header, or end a line that a killed process left unfinished."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "rb+") as file:
        if not file.seek(0, os.SEEK_END):
            file.write(_line(list(columns)))  # by several processes at once: the same bytes at the same place
        elif (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")


def read(path: Path, columns: Sequence[str] = COLUMNS) -> Iterator[dict[str, str]]:
    """The complete rows of the file; half of a row that a killed process left is passed over.

    Raises:
        ValueError: its columns are not those of this version.
    """
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        # Each line by itself: half of a row may end inside quotes, which would swallow the rows after it.
        lines = (next(csv.reader([line]), []) for line in file)
        header = next(lines, None)
        if header is None:  # killed before the header was written
            return
        if header != list(columns):
            raise invalid("results", str(path), "a CSV of this version's sweeps", "another --out folder")
        for values in lines:
            if len(values) == len(columns) and values[columns.index("status")] in STATUSES and values[-1]:
                yield dict(zip(columns, values, strict=True))


def key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a run is: its problem, contender and direction."""
    return (*(str(row[word]) for word in WORDS), row["arm"], row["direction"])
