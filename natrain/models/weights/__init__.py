"""Checkpoints of every origin: ``load_weights`` reads them, ``save_weights`` and ``export_weights`` write them."""

from natrain.models.weights.exporting import EXPORTS, export_weights
from natrain.models.weights.loading import Weights, load_into, load_weights, save_weights

__all__ = ["EXPORTS", "Weights", "export_weights", "load_into", "load_weights", "save_weights"]
