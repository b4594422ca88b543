"""Train a segmentation head on a natrain backbone for some steps on made-up images.

    python scripts/examples/segmentation.py --steps 20
    python scripts/examples/segmentation.py --model dinat_mini --dilations ade512 --na-padding shrink

For ADE20K, replace ``draw`` by your data set. The head is torchvision's FCNHead on the finest level of the pyramid.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from backbone import Pyramid
from shapes import CLASSES, draw, semantic
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead


class Segmenter(nn.Module):
    """Images ``[B, 3, H, W]`` to logits ``[B, classes, H, W]``."""

    def __init__(self, backbone: Pyramid, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = FCNHead(backbone.out_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.head(self.backbone(images)["0"])
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nat_mini")
    parser.add_argument("--dilations", help="name of a published plan: ade512, coco800, ...")
    parser.add_argument("--na-padding", default="shrink", help="small images are smaller than the windows")
    parser.add_argument("--size", type=int, default=128, help="pixels (published: 512)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"na_padding": arguments.na_padding, "drop_path_rate": 0.1}
    if arguments.dilations:
        options["dilations"] = arguments.dilations
    model = Segmenter(Pyramid(arguments.model, **options), len(CLASSES)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.05)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(arguments.steps):
        images, targets = zip(*(draw(arguments.size, generator) for _ in range(arguments.batch)), strict=True)
        classes = torch.stack([semantic(target) for target in targets]).to(device)
        logits = model(torch.stack(images).to(device))
        loss = F.cross_entropy(logits, classes)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        accuracy = (logits.argmax(1) == classes).float().mean()
        print(f"step {step + 1}  loss {loss.item():.4f}  pixel accuracy {100 * accuracy.item():.1f} %")


if __name__ == "__main__":
    main()
