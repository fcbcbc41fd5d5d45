"""The validation loss.

Dims: T tokens in a window (block_size).
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from data.loader import Corpus, Places
from training.device import Device


@torch.no_grad()
def evaluate(
    model: nn.Module, corpus: Corpus, starts: Places, batch_size: int, device: Device, rank: int, world: int,
    is_to_stop: Callable[[], bool],
) -> torch.Tensor | None:  # fmt: skip
    """The mean validation loss at each position of the context, (T,) float64, over the fixed windows at `starts`.

    is_to_stop is asked before each batch, in all processes as often; None if it said so.
    """
    total = torch.zeros(corpus.block_size, dtype=torch.float64)
    mine = starts[rank::world]
    model.eval()
    for i in range(0, -(-len(starts) // world), batch_size):  # in all processes as often, as they ask one another
        if is_to_stop():
            model.train()
            return None
        if i >= len(mine):
            continue
        x, y, documents = corpus.val_batch(mine[i : i + batch_size]).to(device.device)
        with device.autocast():
            _, losses = model(x, y, documents=documents, reduction="none")
        total += losses.float().sum(0).cpu().double()
    model.train()
    if world > 1:
        total = total.to(device.device)
        dist.all_reduce(total)
    return total.cpu() / len(starts)
