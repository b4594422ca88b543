"""The cpu kernel beside its ceilings and peers: torch.mm, dense attention, the reference, and whole models beside Swin.

Contenders of a comparison run interleaved in one process, so that a noisy neighbour hits all alike; medians count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F

import natrain

MM_SIZE = 1024
CHANNELS_LAST = "@channels_last"


@dataclass(frozen=True)
class CpuLayer:
    """An attention layer of NAT-Tiny or DiNAT-Tiny: head dim 32, kernel size 7, with a bias."""

    side: int
    heads: int
    dilation: int
    batch: int = 8
    head_dim: int = 32
    kernel_size: int = 7

    @property
    def name(self) -> str:
        return f"{self.side}/{self.dilation}"

    @property
    def forward_flops(self) -> int:
        """Useful: 2 per multiply-add, neighbours only. Backward counts 2.5 times as many."""
        return 4 * self.batch * self.side**2 * self.heads * self.kernel_size**2 * self.head_dim


LAYERS = (
    CpuLayer(56, 2, 1),
    CpuLayer(28, 4, 1),
    CpuLayer(14, 8, 1),
    CpuLayer(7, 16, 1),
    CpuLayer(56, 2, 8),
    CpuLayer(28, 4, 4),
    CpuLayer(14, 8, 2),
)


def median_s(contenders: Mapping[str, Callable[[], object]], runs: int, is_warm: bool = False) -> dict[str, float]:
    """Median seconds of each contender over interleaved runs, after one that is not counted.

    Wall time; with one thread the process's own time, which others on the machine can slow but not stretch.
    Every contender finds the caches as the one before left them; ``is_warm``: as a call of its own left them.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(runs + 1):
        for name, call in contenders.items():
            if is_warm:
                call()
            started = clock()
            result = call()
            elapsed = clock() - started
            # Freeing a result may make malloc return what others left to the system: no cost of this call.
            del result
            if run:
                times[name].append(elapsed)
    return {name: statistics.median(found) for name, found in times.items()}


def _attention(layer: CpuLayer, kernel: str) -> tuple[Callable, Callable]:
    """(forward, forward and backward) of natrain on a packed projection."""
    side, heads, dims = layer.side, layer.heads, layer.head_dim
    qkv = torch.randn(layer.batch, side, side, 3, heads, dims, requires_grad=True)
    rpb = torch.randn(heads, 2 * layer.kernel_size - 1, 2 * layer.kernel_size - 1, requires_grad=True)
    d_out = torch.randn(layer.batch, side, side, heads, dims)

    def attend() -> torch.Tensor:
        return natrain.na2d_qkvpacked(qkv, layer.kernel_size, layer.dilation, rpb=rpb, kernel=kernel)

    return torch.no_grad()(attend), lambda: torch.autograd.grad(attend(), (qkv, rpb), d_out)


def _dense_attention(layer: CpuLayer) -> tuple[Callable, Callable]:
    """The same of dense scaled_dot_product_attention over all tokens, a bias for every pair as its mask."""
    tokens = layer.side**2
    q, k, v = (torch.randn(layer.batch, layer.heads, tokens, layer.head_dim, requires_grad=True) for _ in range(3))
    mask = torch.randn(1, layer.heads, tokens, tokens, requires_grad=True)
    d_out = torch.randn(layer.batch, layer.heads, tokens, layer.head_dim)

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return torch.no_grad()(attend), lambda: torch.autograd.grad(attend(), (q, k, v, mask), d_out)


def layer_table(runs: int, with_reference: bool, is_warm: bool) -> None:
    """Print one line a layer: useful GFLOP/s, their share of torch.mm's in the same rounds, and the peers' times."""
    a, b = torch.randn(2, MM_SIZE, MM_SIZE)
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32, medians of {runs} interleaved runs, "
        f"{'warm' if is_warm else 'cold'} caches"
    )
    for layer in LAYERS:
        forward, both = _attention(layer, "cpu")
        contenders = {"mm": lambda: a @ b, "forward": forward, "both": both}
        if layer.side <= 14:
            contenders["dense forward"], contenders["dense both"] = _dense_attention(layer)
        if with_reference:
            contenders["reference forward"], contenders["reference both"] = _attention(layer, "reference")
        seconds = median_s(contenders, runs, is_warm)
        mm_rate = 2 * MM_SIZE**3 / seconds.pop("mm")
        cells = [f"{layer.name:>5}", f"mm {mm_rate / 1e9:6.1f} GFLOP/s"]
        for name, flops in (("forward", layer.forward_flops), ("both", 3.5 * layer.forward_flops)):
            rate = flops / seconds[name]
            share = rate / mm_rate
            cells.append(f"{name} {seconds.pop(name) * 1e3:7.2f} ms {rate / 1e9:6.1f} GFLOP/s ({share:4.0%})")
        cells += [f"{name} {value * 1e3:.2f} ms" for name, value in seconds.items()]
        print("  ".join(cells), flush=True)


def model_table(names: tuple[str, ...], batch: int, runs: int) -> None:
    """Print images/s of each model, inference and training step (forward, backward, AdamW), interleaved.

    A name that ends in ``CHANNELS_LAST`` is the model before it, its weights and images in that layout.
    """
    contiguous, targets = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    inference, training = {}, {}
    for name in names:
        layout = torch.channels_last if name.endswith(CHANNELS_LAST) else torch.contiguous_format
        model = timm.create_model(name.removesuffix(CHANNELS_LAST)).to(memory_format=layout)
        images = contiguous.to(memory_format=layout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def infer(model=model, images=images):
            with torch.inference_mode():
                model.eval()(images)

        def step(model=model, optimizer=optimizer, images=images):
            F.cross_entropy(model.train()(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

        inference[name], training[name] = infer, step
    print(f"{torch.get_num_threads()} threads, batch {batch}, float32, medians of {runs} interleaved runs, images/s")
    for title, contenders in (("inference", inference), ("training", training)):
        seconds = median_s(contenders, runs)
        for name, value in seconds.items():
            print(f"{title:>10} {name:<32} {batch / value:6.2f}  {seconds[names[-1]] / value:5.2f}x", flush=True)
