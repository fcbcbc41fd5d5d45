"""Exact attention by torch's own kernels: over all keys up to a row's own, or those of its document and its window.

No mask of T x T is ever made. On CUDA, in bfloat16 and float16, `varlen_attn` takes documents and windows in one call.
Elsewhere each document is a call of scaled_dot_product_attention, and so is a window of W keys: blocks of W / 4 rows,
which compute a quarter more than they see.

Dims: B batch, H query heads, K key/value heads, T queries, N keys, D head dimension, W window.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Sight(NamedTuple):
    """What rows see: of the keys up to their own, those of their document and of their window. Made by `sight_of`."""

    documents: Tensor | None = None  # (B, T) int32: where each token's document begins; None: all are of one
    window: int = 0  # so many keys, with the row's own; 0: any number
    ranges: Tensor | None = None  # (T, 2) or (B, T, 2) int32, as sus_attention takes them; None: all up to its own


ALL = Sight()


def sight_of(T: int, device: torch.device, documents: Tensor | None, window: int, before: int = 0) -> Sight:
    """The Sight of T rows, behind `before` other keys."""
    if documents is None and not 0 < window < before + T:
        return ALL
    row = torch.arange(before, before + T, dtype=torch.int32, device=device)
    lo = torch.zeros_like(row) if documents is None else documents
    if window:
        lo = torch.maximum(lo, row + 1 - window)
    return Sight(documents, window, torch.stack([lo, (row + 1).expand_as(lo)], -1))


def exact_attention(q: Tensor, k: Tensor, v: Tensor, sight: Sight = ALL, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of what each row sees, (B, H, T, D). dropout: of the weights.

    q (B, H, T, D); k, v (B, K, N, D), where q are the last T of N positions. With documents T = N.
    """
    T, N = q.shape[2], k.shape[2]
    if sight.documents is not None:
        return by_document(q, k, v, sight.documents, sight.window, dropout)
    if T == N:
        return of_window(q, k, v, sight.window, dropout)
    if 0 < sight.window < N:  # what none of these rows sees
        k, v = (x[:, :, max(0, N - T + 1 - sight.window) :] for x in (k, v))
        N = k.shape[2]
    mask = None
    if T > 1:  # SDPA's is_causal is aligned to the top left; the last T of N positions need the bottom right
        mask = torch.ones(T, N, dtype=torch.bool, device=q.device).tril(N - T)
        if sight.window:
            mask = mask.triu(N - T + 1 - sight.window)
    return sdpa(q, k, v, mask, dropout)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False
) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, enable_gqa=grouped)


def of_window(q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float) -> Tensor:
    """Each row sees its own key and those before it, `window` in all; T = N."""
    B, _, T, _ = q.shape
    if not 0 < window < T:
        return sdpa(q, k, v, dropout=dropout, causal=True)
    if dropout == 0 and (varlen := varlen_attention(q)):
        ends = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)
        return together(varlen, q, k, v, ends, T, window)
    # The first rows see all before them. The others, in blocks side by side in the batch, see overlapping pieces.
    size = min(max(64, -(-window // 4)), T - window)
    blocks = -(-(T - window) // size)
    q_, k_, v_ = (F.pad(x, (0, 0, 0, window + blocks * size - T)) for x in (q, k, v))
    first = sdpa(q[:, :, :window], k[:, :, :window], v[:, :, :window], dropout=dropout, causal=True)
    rows = q_[:, :, window:].unflatten(2, (blocks, size)).transpose(1, 2).flatten(0, 1)
    pieces = (x[:, :, 1:].unfold(2, window - 1 + size, size).mT for x in (k_, v_))
    keys, values = (x.transpose(1, 2).flatten(0, 1) for x in pieces)
    band = torch.ones(size, window - 1 + size, dtype=torch.bool, device=q.device).triu().tril(window - 1)
    rest = sdpa(rows, keys, values, band, dropout).unflatten(0, (B, blocks)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest[:, :, : T - window]], 2)


@torch.compiler.disable  # how many documents there are depends on the text
def by_document(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int, dropout: float) -> Tensor:
    """Each row sees what `of_window` lets it see of its document. documents: of Sight. T = N."""
    B, T = documents.shape
    place = torch.arange(T, dtype=torch.int32, device=q.device)
    starts = (documents == place).flatten().nonzero().flatten()  # of the batch as one row
    if dropout == 0 and (varlen := varlen_attention(q)):
        ends = torch.cat([starts, starts.new_tensor([B * T])])
        return together(varlen, q, k, v, ends.int(), int(ends.diff().max()), window)
    lengths: list[list[int]] = [[] for _ in range(B)]
    places = starts.tolist()
    for start, end in zip(places, [*places[1:], B * T]):
        lengths[start // T].append(end - start)
    out = []
    for row, of_row in enumerate(lengths):
        parts = zip(*(x.split(1)[row].split(of_row, 2) for x in (q, k, v)))  # split's backward is one concatenation
        out.append(torch.cat([of_window(q, k, v, window, dropout) for q, k, v in parts], 2))
    return torch.cat(out)


def together(varlen: Callable, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, window: int) -> Tensor:
    """Sequences that lie behind one another in the batch, in one call. ends: int32, where each begins and ends."""
    B, H, T, _ = q.shape
    rows = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = varlen(*rows, ends, ends, longest, longest, window_size=(window - 1, 0), enable_gqa=H != k.shape[1])
    return out.unflatten(0, (B, T)).transpose(1, 2)


def varlen_attention(q: Tensor) -> Callable | None:
    """torch's varlen_attn where it takes tensors such as q, as it does in float16 and bfloat16 from sm_80 on."""
    if not (q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] <= 256):
        return None
    return _varlen() if torch.cuda.get_device_capability(q.device)[0] >= 8 else None


@functools.cache
def _varlen() -> Callable | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    needed = {"window_size", "enable_gqa"}  # which earlier versions lack
    return varlen_attn if needed <= inspect.signature(varlen_attn).parameters.keys() else None
