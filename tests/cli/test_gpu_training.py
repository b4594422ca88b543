"""On a GPU: `natrain train` with every CUDA kernel, on real images, in every precision, eager and compiled."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
import tarfile

import pytest
import timm
import torch

import natrain  # noqa: F401  registers the models

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

KERNELS = ("naive", "gemm", "fused")
STEPS = 12


@pytest.fixture(scope="module")
def imagefolder(shared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet")
    with tarfile.open(shared_data / "imagenet-sample.tar") as archive:
        archive.extractall(folder, filter="data")
    # Its validation images are of other classes than its training images.
    images = folder / "images"
    images.mkdir()
    for split in ("train", "val"):
        (images / split).symlink_to(folder / "imagenet-sample" / "train")
    return images


def _losses(tmp_path, *words: str) -> list[float]:
    """Training losses of a short `natrain train` in a process of its own."""
    quick = ["global_batch=16", f"trainer.max_steps={STEPS}", "trainer.log_every_steps=1"]
    quick += ["trainer.limit_val_batches=1", "schedule.warmup_epochs=0", "data.workers=2"]
    quick += ["trainer.progress_bar=false", f"run_dir={tmp_path}/run"]
    command = [sys.executable, "-m", "natrain", "train", "model=nat_tiny", *quick, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    with open(tmp_path / "run" / "metrics.csv") as table:
        rows = list(csv.DictReader(table))
    return [float(row["loss"]) for row in rows if row["loss"]]


def _assert_trained(losses: list[float]) -> None:
    assert len(losses) >= STEPS // 2
    assert all(math.isfinite(loss) and loss < 20 for loss in losses), losses


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_folder_of_images_at_224_pixels(kernel, precision, imagefolder, tmp_path):
    words = ["data=imagefolder", f"data.root={imagefolder}", f"kernel={kernel}", f"precision={precision}"]
    _assert_trained(_losses(tmp_path, *words))


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled(kernel, imagefolder, tmp_path):
    words = ["data=imagefolder", f"data.root={imagefolder}", f"kernel={kernel}", "precision=bf16", "compile=true"]
    _assert_trained(_losses(tmp_path, *words))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_training_step_is_one_graph(kernel):
    model = timm.create_model("nat_mini", kernel=kernel, num_classes=10).cuda()
    step = torch.compile(model, fullgraph=True)
    images = torch.randn(2, 3, 224, 224, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        eager, compiled = model.eval()(images), step(images)
        step(images).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(compiled, eager, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kernel", KERNELS)
def test_cifar_resized(kernel, shared_data, tmp_path):
    root = shared_data / "cifar10"
    words = ["data=cifar10", f"data.root={root}", "data.img_size=224", f"kernel={kernel}", "precision=bf16"]
    _assert_trained(_losses(tmp_path, *words))
