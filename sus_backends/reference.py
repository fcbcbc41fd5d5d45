"""The reference backend: attention with a SUS backward in plain PyTorch, on any device.

It is the truth that faster kernels are tested against, and the fallback where there is none. Three things are specified
here, once, for every backend: the hash behind all random draws, the fixed-point inclusion probabilities, and the
samplers.

Dims: B batch, H query heads, K key/value heads, G = H / K query heads a key/value head, T query rows, N keys, D head
dim, R query rows of one block, n keys that some row of the block sees. All work goes in blocks of R rows, so nothing of
size T x N is ever stored: O(R * N) scratch.

Deliberately missing: speed. A block's masked products are dense; kernels visit kept tiles only.
"""

import math
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


def slot_bound(c_max: float, N: int) -> int:
    """The most entries a row may keep under systematic sampling: ceil(c) + 1, as rounding up may lift sum(q) past c."""
    return N if c_max >= N else min(int(-(-c_max // 1)) + 1, N)


def row_uniforms(
    seed: Tensor, B: int, H: int, rows: range, device: Device, stream: int = STREAM_SYSTEMATIC, first_head: int = 0
) -> Tensor:
    """One uniform a row for systematic sampling: int64 (B, H, R) in [0, 2^23). seed: 0-d int64."""
    return row_states(seed_state(seed, stream), B, H, rows, device, first_head) >> (32 - UNIT_BITS)


def row_states(state: Tensor, B: int, H: int, rows: range, device: Device, first_head: int = 0) -> Tensor:
    """The hash state of each row, int64 (B, H, R), of heads from first_head on."""
    batch, head = torch.arange(B, device=device), torch.arange(first_head, first_head + H, device=device)
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


def poisson_slots(c_max: float, N: int) -> int:
    """So many entries that no row keeps more under Poisson sampling, but for one in 10^19 (Bernstein's inequality)."""
    return N if c_max >= N else min(math.ceil(c_max + 9 * c_max**0.5 + 24), N)


def keep_poisson(q_units: Tensor, seed: Tensor, rows: range, keys: range, first_head: int = 0) -> Tensor:
    """Poisson sampling (the paper's): independent Bernoulli(q).

    q_units: int32 (B, H, R, n), of these rows and keys. seed: 0-d int64. Returns keep, bool (B, H, R, n).
    """
    B, H = q_units.shape[:2]
    device = q_units.device
    state = row_states(seed_state(seed, STREAM_POISSON), B, H, rows, device, first_head)
    u = absorb(state.unsqueeze(-1), torch.arange(keys.start, keys.stop, device=device)) >> (32 - UNIT_BITS)
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
    square: Callable[[], Tensor]  # () -> (B, H, R, n): the squared norm of what an entry adds to (dQ, dK, dV), over W^2
    distance: Callable[[], Tensor]  # () -> (B, H, R, n): |V_j - O_i|^2


def row_weights(grad_out: Tensor, group: torch.distributed.ProcessGroup | None = None) -> Tensor:
    """The norm of each row of grad_out (B, H, T, D) over its mean in that batch and head, held to ROW_WEIGHTS.

    (B, H, T), float32 (float64 for float64 inputs). It is 1 where the mean is 0 or one of the two isn't finite.
    group: of processes that have rows of the same batches and heads each; the mean is over the rows of all.
    """
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()  # strides must not change a bit
    norm = grad_out.norm(dim=-1, dtype=accumulate_dtype(grad_out.dtype))
    if group is None:
        mean = norm.mean(-1, keepdim=True)
    else:
        total = torch.cat([norm.sum(-1).flatten(), norm.new_full((1,), norm.shape[-1])])
        torch.distributed.all_reduce(total, group=group)
        mean = (total[:-1] / total[-1]).view(*norm.shape[:2], 1)
    # in few operations, each of which is a launch: NaN where the mean is 0, or one of the two isn't finite
    return (norm / mean).add_(mean * 0).nan_to_num_(1).clamp_(*ROW_WEIGHTS)


def thinning_units(proposed: Tensor, w: Tensor, q_units: Tensor, c: Tensor, sampler: str, known: Known) -> Tensor:
    """r in fixed point: int32 (B, H, R, n), from 1 to 2^23 where an entry is proposed, 0 elsewhere.

    proposed, bool; w, the weights; q_units, int32, of `inclusion_units`: all (B, H, R, n). c: 0-d.
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


def tiles_of(N: int) -> int:
    return -(-N // TILE)


def tile_slots(c_max: float, N: int) -> int:
    """The most tiles that a row may propose."""
    return slot_bound(KAPPA * c_max, tiles_of(N))


def slots_of(sampler: str, c_max: float, N: int) -> int:
    """The most tiles that a row may propose, or keys that it may keep, in a backend that draws in the forward."""
    return poisson_slots(c_max, N) if sampler == "poisson" else tile_slots(c_max, N)


def tile_masses(w: Tensor) -> Tensor:
    """Sums of W (..., n) over the keys of each tile: (..., tiles). The first key is a tile's first."""
    return torch.nn.functional.pad(w, (0, -w.shape[-1] % TILE)).unflatten(-1, (-1, TILE)).sum(-1)


def proposals_like(q: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Room for the proposals which a forward on q (B, H, T, D) hands to its backward.

    tiles, int32 (B, H, T, slots): each row's proposed tiles, ascending, then -1. masses, float32 of that shape: their
    W_iJ, of which x_iJ = inclusion_units(W_iJ, KAPPA * c) is made, then 0. With the sampler poisson the keys that are
    kept, and their W_ij.
    """
    shape = *q.shape[:3], slots
    return q.new_empty(shape, dtype=torch.int32), q.new_empty(shape, dtype=torch.float32)


Multiplier = Callable[..., tuple[Tensor, Tensor]]  # see sus_multiplier


def sus_multiplier(
    c: Tensor, c_max: float, sampler: str, seed: Tensor, u: Tensor | None, N: int, first_row: int = 0,
    first_head: int = 0,
) -> Multiplier:  # fmt: skip
    """A function (weights (B, H, R, n), rows[, known, first_key]) -> m of their shape: 1/q where they are kept, else 0.

    c: 0-d float tensor, seed: 0-d int64 tensor, both on the weights' device. known: needed by samplers that thin.
    first_key: of the n, a multiple of TILE. It also returns how many entries were dropped (0-d int64 tensor; 0 by
    construction, and always for Poisson). u: None, or the systematic sampler's uniforms, int64 (B, H, T) in [0, 2^23).
    N: keys. first_row, first_head: of the whole, if these are a part of it.
    """
    c = torch.clamp(c, max=c_max)
    thins = sampler in THINNED
    first = KAPPA if thins else 1  # times c: what the first draw is made with; it also sizes the buffers
    slots = tile_slots(c_max, N) if sampler == "tiles" else slot_bound(first * c_max, N)

    def multiplier(w: Tensor, rows: range, known: Known | None = None, first_key: int = 0) -> tuple[Tensor, Tensor]:
        if sampler == "tiles":
            m, dropped = mask_of(tile_masses(w), rows, known, 0)
            return m.repeat_interleave(TILE, -1)[..., : w.shape[-1]] * (w != 0), dropped  # nothing that isn't seen
        return mask_of(w, rows, known, first_key)

    def mask_of(w: Tensor, rows: range, known: Known | None, first_key: int) -> tuple[Tensor, Tensor]:
        B, H = w.shape[:2]
        q_units = inclusion_units(w, first * c)
        there = range(first_row + rows.start, first_row + rows.stop)
        uniforms = lambda stream: row_uniforms(seed, B, H, there, w.device, stream, first_head)
        if sampler == "poisson":
            keys = range(first_key, first_key + w.shape[-1])
            keep, dropped = keep_poisson(q_units, seed, there, keys, first_head), torch.zeros((), dtype=torch.int64)
        else:
            u_rows = uniforms(STREAM_SYSTEMATIC) if u is None else u[:, :, rows.start : rows.stop]
            keep, dropped = keep_systematic(q_units, u_rows, slots)
        m = torch.where(keep, UNIT / q_units.to(w.dtype), 0)
        if thins:
            assert known is not None, "a sampler that thins has to know of more than the weights"
            r_units = thinning_units(keep, w, q_units, c, sampler, known)
            keep, _ = keep_systematic(r_units, uniforms(STREAM_THINNING), slots)
            m = torch.where(keep, m * (UNIT / r_units.to(w.dtype)), 0)
        return m, dropped

    return multiplier


# ---------------------------------------------------------------------------------------------
# Attention.
# ---------------------------------------------------------------------------------------------

# Scores of one block, over all batches and heads. A CPU's caches should hold a block's few buffers; elsewhere a block
# must be large enough to be worth its launches (64 MiB a buffer in float32).
CPU_BLOCK_ENTRIES, BLOCK_ENTRIES = 1 << 19, 1 << 24


def ranges_of(key_ranges: Tensor | None, is_causal: bool, T: int, N: int, device: Device) -> Tensor:
    """The keys [lo, hi) that each row sees: int32 (1 or B, T, 2), 0 <= lo <= hi <= N.

    key_ranges: (T, 2) or (B, T, 2), or None: the rows are the last T of N positions, and see what is up to them if
    is_causal, else all keys.
    """
    if key_ranges is None:
        hi = torch.arange(N - T + 1, N + 1, device=device) if is_causal else torch.full((T,), N, device=device)
        key_ranges = torch.stack([torch.zeros_like(hi), hi], -1)
    ranges = key_ranges.view(-1, T, 2).clamp(0, N)
    return torch.stack([ranges[..., 0], torch.maximum(ranges[..., 0], ranges[..., 1])], -1).int()


def _blocks(q: Tensor, N: int, is_causal: bool, key_ranges: Tensor | None) -> Iterator[tuple[range, range]]:
    """(rows, keys) for q (B, H, T, D): ranges of query rows, and of the keys that some of them see, from a tile's first
    on; of all keys where key_ranges lies on a device that it would have to wait for.
    """
    B, H, T, _ = q.shape
    known = key_ranges is None or q.device.type == "cpu"
    ranges = ranges_of(key_ranges, is_causal, T, N, "cpu") if known else None
    R = max(1, min(T, (CPU_BLOCK_ENTRIES if q.device.type == "cpu" else BLOCK_ENTRIES) // (B * H * N)))
    for start in range(0, T, R):
        rows, keys = range(start, min(start + R, T)), range(N)
        if ranges is not None:
            of_rows = ranges[:, rows.start : rows.stop]
            of_rows = of_rows[of_rows[..., 0] < of_rows[..., 1]]
            if not len(of_rows):
                continue
            keys = range(int(of_rows[:, 0].min()) // TILE * TILE, int(of_rows[:, 1].max()))
        yield rows, keys


def _scores(q: Tensor, k: Tensor, keys: range, ranges: Tensor, scale: float) -> Tensor:
    """Scaled scores of a block. q (B, K, G, R, D), k (B, K, n, D) -> (B, K, G, R, n), -inf where a row doesn't see.

    ranges: (1 or B, R, 2), of the block's rows.
    """
    s = torch.einsum("bkgrd,bknd->bkgrn", q * scale, k)
    key = torch.arange(keys.start, keys.stop, device=q.device)
    lo, hi = ranges[:, None, None, :, :1], ranges[:, None, None, :, 1:]
    return s.masked_fill_((key < lo) | (key >= hi), float("-inf"))


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float, key_ranges: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Exact attention. q (B, H, T, D); k, v (B, K, N, D). key_ranges: see `ranges_of`.

    Returns out (B, H, T, D) in q's dtype, and the log-sum-exp of each row's scaled scores, (B, H, T) in float32
    (float64 for float64 inputs). Both are 0 for a row that sees nothing: its weights are then 0, too.
    """
    B, H, T, D = q.shape
    K, N = k.shape[1:3]
    acc = accumulate_dtype(q.dtype)
    q_, k_, v_ = q.to(acc).reshape(B, K, H // K, T, D), k.to(acc), v.to(acc)
    ranges = ranges_of(key_ranges, is_causal, T, N, q.device)
    out = q.new_zeros(B, H, T, D)
    lse = q.new_zeros(B, H, T, dtype=acc)
    for rows, keys in _blocks(q, N, is_causal, key_ranges):
        r, n, seen = slice(rows.start, rows.stop), slice(keys.start, keys.stop), ranges[:, rows.start : rows.stop]
        s = _scores(q_[:, :, :, r], k_[:, :, n], keys, seen, scale)
        nothing = (seen[..., :1] == seen[..., 1:])[:, None, None]
        lse_r = torch.logsumexp(s, -1, keepdim=True).masked_fill_(nothing, 0)
        lse[:, :, r] = lse_r.reshape(B, H, -1)
        w = s.sub_(lse_r).exp_()
        out[:, :, r] = torch.einsum("bkgrn,bknd->bkgrd", w, v_[:, :, n]).reshape(B, H, -1, D)
    return out, lse


def _distance(v: Tensor, out: Tensor) -> Tensor:
    """|V_j - O_i|^2 from differences: of squares and a product, next to nothing may be left. (B, K, G, R, n)"""
    return torch.stack([(v[:, :, None] - o[:, :, :, None]).square().sum(-1) for o in out.unbind(3)], 3)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    multiplier: Multiplier, is_causal: bool, scale: float, with_stats: bool = False,
    key_ranges: Tensor | None = None, row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `forward`, with the weights W replaced by W * m wherever they stand (arXiv 2505.15080).

        dV = W^T G      M = W (G V^T - delta)      dQ = scale M K      dK = scale M^T Q      delta_i = G_i . O_i

    grad_out, q, out (B, H, T, D); k, v (B, K, N, D); lse (B, H, T) of `forward`. multiplier: see `sus_multiplier`; a
    test may pass any explicit mask in this form. delta always stays exact. row_weight: of `row_weights`, which is
    called if it is None.

    Returns dq (B, H, T, D), dk and dv (B, K, N, D) and, if with_stats (else zeros), float32 (3,): the kept entries, the
    dropped entries, and an estimate of the variance that the cut adds to (dQ, dK, dV): sum over kept of
    (1/q - 1)/q * |contribution|^2.
    """
    B, H, T, D = q.shape
    K, N = k.shape[1:3]
    G = H // K
    acc = accumulate_dtype(q.dtype)
    grouped = lambda x: x.to(acc).reshape(B, K, G, T, D)
    q_, g_, k_, v_ = grouped(q), grouped(grad_out), k.to(acc), v.to(acc)
    lse_ = lse.reshape(B, K, G, T, 1)
    out_ = grouped(out)
    delta = (g_ * out_).sum(-1, keepdim=True)
    row_weight = (row_weights(grad_out) if row_weight is None else row_weight).unsqueeze(-1)
    ranges = ranges_of(key_ranges, is_causal, T, N, q.device)
    # contiguous, whatever the inputs' strides: torch.compile is promised that
    dq, dk, dv = (torch.zeros(x.shape, dtype=acc, device=q.device) for x in (q_, k, v))
    stats = torch.zeros(3, device=q.device)

    for rows, keys in _blocks(q, N, is_causal, key_ranges):
        r, n = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
        q_r, g_r, k_n, v_n = q_[:, :, :, r], g_[:, :, :, r], k_[:, :, n], v_[:, :, n]
        w = torch.exp(_scores(q_r, k_n, keys, ranges[:, r], scale) - lse_[:, :, :, r])  # (B, K, G, R, n)
        score_grad = torch.einsum("bkgrd,bknd->bkgrn", g_r, v_n) - delta[:, :, :, r]

        def square() -> Tensor:  # (B, H, R, n), as is distance: see Known
            norms = k_n.square().sum(-1)[:, :, None, None] + q_r.square().sum(-1, keepdim=True)
            square = g_r.square().sum(-1, keepdim=True) + (scale * score_grad) ** 2 * norms
            return square.reshape(B, H, -1, len(keys))

        def distance() -> Tensor:
            return _distance(v_n, out_[:, :, :, r]).reshape(B, H, -1, len(keys))

        known = Known(row_weight[:, :, r], square, distance)
        m, dropped = multiplier(w.reshape(B, H, -1, len(keys)), rows, known, keys.start)
        m = m.reshape(w.shape)
        if with_stats:
            stats[0] += (m > 0).sum()
            stats[1] += dropped
            stats[2] += ((m - 1) * m * w**2 * square().reshape(w.shape)).sum()
        w = w * m  # a product, not a selection: NaN weights stay NaN, as in the exact gradient
        dv[:, :, n] += torch.einsum("bkgrn,bkgrd->bknd", w, g_r)
        w = w * score_grad
        dq[:, :, :, r] = torch.einsum("bkgrn,bknd->bkgrd", w, k_n) * scale
        dk[:, :, n] += torch.einsum("bkgrn,bkgrd->bknd", w, q_r) * scale
    return dq.reshape(B, H, T, D).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), stats
