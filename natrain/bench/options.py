"""Options of ``natrain ablate`` where whole models or trainings are compared, not kernels on problems."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from natrain.bench.sweep import add_options, check_limits
from natrain.errors import invalid


@dataclass(frozen=True)
class Options:
    """What does not change the results: whether failed runs are run again, how long, on how many threads."""

    retry_failed: bool = False
    time_limit_s: float | None = None
    threads: int | None = None

    @staticmethod
    def of(arguments: argparse.Namespace, devices: str, kind: str, instead: Mapping[str, str]) -> Options:
        """The options typed.

        Args:
            devices: the word ``devices=``.
            instead: option that ``kind`` does not have -> what to type in its place.

        Raises:
            ValueError: one of those was typed, or a value out of range.
        """
        parser = argparse.ArgumentParser()
        add_options(parser)
        for name, fix in instead.items():
            value = devices if name == "devices" else getattr(arguments, name)
            if value != ("1" if name == "devices" else parser.get_default(name)):
                shown = name if name == "devices" else f"--{name.replace('_', '-')}"
                raise invalid(shown, value, f"no such option where kind is {kind}", fix)
        check_limits(arguments)
        if arguments.threads is not None and arguments.threads < 1:
            raise invalid("--threads", arguments.threads, "a whole number >= 1", "--threads 2")
        return Options(arguments.retry_failed, arguments.time_limit, arguments.threads)
