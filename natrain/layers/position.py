"""How an attention layer knows where its keys are: a learned bias, a rotation of q and k, or not at all.

- ``"rpb"`` (default): the published relative position bias, a learned number per head and offset.
- ``"rope"``: axial rotary embedding, no parameters (B. Heo et al., "Rotary Position Embedding for Vision Transformer",
  2403.13298, section 3.2; after J. Su et al., "RoFormer", 2104.09864). The score of a query and a key depends on where
  the two tokens lie to each other, at any kernel size, dilation and map size, and every kernel without bias serves it.
- ``"none"``: neither; the model then knows positions from its convolutions and the borders of the windows only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from natrain.errors import invalid, nearest

POSITIONS = ("rpb", "rope", "none")
BASE = 100.0  # of the wavelengths; 2403.13298 takes 100 where language models take 10,000, as maps are short


def check_pos(pos: str, head_dim: int, na_dim: int) -> str:
    """``pos`` if it is one of POSITIONS and the heads are wide enough for it.

    Raises:
        ValueError: it is not; rotations need head_dim in pairs for each of the ``na_dim`` axes.
    """
    if pos not in POSITIONS:
        closest = nearest(str(pos), POSITIONS) or "rpb"
        raise invalid("pos", pos, f"one of {', '.join(POSITIONS)}", f"pos={closest!r}")
    if pos == "rope" and head_dim % (2 * na_dim):
        raise invalid(
            "pos", pos, f"a head dim that is a multiple of {2 * na_dim}; it is {head_dim}", "pos='rpb', or other heads"
        )
    return pos


def rotary_angles(lengths: Sequence[int], head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Angles (radians, float32 ``[*lengths, head_dim / 2]``) by which each pair of channels turns at each token.

    The pairs are shared out among the axes in order; of the ``n`` pairs of an axis, pair t turns by
    ``position * 100 ** (-t / n)``, position in tokens.
    """
    pairs = head_dim // (2 * len(lengths))
    frequency = BASE ** (-torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
    angles = []
    for axis, length in enumerate(lengths):
        turn = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
        shape = [1] * len(lengths) + [pairs]
        shape[axis] = length
        angles.append(turn.view(shape).expand(*lengths, pairs))
    return torch.cat(angles, -1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the channel pairs (0, 1), (2, 3), ... of ``x`` ``[B, *lengths, N, D]`` by ``angles``, alike in every head.

    Computed in float32 at least; the result has the dtype of ``x``.
    """
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = angles.cos()[..., None, :].to(precise.dtype), angles.sin()[..., None, :].to(precise.dtype)
    even, odd = precise.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
