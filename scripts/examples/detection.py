"""Train Mask R-CNN (torchvision's) with a natrain backbone for some steps on made-up images.

    python scripts/examples/detection.py --steps 20
    python scripts/examples/detection.py --model dinat_mini --dilations coco800 --na-padding shrink

For COCO, replace ``draw`` by your data set; torchvision's references/detection has the loop with evaluation.
"""

from __future__ import annotations

import argparse

import torch
from backbone import Pyramid
from shapes import CLASSES, draw
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.rpn import AnchorGenerator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nat_mini")
    parser.add_argument("--dilations", help="name of a published plan: coco800, ade512, ...")
    parser.add_argument("--na-padding", default="shrink", help="small images are smaller than the windows")
    parser.add_argument("--size", type=int, default=160, help="pixels (published: 800)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"na_padding": arguments.na_padding, "drop_path_rate": 0.1}
    if arguments.dilations:
        options["dilations"] = arguments.dilations
    anchors = AnchorGenerator(tuple((size,) for size in (16, 32, 64, 128, 256)), ((0.5, 1.0, 2.0),) * 5)
    model = MaskRCNN(
        Pyramid(arguments.model, **options),
        num_classes=len(CLASSES),
        min_size=arguments.size,
        max_size=2 * arguments.size,
        rpn_anchor_generator=anchors,
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(arguments.steps):
        images, targets = zip(*(draw(arguments.size, generator) for _ in range(arguments.batch)), strict=True)
        losses = model(
            [image.to(device) for image in images],
            [{key: value.to(device) for key, value in target.items()} for target in targets],
        )
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        parts = ", ".join(f"{name.removeprefix('loss_')} {value.item():.3f}" for name, value in losses.items())
        print(f"step {step + 1}  loss {loss.item():.4f}  ({parts})")
    model.eval()
    with torch.no_grad():
        (found,) = model([draw(arguments.size, generator)[0].to(device)])
    print(f"one image: {len(found['boxes'])} detections, masks {tuple(found['masks'].shape)}")


if __name__ == "__main__":
    main()
