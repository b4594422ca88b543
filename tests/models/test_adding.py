"""The steps of natrain/models/README.md, done: the example becomes a module, and timm makes the model."""

from __future__ import annotations

import importlib.util
import re
import sys

import timm
import torch

from natrain.models import registry


def test_the_example_adds_a_model(repository, tmp_path, monkeypatch) -> None:
    text = (repository / "natrain" / "models" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "pico.py").write_text(re.search(r"```python\n(.*?)```", text, re.S)[1], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("pico", tmp_path / "pico.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pico", module)
    monkeypatch.setattr(registry, "_names", list(registry._names))
    spec.loader.exec_module(module)
    assert "nat_pico" in registry.list_models("nat_*")
    with torch.device("meta"):
        model = timm.create_model("nat_pico", num_classes=5)
        assert model(torch.empty(1, 3, 224, 224)).shape == (1, 5)
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
