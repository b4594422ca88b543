"""Scoring a checkpoint on the validation images."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import lightning
from omegaconf import DictConfig, OmegaConf
from torch import nn

from natrain.data import build_datamodule
from natrain.errors import invalid
from natrain.models.registry import pretrained_source
from natrain.training.build import is_ours
from natrain.training.checkpoint import LoadedModel, load_for_inference, open_checkpoint, shorten
from natrain.training.console import logging_to
from natrain.training.launch import cluster_environment, launch
from natrain.training.plan import device_count, device_kind, global_rank
from natrain.training.run import PRECISION
from natrain.training.score import cut, score
from natrain.training.validate import check_values

VAL_BATCH = 128  # images per device and forward pass where data.val_batch is null


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Score raw and averaged weights on the validation images, each image exactly once.

    The model, its classes and its preprocessing come out of ``checkpoint``, or out of the published weights where
    ``model.args.pretrained`` asks for them; what ``data`` sets wins over the preprocessing.

    Returns:
        ``top1``, ``top5`` (percent), ``loss``, ``images``; ``ema_*`` where there are averaged weights; ``checkpoint``.

    Raises:
        ValueError: a checkpoint that is missing or cannot be used, or whose classes are not those of the data.
    """
    if cfg.checkpoint is None and cfg.model.args.get("pretrained") and is_ours(cfg.model.name):
        cfg = OmegaConf.merge(cfg, {"checkpoint": pretrained_source(cfg.model.name)})
    if cfg.checkpoint is None:
        raise invalid("checkpoint", None, "a checkpoint file", "checkpoint=runs/NAME/checkpoints/best.ckpt")
    check_values(cfg)
    return launch(evaluate_rank, OmegaConf.to_container(cfg, resolve=True), cfg.trainer)


def evaluate_rank(plain: dict[str, Any]) -> dict[str, Any]:
    """One process of an evaluation."""
    with logging_to(None):
        return _evaluate(OmegaConf.create(plain))


def _evaluate(cfg: DictConfig) -> dict[str, Any]:
    devices, nodes = device_count(cfg.trainer)
    kind = device_kind(cfg.trainer.accelerator)
    fabric = lightning.Fabric(
        accelerator="gpu" if kind == "cuda" else "cpu",
        devices=devices,
        num_nodes=nodes,
        strategy="ddp" if devices * nodes > 1 else "auto",
        precision=PRECISION[cfg.precision],
        plugins=[cluster_environment()],
    )
    fabric.launch()
    models, loaded = _models(cfg)
    data = build_datamodule(cfg.data, cfg.augment, input=loaded.input, micro_batch=VAL_BATCH // 2, seed=cfg.seed)
    found = list(data.class_names)
    _check_classes(loaded.class_names if loaded.is_named else found[: len(loaded.class_names)], found)
    for model in models.values():
        model.to(fabric.device)
    limit = cfg.trainer.limit_val_batches
    scores = score(
        models,
        cut(data.val_loader(global_rank(), devices * nodes, devices), limit),
        device=fabric.device,
        autocast=fabric.autocast,
        expected=data.num_val if limit is None else None,
    )
    result: dict[str, Any] = {"checkpoint": cfg.checkpoint}
    for name, values in scores.items():
        prefix = "" if name == "raw" else f"{name}_"
        result |= {f"{prefix}{key}": value for key, value in asdict(values).items()}
    return result


def _models(cfg: DictConfig) -> tuple[dict[str, nn.Module], LoadedModel]:
    """The raw and, where the file has them, the averaged weights, each in a model of its own."""
    given = {key: cfg.data.get(key) for key in ("img_size", "mean", "std", "crop_pct", "interpolation")}
    changes = {
        key: value for key, value in OmegaConf.to_container(OmegaConf.create(given)).items() if value is not None
    }
    kernel = OmegaConf.to_object(cfg).get("kernel")
    options = {"kernel": None if kernel == "auto" else kernel, "input_changes": changes}
    options["model"] = cfg.model.name if is_ours(cfg.model.name) else None
    loaded = load_for_inference(cfg.checkpoint, weights="raw", **options)
    channels = loaded.input["in_chans"]
    if cfg.data.get("in_chans") not in (None, channels):
        raise invalid("data.in_chans", cfg.data.in_chans, f"{channels}, as in the checkpoint", "data.in_chans=null")
    models = {"raw": loaded.model}
    if "ema_state_dict" in open_checkpoint(cfg.checkpoint, options["model"]):
        models["ema"] = load_for_inference(cfg.checkpoint, weights="ema", **options).model
    return models, loaded


def _check_classes(trained: list[str], found: list[str]) -> None:
    if len(trained) != len(found):
        raise invalid(
            "data",
            f"{len(found)} classes",
            f"the {len(trained)} classes of the checkpoint ({shorten(trained)})",
            "data.root=DIR with the classes it was trained on",
        )
    for number, (ours, theirs) in enumerate(zip(trained, found, strict=True)):
        if ours != theirs:
            raise invalid(
                "data",
                f"class {number} named {theirs!r}",
                f"{ours!r}, as in the checkpoint: outputs are matched to classes by their order",
                "data.root=DIR with the classes it was trained on",
            )
