"""Compare kernels on one problem: forward, backward, memory, TFLOP/s, GB/s, share of the floor, error against float64.

  natrain bench op=na2d shape=56x56 heads=2 head_dim=32 kernel_size=7 batch=128 dtype=bf16 kernels=naive,flex,sdpa
Further words: dilation, stride, is_causal, rpb (per axis joined by x: dilation=8x4); device=cuda|cpu; runs;
threads (on a CPU, each on a core of its own);
timer=device (the device's time), graph (of graph replays) or events (the caller's, with its gaps); cache=cold or warm.
Contenders besides natrain's kernels: flex (FlexAttention, compiled), sdpa (scaled_dot_product_attention with the
neighbourhood as mask), dense (attention to everything, another function); natten, natten-naive, natten-gemm and
natten-BACKEND where NATTEN is installed. One that cannot do it is listed with the reason."""

from __future__ import annotations

import argparse

from natrain.errors import invalid

SETTINGS = {"kernels": None, "device": None, "runs": "30", "timer": "device", "cache": "cold", "threads": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="+", metavar="key=value", help="the problem, and kernels=A,B")


def run(arguments: argparse.Namespace) -> int:
    from natrain.bench.ahead import Ahead
    from natrain.bench.arms import find_arm
    from natrain.bench.case import WORDS, Case, meant
    from natrain.bench.ceilings import copy_bytes_per_s
    from natrain.bench.environment import device_name
    from natrain.bench.one import heading, refusals, table, text_of
    from natrain.bench.run_case import Setup, close_calls, run_case
    from natrain.bench.sweep import checked_device
    from natrain.bench.threads import computing_on

    words = {}
    for word in arguments.words:
        key, equals, value = word.partition("=")
        if not equals or key not in (*SETTINGS, *WORDS):
            names = [*WORDS, *SETTINGS]
            raise invalid("setting", word, f"one of {', '.join(names)}", f"{meant(key, names)}=...")
        words[key] = value
    settings = {**SETTINGS, **{key: words.pop(key) for key in SETTINGS if key in words}}
    case = Case.of(words)
    device = checked_device(settings["device"])
    _check(settings)
    names = settings["kernels"].split(",") if settings["kernels"] else _default_arms(case, device)
    arms = [find_arm(name) for name in dict.fromkeys(names)]
    setup = Setup(device, int(settings["runs"]), settings["timer"], settings["cache"])
    if device == "cuda":
        Ahead().compile([(case, names)])
    threads = settings["threads"] and int(settings["threads"])
    with computing_on(device, threads, "threads="):
        bytes_per_s = copy_bytes_per_s(device)
        outcomes = list(run_case(case, {arm: ("forward", "backward") for arm in arms}, setup))
        print(heading(case, setup, bytes_per_s, device_name(device)))
    print(text_of(table(case, sorted(outcomes, key=lambda o: names.index(o.arm)), bytes_per_s, device)))
    for line in refusals(outcomes):
        print(line)
    for line in close_calls(outcomes, names[0]):
        print(f"warning: {line}")
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


def _check(settings: dict) -> None:
    from natrain.bench.measure import TIMERS

    choices = {"timer": TIMERS, "cache": ("cold", "warm")}
    for key, allowed in choices.items():
        if settings[key] not in allowed:
            raise invalid(key, settings[key], f"one of {', '.join(allowed)}", f"{key}={allowed[0]}")
    if not settings["runs"].isdigit() or int(settings["runs"]) < 3:
        raise invalid("runs", settings["runs"], "a whole number >= 3, for an interval", "runs=30")
    if settings["threads"] is not None and not settings["threads"].isdigit():
        raise invalid("threads", settings["threads"], "a whole number >= 1", "threads=1")


def _default_arms(case, device: str) -> list[str]:
    """Every kernel that can, and the peers that need no installation."""
    from natrain.bench.arms import KernelArm
    from natrain.bench.peers import PEERS
    from natrain.ops.registry import list_kernels

    kernels = [name for name in list_kernels() if not KernelArm(name).reasons(case, device, "forward")]
    return kernels + [name for name in ("flex", "sdpa") if not PEERS[name].reasons(case, device, "forward")]
