"""What a model can become: one entry of ``TARGETS`` a form; written under a temporary name, checked, then named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from natrain.errors import invalid, nearest
from natrain.export import aoti, onnx, program
from natrain.export.graph import set_kernel

TOLERANCE = 1e-4  # largest difference of a float32 logit between the written file and the model in torch
BATCHES = (1, 3)  # neither is the batch that was traced


@dataclass(frozen=True)
class Target:
    """A form: where ``--help`` and errors take their words from, and the three functions that make it.

    Attributes:
        suffix: what file names end in.
        meaning: one line.
        precisions: what it can compute in.
        devices: what it can be made for.
        check_install: raises ValueError where a package that it needs is missing.
        write: ``(model, input, path, metadata, precision, device, decompose)`` writes the file.
        load: ``path, device`` to a function from images to logits, as a user would load it.
        only_decomposed: the form never holds natrain's operators.
    """

    suffix: str
    meaning: str
    precisions: tuple[str, ...]
    devices: tuple[str, ...]
    check_install: Callable[[], None]
    write: Callable[..., None]
    load: Callable[[Path, str], Callable[[Tensor], Tensor]]
    only_decomposed: bool


TARGETS = {
    "onnx": Target(
        ".onnx", "ONNX with standard operators", ("fp32", "fp16", "int8"), ("cpu",),
        onnx.check_install, onnx.write, onnx.load, True,
    ),
    "torch-export": Target(
        ".pt2", "torch.export program", ("fp32", "fp16", "bf16"), ("cpu", "cuda"),
        lambda: None, program.write, program.load, False,
    ),
    "aoti": Target(
        ".pt2", "AOTInductor package, compiled for this machine", ("fp32", "fp16", "bf16"), ("cpu", "cuda"),
        aoti.check_install, aoti.write, aoti.load, True,
    ),
}  # fmt: skip


def export(
    model: nn.Module,
    input: dict[str, Any],
    to: str,
    out: Path,
    *,
    precision: str = "fp32",
    device: str = "cpu",
    decompose: bool = False,
    description: dict[str, Any] | None = None,
) -> float:
    """Write ``model`` in the form ``to`` and compare what was written with it.

    Args:
        model: a classifier of this package; left as it is.
        input: ``in_chans`` and ``img_size`` of its images, [height, width].
        to: a name of TARGETS.
        out: the file; its folder is made.
        precision: fp32, fp16, bf16, int8 (weights of matrix products), where the form has it.
        device: cpu or cuda: where the file will run.
        decompose: for torch-export, aten operators only, so that a machine without natrain runs it.
        description: plain values that travel in the file (class names, preprocessing), under the key ``natrain``.

    Returns:
        The largest difference of a logit from the model's in float32, over batches of 1 and 3 random images.

    Raises:
        ValueError: an argument not allowed, a package missing, or (fp32) a difference beyond TOLERANCE; no file is then
            left under ``out``.
    """
    target = _check(to, out, precision, device, decompose)
    metadata = {"natrain": json.dumps(description or {})}
    # The suffix stays last: AOTInductor takes no other name.
    temporary = out.with_name(f".{out.stem}.{os.getpid()}.tmp{out.suffix}")
    try:
        target.write(
            model, input, temporary, metadata, precision, device, decompose=decompose or target.only_decomposed
        )
        difference = _difference(model, input, target.load(temporary, device), device)
        if precision == "fp32" and not difference <= TOLERANCE:
            raise invalid(
                "--to",
                to,
                f"a file whose logits are within {TOLERANCE} of the model's; they differ by {difference:.3g}",
                "finite weights; if they are, please report this with the versions that `natrain doctor` shows",
            )
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return difference


def _check(to: str, out: Path, precision: str, device: str, decompose: bool) -> Target:
    if to not in TARGETS:
        raise invalid("--to", to, f"one of {', '.join(TARGETS)}", f"--to {nearest(to, TARGETS) or 'onnx'}")
    target = TARGETS[to]
    if out.suffix != target.suffix:
        fix = f"--out {out.with_suffix(target.suffix)}"
        raise invalid("--out", str(out), f"a file that ends in {target.suffix}", fix)
    if precision not in target.precisions:
        raise invalid("--precision", precision, f"one of {', '.join(target.precisions)} for {to}", "--precision fp32")
    if device not in target.devices:
        raise invalid("--device", device, f"one of {', '.join(target.devices)} for {to}", "--device cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise invalid("--device", device, "cpu: torch sees no CUDA device here", "--device cpu")
    if decompose and target.only_decomposed:
        raise invalid("--decompose", True, f"an option of torch-export; {to} is always decomposed", "without it")
    target.check_install()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise invalid(
            "--out", str(out), f"a file in a folder that can be made ({error})", "--out model.onnx"
        ) from error
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise invalid("--out", str(out), "a file, in a folder that can be written to", f"--out {out.name}")
    return target


def _difference(model: nn.Module, input: dict[str, Any], run: Callable[[Tensor], Tensor], device: str) -> float:
    """Largest difference of a logit between ``run`` and the model with the reference kernel, on the CPU."""
    truth = set_kernel(model, "reference").cpu()
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    with torch.inference_mode():
        for batch in BATCHES:
            images = torch.randn(batch, input["in_chans"], *input["img_size"], generator=generator)
            difference = (run(images.to(device)).cpu().double() - truth(images).double()).abs().max().item()
            # A NaN is not the largest of anything; it must not pass for agreement.
            worst = max(worst, difference) if difference == difference else float("nan")
            if worst != worst:
                break
    return worst
