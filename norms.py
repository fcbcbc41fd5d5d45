"""Normalisation: of the residual stream, and of queries and keys."""

import torch
import torch.nn as nn
from torch import Tensor


def make_norm(kind: str, width: int, bias: bool, eps: float) -> nn.Module:
    """kind: "layernorm", whose bias is left out where `bias` says so, or "rmsnorm", which has none."""
    if kind == "rmsnorm":
        return nn.RMSNorm(width, eps=eps)
    return nn.LayerNorm(width, eps=eps, bias=bias)


class HeadNorm(nn.RMSNorm):
    """RMSNorm of each query or key, in the weight's precision also under autocast (QK-norm, arXiv 2302.05442).

    scale: its gain, the same for all D, for good: scores are then at most scale^2 sqrt(D). 0: one for each, learned.
    """

    def __init__(self, D: int, scale: float, eps: float):
        super().__init__(D, eps=eps)
        if scale:
            del self.weight  # no parameter
            self.register_buffer("weight", torch.full((D,), scale), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))
