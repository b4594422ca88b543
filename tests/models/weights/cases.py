"""Every family at the full architecture of its smallest variant, as an original tree; and files in each layout."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from safetensors.torch import save_file
from torch import nn

from tests.models.weights.huggingface import ForImageClassification
from tests.models.weights.original import Hierarchical, Isotropic, randomise

PLAIN = [(1,) * 3, (1,) * 4, (1,) * 6, (1,) * 5]
DILATED = [(1, 8, 1), (1, 4, 1, 4), (1, 2) * 3, (1,) * 5]
DILATED_S = [(1, 8), (1, 4), (1, 2) * 3, (1, 1)]
DEEP = [(1,) * 3, (1,) * 4, (1,) * 18, (1,) * 5]


@dataclass(frozen=True)
class Family:
    """``make`` builds the original; ``hf`` the tree of Hugging Face where that library has such a class."""

    make: Callable[..., nn.Module]
    hf: Callable[[], nn.Module] | None = None


FAMILIES = {
    "nat_mini": Family(
        lambda: Hierarchical("levels", 64, 2, PLAIN, 3), lambda: ForImageClassification("nat", 64, 2, PLAIN, 3)
    ),
    "dinat_mini": Family(
        lambda: Hierarchical("levels", 64, 2, DILATED, 3), lambda: ForImageClassification("dinat", 64, 2, DILATED, 3)
    ),
    # The smallest with layer scale.
    "nat_small": Family(
        lambda: Hierarchical("levels", 96, 3, DEEP, 2, layer_scale=True),
        lambda: ForImageClassification("nat", 96, 3, DEEP, 2, layer_scale=True),
    ),
    "dinat_s_tiny": Family(lambda: Hierarchical("layers", 96, 3, DILATED_S, 4)),
    "nat_isotropic_small": Family(lambda: Isotropic(384, 12, (1,) * 12)),
    "dinat_isotropic_small": Family(lambda: Isotropic(384, 12, (1, 2) * 6)),
    "vitrpb_small": Family(lambda: Isotropic(384, 12, (0,) * 12)),
}


def original(variant: str, layout: str = "official") -> nn.Module:
    """The random original of a variant, in the tree that ``layout`` needs."""
    family = FAMILIES[variant]
    return randomise(family.hf() if layout == "hf" else family.make())


def write(model: nn.Module, variant: str, layout: str, folder: Path) -> Path:
    """Store ``model`` as users of that layout have it; the path to import."""
    return WRITERS[layout](model, variant, folder)


def _official(model: nn.Module, variant: str, folder: Path) -> Path:
    path = folder / f"{variant}_in1k_224.pth"
    torch.save(model.state_dict(), path)
    return path


def _official_wrapped(model: nn.Module, variant: str, folder: Path) -> Path:
    """As a training run with several GPUs leaves it: wrapped, prefixed, with averaged weights beside raw ones."""
    path = folder / f"{variant}.pth.tar"
    average = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    raw = {name: torch.zeros_like(tensor) for name, tensor in average.items()}
    torch.save({"model": raw, "model_ema": {"state_dict": average}, "epoch": 3}, path)
    return path


def _hf(model: nn.Module, variant: str, folder: Path) -> Path:
    backbone = getattr(model, model.base)
    levels = backbone.encoder["levels"]
    config = {
        "model_type": model.base,
        "embed_dim": backbone.layernorm.normalized_shape[0] // 8,
        "depths": [len(level.layers) for level in levels],
        "num_channels": 3,
        "id2label": {str(number): f"class of {number}" for number in range(11)},
    }
    if model.base == "dinat":
        config["dilations"] = [[layer.window // 7 for layer in level.layers] for level in levels]
    (folder / "config.json").write_text(json.dumps(config))
    processor = {"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True, "resample": 3}
    processor |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _hf_bin(model: nn.Module, variant: str, folder: Path) -> Path:
    _hf(model, variant, folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def _timm(model: nn.Module, variant: str, folder: Path) -> Path:
    """The folder that timm pushes to the hub."""
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    cfg = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.9, "license": "mit"}
    config = {"architecture": variant, "num_classes": 11, "pretrained_cfg": {**cfg, "interpolation": "bilinear"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _timm_run(model: nn.Module, variant: str, folder: Path) -> Path:
    """The file that timm's training script writes: names of torch.compile, its arguments as a Namespace."""
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    path = folder / "model_best.pth.tar"
    content = {"epoch": 1, "arch": variant, "state_dict": state, "args": argparse.Namespace(model=variant, lr=1e-3)}
    torch.save(content, path)
    return path


class Task(lightning.LightningModule):
    """Somebody's own module, with more in it than the network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("class_weights", torch.ones(11))


def _lightning(model: nn.Module, variant: str, folder: Path) -> Path:
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder)
    trainer.strategy.connect(Task(copy.deepcopy(model)))
    path = folder / f"{variant}-epoch=1.ckpt"
    trainer.save_checkpoint(path)
    return path


WRITERS = {
    "official": _official,
    "official, wrapped": _official_wrapped,
    "hf": _hf,
    "hf, bin": _hf_bin,
    "timm": _timm,
    "timm, run": _timm_run,
    "lightning": _lightning,
}
