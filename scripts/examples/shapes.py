"""Made-up images for the examples: bright rectangles and dark discs on noise, with boxes, labels and masks."""

from __future__ import annotations

import torch
from torch import Tensor

CLASSES = ("background", "rectangle", "disc")


def draw(size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """One image ``[3, size, size]`` in 0..1 and, as torchvision's detectors want them: boxes [n, 4] (x1, y1, x2, y2 in
    pixels), labels [n], masks uint8 [n, size, size]. Each of the two shapes has its own half of the image.
    """
    image = 0.4 + 0.2 * torch.rand(3, size, size, generator=generator)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    masks = []
    for label, left in ((1, 0), (2, size // 2)):
        half = int(torch.randint(size // 8, size // 4, (), generator=generator))
        row = int(torch.randint(half, size - half, (), generator=generator))
        column = left + int(torch.randint(half, size // 2 - half + 1, (), generator=generator))
        if label == 1:
            mask = ((y - row).abs() < half) & ((x - column).abs() < half)
        else:
            mask = (y - row) ** 2 + (x - column) ** 2 < half**2
        image[:, mask] = torch.rand(3, 1, generator=generator) * 0.2 + (0.75 if label == 1 else 0.0)
        masks.append(mask)
    boxes = [[x[m].min(), y[m].min(), x[m].max() + 1, y[m].max() + 1] for m in masks]
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "labels": torch.tensor([1, 2]),
        "masks": torch.stack(masks).to(torch.uint8),
    }
    return image, target


def semantic(target: dict[str, Tensor]) -> Tensor:
    """The class of each pixel, int64 ``[H, W]``."""
    return (target["masks"] * target["labels"][:, None, None]).amax(0).long()
