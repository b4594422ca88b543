"""What docs/export.md promises: NAT-Mini at 224 is no slower in onnxruntime than the reference kernel in torch."""

from __future__ import annotations

import pytest
import timm

import natrain  # noqa: F401
from natrain.export.timing import compare
from tests.export.helpers import INPUT, small_model

pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'natrain[export]'")


def test_forms_are_timed_side_by_side(tmp_path):
    rows = compare(small_model(), INPUT, tmp_path, [("torch-export", "fp32")], batch=2, rounds=1)
    assert [row.name for row in rows] == ["torch reference", "torch auto", "torch-export fp32"]
    assert all(row.median_ms > 0 and row.difference < 1e-4 for row in rows)
    assert rows[0].size_mb is None and rows[2].size_mb > 0.01


@pytest.mark.slow
def test_nat_mini_in_onnxruntime_is_no_slower_than_the_reference_kernel(tmp_path):
    model = timm.create_model("nat_mini")
    rows = compare(model, {"in_chans": 3, "img_size": [224, 224]}, tmp_path, [("onnx", "fp32")], batch=1, rounds=5)
    times = {row.name: row.median_ms for row in rows}
    assert times["onnx fp32"] <= times["torch reference"], times
