"""List models with parameters and input size. The pattern is a shell pattern: natrain models 'dinat*'."""

from __future__ import annotations

import argparse

from natrain.errors import invalid, nearest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", help="which models (default: all of natrain)")


def run(arguments: argparse.Namespace) -> int:
    import timm
    import torch

    from natrain.models import list_models

    names = list_models(arguments.pattern)
    if not names:
        best = nearest(arguments.pattern.strip("*"), list_models()) or "*"
        raise invalid("pattern", arguments.pattern, "a pattern that matches a model", f"natrain models '{best}'")
    print(f"{'model':24}{'parameters':>14}{'input':>12}")
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        channels, height, width = model.pretrained_cfg["input_size"]
        print(f"{name:24}{parameters:>14,}{f'{channels}x{height}x{width}':>12}")
    return 0
