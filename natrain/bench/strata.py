"""The rule that drew the frozen sweep, configs/ablation/sweep.yaml: 405 problems, the same number in every stratum.

A stratum is a rank, a range of windows and a dtype; each holds nine problems, and the three dtypes share their
geometries, so that they compare. Inside a stratum five pairs of window and head dim are compiled, used one to three
times each. Everything else is drawn: lengths log-uniform, heads, dilation, and as many images as make the slowest pass
of the naive kernel last a drawn time, while the fastest conceivable forward lasts 20 us or more.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from natrain.bench.case import Case
from natrain.bench.estimate import FASTEST, RATES, seconds

SEED = 20261123
PER_STRATUM, PAIRS = 9, 5
SHORTEST_S, LONGEST_S = 20e-6, 4e-3  # the guess may be a quarter off, the promise is 5 ms
DTYPES = ("fp16", "bf16", "fp32")
HEAD_DIMS = (32, 32, 64, 64, 128)
HEADS = (1, 2, 3, 4, 6, 8, 12, 16)
DILATIONS = (2, 3, 4, 8, 16)
MAX_BATCH = 1024
# Per rank: the windows of each stratum (per axis), then the lengths' range per axis.
WINDOWS = {
    1: ((3, 5, 7), (9, 13, 21, 31), (47, 63, 95, 127), (191, 255, 383, 511), (639, 767, 1023)),
    2: ((3, 5), (7, 9), (11, 13, 15), (17, 21, 25, 31), (39, 45, 63)),
    3: ((3,), (5,), (7,), (9, 11), (13, 15)),
}
LENGTHS = {1: ((128, 65_536),), 2: ((7, 256), (7, 256)), 3: ((3, 32), (5, 64), (5, 64))}
# Windows of videos are shorter in time: one pair in five of the wider strata.
FLAT = {5: (3, 5, 5), 7: (3, 7, 7), 9: (5, 9, 9), 11: (5, 11, 11), 13: (7, 13, 13), 15: (7, 15, 15)}


def frozen_cases(seed: int = SEED) -> Iterator[Case]:
    """The problems in the order of the file: dtype, rank, stratum."""
    rng = random.Random(seed)
    geometries = [case for rank in WINDOWS for stratum in WINDOWS[rank] for case in _stratum(rng, rank, stratum)]
    for dtype in DTYPES:
        for words in geometries:
            yield Case.of({**words, "dtype": dtype})


def _stratum(rng: random.Random, rank: int, windows: tuple[int, ...]) -> list[dict]:
    pairs = [(windows[index % len(windows)], head_dim) for index, head_dim in enumerate(_shuffled(rng, HEAD_DIMS))]
    drawn: list[dict] = []
    while len(drawn) < PER_STRATUM:
        index = len(drawn) % PAIRS
        window, head_dim = pairs[index]
        kernel_size = FLAT.get(window, (window,) * 3) if rank == 3 and index == PAIRS - 1 else (window,) * rank
        words = _draw(rng, rank, kernel_size, head_dim, is_dilated=len(drawn) % 2 == 1)
        if words is not None and words not in drawn:
            drawn.append(words)
    return drawn


def _shuffled(rng: random.Random, values: tuple) -> list:
    return sorted(values, key=lambda _: rng.random())


def _draw(rng: random.Random, rank: int, kernel_size: tuple[int, ...], head_dim: int, is_dilated: bool) -> dict | None:
    """One geometry, or None where what was drawn does not fit together."""
    spatial = tuple(
        _log_uniform(rng, max(low, k), high) for (low, high), k in zip(LENGTHS[rank], kernel_size, strict=True)
    )
    if rank == 2 and rng.random() < 0.5:
        spatial = (spatial[0], spatial[0])
    room = min(length // k for length, k in zip(spatial, kernel_size, strict=True))
    dilations = [d for d in DILATIONS if d <= room]
    heads, share = rng.choice(HEADS), rng.random()
    if is_dilated and not dilations:
        # A border stratum may have no room for a dilation at all: half of its tries end undilated.
        if rng.random() < 0.5:
            return None
        dilations = [1]
    words = {
        "op": f"na{rank}d",
        "shape": spatial,
        "heads": heads,
        "head_dim": head_dim,
        "kernel_size": kernel_size,
        "dilation": rng.choice(dilations) if is_dilated else 1,
    }
    if any(k > length for k, length in zip(kernel_size, spatial, strict=True)):
        return None
    bounds = _batches(Case.of({**words, "dtype": "fp16"}), Case.of({**words, "dtype": "fp32"}))
    if bounds is None:
        return None
    low, high = bounds
    return {**words, "batch": round(low * (high / low) ** share)}


def _batches(short: Case, long: Case) -> tuple[int, int] | None:
    """The fewest and the most images within the two limits, of the fastest and of the slowest dtype."""
    low = next((b for b in _counts() if seconds(short.with_batch(b), FASTEST, "forward") >= SHORTEST_S), None)
    fits = [b for b in _counts() if seconds(long.with_batch(b), RATES["naive"], "backward") <= LONGEST_S]
    if low is None or not fits or fits[-1] < low:
        return None
    return low, fits[-1]


def _counts() -> list[int]:
    """1 to MAX_BATCH in steps of about a tenth: what one bisects over."""
    return sorted({round(1.1**step) for step in range(int(math.log(MAX_BATCH, 1.1)) + 1)})


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return min(high, round(low * (high / low) ** rng.random()))


_HEAD = """\
# The frozen sweep of the kernels: 405 problems, nine per stratum of rank, window and dtype, 20 us to 5 ms each.
# Drawn once by natrain/bench/strata.py before any kernel was timed on it; a test holds the two together.
kernels: [naive, gemm, fused]
baseline: naive
directions: [forward, backward]
runs: 15  # timed calls of each kernel and direction
timer: device  # device | graph | events: the device's time, that of CUDA graph replays, or the caller's
cache: cold  # cold | warm: the second-level cache emptied before each call, or not
tf32: true  # float32 products may use TF32, where a kernel has them
problems:
"""


def sweep_text() -> str:
    """The file: its settings and one line a problem."""
    lines = []
    for case in frozen_cases():
        words = {key: value for key, value in case.words.items() if key not in ("stride", "is_causal", "rpb")}
        words["shape"] = f'"{words["shape"]}"'
        lines.append("  - {" + ", ".join(f"{key}: {value}" for key, value in words.items()) + "}\n")
    return _HEAD + "".join(lines)
