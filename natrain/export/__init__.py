"""Models that leave the house: ONNX files, exported torch programs, AOTInductor packages; each checked when written."""

from natrain.export.targets import TARGETS, Target, export

__all__ = ["TARGETS", "Target", "export"]
