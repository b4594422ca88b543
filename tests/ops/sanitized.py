"""A small grid for compute-sanitizer, forward and backward: `python -m tests.ops.sanitized KERNEL` is what it runs."""

from __future__ import annotations

import sys

import torch

from natrain.ops import naive
from natrain.ops.registry import get_kernel
from tests.ops import judge
from tests.ops.grid import CHOSEN, FEATURES, LINES, Case

# An odd shape, dilation and stride, causal axes, a window as long as its axis, three dimensions; a wide head; a window
# whose halo goes through shared memory in parts; short windows in one line.
WIDE = Case(1, (9, 8), 2, 128, (3, 3), (1, 1), (1, 1), (False, False), True)
LONG = Case(1, (330,), 1, 16, (197,), (1,), (1,), (False,), True)
CAUSAL_PLANES = Case(1, (8, 10, 8), 1, 32, (5, 5, 3), (1, 1, 1), (1, 5, 1), (False, True, False), False)
CASES = [*(CHOSEN[i] for i in (1, 4, 9, 11, 13, 18)), WIDE, LONG, CAUSAL_PLANES, LINES[0], LINES[7]]


def mistake() -> None:
    """naive's av once more, into a tensor of one element: what the tool must find."""
    inputs = judge.Inputs.draw(WIDE, torch.float32)
    judge.outputs(WIDE, inputs, "naive")
    plan = next(plan for plan in naive.plans.values() if plan.kernel.name == "natrain_naive_av")
    weights = torch.rand(1, 9, 8, 2, 16, device="cuda")
    plan.launch(0, 1.0, weights.data_ptr(), inputs.v.data_ptr(), torch.empty(1, device="cuda").data_ptr())
    torch.cuda.synchronize()


def main(kernel: str) -> None:
    if kernel == "mistake":
        return mistake()
    cases = [*CASES, *FEATURES[:2], *FEATURES[5:7]] if get_kernel(kernel).limits.key_mask else CASES
    for case in cases:
        for dtype in (torch.bfloat16, torch.float32):
            inputs = judge.Inputs.draw(
                case, dtype, kv_heads=case.kv_heads, value_dim=case.value_dim, masked=0.2 * case.has_key_mask
            )
            judge.outputs(case, inputs, kernel)
            torch.cuda.synchronize()
            print(f"{kernel} {case} {dtype}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
