"""ONNX files: the reference kernel's operators in the standard domain, a dynamic batch, no path of this machine."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from natrain.errors import invalid
from natrain.export.graph import trace

OPSET = 20  # the first with Gelu; LayerNormalization came with 17


def check_install() -> None:
    """ValueError unless onnx, onnxscript (torch's exporter) and onnxruntime (the check) are there."""
    missing = [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None]
    if missing:
        raise invalid("--to", "onnx", f"a form whose packages are installed; missing: {', '.join(missing)}",
                      "pip install 'natrain[export]'")  # fmt: skip


def write(
    model: nn.Module,
    input: dict[str, Any],
    path: Path,
    metadata: dict[str, str],
    precision: str,
    device: str,
    decompose: bool,
) -> None:
    """Input ``images`` float32 [batch, in_chans, height, width], output ``logits`` float32 [batch, classes]."""
    import onnx

    assert decompose, "a standard file has none of natrain's operators"
    program = trace(model, input, decompose=True, precision="fp32" if precision == "int8" else precision, device=device)
    with _quiet():
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=["images"], output_names=["logits"], verbose=False
        )
    proto = exported.model_proto
    for node in [*proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output]:
        # Names of files and lines of the machine that exported.
        del node.metadata_props[:]
    foreign = {node.domain for node in proto.graph.node} - {"", "ai.onnx"}
    assert not foreign, f"operators of {foreign} in the graph"
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(proto)
    onnx.save(proto, path)
    if precision == "int8":
        _quantise(path)


def _quantise(path: Path) -> None:
    """Weights of matrix products as int8, activations quantised while running."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().addFilter(_without_preprocessing_hint)
    try:
        quantize_dynamic(
            path, path, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
    finally:
        logging.getLogger().removeFilter(_without_preprocessing_hint)


def _without_preprocessing_hint(record: logging.LogRecord) -> bool:
    return "pre-processing before quantization" not in record.getMessage()


class _quiet(warnings.catch_warnings):
    """Without the exporter's notes about its own internals."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)


def load(path: Path, device: str) -> Callable[[Tensor], Tensor]:
    """The file in onnxruntime on the CPU, with as many threads as torch, as a function of tensors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
