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

import torch

import natrain
from natrain.ops import registry
from natrain.ops.registry import FusedKernel, Limits


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


def microseconds(call: Callable[[], object], calls: int) -> float:
    """Median over rounds of 100 calls, after one round that is not counted."""
    rounds = []
    for _ in range(calls // 100 + 1):
        start = time.perf_counter()
        for _ in range(100):
            call()
        rounds.append((time.perf_counter() - start) * 1e4)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return statistics.median(rounds[1:])


def contenders(device: str, kernels: list[str]) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """By name: a forward call, and one of forward and backward."""
    qkv = torch.randn(1, 8, 8, 3, 2, 32, device=device, requires_grad=True)
    rpb = torch.randn(2, 13, 13, device=device, requires_grad=True)
    d_out = torch.randn(1, 8, 8, 2, 32, device=device)
    mask = torch.ones(1, 8, 8, dtype=torch.bool, device=device)
    q, k, v = (t.detach().clone().requires_grad_() for t in qkv.unbind(-3))
    kernel = registry.register(Nothing())
    forwards = {
        "floor": (lambda: _Floor.apply(kernel, qkv, rpb)[0], (qkv, rpb)),
        "na2d_qkvpacked": (lambda: natrain.na2d_qkvpacked(qkv, 7, rpb=rpb, kernel="nothing"), (qkv, rpb)),
        "na2d": (lambda: natrain.na2d(q, k, v, 7, rpb=rpb, kernel="nothing"), (q, k, v, rpb)),
        "na2d, all options": (
            lambda: natrain.na2d(
                q, k, v, (7, 7), (1, 1), 1, (False, False), rpb, mask, 0.2, 0.0, True, kernel="nothing"
            )[0],
            (q, k, v, rpb),
        ),
    }

    for name in kernels:
        forwards[f"na2d_qkvpacked, {name}"] = (
            lambda name=name: natrain.na2d_qkvpacked(qkv, 7, rpb=rpb, kernel=name),
            (qkv, rpb),
        )

    def both(forward, inputs):
        return lambda: torch.autograd.grad(forward(), inputs, d_out)

    return {name: (forward, both(forward, inputs)) for name, (forward, inputs) in forwards.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--kernels", nargs="*", default=[])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__} on {args.device}, us a call, median of rounds of 100 calls")
    print(f"{'':<24}{'inference':>11}{'forward':>11}{'with backward':>15}")
    for name, (forward, both) in contenders(args.device, args.kernels).items():
        with torch.no_grad():
            inference_us = microseconds(forward, args.calls)
        times = inference_us, microseconds(forward, args.calls), microseconds(both, args.calls)
        print("{:<24}{:11.1f}{:11.1f}{:15.1f}".format(name, *times), flush=True)


if __name__ == "__main__":
    main()
