"""Code written against NATTEN runs on natrain's operators, unchanged.

    import natrain.compat
    natrain.compat.install("0.14")      # then `import natten`, here or in any library, finds natrain

or, without a line of Python: ``python -m natrain.compat --natten 0.14 SCRIPT ...``. The versions differ in signatures,
defaults and layouts; name the one the code was written for. ``natrain.compat.natten`` is the interface of 0.17 as a
module of its own. docs/compat.md lists what each name maps to.
"""

from __future__ import annotations

import warnings

from natrain.compat.importing import interface_of, put_in_place

__all__ = ["DEFAULT_VERSION", "CompatWarning", "install"]

# 0.17 still has the functions of 0.14 to 0.16 beside its own, so most code fits it; modules with a default bias do not.
DEFAULT_VERSION = "0.17"

DIFFERENCES = (
    "natten is natrain's stand-in with the interface of NATTEN {version}. It differs: more dtypes, head dims and "
    "devices are accepted, and biases can be trained where fused NATTEN refused; tile sizes, auto-tuner and KV "
    "parallelism are accepted and tune nothing; float results agree to rounding, not bit by bit. See docs/compat.md."
)


class CompatWarning(UserWarning):
    """Says, once, where natrain's stand-in differs from NATTEN."""


def install(version: str = DEFAULT_VERSION) -> None:
    """Make ``import natten`` find natrain's stand-in in this process, and warn once where it differs.

    Call it before the code (or transformers, which looks for natten when imported) is imported. Calling it again with
    the same interface does nothing.

    Args:
        version: the NATTEN that the code was written for, "0.14" to "0.21", patch releases included ("0.21" is 0.21.7).

    Raises:
        ValueError: no such version; natten, or another version of it, is imported already.
    """
    interface = interface_of(version)
    put_in_place(interface)
    if not _warned:
        _warned.append(interface.VERSION)
        warnings.warn(DIFFERENCES.format(version=interface.VERSION), CompatWarning, stacklevel=2)


_warned: list[str] = []
