"""Names that only the models and kernels know: checked before anything is built."""

from __future__ import annotations

import timm
from omegaconf import DictConfig, ListConfig

from natrain.errors import invalid, nearest
from natrain.models import list_models
from natrain.ops.registry import get_kernel


def check_names(config: DictConfig) -> None:
    """Raise ValueError, with the nearest valid name, for an unknown model or kernel."""
    check_model(config.model.name)
    for kernel in config.kernel if isinstance(config.kernel, ListConfig) else [config.kernel]:
        if kernel != "auto":
            get_kernel(kernel)


def check_model(name: str) -> None:
    """Names are ``ARCHITECTURE`` or ``ARCHITECTURE.TAG``; a source such as ``hf-hub:...`` is timm's to judge."""
    architecture, _, tag = name.partition(".")
    if ":" in name:
        return
    if not timm.is_model(architecture):
        best = nearest(name, list_models()) or nearest(name, timm.list_models())
        raise invalid(
            "model", name, "a model of natrain or timm (`natrain models` lists ours)", f"model={best or 'nat_tiny'}"
        )
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        fix = f"{architecture}.{nearest(tag, tags)}" if nearest(tag, tags) else architecture
        raise invalid("model", name, f"a tag of {architecture}: {', '.join(tags) or 'it has none'}", f"model={fix}")
