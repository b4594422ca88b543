"""One form for every error a caller can cause: the argument, its value, what is allowed, what to type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Stopped(RuntimeError):
    """Work that cannot go on, for a reason that the message says together with what to change."""


def invalid(argument: str, value: object, allowed: str, fix: str) -> ValueError:
    """Build (not raise) the error for one bad argument.

    Args:
        argument: the name the caller used, for example ``"kernel_size"`` or ``"data.root"``.
        value: what the caller passed; shown with ``repr``.
        allowed: what would have been accepted, for example ``"an int >= 1 or a tuple of 2"``.
        fix: what to type instead, for example ``"kernel_size=7"``.
    """
    return ValueError(f"{argument}={value!r} is not allowed: expected {allowed}. Try: {fix}")


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most similar to ``word``, or None when nothing is similar enough to suggest."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return matches[0] if matches else None
