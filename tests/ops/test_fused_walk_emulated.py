"""Blocks of the fused kernels that walk, without a GPU: as test_fused_emulated.py, in a process of its own."""

from __future__ import annotations

import pytest

from natrain.ops import fused
from tests.ops.test_fused_emulated import check
from tests.ops.walked import WALKS, walking

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@pytest.mark.parametrize("walked", WALKS, ids=str)
def test_blocks_walk(walked, monkeypatch):
    """In every kernel; runs of unlike lengths, and tiles at both ends that are in none."""
    monkeypatch.setattr(fused, "device_of", lambda index: fused.Device((9, 0), 1))
    with walking(walked):
        check(walked.case, walked.dtype, seed=1)
