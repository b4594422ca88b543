"""What plans depend on of the GPU at hand, asked of torch."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from natrain.ops.fused_plan import Device


@functools.lru_cache
def device_of(index: int) -> Device:
    """The GPU of that index, as plans know it."""
    if index < 0:  # nothing to ask
        return Device()
    properties = torch.cuda.get_device_properties(index)
    device = Device((properties.major, properties.minor), properties.multi_processor_count, tuned_as=properties.name)
    # What a driver does not say is 0, and torch's older releases ask for none of these.
    clock, memory_clock, bits = (
        getattr(properties, name, 0) for name in ("clock_rate", "memory_clock_rate", "memory_bus_width")
    )
    if not (clock and memory_clock and bits):
        return device
    # Twice a cycle of the memory. Rounded, so that boards of one kind have one plan.
    moved = 2 * memory_clock * bits / 8 / (clock * device.multiprocessors)
    return replace(device, memory_bytes=round(moved, 1))


def device_ahead(capability: tuple[int, int]) -> Device:
    """What is compiled for ahead of calls: the current GPU where it is of that capability."""
    try:
        if torch.cuda.is_available() and torch.cuda.get_device_capability() == capability:
            return device_of(torch.cuda.current_device())
    except RuntimeError:  # it is another process's alone, or full: nothing that compiling needs
        pass
    return Device(capability)
