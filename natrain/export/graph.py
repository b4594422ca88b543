"""From a model to one traced graph with a dynamic batch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MAX_BATCH = 4096  # torch.export wants a bound; no larger batch is checked or refused when the graph runs


class _Cast(nn.Module):
    """float32 images in, float32 logits out, whatever ``model`` computes in."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model.to(dtype)
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype)).float()


def set_kernel(model: nn.Module, kernel: str) -> nn.Module:
    """A float32 copy of ``model`` in evaluation mode whose attention layers take ``kernel``."""
    model = copy.deepcopy(model).float().eval()
    for module in model.modules():
        if hasattr(module, "kernel") and hasattr(module, "window"):
            module.kernel = kernel
    return model


def trace(model: nn.Module, input: dict[str, Any], *, decompose: bool, precision: str, device: str) -> ExportedProgram:
    """``model`` on float32 images [batch, in_chans, height, width], batch free, as a graph.

    Args:
        model: in any mode and dtype, on any device; left as it is.
        input: ``in_chans`` and ``img_size`` of its images.
        decompose: every operator of natrain becomes aten operators (those of the reference kernel); else it stays one
            operator with ``kernel="auto"``, which chooses where the graph runs.
        precision: fp32, fp16 or bf16: what parameters and most operators are; attention accumulates in float32.
        device: where the graph will run; decomposed graphs hold constants of that device.
    """
    model = set_kernel(model, "reference" if decompose else "auto")
    model = (model if precision == "fp32" else _Cast(model, DTYPES[precision])).to(device).eval()
    images = torch.zeros(2, input["in_chans"], *input["img_size"], device=device)
    batch = Dim("batch", min=1, max=MAX_BATCH)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
        return program.run_decompositions() if decompose else program


def operators(program: ExportedProgram) -> set[str]:
    """Names of the torch operators in the graph, ``namespace.operator``."""
    nodes = [node.target for module in program.graph_module.modules() for node in module.graph.nodes]
    return {str(target).rsplit(".", 1)[0] for target in nodes if isinstance(target, torch._ops.OpOverload)}
