"""Rotary positions (RoPE; Su et al., arXiv 2104.09864): queries and keys are rotated by angles of their positions.

So a score depends on how far apart the two tokens are, and on nothing else of their positions. Pair i of D / 2 turns by
position * theta^(-2i / D). A model that is to read further than it was trained for turns slower, by its rope_type:

    default, linear   every pair by the factor s = rope_scaling (position interpolation, Chen et al., arXiv 2306.15595)
    llama3            slow pairs by s, fast ones not at all, and those between in part (Llama 3.1, arXiv 2407.21783;
                      the rule is in Meta's code)
    yarn              the same by another rule, and scores are sharpened (YaRN, Peng et al., arXiv 2309.00071)

Dims: B batch, H heads, T tokens, D head dimension.
"""

import math

import torch
from torch import Tensor

ROPE_KEYS = (
    "rope_type",
    "rope_theta",
    "rope_scaling",
    "rope_original_context",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_beta_fast",
    "rope_beta_slow",
    "rope_attention_factor",
)


def rope_table(
    D: int,
    T: int,
    *,
    rope_type: str = "default",
    rope_theta: float = 10000.0,
    rope_scaling: float = 1.0,
    rope_original_context: int = 8192,
    rope_low_freq_factor: float = 1.0,
    rope_high_freq_factor: float = 4.0,
    rope_beta_fast: float = 32.0,
    rope_beta_slow: float = 1.0,
    rope_attention_factor: float = 0.0,
) -> Tensor:
    """cos and sin of the rotary angles, (2, T, D/2) float32; with yarn times the factor that sharpens scores.

    rope_original_context: the context, in tokens, that the unstretched model was trained for. llama3 stretches pairs
    that turn less than rope_low_freq_factor times in it, and leaves those that turn more than rope_high_freq_factor
    times. yarn: rope_beta_slow and rope_beta_fast times. rope_attention_factor: of queries and keys each, in yarn; 0:
    the paper's, 0.1 ln(s) + 1.
    """
    frequency = rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    turns = rope_original_context * frequency / (2 * math.pi)  # of each pair, in the original context
    factor = 1.0
    if rope_type == "llama3":
        span = rope_high_freq_factor - rope_low_freq_factor
        kept = ((turns - rope_low_freq_factor) / span).clamp(0, 1)
    elif rope_type == "yarn":
        # A ramp over the pairs, between the whole ones just outside those that turn so many times.
        place = lambda turns: D * math.log(rope_original_context / (turns * 2 * math.pi)) / (2 * math.log(rope_theta))
        first, last = max(math.floor(place(rope_beta_fast)), 0), min(math.ceil(place(rope_beta_slow)), D - 1)
        kept = 1 - ((torch.arange(D // 2) - first) / max(last - first, 1e-3)).clamp(0, 1).double()
        factor = rope_attention_factor or 0.1 * math.log(max(rope_scaling, 1)) + 1
    else:
        kept = torch.zeros_like(frequency)
    frequency = kept * frequency + (1 - kept) * frequency / rope_scaling
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency  # float64: at 128k float32 angles are off by 1e-2
    return (factor * torch.stack([angle.cos(), angle.sin()])).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of x (B, H, T, D) by the angles of table (2, T, D/2)."""
    cos, sin = table
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
