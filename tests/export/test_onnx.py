"""ONNX files: standard operators, any batch, onnxruntime's logits within 1e-4 of torch's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

import natrain
from natrain.export import export
from natrain.models.weights import load_into, load_weights
from tests.export.helpers import INPUT, images_of, logits_of, run_without_natrain, small_model

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'natrain[export]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'natrain[export]'")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'natrain[export]'")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(model, path of its ONNX file)."""
    model, path = small_model(), tmp_path_factory.mktemp("onnx") / "model.onnx"
    description = {"class_names": ["a", "b", "c", "d"], "input": {**INPUT, "img_size": [9, 7]}}
    assert export(model, INPUT, "onnx", path, description=description) <= 1e-4
    return model, path


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_logits(written):
    model, path = written
    session = session_of(path)
    for batch in (1, 2, 5):
        (logits,) = session.run(["logits"], {"images": images_of(batch).numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), logits_of(model, images_of(batch)), atol=1e-4, rtol=0)


def test_standard_operators_only(written):
    proto = onnx.load(written[1])
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    assert not proto.functions and [entry.domain for entry in proto.opset_import] == [""]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_what_travels_in_the_file(written):
    proto = onnx.load(written[1])
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(metadata["natrain"])["class_names"] == ["a", "b", "c", "d"]
    assert b"/natrain/layers/" not in written[1].read_bytes()


def test_a_process_without_torch_or_natrain_runs_it(written):
    model, path = written
    torch_logits = logits_of(model, torch.ones(3, 2, 9, 7))
    said = run_without_natrain(
        """
        import numpy, onnxruntime
        session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
        print(session.run(None, {"images": numpy.ones((3, 2, 9, 7), numpy.float32)})[0][0].tolist())
        assert "torch" not in sys.modules
        """,
        path.parent,
    )
    assert json.loads(said) == pytest.approx(torch_logits[0].tolist(), abs=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_smaller_precisions(tmp_path, precision):
    model = small_model()
    difference = export(model, INPUT, "onnx", tmp_path / "model.onnx", precision=precision)
    largest = logits_of(model, images_of(8)).abs().max().item()
    assert 1e-4 < difference < {"fp16": 0.01, "int8": 0.1}[precision] * largest
    proto = onnx.load(tmp_path / "model.onnx")
    kinds = {tensor.data_type for tensor in proto.graph.initializer if len(tensor.dims) == 2}
    assert {"fp16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT8}[precision] in kinds


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_smaller_precisions_keep_the_accuracy_of_a_trained_model(tmp_path, precision):
    """The shipped model of digits, on scikit-learn's images: docs/export.md says 99.28 % in every form."""
    digits = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn").load_digits()
    weights = load_weights(Path(natrain.__file__).parent / "models" / "weights" / "nat_digits.safetensors")
    model = timm.create_model(weights.model_name, **weights.model_args)
    load_into(model, weights)
    export(model, weights.input, "onnx", tmp_path / "model.onnx", precision=precision)
    images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - weights.input["mean"][0]) / (
        weights.input["std"][0]
    )
    (logits,) = session_of(tmp_path / "model.onnx").run(None, {"images": images.numpy()})
    assert (logits.argmax(1) == digits.target).mean() > 0.99
    assert (logits.argmax(1) == logits_of(model, images).argmax(1).numpy()).mean() > 0.995
