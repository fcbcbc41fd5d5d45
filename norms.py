"""Normalisation: of the residual stream, and of queries and keys."""

import torch
import torch.nn as nn
from torch import Tensor


def make_norm(kind: str, width: int, bias: bool) -> nn.Module:
    """kind: "layernorm", whose bias is left out where `bias` says so, or "rmsnorm", which has none."""
    if kind == "rmsnorm":
        return nn.RMSNorm(width, eps=1e-5)
    return nn.LayerNorm(width, bias=bias)


class HeadNorm(nn.RMSNorm):
    """RMSNorm of each query or key, in the weight's precision also under autocast (QK-norm, arXiv 2302.05442).

    scale: its gain, the same for all D, for good: scores are then at most scale^2 sqrt(D). 0: one for each, learned.
    """

    def __init__(self, D: int, scale: float):
        super().__init__(D, eps=1e-5)
        if scale:
            del self.weight  # no parameter
            self.register_buffer("weight", torch.full((D,), scale), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))
