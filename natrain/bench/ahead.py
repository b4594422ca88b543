"""Compile what problems launch before they are measured, on every processor at once, and guess how long that takes."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from natrain.bench.arms import find_arm
from natrain.bench.case import Case
from natrain.jit import BuildError, BuildSpec, build, find_built

_SAMPLE = 12


class Ahead:
    """Asks each kernel once for what a problem launches: choosing configurations takes a kernel up to 0.1 s."""

    def __init__(self) -> None:
        self._specs: dict[tuple[Case, str], list[BuildSpec]] = {}
        self._built: set[BuildSpec] = set()
        self._cores = os.cpu_count() or 1
        # Processor seconds a kernel; those of what was compiled so far replace this first guess.
        self._kernel_s = 3.0

    def missing(self, pairs: Iterable[tuple[Case, Collection[str]]]) -> list[BuildSpec]:
        """What these problems launch on these contenders and nobody compiled yet, each once."""
        if not torch.cuda.is_available():
            return []
        from natrain.jit.cuda import arch_of

        arch = arch_of(torch.cuda.get_device_capability())
        specs: dict[BuildSpec, None] = {}
        for case, kernels in pairs:
            for kernel in kernels:
                if (case, kernel) not in self._specs:
                    self._specs[case, kernel] = find_arm(kernel).build_specs(case, arch)
                specs |= dict.fromkeys(self._specs[case, kernel])
        return [spec for spec in specs if not self._is_built(spec)]

    def _is_built(self, spec: BuildSpec) -> bool:
        """To look for it means to hash all sources: not again for one that was found."""
        if spec not in self._built and find_built(spec) is not None:
            self._built.add(spec)
        return spec in self._built

    def seconds(self, pairs: Collection[tuple[Case, Collection[str]]]) -> float:
        """A guess of the time until all of these are compiled; of many problems, from a sample."""
        sample = list(pairs)[:_SAMPLE]
        share = len(pairs) / len(sample) if sample else 1
        return self._kernel_s * share * len(self.missing(sample)) / self._cores

    def compile(self, pairs: Iterable[tuple[Case, Collection[str]]]) -> int:
        """Compile them; the number compiled. A kernel that does not compile says so when it is measured."""
        started = time.monotonic()
        todo = self.missing(pairs)
        with ThreadPoolExecutor(max_workers=self._cores) as pool:
            list(pool.map(_attempt, todo))
        if len(todo) >= self._cores:
            self._kernel_s = (time.monotonic() - started) * self._cores / len(todo)
        return len(todo)


def _attempt(spec: BuildSpec) -> None:
    try:
        build(spec)
    except BuildError:
        pass
