"""Fixtures every test folder shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The clone's root folder."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of real images (cifar10/*.parquet, imagefolder tar); skips where there is none."""
    root = Path(os.environ.get("NATRAIN_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real images at {root}; set NATRAIN_TEST_DATA to the folder that holds cifar10/train.parquet")
    return root


@pytest.fixture(autouse=True)
def _precision_stays() -> Iterator[None]:
    """What a test lets float32 products do, the next one must not inherit."""
    before = torch.get_float32_matmul_precision()
    yield
    after = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    assert after == before, f"left torch.set_float32_matmul_precision at {after!r}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
