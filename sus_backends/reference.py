"""The reference backend: attention with a SUS backward in plain PyTorch, on any device.

It is the truth that faster kernels are tested against, and the fallback where there is none. Three things are specified
here, once, for every backend: the hash behind all random draws, the fixed-point inclusion probabilities, and the
samplers.

Dims: B batch, H query heads, K key/value heads, G = H / K query heads a key/value head, T positions, D head dim,
R query rows of one block, N keys that the block sees (those up to its last row if causal, else T). All work goes in
blocks of R rows, so nothing of size T x T is ever stored: O(R * T) scratch.

Deliberately missing: speed. A block's masked products are dense; kernels visit kept tiles only.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar, overload

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------
# Randomness: a counter-based hash. A draw is a pure function of (seed, stream, batch, head, row[, column]),
# so the backward can be repeated (activation checkpointing, compilation, resume) and gives the same mask.
# ---------------------------------------------------------------------------------------------

Device = torch.device | str
WORD = 0xFFFFFFFF
STREAM_SYSTEMATIC, STREAM_POISSON, STREAM_FOLD, STREAM_THINNING = 0, 1, 2, 3


@overload
def absorb(state: int, word: int) -> int: ...
@overload
def absorb(state: Tensor, word: int) -> Tensor: ...
@overload
def absorb(state: int | Tensor, word: Tensor) -> Tensor: ...
def absorb(state, word):
    """Absorb one 32-bit word into a 32-bit hash state.

    Both are ints or int64 tensors in [0, 2^32), of shapes that broadcast. Returns an int if both are, else a tensor.

    The finaliser is lowbias32 (Wellons, "Prospecting for hash functions", 2018). The added constant keeps (0, 0) from
    being a fixed point. 32-bit unsigned arithmetic is enough: the low half of a product is right even if int64 wraps.
    """
    x = ((state + 0x9E3779B9) & WORD) ^ word
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & WORD
    return x ^ (x >> 16)


IntOrTensor = TypeVar("IntOrTensor", int, Tensor)


def seed_state(seed: IntOrTensor, stream: int) -> IntOrTensor:
    """The hash state that all draws of one (seed, stream) start from. seed: int or 0-d int64 tensor, 64 bits."""
    return absorb(absorb(absorb(0, seed & WORD), (seed >> 32) & WORD), stream)


@overload
def fold_in(seed: int, *words: int) -> int: ...
@overload
def fold_in(seed: int | Tensor, *words: Tensor) -> Tensor: ...
@overload
def fold_in(seed: int | Tensor, *words: int | Tensor) -> int | Tensor: ...
def fold_in(seed, *words):
    """A new seed in [0, 2^32) from a seed and integers (iteration, micro-batch, layer, ...).

    All are ints or int64 tensors, of shapes that broadcast. The new one is an int if all are, else such a tensor.
    """
    state = seed_state(seed, STREAM_FOLD)
    for word in words:
        state = absorb(absorb(state, word & WORD), (word >> 32) & WORD)
    return state


# ---------------------------------------------------------------------------------------------
# Inclusion probabilities in fixed point, and the samplers.
# ---------------------------------------------------------------------------------------------

UNIT_BITS = 23
UNIT = 1 << UNIT_BITS  # q = 1


def inclusion_units(w: Tensor, c: Tensor) -> Tensor:
    """q = min(1, c * w), rounded up to an integer multiple of 2^-23: at least one unit where w > 0, zero elsewhere.

    w: float tensor of attention weights; c: 0-d float tensor (inf keeps everything). Returns int32, shape of w.
    Sampler and divisor both use this integer. That makes the estimator exactly unbiased, however small the weights and
    however long the row: a float32 running sum loses entries too small to move it.
    """
    units = (w * (c.to(w.dtype) * UNIT)).nan_to_num_(0)  # 0 * inf is no entry; and no integer comes from a NaN
    return units.ceil_().clamp_(max=UNIT).to(torch.int32)


def slot_bound(c_max: float, T: int) -> int:
    """The most entries a row may keep under systematic sampling: ceil(c) + 1, as rounding up may lift sum(q) past c."""
    return T if c_max >= T else min(int(-(-c_max // 1)) + 1, T)


def row_uniforms(seed: Tensor, B: int, H: int, rows: range, device: Device, stream: int = STREAM_SYSTEMATIC) -> Tensor:
    """One uniform a row for systematic sampling: int64 (B, H, R) in [0, 2^23). seed: 0-d int64."""
    return _row_states(seed_state(seed, stream), B, H, rows, device) >> (32 - UNIT_BITS)


def _row_states(state: Tensor, B: int, H: int, rows: range, device: Device) -> Tensor:
    """The hash state of each row, int64 (B, H, R)."""
    batch, head = torch.arange(B, device=device), torch.arange(H, device=device)
    state = absorb(absorb(state, batch[:, None, None]), head[:, None])
    return absorb(state, torch.arange(rows.start, rows.stop, device=device))


def keep_systematic(q_units: Tensor, u: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Systematic sampling: keep entry j where the running sum of q, shifted by u, crosses an integer.

    q_units: int32 (..., R, N) from `inclusion_units`; u: int (..., R) in [0, 2^23). Returns keep, bool (..., R, N), and
    the number of entries that fell beyond `slots`, 0-d int64 (tests assert that there are none).
    """
    # Integer sums are associative: tiles, scans and threads all agree. int32 holds them while sum(q) <= c < 255.
    total_dtype = torch.int32 if slots < 254 else torch.int64
    total = q_units.cumsum(-1, dtype=total_dtype).add_(u.to(total_dtype).unsqueeze(-1))
    dropped = ((total[..., -1] >> UNIT_BITS) - slots).clamp_(min=0).sum()
    within = total < (slots + 1) * UNIT  # total >> 23 is an entry's ordinal: the slot that a kernel stores it into
    return ((total & (UNIT - 1)) < q_units) & within, dropped


def keep_poisson(q_units: Tensor, seed: Tensor, rows: range) -> Tensor:
    """Poisson sampling (the paper's): independent Bernoulli(q).

    q_units: int32 (B, H, R, N). seed: 0-d int64. Returns keep, bool (B, H, R, N).
    """
    B, H, _, N = q_units.shape
    device = q_units.device
    state = _row_states(seed_state(seed, STREAM_POISSON), B, H, rows, device)
    u = absorb(state.unsqueeze(-1), torch.arange(N, device=device)) >> (32 - UNIT_BITS)  # (B, H, R, N)
    return u < q_units


# Thinning. A systematic draw with KAPPA * c proposes; of what it proposes, a second one keeps each entry with
# probability r, and divides by r too. For any r > 0 that is decided before the second draw, E[kept / (q r)] given the
# proposals is (proposed / q), so the whole stays unbiased: r may look at the gradient, at the values, and at the
# proposals themselves. It aims at a total inclusion probability of c W f_ij, f_ij what an entry's contribution to the
# gradient weighs beside the others', so that entries which matter little are cut most.

KAPPA = 2.0
ROW_WEIGHTS = 1 / 8, 4  # a row with next to no gradient keeps something all the same
# sampler: (are rows weighed by the norm of their gradient?, what entries of a row are weighed by)
THINNED = {
    "tiles": (True, None),
    "weighted": (True, "contribution"),
    "rows": (True, None),
    "values": (False, "value"),
    "rows+values": (True, "value"),
}
VALUE_SHARE = 0.75  # of the values' distances in the weight; the rest is a floor


class Known(NamedTuple):
    """What a backward knows of a block of rows besides their weights; what costs something is computed if asked for."""

    row_weight: Tensor  # (B, H, R, 1) of `row_weights`
    square: Callable[[], Tensor]  # () -> (B, H, R, N): the squared norm of what an entry adds to (dQ, dK, dV), over W^2
    distance: Callable[[], Tensor]  # () -> (B, H, R, N): |V_j - O_i|^2


def row_weights(grad_out: Tensor) -> Tensor:
    """The norm of each row of grad_out (B, H, T, D) over its mean in that batch and head, held to ROW_WEIGHTS.

    (B, H, T), float32 (float64 for float64 inputs). It is 1 where the mean is 0 or one of the two isn't finite.
    """
    norm = grad_out.norm(dim=-1, dtype=accumulate_dtype(grad_out.dtype))
    mean = norm.mean(-1, keepdim=True)
    return torch.where((mean > 0) & mean.isfinite() & norm.isfinite(), norm / mean, 1).clamp(*ROW_WEIGHTS)


def thinning_units(proposed: Tensor, w: Tensor, q_units: Tensor, c: Tensor, sampler: str, known: Known) -> Tensor:
    """r in fixed point: int32 (B, H, R, N), from 1 to 2^23 where an entry is proposed, 0 elsewhere.

    proposed, bool; w, the weights; q_units, int32, of `inclusion_units`: all (B, H, R, N). c: 0-d.
    """
    weighs_rows, importance = THINNED[sampler]
    proposal = torch.where(proposed, w * (UNIT / q_units.to(w.dtype)), 0)  # W / q
    aim = c * known.row_weight if weighs_rows else c
    if importance is not None:
        if importance == "value":
            distance = known.distance()
            mean = (w * distance).sum(-1, keepdim=True)
            square = VALUE_SHARE * torch.where(mean > 0, distance / mean, 1) + 1 - VALUE_SHARE
        else:
            square = known.square()
        # over its mean in the row, estimated from the proposals; by Jensen the mean of the root is at most 1
        mean = (proposal * square).sum(-1, keepdim=True) / proposal.sum(-1, keepdim=True)
        aim = aim * (square / mean).sqrt().nan_to_num(1, 1, 1)
    units = (aim * proposal * UNIT).nan_to_num(UNIT, UNIT).ceil_().clamp_(1, UNIT)
    return torch.where(proposed, units, 0).to(torch.int32)


# Tiles. A row's weights in TILE neighbouring keys are kept or cut as one, by their sum W_iJ in place of W_ij. It takes
# no more draws, and no more rows of Q and G to fetch, but has the mean over what a draw of single keys might have found
# there: the variance is far lower, and dense products do the work.

TILE = 64


def tiles_of(T: int) -> int:
    return -(-T // TILE)


def tile_slots(c_max: float, T: int) -> int:
    """The most tiles that a row may propose."""
    return slot_bound(KAPPA * c_max, tiles_of(T))


def tile_masses(w: Tensor) -> Tensor:
    """Sums of W (..., N) over the keys of each tile: (..., tiles)."""
    return torch.nn.functional.pad(w, (0, -w.shape[-1] % TILE)).unflatten(-1, (-1, TILE)).sum(-1)


def proposals_like(q: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Room for the proposals which a forward on q (B, H, T, D) hands to its backward.

    tiles, int32 (B, H, T, slots): each row's proposed tiles, ascending, then -1. masses, float32 of that shape: their
    W_iJ, of which x_iJ = inclusion_units(W_iJ, KAPPA * c) is made, then 0.
    """
    shape = *q.shape[:3], slots
    return q.new_empty(shape, dtype=torch.int32), q.new_empty(shape, dtype=torch.float32)


Multiplier = Callable[..., tuple[Tensor, Tensor]]  # (weights (B, H, R, N), rows[, known]) -> (m (B, H, R, N), dropped)


def sus_multiplier(c: Tensor, c_max: float, sampler: str, seed: Tensor, u: Tensor | None, T: int) -> Multiplier:
    """A function (weights (B, H, R, N), rows, known) -> m of the weights' shape: 1/q where an entry is kept, else 0.

    c: 0-d float tensor, seed: 0-d int64 tensor, both on the weights' device. known: needed by samplers that thin.
    It also returns how many entries were dropped (0-d int64 tensor; 0 by construction, and always for Poisson).
    u: None, or the systematic sampler's uniforms, int64 (B, H, T) in [0, 2^23).
    """
    c = torch.clamp(c, max=c_max)
    thins = sampler in THINNED
    first = KAPPA if thins else 1  # times c: what the first draw is made with; it also sizes the buffers
    slots = tile_slots(c_max, T) if sampler == "tiles" else slot_bound(first * c_max, T)

    def multiplier(w: Tensor, rows: range, known: Known | None = None) -> tuple[Tensor, Tensor]:
        if sampler == "tiles":
            m, dropped = mask_of(tile_masses(w), rows, known)
            return m.repeat_interleave(TILE, -1)[..., : w.shape[-1]] * (w != 0), dropped  # nothing above the diagonal
        return mask_of(w, rows, known)

    def mask_of(w: Tensor, rows: range, known: Known | None) -> tuple[Tensor, Tensor]:
        B, H = w.shape[:2]
        q_units = inclusion_units(w, first * c)
        if sampler == "poisson":
            keep, dropped = keep_poisson(q_units, seed, rows), torch.zeros((), dtype=torch.int64)
        else:
            u_rows = row_uniforms(seed, B, H, rows, w.device) if u is None else u[:, :, rows.start : rows.stop]
            keep, dropped = keep_systematic(q_units, u_rows, slots)
        m = torch.where(keep, UNIT / q_units.to(w.dtype), 0)
        if thins:
            assert known is not None, "a sampler that thins has to know of more than the weights"
            r_units = thinning_units(keep, w, q_units, c, sampler, known)
            keep, _ = keep_systematic(r_units, row_uniforms(seed, B, H, rows, w.device, STREAM_THINNING), slots)
            m = torch.where(keep, m * (UNIT / r_units.to(w.dtype)), 0)
        return m, dropped

    return multiplier


# ---------------------------------------------------------------------------------------------
# Attention.
# ---------------------------------------------------------------------------------------------

# Scores of one block, over all batches and heads. A CPU's caches should hold a block's few buffers; elsewhere a block
# must be large enough to be worth its launches (64 MiB a buffer in float32).
CPU_BLOCK_ENTRIES, BLOCK_ENTRIES = 1 << 19, 1 << 24


def _blocks(q: Tensor, is_causal: bool) -> Iterator[tuple[range, int]]:
    """(rows, N) for q (B, H, T, D): ranges of query rows, and how many keys they see."""
    B, H, T, _ = q.shape
    R = max(1, min(T, (CPU_BLOCK_ENTRIES if q.device.type == "cpu" else BLOCK_ENTRIES) // (B * H * T)))
    for start in range(0, T, R):
        stop = min(start + R, T)
        yield range(start, stop), stop if is_causal else T


def _scores(q: Tensor, k: Tensor, rows: range, is_causal: bool, scale: float) -> Tensor:
    """Scaled scores of a block. q (B, K, G, R, D), k (B, K, N, D) -> (B, K, G, R, N), -inf above the diagonal."""
    s = torch.einsum("bkgrd,bknd->bkgrn", q * scale, k)
    if is_causal:
        row = torch.arange(rows.start, rows.stop, device=q.device)
        column = torch.arange(rows.start, k.shape[2], device=q.device)  # only these can lie above the diagonal
        s[..., rows.start :].masked_fill_(column > row[:, None], float("-inf"))
    return s


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Exact attention. q (B, H, T, D); k, v (B, K, T, D).

    Returns out (B, H, T, D) in q's dtype, and the log-sum-exp of each row's scaled scores, (B, H, T) in float32
    (float64 for float64 inputs).
    """
    B, H, T, D = q.shape
    K = k.shape[1]
    acc = accumulate_dtype(q.dtype)
    q_, k_, v_ = q.to(acc).reshape(B, K, H // K, T, D), k.to(acc), v.to(acc)
    out = q.new_empty(B, H, T, D)
    lse = q.new_empty(B, H, T, dtype=acc)
    for rows, N in _blocks(q, is_causal):
        r = slice(rows.start, rows.stop)
        s = _scores(q_[:, :, :, r], k_[:, :, :N], rows, is_causal, scale)
        lse_r = torch.logsumexp(s, -1, keepdim=True)
        lse[:, :, r] = lse_r.reshape(B, H, -1)
        w = s.sub_(lse_r).exp_()
        out[:, :, r] = torch.einsum("bkgrn,bknd->bkgrd", w, v_[:, :, :N]).reshape(B, H, -1, D)
    return out, lse


def _distance(v: Tensor, out: Tensor) -> Tensor:
    """|V_j - O_i|^2 from differences: of squares and a product, next to nothing may be left. (B, K, G, R, N)"""
    return torch.stack([(v[:, :, None] - o[:, :, :, None]).square().sum(-1) for o in out.unbind(3)], 3)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    multiplier: Multiplier, is_causal: bool, scale: float, with_stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `forward`, with the weights W replaced by W * m wherever they stand (arXiv 2505.15080).

        dV = W^T G      M = W (G V^T - delta)      dQ = scale M K      dK = scale M^T Q      delta_i = G_i . O_i

    grad_out, q, out (B, H, T, D); k, v (B, K, T, D); lse (B, H, T) of `forward`. multiplier: (weights (B, H, R, N),
    rows, known) -> (m, dropped), see `sus_multiplier`; a test may pass any explicit mask in this form. delta always
    stays exact.

    Returns dq (B, H, T, D), dk and dv (B, K, T, D) and, if with_stats (else zeros), float32 (3,): the kept entries, the
    dropped entries, and an estimate of the variance that the cut adds to (dQ, dK, dV): sum over kept of
    (1/q - 1)/q * |contribution|^2.
    """
    B, H, T, D = q.shape
    K = k.shape[1]
    G = H // K
    acc = accumulate_dtype(q.dtype)
    grouped = lambda x: x.to(acc).reshape(B, K, G, T, D)
    q_, g_, k_, v_ = grouped(q), grouped(grad_out), k.to(acc), v.to(acc)
    lse_ = lse.reshape(B, K, G, T, 1)
    out_ = grouped(out)
    delta = (g_ * out_).sum(-1, keepdim=True)
    row_weight = row_weights(grad_out).unsqueeze(-1)
    # contiguous, whatever the inputs' strides: torch.compile is promised that
    dq = torch.empty(q_.shape, dtype=acc, device=q.device)
    dk, dv = (torch.zeros(k.shape, dtype=acc, device=q.device) for _ in range(2))
    stats = torch.zeros(3, device=q.device)

    for rows, N in _blocks(q, is_causal):
        r = slice(rows.start, rows.stop)
        q_r, g_r, k_n, v_n = q_[:, :, :, r], g_[:, :, :, r], k_[:, :, :N], v_[:, :, :N]
        w = torch.exp(_scores(q_r, k_n, rows, is_causal, scale) - lse_[:, :, :, r])  # (B, K, G, R, N)
        score_grad = torch.einsum("bkgrd,bknd->bkgrn", g_r, v_n) - delta[:, :, :, r]

        def square() -> Tensor:  # (B, H, R, N), as is distance: see Known
            norms = k_n.square().sum(-1)[:, :, None, None] + q_r.square().sum(-1, keepdim=True)
            square = g_r.square().sum(-1, keepdim=True) + (scale * score_grad) ** 2 * norms
            return square.reshape(B, H, -1, N)

        def distance() -> Tensor:
            return _distance(v_n, out_[:, :, :, r]).reshape(B, H, -1, N)

        m, dropped = multiplier(w.reshape(B, H, -1, N), rows, Known(row_weight[:, :, r], square, distance))
        m = m.reshape(w.shape)
        if with_stats:
            stats[0] += (m > 0).sum()
            stats[1] += dropped
            stats[2] += ((m - 1) * m * w**2 * square().reshape(w.shape)).sum()
        w = w * m  # a product, not a selection: NaN weights stay NaN, as in the exact gradient
        dv[:, :, :N] += torch.einsum("bkgrn,bkgrd->bknd", w, g_r)
        w = w * score_grad
        dq[:, :, :, r] = torch.einsum("bkgrn,bknd->bkgrd", w, k_n) * scale
        dk[:, :, :N] += torch.einsum("bkgrn,bkgrd->bknd", w, q_r) * scale
    return dq.reshape(B, H, T, D).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), stats
