"""One problem of a benchmark, in the words that the command line, the yaml files and the CSV share.

``op=na2d shape=56x56 batch=128 heads=2 head_dim=32 kernel_size=7 dilation=1 dtype=bf16``; what differs per axis is
joined by ``x`` (``kernel_size=3x7x7``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from natrain.errors import invalid, nearest
from natrain.ops.problem import Problem, Window, check_window

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OPS = {"na1d": 1, "na2d": 2, "na3d": 3}
WORDS = (
    "op", "shape", "batch", "heads", "head_dim", "kernel_size", "dilation", "stride", "is_causal", "dtype", "rpb",
)  # fmt: skip
DEFAULTS = {"batch": 1, "dilation": 1, "stride": 1, "is_causal": False, "dtype": "fp32", "rpb": False}


# Words of other projects, which no spelling leads to ours.
_OTHERS = {
    "window": "kernel_size",
    "window_size": "kernel_size",
    "size": "shape",
    "dim": "head_dim",
    "causal": "is_causal",
}


def meant(word: str, names: Sequence[str]) -> str:
    """The one of ``names`` that who typed ``word`` most likely meant; the size of the window where nothing is near."""
    return _OTHERS.get(word) or nearest(str(word), names) or "kernel_size"


@dataclass(frozen=True)
class Case:
    """Attention of ``batch`` images of ``spatial`` tokens; per-axis tuples in the order of the spatial axes."""

    spatial: tuple[int, ...]
    batch: int
    heads: int
    head_dim: int
    window: Window
    dtype: torch.dtype
    has_rpb: bool = False

    @staticmethod
    def of(words: Mapping[str, Any]) -> Case:
        """From the words of this module's legend; those with defaults may be missing.

        Raises:
            ValueError: an unknown or missing word, or a value out of range.
        """
        for word in words:
            if word not in WORDS:
                raise invalid("setting", word, f"one of {', '.join(WORDS)}", f"{meant(word, WORDS)}=...")
        given = {**DEFAULTS, **words}
        for word in ("shape", "heads", "head_dim", "kernel_size"):
            if given.get(word) is None:
                examples = {"shape": "56x56", "heads": "2", "head_dim": "32", "kernel_size": "7"}
                raise invalid(word, None, "a value", f"{word}={examples[word]}")
        spatial = _numbers("shape", given["shape"])
        if len(spatial) not in OPS.values():
            raise invalid("shape", given["shape"], "1 to 3 axes joined by x", "shape=56x56")
        op = given.get("op", f"na{len(spatial)}d")
        if OPS.get(op) != len(spatial):
            raise invalid("op", op, f"na{len(spatial)}d for shape={given['shape']}", f"op=na{len(spatial)}d")
        if given["dtype"] not in DTYPES:
            raise invalid("dtype", given["dtype"], f"one of {', '.join(DTYPES)}", "dtype=bf16")
        whole = {word: _number(word, given[word]) for word in ("batch", "heads", "head_dim")}
        window = check_window(
            spatial,
            *(_per_axis(_numbers(word, given[word])) for word in ("kernel_size", "dilation", "stride")),
            _per_axis(tuple(_flag("is_causal", flag) for flag in _parts(given["is_causal"]))),
        )
        return Case(spatial, **whole, window=window, dtype=DTYPES[given["dtype"]], has_rpb=_flag("rpb", given["rpb"]))

    @property
    def op(self) -> str:
        return f"na{len(self.spatial)}d"

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    @property
    def tokens(self) -> int:
        return math.prod(self.spatial)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of q, k, v and the output: [B, *S, N, D]."""
        return self.batch, *self.spatial, self.heads, self.head_dim

    @property
    def words(self) -> dict[str, Any]:
        """The words that make this case again, all of them, for a row of a CSV."""
        window = self.window
        return {
            "op": self.op,
            "shape": _joined(self.spatial, shorten=False),
            "batch": self.batch,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "kernel_size": _joined(window.kernel_size),
            "dilation": _joined(window.dilation),
            "stride": _joined(window.stride),
            "is_causal": _joined(tuple(map(int, window.is_causal))),
            "dtype": self.dtype_name,
            "rpb": int(self.has_rpb),
        }

    @property
    def name(self) -> str:
        """Short and unique: what differs from the defaults."""
        words = self.words
        return " ".join(
            [words["op"], words["shape"], f"b{self.batch} n{self.heads} d{self.head_dim} k{words['kernel_size']}"]
            + [
                f"{word}={words[word]}"
                for word in ("dilation", "stride", "is_causal", "rpb")
                if str(words[word]) not in ("0", "1" if word in ("dilation", "stride") else "0")
            ]
            + [words["dtype"]]
        )

    def problem(self, device: str, capability: tuple[int, int] | None, needs_grad: bool = True) -> Problem:
        """What the registry is asked about this case, in training or forward alone."""
        return Problem(
            self.batch,
            self.spatial,
            self.heads,
            self.head_dim,
            self.window,
            self.dtype,
            device,
            capability,
            has_rpb=self.has_rpb,
            needs_grad=needs_grad,
        )

    def with_batch(self, batch: int) -> Case:
        return replace(self, batch=batch)


def _parts(value: Any) -> list:
    if isinstance(value, (list, tuple)):
        return list(value)
    return str(value).split("x") if isinstance(value, str) else [value]


def _numbers(word: str, value: Any) -> tuple[int, ...]:
    try:
        numbers = tuple(_whole(part) for part in _parts(value))
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise invalid(word, value, "whole numbers >= 1 joined by x", f"{word}=7 or {word}=7x7")
    return numbers


def _whole(value: Any) -> int:
    """Raises: ValueError: 1.5 and true, which ``int`` would take."""
    if isinstance(value, (bool, float)):
        raise ValueError(value)
    return int(value)


def _number(word: str, value: Any) -> int:
    try:
        numbers = _numbers(word, value)
    except ValueError:
        numbers = ()
    if len(numbers) != 1:
        raise invalid(word, value, "one whole number >= 1", f"{word}=2")
    return numbers[0]


def _per_axis(entries: tuple) -> Any:
    return entries[0] if len(entries) == 1 else entries


def _flag(word: str, value: Any) -> bool:
    flags = {"true": True, "false": False, "1": True, "0": False}
    if str(value).lower() not in flags:
        raise invalid(word, value, "true or false", f"{word}=true")
    return flags[str(value).lower()]


def _joined(values: tuple[int, ...], shorten: bool = True) -> int | str:
    if shorten and len(set(values)) == 1:
        return values[0]
    return "x".join(map(str, values))
