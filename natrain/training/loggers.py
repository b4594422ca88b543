"""Weights & Biases and TensorBoard, where the configuration asks for them."""

from __future__ import annotations

import secrets
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from natrain.training.checkpoint import write_atomically

RUN_ID = "wandb_id.txt"


class RunLogger(WandbLogger):
    """Ends its run with the training, so that the next training in this process does not write into it."""

    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish()
            self._experiment = None


def build_loggers(cfg: DictConfig, folder: Path) -> list[Logger]:
    """The loggers that ``logger.wandb.enabled`` and ``logger.tensorboard.enabled`` switch on.

    A resumed run goes on in the same Weights & Biases run: its id lies in the run folder.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """
    loggers: list[Logger] = []
    if cfg.logger.wandb.enabled:
        settings = cfg.logger.wandb
        loggers.append(
            RunLogger(
                name=cfg.name,
                project=settings.project,
                entity=settings.entity,
                save_dir=folder,
                offline=settings.mode == "offline",
                id=_run_id(folder),
                resume="allow",
                config=OmegaConf.to_container(cfg, resolve=True),
            )
        )
    if cfg.logger.tensorboard.enabled:
        loggers.append(TensorBoardLogger(save_dir=folder, name="tensorboard", version=""))
    return loggers


def _run_id(folder: Path) -> str:
    path = folder / RUN_ID
    if not path.is_file():
        write_atomically(path, lambda file: file.write(secrets.token_hex(4).encode()))
    return path.read_text().strip()
