"""On a GPU: a NAT trained on each CUDA kernel follows the curve of the reference, in every precision."""

from __future__ import annotations

import pytest
import timm
import torch

import natrain  # noqa: F401  registers the models

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

STEPS, WINDOW, BATCH = 300, 20, 16


def _images():
    """A learnable task that is never learnt to zero loss: ten prototypes under noise, a fifth of the labels random."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(10, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (STEPS, BATCH), generator=generator)
    images = prototypes[labels] + 2.5 * torch.randn(STEPS, BATCH, 3, 32, 32, generator=generator)
    random = torch.rand(STEPS, BATCH, generator=generator) < 0.2
    return images.cuda(), torch.where(random, torch.randint(10, (STEPS, BATCH), generator=generator), labels).cuda()


def _curve(data, kernel: str, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Mean loss of every window of steps."""
    torch.manual_seed(seed)
    model = timm.create_model("nat_cifar", num_classes=10, kernel=kernel).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    losses = []
    for images, labels in zip(*data, strict=True):
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return torch.stack(losses).view(-1, WINDOW).mean(1)


@pytest.fixture(scope="module")
def data():
    return _images()


@pytest.fixture(scope="module")
def references(data):
    """Curves of three seeds."""
    curves = torch.stack([_curve(data, "reference", seed, torch.float32) for seed in range(3)])
    assert curves[0, -1] < curves[0, 0] - 0.3, "nothing was learnt, so that nothing can be compared"
    return curves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kernel", ["naive", "gemm", "fused"])
def test_curves_stay_within_the_spread_of_reference_seeds(kernel, dtype, data, references):
    spread = references.max(0).values - references.min(0).values
    difference = (_curve(data, kernel, 0, dtype) - references[0]).abs()
    assert (difference <= 2 * spread).all(), f"{difference.tolist()} against a spread of {spread.tolist()}"
