"""Training, evaluation and checkpoints."""

from natrain.training.checkpoint import LoadedModel, load_for_inference
from natrain.training.evaluate import evaluate
from natrain.training.run import TrainResult, train
from natrain.training.validate import validate

__all__ = ["LoadedModel", "TrainResult", "evaluate", "load_for_inference", "train", "validate"]
