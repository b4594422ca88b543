"""The cpu kernel's numbers in docs/performance.md: layers beside torch.mm and dense attention, then models."""

import argparse

import torch

from natrain.bench import cpu

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="1: the process's own time, for busy machines")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--reference", action="store_true", help="time the reference kernel too (slow)")
    parser.add_argument("--warm", action="store_true", help="time a layer's call right after one like it")
    parser.add_argument(
        "--models",
        nargs="*",
        default=["nat_tiny", "swin_tiny_patch4_window7_224"],
        metavar="NAME",
        help=f"timm names, {cpu.CHANNELS_LAST} behind them for that layout",
    )
    parser.add_argument("--batch", type=int, default=8, help="images of the models' steps")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cpu.layer_table(arguments.runs, arguments.reference, arguments.warm)
    if arguments.models:
        cpu.model_table(tuple(arguments.models), arguments.batch, arguments.runs)
