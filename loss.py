"""The cross-entropy of next tokens, without the logits of the whole context.

Dims: B batch, T tokens, C width, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOSS_CHUNK = 1 << 25  # logits that stand in memory at once: 128 MiB in float32


def widened(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each token, (B, T) float32 (float64 for float64 weights); 0 where the target is -1.

    x (B, T, C) hidden states, weight (V, C) the head, targets (B, T) int64. The logits are made, and made again in
    the backward, a chunk of tokens at a time: at T = 32k and V = 50k all of them are 6.6 GB.
    """

    def chunk_loss(x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(widened(F.linear(x, weight)), targets, ignore_index=-1, reduction="none")

    x, flat_targets = x.flatten(0, 1), targets.flatten()
    chunk = max(1, LOSS_CHUNK // weight.shape[0])
    if len(x) <= chunk:
        return chunk_loss(x, flat_targets).view(targets.shape)
    losses = [
        checkpoint(chunk_loss, x_chunk, targets_chunk, use_reentrant=False, preserve_rng_state=False)
        for x_chunk, targets_chunk in zip(x.split(chunk), flat_targets.split(chunk))
    ]
    return torch.cat(losses).view(targets.shape)
