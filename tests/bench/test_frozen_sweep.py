"""The frozen sweep is what its rule drew, and keeps what was promised about it."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import yaml

from natrain.bench.case import Case
from natrain.bench.estimate import floor_bytes, flops
from natrain.bench.strata import sweep_text
from natrain.cli.settings import config_folder

FILE = config_folder() / "ablation" / "sweep.yaml"


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [Case.of(line) for line in yaml.safe_load(FILE.read_text())["problems"]]


def test_the_file_is_what_the_rule_draws():
    assert FILE.read_text(encoding="utf-8") == sweep_text()


def test_every_stratum_holds_the_same_number(cases):
    """Strata by the upper end of the window's range, read off the issue's ranges and not off the rule."""
    ends = {1: (7, 31, 127, 511, 1023), 2: (5, 9, 15, 31, 63), 3: (3, 5, 7, 11, 15)}
    strata = Counter()
    for case in cases:
        rank = len(case.spatial)
        widest = max(case.window.kernel_size)
        strata[case.dtype_name, rank, next(end for end in ends[rank] if widest <= end)] += 1
    assert len(cases) == 405 and len(strata) == 45 and set(strata.values()) == {9}
    assert len({case.name for case in cases}) == 405


def test_sizes_are_in_the_promised_ranges(cases):
    ranges = {1: [(128, 65_536)], 2: [(7, 256)] * 2, 3: [(3, 32), (5, 64), (5, 64)]}
    for case in cases:
        for length, (low, high) in zip(case.spatial, ranges[len(case.spatial)], strict=True):
            assert low <= length <= high
        assert case.head_dim in (32, 64, 128) and 1 <= max(case.window.dilation) <= 16
    two_d = [case.spatial for case in cases if len(case.spatial) == 2]
    assert sum(y != x for y, x in two_d) >= len(two_d) // 4
    assert {max(case.window.dilation) for case in cases} == {1, 2, 3, 4, 8, 16}
    assert {case.head_dim for case in cases} == {32, 64, 128}


def test_no_problem_is_too_small_or_too_large_by_the_layer_that_was_measured(cases):
    """56/1 takes the naive kernel 0.41 / 0.95 ms in 16 bits, 6.5 T multiply-adds a second; 4.5 T in 32 bits."""
    for case in cases:
        macs_per_s = 4.5e12 if case.dtype_name == "fp32" else 6.5e12
        assert flops(case, "backward") / 2 / macs_per_s < 5e-3
        # Neither the H200's memory (4.8 TB/s at best) nor its tensor cores (1 PFLOP/s) allow less.
        assert max(floor_bytes(case, "forward") / 4.8e12, flops(case, "forward") / 1e15) > 5e-6


def test_kernels_to_compile_are_few_enough_for_the_promised_minutes(cases):
    specialisations = {(case.window, case.head_dim) for case in cases if case.dtype_name == "fp16"}
    assert len({(window.kernel_size, head_dim) for window, head_dim in specialisations}) <= 75


def test_words_of_a_case():
    case = Case.of({"op": "na2d", "shape": "56x40", "batch": 3, "heads": 2, "head_dim": 32, "kernel_size": "7x5"})
    assert case.shape == (3, 56, 40, 2, 32) and case.window.kernel_size == (7, 5)
    assert Case.of(case.words) == case and case.name == "na2d 56x40 b3 n2 d32 k7x5 fp32"
    # Two products forward, of every query of every head with its 35 neighbours.
    assert flops(case, "forward") == 2 * 2 * 3 * 56 * 40 * 2 * 35 * 32
    assert floor_bytes(case, "forward") == 4 * math.prod(case.shape) * 4
    causal = Case.of({**case.words, "is_causal": "0x1", "rpb": "true", "dilation": 3, "dtype": "bf16"})
    assert causal.window.is_causal == (False, True) and Case.of(causal.words) == causal
    assert causal.name == "na2d 56x40 b3 n2 d32 k7x5 dilation=3 is_causal=0x1 rpb=1 bf16"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"shape": "56x56", "heads": 2, "head_dim": 32}, "kernel_size"),
        ({"shape": "56x56", "heads": 2, "head_dim": 32, "kernel_size": 57}, "kernel_size"),
        ({"shape": "56x56", "heads": 2, "head_dim": 32, "kernelsize": 7}, "kernel_size="),
        ({"op": "na1d", "shape": "56x56", "heads": 2, "head_dim": 32, "kernel_size": 7}, "op=na2d"),
        ({"shape": "56x56", "heads": 2, "head_dim": 32, "kernel_size": 7, "dtype": "half"}, "dtype=bf16"),
        ({"shape": "a", "heads": 2, "head_dim": 32, "kernel_size": 7}, "joined by x"),
    ],
)
def test_bad_words_say_what_to_type(words, message):
    with pytest.raises(ValueError, match=message):
        Case.of(words)
