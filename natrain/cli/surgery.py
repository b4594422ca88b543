"""Fit weights to another image size or kernel size.

Relative position biases are interpolated bicubically, dilations are planned anew for the new maps unless dilations=
names them; a table says what changed. Nothing else in the weights depends on either size.
  natrain surgery dinat_large.safetensors dinat_large_384.safetensors kernel_size=11 img_size=384
  natrain surgery hf-hub:shi-labs/dinat-mini-in1k-224 dinat_mini_coco.safetensors img_size=800 dilations=coco800
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from natrain.errors import invalid, nearest

EXAMPLES = {"kernel_size": "11", "img_size": "384", "dilations": "in384"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="what `natrain import` reads: file, folder, address, hf-hub:NAME")
    parser.add_argument("out", metavar="OUT", type=Path, help="the .safetensors file to write")
    parser.add_argument(
        "changes",
        nargs="+",
        metavar="key=value",
        help="kernel_size=K or [K, K, K, K]; img_size=PIXELS or [H, W]; dilations=NAME or [[1, 8], ...]",
    )
    parser.add_argument("--model", help="the variant, where names and shapes leave a choice (`natrain models`)")


def run(arguments: argparse.Namespace) -> int:
    changes = parse_changes(arguments.changes)

    from natrain.models.surgery import operate
    from natrain.models.weights import load_weights, save_weights

    changed, table = operate(load_weights(arguments.source, model=arguments.model), **changes)
    save_weights(changed, arguments.out)
    print(table)
    print(f"written: {arguments.out}")
    return 0


def parse_changes(words: list[str]) -> dict[str, Any]:
    """The words ``key=value`` as arguments of ``operate``.

    Raises:
        ValueError: an unknown key, a value that is no number or list.
    """
    import yaml

    changes: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if key not in EXAMPLES or not equals:
            best = nearest(key, EXAMPLES) or "img_size"
            raise invalid("setting", word, f"one of {', '.join(EXAMPLES)} and a value", f"{best}={EXAMPLES[best]}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = None
        is_named = key == "dilations" and isinstance(value, str)
        if not is_named and not _is_numbers(value):
            raise invalid(key, text, "a whole number >= 1 or a list", f"{key}={EXAMPLES[key]}")
        changes[key] = value
    return changes


def _is_numbers(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_numbers, value))
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
