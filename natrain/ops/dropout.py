"""Counter-based dropout: whether a probability is kept is a function of (seed, image, head, query, slot) alone.

No kernel stores a mask and every kernel draws the same one, forward and backward, whatever its tiling. The twin for
device code is csrc/include/dropout.h. A 32-bit hash is compared with ``round(p * 2**32)``: the drop probability has a
resolution of 2**-32.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def drop_threshold(dropout_p: float) -> int:
    """A slot is dropped when its 32-bit hash is below this."""
    return min(round(dropout_p * 2**32), _WORD)


def draw_seed(device: torch.device) -> Tensor:
    """A seed [1] int64, drawn by torch's own generator so that graphs, checkpointing and torch.manual_seed hold."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words with low bias (C. Wellons, "hash-prospector", the two-round lowbias32)."""
    word = word ^ (word >> 16)
    word = (word * 0x21F0AAAD) & _WORD
    word = word ^ (word >> 15)
    word = (word * 0xD35A2D97) & _WORD
    return word ^ (word >> 15)


def keep_mask(seed: Tensor, row: Tensor, num_neighbors: int, dropout_p: float) -> Tensor:
    """Which probabilities survive.

    Args:
        seed: [1] int64, >= 0.
        row: int64, any shape; ``(image * heads + head) * tokens + query``.
        num_neighbors: K slots a row, in the order of ``scores``.
        dropout_p: in [0, 1).

    Returns:
        bool, ``[*row.shape, K]``.
    """
    slot = torch.arange(num_neighbors, device=row.device)
    low = _mix((row & _WORD) ^ (seed & _WORD))
    high = _mix((low + (row >> 32) + (seed >> 32)) & _WORD)
    word = _mix(low[..., None] ^ (slot * 0x9E3779B9 & _WORD))
    return _mix((word + high[..., None]) & _WORD) >= drop_threshold(dropout_p)
