"""What one eager call of natrain costs the host: microseconds around a kernel that does nothing but allocate.

The kernel that is measured with is registered by this script, so that every device gives the same path: checks,
operator, choice, autograd. ``floor`` is what torch asks for the least that does the same: an autograd.Function that
calls the kernel's methods.

    python scripts/bench_host.py [--device cuda] [--calls 2000] [--kernels fused naive]

``--kernels``: real kernels too, on one 8x8 image: the host's time only where the device's work is shorter.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import natrain
from natrain.ops import registry
from natrain.ops.registry import FusedKernel, Limits

BATCH = 50


class Nothing(FusedKernel):
    name, summary, priority = "nothing", "allocates its results", 1000
    limits = Limits(gqa=True, value_dim=True, key_mask=True)

    def forward(self, problem, q, k, v, rpb, key_mask, seed, scale, dropout_p):
        return v.new_empty(q.shape[:-1] + v.shape[-1:]), q.new_empty(q.shape[:-1], dtype=torch.float32)

    def backward(
        self, problem, d_out, d_lse, q, k, v, rpb, key_mask, out, lse, seed, scale, dropout_p, d_q, d_k, d_v
    ):  # fmt: skip
        return None if rpb is None else torch.empty_like(rpb)


class _Floor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, qkv, rpb):
        q, k, v = qkv.unbind(-3)
        out, lse = kernel.forward(None, q, k, v, rpb, None, None, 1.0, 0.0)
        ctx.kernel = kernel
        ctx.save_for_backward(qkv, rpb, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, d_out, d_lse):
        qkv, rpb, out, lse = ctx.saved_tensors
        d_qkv = torch.empty_like(qkv)
        q, k, v = qkv.unbind(-3)
        d_q, d_k, d_v = d_qkv.unbind(-3)
        d_rpb = ctx.kernel.backward(
            None, d_out, d_lse, q, k, v, rpb, None, out, lse, None, 1.0, 0.0, d_q, d_k, d_v
        )  # fmt: skip
        return None, d_qkv, d_rpb


@dataclass(frozen=True)
class Contender:
    """``call`` maps fresh leaves to out; ``leaves`` makes them."""

    call: Callable[..., torch.Tensor]
    leaves: Callable[[], list[torch.Tensor]]


def microseconds(run: Callable[[], object], calls: int) -> float:
    """Median over rounds of ``run``, which makes BATCH calls, per call; one round is not counted."""
    rounds = []
    for _ in range(calls // BATCH + 1):
        start = time.perf_counter()
        run()
        rounds.append((time.perf_counter() - start) * 1e6 / BATCH)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return statistics.median(rounds[1:])


def times_us(contender: Contender, calls: int, d_out: torch.Tensor) -> tuple[float, float, float]:
    """Inference, forward, backward; the backward of BATCH calls is one pass, as in a model."""
    leaves = [contender.leaves() for _ in range(BATCH)]

    def forward() -> list[torch.Tensor]:
        return [contender.call(*inputs) for inputs in leaves]

    with torch.no_grad():
        inference_us = microseconds(forward, calls)
    forward_us = microseconds(forward, calls)
    outs, inputs = forward(), [leaf for group in leaves for leaf in group]
    return (
        inference_us,
        forward_us,
        microseconds(lambda: torch.autograd.grad(outs, inputs, [d_out] * BATCH, retain_graph=True), calls),
    )


def contenders(device: str, kernels: list[str]) -> dict[str, Contender]:
    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, requires_grad=True)

    def packed() -> list[torch.Tensor]:
        return [leaf(1, 8, 8, 3, 2, 32), leaf(2, 13, 13)]

    def unpacked() -> list[torch.Tensor]:
        return [*(leaf(1, 8, 8, 2, 32) for _ in range(3)), leaf(2, 13, 13)]

    mask = torch.ones(1, 8, 8, dtype=torch.bool, device=device)
    kernel = registry.register(Nothing())
    window = ((7, 7), (1, 1), 1, (False, False))
    options = dict(key_mask=mask, scale=0.2, return_lse=True, kernel="nothing")
    found = {
        "torch, x * y": Contender(torch.mul, lambda: [leaf(1, 8, 8, 2, 32) for _ in range(2)]),
        "floor": Contender(lambda qkv, rpb: _Floor.apply(kernel, qkv, rpb)[0], packed),
        "na2d": Contender(lambda q, k, v, rpb: natrain.na2d(q, k, v, 7, rpb=rpb, kernel="nothing"), unpacked),
        "na2d, all options": Contender(
            lambda q, k, v, rpb: natrain.na2d(q, k, v, *window, rpb, **options)[0], unpacked
        ),
    }
    for name in ("nothing", *kernels):
        found[f"na2d_qkvpacked, {name}"] = Contender(
            lambda qkv, rpb, name=name: natrain.na2d_qkvpacked(qkv, 7, rpb=rpb, kernel=name), packed
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--kernels", nargs="*", default=[])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__} on {args.device}, us a call, median of rounds of {BATCH} calls")
    print(f"{'':<28}{'inference':>11}{'forward':>11}{'backward':>11}")
    d_out = torch.randn(1, 8, 8, 2, 32, device=args.device)
    for name, contender in contenders(args.device, args.kernels).items():
        print("{:<28}{:11.1f}{:11.1f}{:11.1f}".format(name, *times_us(contender, args.calls, d_out)), flush=True)


if __name__ == "__main__":
    main()
