"""The layer between attentions, of each token alone: GPT-2's, or SwiGLU, which Llama, Mistral and Qwen have.

Dims: C width, I the width inside.
"""

import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F


class MLP(nn.Module):
    """gelu: c_proj(GELU(c_fc(x))), with tanh's approximation, as GPT-2 has it. swiglu: c_proj(silu(gate) * up), where
    c_fc makes both, gate first (Shazeer, arXiv 2002.05202).
    """

    def __init__(self, kind: str, C: int, I: int, bias: bool, dropout: float):
        super().__init__()
        self.kind = kind
        self.c_fc = nn.Linear(C, 2 * I if kind == "swiglu" else I, bias=bias)
        self.c_proj = nn.Linear(I, C, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def activate(self, h: Tensor) -> Tensor:
        """What c_proj reads (..., I), of what c_fc makes (..., I), or (..., 2 I)."""
        if self.kind == "swiglu":
            gate, up = h.chunk(2, -1)
            return F.silu(gate) * up
        return F.gelu(h, approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.activate(self.c_fc(x))))
