"""The command line: ``natrain COMMAND ...``.

Each command is a module with ``add_arguments``, ``run`` and, where ``--help`` needs more, ``epilog``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys

import natrain
from natrain import env
from natrain.errors import Stopped, nearest

# command -> (module, one-line meaning); modules are imported when their command runs.
COMMANDS = {
    "train": ("train", "train a model: natrain train model=nat_mini data=imagefolder data.root=DIR"),
    "finetune": ("finetune", "train a checkpoint on: natrain finetune checkpoint=FILE data=imagefolder data.root=DIR"),
    "eval": ("evaluate", "accuracy of a checkpoint: natrain eval checkpoint=FILE"),
    "predict": ("predict", "classes of images: natrain predict IMAGE... --checkpoint FILE --topk 5"),
    "viz": ("viz", "pictures: natrain viz attention IMAGE --checkpoint FILE; viz rpb FILE; viz windows model=NAME"),
    "import": ("import_", "checkpoints of other code: natrain import CHECKPOINT --out model.safetensors"),
    "export": ("export", "models for other programs: natrain export --checkpoint FILE --to onnx --out model.onnx"),
    "surgery": ("surgery", "weights for another size: natrain surgery IN OUT kernel_size=11 img_size=384"),
    "models": ("models", "models, their parameters and input sizes: natrain models 'dinat*'"),
    "kernels": ("kernels", "attention kernels and what each can do; build, tune, list, clear: compiled ones"),
    "bench": ("bench", "kernels on one problem: natrain bench shape=56x56 heads=2 head_dim=32 kernel_size=7"),
    "ablate": ("ablate", "many problems, models or trainings from a yaml: natrain ablate ablation=nat_layers"),
    "report": ("report", "a page of results: natrain report runs/ablations/NAME"),
    "doctor": ("doctor", "versions, devices, and which kernels work here and why not"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``natrain``; ``sys.argv[1:]`` by default.

    Returns:
        The exit code: 0, 1 where work failed or stopped, 2 for an error of the caller, 141 where the reader of the
        output left.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        suggestion = nearest(argv[0], COMMANDS)
        return _complain(
            f"unknown command {argv[0]!r}"
            + (f": did you mean {suggestion!r}?" if suggestion else f": expected one of {', '.join(COMMANDS)}")
        )
    if not argv or argv[0] not in COMMANDS:
        parser.parse_args(argv or ["--help"])
        return 0
    module = importlib.import_module(f"natrain.cli.{COMMANDS[argv[0]][0]}")
    command = argparse.ArgumentParser(
        prog=f"natrain {argv[0]}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--traceback", action="store_true", help="show where an error was raised")
    module.add_arguments(command)
    if {"-h", "--help"} & set(argv) and hasattr(module, "epilog"):
        command.epilog = module.epilog()
    arguments, unknown = command.parse_known_intermixed_args(argv[1:])
    if unknown:
        key = unknown[0].lstrip("-")
        hint = f"settings have no dashes: {key}" if "=" in key else f"`natrain {argv[0]} --help` lists the options"
        return _complain(f"unknown option {unknown[0]!r}: {hint}")
    try:
        code = module.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, Stopped, ModuleNotFoundError) as error:
        if arguments.traceback or env.read("NATRAIN_DEBUG"):
            raise
        code = _complain(str(error))
        return 1 if isinstance(error, Stopped) else code
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    lines = [f"  {name:9}{meaning}" for name, (_, meaning) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="natrain",
        usage="natrain COMMAND ...",
        description="Train, fine-tune and ablate Neighborhood Attention Transformers.",
        epilog="\n".join(["commands:", *lines, "", "`natrain COMMAND --help` says more."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"natrain {natrain.__version__}")
    return parser


def _complain(message: str) -> int:
    print(f"natrain: error: {message}", file=sys.stderr)
    return 2
