"""Pictures of what a model looks at.

  natrain viz attention IMAGE --checkpoint FILE --layer 2.5 --query 112,80   what one pixel's token attends to, by head
  natrain viz rpb CHECKPOINT [--layer 0.0]                                   the position biases it has learned
  natrain viz windows model=dinat_tiny img_size=384 [--query 190,190]        which pixels reach a token after each stage
Layers are STAGE.BLOCK from 0, as in the weights' names; a query is a pixel row,column of the model's input.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from natrain.errors import invalid, nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

# Each picture with the options that it takes besides --out.
PICTURES = {"attention": ("checkpoint", "layer", "query"), "rpb": ("layer",), "windows": ("query",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", metavar="PICTURE", help="attention, rpb or windows")
    parser.add_argument(
        "subject", nargs="+", metavar="WHAT", help="an image; a checkpoint; or model=NAME and arguments of the model"
    )
    parser.add_argument("--checkpoint", help="of attention: any file, address or hf-hub:NAME that natrain imports")
    parser.add_argument("--layer", help="STAGE.BLOCK (default: attention: the last; rpb: all, averaged over heads)")
    parser.add_argument("--query", metavar="Y,X", help="not of rpb: the pixel to look from (default: the middle)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the picture (default: PICTURE.png)")


def run(arguments: argparse.Namespace) -> int:
    draw = {"attention": _attention, "rpb": _rpb, "windows": _windows}
    if arguments.picture not in draw:
        best = nearest(arguments.picture, PICTURES) or "windows"
        raise invalid("PICTURE", arguments.picture, f"one of {', '.join(PICTURES)}", f"natrain viz {best} ...")
    for name in ("checkpoint", "layer", "query"):
        if getattr(arguments, name) is not None and name not in PICTURES[arguments.picture]:
            taken = " and ".join(f"--{other}" for other in (*PICTURES[arguments.picture], "out"))
            allowed = f"no option of {arguments.picture}, which takes {taken}"
            raise invalid(f"--{name}", getattr(arguments, name), allowed, f"leave --{name} out")
    out = arguments.out or Path(f"{arguments.picture}.png")
    formats = (".png", ".pdf", ".svg", ".jpg")
    if out.suffix not in formats:
        raise invalid(
            "--out", str(out), f"a file that ends in {', '.join(formats)}", f"--out {out.with_suffix('.png')}"
        )

    from natrain.viz import save_figure

    save_figure(draw[arguments.picture](arguments), out)
    print(f"written: {out}")
    return 0


def _attention(arguments: argparse.Namespace) -> Figure:
    import torch

    from natrain.cli.predict import read_image
    from natrain.data import build_eval_transform
    from natrain.training import load_for_inference
    from natrain.viz import attention_map, draw_attention
    from natrain.viz.attention import find_layer

    if arguments.checkpoint is None:
        raise invalid("--checkpoint", None, "the weights to look into", "--checkpoint runs/NAME/checkpoints/best.ckpt")
    loaded = load_for_inference(arguments.checkpoint)
    image = build_eval_transform(loaded.input)(read_image(Path(_only(arguments.subject, "IMAGE"))))
    name, layer = find_layer(loaded.model, arguments.layer)
    query = _query(arguments.query, tuple(image.shape[1:]))
    maps, token = attention_map(loaded.model, layer, image, query)
    mean, std = (torch.tensor(loaded.input[key])[:, None, None] for key in ("mean", "std"))
    picture = (image * std + mean).clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3).numpy()
    window = getattr(layer, "window", None)
    shape = f"kernel {window.kernel_size[0]}, dilation {window.dilation[0]}" if window else "global attention"
    title = f"{loaded.model_name}, {name}: {shape}; query pixel {query}, token {token} of {tuple(maps.shape[1:])}"
    return draw_attention(picture, maps, query, title)


def _rpb(arguments: argparse.Namespace) -> Figure:
    from natrain.models.weights import load_weights
    from natrain.viz import draw_rpb

    weights = load_weights(_only(arguments.subject, "CHECKPOINT"))
    return draw_rpb(weights.create_model(), arguments.layer, f"{weights.model_name}: relative position biases")


def _windows(arguments: argparse.Namespace) -> Figure:
    from natrain.viz import draw_windows, pixel_reach

    name, model, size = _meta_model(arguments.subject)
    query = _query(arguments.query, size)
    reaches = pixel_reach(model, size, query)
    for reach in reaches:
        print(
            f"after {reach.unit + 1}: token {reach.token} of {reach.map_size}, "
            f"{int(reach.rows.sum())} rows x {int(reach.columns.sum())} columns of pixels, {100 * reach.share:.3g} %"
        )
    return draw_windows(reaches, query, f"{name} at {size[0]}x{size[1]}: what the token of pixel {query} sees")


def _meta_model(words: list[str]) -> tuple[str, nn.Module, tuple[int, int]]:
    """The model that ``model=NAME key=value ...`` describes, without memory, and its image size."""
    import timm
    import torch
    import yaml

    from natrain.models import list_models
    from natrain.models.registry import default_input
    from natrain.models.spec import image_size

    settings: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise invalid("setting", word, "key=value", "natrain viz windows model=dinat_tiny img_size=384")
        try:
            settings[key.removeprefix("model.args.")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise invalid(key, value, "a number, a word or a list", "img_size=[384,512]") from None
    name = settings.pop("model", None)
    if name is None or name.split(".")[0] not in list_models():
        best = nearest(str(name), list_models()) or "dinat_tiny"
        raise invalid("model", name, "a model of natrain (`natrain models` lists them)", f"model={best}")
    size = image_size(settings.pop("img_size", default_input(name)["img_size"]))
    with torch.device("meta"):
        return name, timm.create_model(name, img_size=size, **settings), size


def _query(text: str | None, size: tuple[int, int]) -> tuple[int, int]:
    if text is None:
        return size[0] // 2, size[1] // 2
    try:
        row, column = map(int, text.split(","))
    except ValueError:
        raise invalid("--query", text, "row,column in pixels", f"--query {size[0] // 2},{size[1] // 2}") from None
    return row, column


def _only(words: list[str], what: str) -> str:
    if len(words) != 1:
        raise invalid(what, " ".join(words), f"one {what}", f"natrain viz ... {words[0]}")
    return words[0]
