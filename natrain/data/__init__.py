"""Images for training and evaluation: data sets, augmentation, order, and what happens to unreadable files."""

from natrain.data.datamodule import ImageDataModule, build_datamodule
from natrain.data.transforms import build_eval_transform

__all__ = ["ImageDataModule", "build_datamodule", "build_eval_transform"]
