"""Assembly of a run: configuration in, trained checkpoint and its scores out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from omegaconf import DictConfig, OmegaConf

from natrain.data import build_datamodule
from natrain.errors import invalid
from natrain.models.weights.loading import refuse_pos_conversion
from natrain.training.build import build_model, load_initial_weights, model_input
from natrain.training.checkpoint import AtomicCheckpointIO, load_state, model_state, read_checkpoint, says
from natrain.training.console import logging_to
from natrain.training.ema import WeightAverage
from natrain.training.epoch import EpochEnd, EpochSeed
from natrain.training.finetune import freeze
from natrain.training.folder import CHECKPOINTS, METRICS, open_folder, resume_path, run_name
from natrain.training.launch import cluster_environment, launch
from natrain.training.loggers import build_loggers
from natrain.training.memory import explain_out_of_memory
from natrain.training.metrics import MetricsFile, draw_curves, read_metrics
from natrain.training.plan import Plan, device_kind, global_rank, make_plan
from natrain.training.report import Reporter, Terminated
from natrain.training.task import ClassificationTask
from natrain.training.validate import validate

logger = logging.getLogger("natrain.training")
# Without them equal the optimiser's state or the data's order would mean something else.
SAME_IN_RESUMED = (
    *("global_batch", "seed", "optim.name", "optim.layer_decay"),
    *("finetune.freeze_stages", "finetune.linear_probe"),
)
PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass(frozen=True)
class TrainResult:
    """Scores (percent) at the end of a run and where it lies.

    Attributes:
        top1, top5: of the raw weights after the last epoch.
        ema_top1: of the averaged weights after the last epoch; None without EMA.
        run_dir: the run folder.
        checkpoint: the best checkpoint.
    """

    top1: float
    top5: float
    ema_top1: float | None
    run_dir: str
    checkpoint: str


def train(cfg: DictConfig) -> TrainResult:
    """Train as ``cfg`` says (see configs/train.yaml for every key).

    With ``trainer.devices=N`` this process starts N others and waits for them; under torchrun or srun it is one of
    them.

    Raises:
        ValueError: a setting, a data set or a checkpoint that cannot be used; raised before training starts.
        RuntimeError: out of memory, a loss that is not finite, a rank that died.
        SystemExit: SIGTERM arrived (code 143); ``resume=auto`` continues after the last whole epoch.
    """
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    if cfg.name is None:
        cfg.name = run_name(cfg)
    validate(cfg)
    model_input(cfg)
    if global_rank() == 0:
        open_folder(cfg)
    return launch(train_rank, OmegaConf.to_container(cfg, resolve=True), cfg.trainer)


def train_rank(plain: dict[str, Any]) -> TrainResult:
    """One process of a run. Takes the configuration as a plain dict, since it may come from another process."""
    cfg = OmegaConf.create(plain)
    folder = Path(cfg.run_dir)
    lightning.seed_everything(cfg.seed, verbose=False)
    with logging_to(folder / "log.txt"):
        input = model_input(cfg)
        micro_batch = make_plan(cfg, cfg.global_batch).micro_batch
        data = build_datamodule(
            cfg.data,
            cfg.augment,
            input=input,
            micro_batch=micro_batch,
            seed=cfg.seed,
            global_batch=cfg.global_batch,
        )
        plan = make_plan(cfg, data.num_train)
        model = _initial_model(cfg, input, data.class_names)
        describe = _describe(cfg, input, data.class_names)
        task = ClassificationTask(model, cfg, plan, data.num_classes, describe)
        return _fit(cfg, folder, task, data)


def _initial_model(cfg: DictConfig, input: dict[str, Any], class_names: list[str]) -> torch.nn.Module:
    model = build_model(
        cfg.model.name,
        OmegaConf.to_container(cfg.model.args),
        num_classes=len(class_names),
        input=input,
        kernel=OmegaConf.to_object(cfg).get("kernel"),
    )
    if cfg.checkpoint is not None:
        fresh = load_initial_weights(
            model,
            cfg.checkpoint,
            class_names=class_names,
            head=cfg.finetune.head,
            head_init_scale=cfg.finetune.head_init_scale,
            surgery=cfg.finetune.surgery,
        )
        note = f"; {', '.join(fresh)} start anew (finetune.head={cfg.finetune.head})" if fresh else ""
        logger.info("initial weights from %s%s", cfg.checkpoint, note)
    freeze(model, cfg.finetune.freeze_stages, cfg.finetune.linear_probe)
    if cfg.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise invalid("grad_checkpointing", True, f"false: {cfg.model.name} has none", "grad_checkpointing=false")
        model.set_grad_checkpointing(True)
    if cfg.compile:
        model.compile()
    return model


def _describe(cfg: DictConfig, input: dict[str, Any], class_names: list[str]) -> dict[str, Any]:
    """What a checkpoint says about its model; plain values only, so that ``weights_only`` loads it."""
    return {
        "model_name": cfg.model.name,
        "model_args": OmegaConf.to_container(cfg.model.args),
        "kernel": OmegaConf.to_object(cfg)["kernel"],
        "class_names": [str(name) for name in class_names],
        "input": {key: list(value) if isinstance(value, tuple) else value for key, value in input.items()},
        "config": OmegaConf.to_container(cfg),
    }


def _fit(cfg: DictConfig, folder: Path, task: ClassificationTask, data: lightning.LightningDataModule) -> TrainResult:
    plan, rank = task.plan, global_rank()
    place = (rank, plan.world, plan.devices)
    resumed = resume_path(cfg)
    done_steps = check_resumable(task, resumed) if resumed is not None else 0
    metrics = MetricsFile(folder / METRICS, done_steps) if rank == 0 else None
    reporter = Reporter(metrics, cfg.trainer.log_every_steps, cfg.trainer.progress_bar)
    average = WeightAverage(cfg.ema.decay, cfg.ema.warmup) if cfg.ema.enabled else None
    after_epoch = EpochEnd(
        folder / CHECKPOINTS,
        data.val_loader(*place),
        data.num_val,
        cfg.trainer.limit_val_batches,
        average,
        reporter,
        resumed,
    )
    callbacks = [EpochSeed(cfg.seed), *([average] if average is not None else []), reporter, after_epoch]
    trainer = _make_trainer(cfg, plan, task.model, folder, callbacks)
    _announce(cfg, plan, task, data)
    try:
        with explain_out_of_memory(cfg, plan.micro_batch, plan.accumulation):
            trainer.fit(task, data.train_loader(*place), ckpt_path=resumed, weights_only=True)
    except Terminated:
        logger.info("stopped by SIGTERM at step %d; resume=auto continues after the last whole epoch", task.global_step)
        raise SystemExit(143) from None
    if rank == 0:
        draw_curves(read_metrics(folder / METRICS), folder / "curves.png", cfg.name)
    last, best = after_epoch.last, after_epoch.best
    logger.info("best top-1 %.2f %% (%s weights, epoch %d) in %s", best["top1"], best["weights"], best["epoch"], folder)
    return TrainResult(
        top1=last["top1"],
        top5=last["top5"],
        ema_top1=last.get("ema_top1"),
        run_dir=str(folder),
        checkpoint=str(folder / CHECKPOINTS / "best.ckpt"),
    )


def _make_trainer(
    cfg: DictConfig, plan: Plan, model: torch.nn.Module, folder: Path, callbacks: list[lightning.Callback]
) -> lightning.Trainer:
    kind = device_kind(cfg.trainer.accelerator)
    trainer = lightning.Trainer(
        accelerator="gpu" if kind == "cuda" else "cpu",
        devices=plan.devices,
        num_nodes=plan.num_nodes,
        strategy=_strategy(plan, kind, model),
        precision=PRECISION[cfg.precision],
        max_epochs=plan.epochs,
        max_steps=cfg.trainer.max_steps or -1,
        accumulate_grad_batches=plan.accumulation,
        limit_train_batches=plan.steps_per_epoch * plan.accumulation,
        limit_val_batches=0,  # EpochEnd evaluates: Lightning's loop knows neither averaged weights nor uneven ranks
        callbacks=callbacks,
        logger=build_loggers(cfg, folder) if global_rank() == 0 else False,
        plugins=[AtomicCheckpointIO(), cluster_environment()],
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    # It broadcasts and waits for the device before every batch; Reporter shares a SIGTERM at log steps instead.
    assert hasattr(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor")
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer


def _strategy(plan: Plan, kind: str, model: torch.nn.Module) -> Strategy | str:
    if plan.world == 1:
        return "auto"
    return DDPStrategy(
        process_group_backend="nccl" if kind == "cuda" else "gloo",
        gradient_as_bucket_view=True,
        # Only statistics (batch norm) drift apart; constant tables need no copy at every step.
        broadcast_buffers=any(buffer.is_floating_point() for buffer in model.buffers()),
    )


def check_resumable(task: ClassificationTask, path: Path) -> int:
    """Check that the run can go on from ``path``, say what changed since, and return the steps it has done.

    Raises:
        ValueError: weights only, another model, or settings under which its progress would mean something else.
    """
    checkpoint = read_checkpoint(path, "resume")
    if "optimizer_states" not in checkpoint or "hyper_parameters" not in checkpoint:
        raise invalid(
            "resume",
            str(path),
            "a checkpoint of a natrain run, with optimiser and epoch",
            f"checkpoint={path} to start from its weights",
        )
    load_state(task.model, model_state(checkpoint), argument="resume", path=path, says=says(checkpoint))
    told = checkpoint["hyper_parameters"]
    if hasattr(task.model, "pos"):
        refuse_pos_conversion(told["model_args"].get("pos", "rpb"), task.model.pos, str(path))
    if told["class_names"] != task.describe["class_names"]:
        raise invalid(
            "resume", str(path), "a run on the same classes as the data", f"checkpoint={path} for its weights"
        )
    before, now = OmegaConf.create(told["config"]), task.cfg
    for key in SAME_IN_RESUMED:
        value = OmegaConf.select(now, key)
        was = OmegaConf.select(before, key, default=value)  # a file of an older version lacks later settings
        if was != value:
            raise invalid(key, value, f"{was}, with which the run in {path} was trained", f"{key}={was}")
    for section in ("optim", "schedule", "augment", "ema", "precision"):
        if before[section] != now[section]:
            logger.info("since the checkpoint %s changed from %s to %s", section, before[section], now[section])
    return checkpoint["global_step"]


def _announce(cfg: DictConfig, plan: Plan, task: ClassificationTask, data: lightning.LightningDataModule) -> None:
    parameters, trained = (
        sum(parameter.numel() for parameter in task.model.parameters() if parameter.requires_grad or not is_trained)
        for is_trained in (False, True)
    )
    logger.info(
        "%s: %.3f M parameters%s, %d classes, run folder %s",
        *(cfg.model.name, parameters / 1e6),
        "" if trained == parameters else f", {trained / 1e6:.3f} M of them trained",
        data.num_classes,
        cfg.run_dir,
    )
    logger.info(
        "%d training and %d validation images; %d epochs of %d steps; "
        "global batch %d = %d devices x %d images x %d passes; peak lr %.3g",
        *(data.num_train, data.num_val, plan.epochs, plan.steps_per_epoch, cfg.global_batch),
        *(plan.world, plan.micro_batch, plan.accumulation, plan.lr),
    )
