"""Rotary positions (RoPE; Su et al., arXiv 2104.09864): queries and keys are rotated by angles of their positions.

So a score depends on how far apart the two tokens are, and on nothing else of their positions.

Dims: B batch, H heads, T tokens, D head dimension.
"""

import torch
from torch import Tensor


def rope_table(D: int, T: int, theta: float, scaling: float = 1.0) -> Tensor:
    """cos and sin of the rotary angles, (2, T, D/2) float32.

    scaling: position t has the angles of t / scaling, so that a longer context has none that a model has not seen in
    training (position interpolation, Chen et al., arXiv 2306.15595).
    """
    frequency = theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    position = torch.arange(T, dtype=torch.float64) / scaling
    angle = position[:, None] * frequency  # float64: at 128k float32 angles are off by 1e-2
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of x (B, H, T, D) by the angles of table (2, T, D/2)."""
    cos, sin = table
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
