"""Times of a model in torch and in its exported forms on this CPU: bench_export.py [MODEL] [FORM:PRECISION ...]"""

import sys
import tempfile
from pathlib import Path

import timm

from natrain.export.timing import HEADER, compare
from natrain.models.registry import default_input

if __name__ == "__main__":
    words = sys.argv[1:]
    name = words.pop(0) if words and ":" not in words[0] else "nat_mini"
    forms = [tuple(word.split(":")) for word in words] or [("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "int8")]
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(timm.create_model(name), default_input(name), Path(folder), forms, batch=1, rounds=9)
    print("\n".join([HEADER, *map(str, rows)]))
