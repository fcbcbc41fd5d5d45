"""The Triton kernels of the triton backend: an exact forward, and a SUS backward over the kept entries only.

    forward           out and the log-sum-exp of each row's scores, as FlashAttention-2 (Dao, arXiv 2307.08691)
    draw              the scores once more, now that W is known: each row's entries, and their order by tile of keys
    slopes            of each entry: scale * (G_i . V_j - delta_i)
    thin              of each entry: w = W / q and M = w * slope, both 0 where thinning cuts it
    query_gradients   dQ_i = sum of M K_j
    key_gradients     dK_j = sum of M Q_i and dV_j = sum of w G_i

What they have in common. B batch, H query heads, K key/value heads, T positions, D head dim. "local" are the heads of
one round of the backward, see triton.py; first_head is the first of them among all B * H. A row has `slots` entries, by tile,
in a tile by key % 8, and then by key: in `keys` int32, -1 in the empty ones, which come last; in `weights` float32, first W,
then w; in `m` float32, first the slope, then M. All three are (local, T, slots). Blocks are of BM query rows; a pass over the scores takes BN keys at once.

For dK and dV entries are wanted by tile of TILE keys. Each block's entries therefore have a second order, tile after
tile, in which a tile's are side by side: `order`, int32 (local, T, slots), has their places (row * slots + slot, within the block), and
`starts`, int32 (local, tiles + 1, blocks), where each tile's begin. The draw walks through its tiles in this order anyway. No
atomics: sums are the same from run to run.
"""

import triton
import triton.language as tl

from backends import reference

UNIT_BITS, UNIT = tl.constexpr(reference.UNIT_BITS), tl.constexpr(reference.UNIT)
STRIDED, THINNING = tl.constexpr(reference.STREAM_STRIDED), tl.constexpr(reference.STREAM_THINNING)
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


# -- randomness, as specified in reference.py -------------------------------------------------------


@triton.jit
def absorb(state, word):
    x = (state + 0x9E3779B9) ^ word.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_state(seed, STREAM: tl.constexpr, batch, head, rows):
    """The hash state of each row, uint32. seed: pointer to an int64."""
    words = tl.load(seed)
    state = absorb(tl.zeros([], tl.uint32), words & 0xFFFFFFFF)
    state = absorb(state, (words >> 32) & 0xFFFFFFFF)
    state = absorb(absorb(absorb(state, tl.full([], STREAM, tl.uint32)), batch), head)
    return absorb(state, rows)


@triton.jit
def uniform(state):
    """int32 in [0, UNIT)."""
    return (state >> (32 - UNIT_BITS)).to(tl.int32)


@triton.jit
def retention(c, c_max):
    """c, or 0 where it is no number above 0 (its gradients are NaN). c: pointer to a float32."""
    c = tl.load(c)
    return tl.where(c > 0, tl.minimum(c, c_max), 0)


@triton.jit
def units_of(x, one):
    """Inclusion probabilities x = c w in units: rounded up, at least one if `one` is 1, at most UNIT."""
    return tl.minimum(x, UNIT - 1).to(tl.int32) + one


# -- the forward ------------------------------------------------------------------------------------


@triton.jit
def forward(
    q, k, v, out, lse, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, scale, H, K, T,
    D: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out (B, H, T, D) and lse (B, H, T), contiguous. One program a block of rows, those with the most keys first.

    A row whose first BN scores are all -inf is NaN, though it is defined; only infinite inputs have such rows.
    """
    blocks = tl.cdiv(T, BM)
    block = blocks - 1 - tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    kv = h // (H // K)
    rows, cols, d = block * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    rows_ = rows.to(tl.int64)
    within = rows[:, None] < T
    q_tile = tl.load(q + b * q_b + h * q_h + rows_[:, None] * q_t + d[None, :] * q_d, mask=within, other=0)
    k_at = k + b * k_b + kv * k_h + cols[None, :].to(tl.int64) * k_t + d[:, None] * k_d  # (D, BN)
    v_at = v + b * v_b + kv * v_h + cols[:, None].to(tl.int64) * v_t + d[None, :] * v_d
    top = tl.full([BM], float("-inf"), tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    first_masked = block * BM // BN * BN
    for MASKED in tl.static_range(2):
        for start in range(first_masked if MASKED else 0, tl.minimum(block * BM + BM, T) if MASKED else first_masked, BN):
            if MASKED:
                inside = start + cols < T
                k_tile = tl.load(k_at, mask=inside[None, :], other=0)
                v_tile = tl.load(v_at, mask=inside[:, None], other=0)
            else:
                k_tile, v_tile = tl.load(k_at), tl.load(v_at)
            s = tl.dot(q_tile, k_tile, input_precision=PRECISION) * (scale * LOG2_E)
            if MASKED:
                s = tl.where((start + cols[None, :] <= rows[:, None]) & inside[None, :], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            norm = norm * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
            top = new_top
            k_at += BN * k_t
            v_at += BN * v_t
    row = head.to(tl.int64) * T + rows
    tl.store(out + row[:, None] * D + d[None, :], (acc / norm[:, None]).to(out.dtype.element_ty), mask=within)
    tl.store(lse + row, (top + tl.log2(norm)) * LN_2, mask=rows < T)


# -- the backward -----------------------------------------------------------------------------------


@triton.jit
def step(x, g: tl.constexpr, running, one, crossed, visible, MASKED: tl.constexpr):
    """Key g of each class: add its units to the running sum, and put the sum's lowest whole bit at bit g of crossed."""
    units = units_of(tl.exp2(x), one)
    if MASKED:
        units = tl.where(8 * g <= visible, units, 0)
    running += units
    return running, crossed | ((running >> (UNIT_BITS - g)) & (1 << g))


@triton.jit(do_not_specialize=["first_head"])
def draw(
    q, k, lse, c, seed, u, keys, order, starts, dropped, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, scale, c_max, kappa,
    first_head, H, K, T, slots,
    HAS_U: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The strided draw with kappa * c. lse and u are (B, H, T), u int32 in [0, UNIT) if HAS_U, else from the seed.

    dropped, int32 (local, blocks): entries beyond the slots, of which there are none. A tile's keys are of 8 classes,
    key % 8. In the layout of a product's result, the keys of a class lie in one thread: the running sums are additions
    within threads, and what is particular to the draw takes six instructions a score.
    """
    blocks = tl.cdiv(T, BM)
    block = blocks - 1 - tl.program_id(0) % blocks
    local = (tl.program_id(0) // blocks).to(tl.int64)
    head = first_head + local
    b, h = head // H, head % H
    kv = h // (H // K)
    rows, cols, d = block * BM + tl.arange(0, BM), tl.arange(0, TILE), tl.arange(0, D)
    classes = tl.arange(0, 8)[None, :]
    rows_ = rows.to(tl.int64)
    within = rows < T
    q_tile = tl.load(q + b * q_b + h * q_h + rows_[:, None] * q_t + d[None, :] * q_d, mask=within[:, None], other=0)
    k_at = k + b * k_b + kv * k_h + cols[None, :].to(tl.int64) * k_t + d[:, None] * k_d  # (D, TILE)
    log_norm = tl.load(lse + head * T + rows, mask=within, other=float("inf"))
    one = (tl.abs(log_norm) < float("inf")).to(tl.int32)[:, None]  # 0 in rows that keep nothing
    offset = tl.log2(retention(c, c_max) * kappa * UNIT) - tl.where(one == 1, log_norm[:, None], float("inf")) * LOG2_E
    if HAS_U:
        running = tl.load(u + head * T + rows, mask=within, other=0)[:, None] + 0 * classes
    else:
        running = uniform(absorb(row_state(seed, STRIDED, b, h, rows)[:, None], classes))
    block_entries = (local * T + block * BM) * slots
    place = (tl.arange(0, BM) * slots)[:, None]  # of a row's first slot
    starts_at = starts + local * (tl.cdiv(T, TILE) + 1) * blocks + block
    count = tl.zeros([BM], tl.int32)  # of a row's entries
    placed = tl.zeros([], tl.int32)  # of the block's
    lost = tl.zeros([BM], tl.int32)
    first_masked = block * BM // TILE * TILE
    stop = tl.minimum(block * BM + BM, T)
    for MASKED in tl.static_range(2):
        for start in range(first_masked if MASKED else 0, stop if MASKED else first_masked, TILE):
            if MASKED:
                k_tile = tl.load(k_at, mask=start + cols[None, :] < T, other=0)
            else:
                k_tile = tl.load(k_at)
            s = tl.dot(q_tile, k_tile, input_precision=PRECISION) * (scale * LOG2_E) + offset
            visible = rows[:, None] - start - classes  # the classes' keys at 8 g up to this
            crossed = tl.zeros([BM, 8], tl.int32)
            # (BM, bits of g, classes) -> (BM, classes, bits of g); splitting takes the last bit first
            if TILE == 64:
                s0, s1 = tl.split(tl.permute(tl.reshape(s, [BM, 2, 2, 2, 8]), [0, 4, 1, 2, 3]))
                s00, s10 = tl.split(s0)
                s01, s11 = tl.split(s1)
                g0, g4 = tl.split(s00)
                g1, g5 = tl.split(s01)
                g2, g6 = tl.split(s10)
                g3, g7 = tl.split(s11)
            else:
                s0, s1 = tl.split(tl.permute(tl.reshape(s, [BM, 2, 2, 8]), [0, 3, 1, 2]))
                g0, g2 = tl.split(s0)
                g1, g3 = tl.split(s1)
            running, crossed = step(g0, 0, running, one, crossed, visible, MASKED)
            running, crossed = step(g1, 1, running, one, crossed, visible, MASKED)
            running, crossed = step(g2, 2, running, one, crossed, visible, MASKED)
            running, crossed = step(g3, 3, running, one, crossed, visible, MASKED)
            if TILE == 64:
                running, crossed = step(g4, 4, running, one, crossed, visible, MASKED)
                running, crossed = step(g5, 5, running, one, crossed, visible, MASKED)
                running, crossed = step(g6, 6, running, one, crossed, visible, MASKED)
                running, crossed = step(g7, 7, running, one, crossed, visible, MASKED)
            hits = (crossed ^ (crossed << 1)) & ((1 << (TILE // 8)) - 1) & -one  # a whole number was passed
            n = (running >> UNIT_BITS) * one
            running &= UNIT - 1

            slot = count[:, None] + tl.cumsum(n, 1) - n
            wanted = count + tl.sum(n, 1)
            new = tl.minimum(wanted, slots) - count
            shift = (placed + tl.cumsum(new, 0) - new - count)[:, None]
            tl.store(starts_at + start // TILE * blocks, placed)
            for _ in range(0, tl.max(tl.max(n, 1), 0)):
                low = hits & -hits
                g = ((low & 0xF0) != 0).to(tl.int32) * 4 + ((low & 0xCC) != 0).to(tl.int32) * 2 + ((low & 0xAA) != 0).to(tl.int32)
                kept = (low != 0) & (slot < slots)
                tl.store(keys + block_entries + place + slot, start + 8 * g + classes, mask=kept)
                tl.store(order + block_entries + shift + slot, place + slot, mask=kept)
                hits ^= low
                slot += 1
            placed += tl.sum(new, 0)
            lost += wanted - count - new
            count += new
            k_at += TILE * k_t
    tl.store(starts_at + tl.cdiv(stop, TILE) * blocks, placed)
    tl.store(dropped + local * blocks + block, tl.sum(lost, 0))
    for start in range(0, slots, TILE):
        empty = (start + cols[None, :] >= count[:, None]) & (start + cols[None, :] < slots) & within[:, None]
        tl.store(keys + block_entries + place + start + cols[None, :], tl.full([BM, TILE], -1, tl.int32), mask=empty)


@triton.jit(do_not_specialize=["first_head"])
def slopes(
    grad_out, q, k, v, out, lse, c, keys, weights, m, undefined,
    g_b, g_h, g_t, g_d, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, scale,
    first_head, H, K, T, slots, D: tl.constexpr, ROWS: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """W, and the slopes scale * (G_i . V_j - delta_i). undefined, float32 (local, T): 0, or NaN where dQ is.

    out and lse are whole, contiguous. One program ROWS rows; SOME slots of each at once.
    """
    groups = tl.cdiv(T, ROWS)
    local = (tl.program_id(0) // groups).to(tl.int64)
    head = first_head + local
    b, h = head // H, head % H
    rows, d = tl.program_id(0) % groups * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    within = rows < T
    rows_ = rows.to(tl.int64)
    g_at = grad_out + b * g_b + h * g_h + rows_[:, None] * g_t + d[None, :] * g_d
    g = tl.load(g_at, mask=within[:, None], other=0).to(tl.float32)
    out_at = out + (head * T + rows_)[:, None] * D + d[None, :]
    delta = tl.sum(g * tl.load(out_at, mask=within[:, None], other=0).to(tl.float32), 1)
    log_norm = tl.load(lse + head * T + rows_, mask=within, other=0)
    bad = tl.where(tl.load(c) > 0, 0.0, float("nan"))
    tl.store(undefined + local * T + rows_, (delta + log_norm) * 0 + bad, mask=within)
    q_at = q + b * q_b + h * q_h + rows_[:, None] * q_t + d[None, :] * q_d
    q_rows = tl.load(q_at, mask=within[:, None], other=0).to(tl.float32)
    for start in range(0, slots, SOME):
        slot = start + tl.arange(0, SOME)
        at = (local * T + rows_)[:, None] * slots + slot[None, :]
        key = tl.load(keys + at, mask=within[:, None] & (slot[None, :] < slots), other=-1)
        used = key >= 0
        k_at = k + b * k_b + h // (H // K) * k_h + key[:, :, None].to(tl.int64) * k_t + d[None, None, :] * k_d
        s = tl.sum(q_rows[:, None, :] * tl.load(k_at, mask=used[:, :, None], other=0).to(tl.float32), 2)
        # the difference first: of large scores, each further product would round away more of it
        tl.store(weights + at, tl.exp2((s * scale - log_norm[:, None]) * LOG2_E), mask=used)
        v_at = v + b * v_b + h // (H // K) * v_h + key[:, :, None].to(tl.int64) * v_t + d[None, None, :] * v_d
        products = tl.sum(g[:, None, :] * tl.load(v_at, mask=used[:, :, None], other=0).to(tl.float32), 2)
        tl.store(m + at, scale * (products - delta[:, None]), mask=used)


@triton.jit(do_not_specialize=["first_head"])
def thin(
    keys, weights, m, c, seed, row_weight, g_square, q_square, k_square, kept, variance, c_max, kappa, first_head, H, K, T,
    slots, THINS: tl.constexpr, ESTIMATES: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """W becomes w = W / q, and the slopes M, both 0 where the second draw cuts an entry (if THINS).

    row_weight, g_square, q_square (B, H, T) and k_square (B, K, T): see reference.row_weights, and squared norms of
    rows; unused but to thin or estimate. kept int32, variance float32 (local, groups of rows): sums over each
    program's entries, the variance as in reference.backward if ESTIMATES. SLOTS: a power of 2, at least slots.
    """
    groups = tl.cdiv(T, ROWS)
    group = tl.program_id(0) % groups
    local = (tl.program_id(0) // groups).to(tl.int64)
    head = first_head + local
    b, h = head // H, head % H
    rows, slot = group * ROWS + tl.arange(0, ROWS), tl.arange(0, SLOTS)
    within = rows < T
    at = (local * T + rows)[:, None] * slots + slot[None, :]
    key = tl.load(keys + at, mask=within[:, None] & (slot[None, :] < slots), other=-1)
    used = key >= 0
    keep = used
    weight, slope = tl.load(weights + at, mask=used, other=0), tl.load(m + at, mask=used, other=0)
    c_i = retention(c, c_max)
    units = units_of(weight * (c_i * kappa * UNIT), 1).to(tl.float32)
    w = tl.where(used, weight * (UNIT / units), 0)
    if THINS or ESTIMATES:
        k_at = k_square + (b * K + h // (H // K)) * T + key
        norms = tl.load(k_at, mask=used, other=0) + tl.load(q_square + head * T + rows, mask=within, other=0)[:, None]
        g = tl.load(g_square + head * T + rows, mask=within, other=0)
        square = slope * slope * norms + g[:, None]
    if THINS:
        mean = tl.sum(tl.where(used, w * square, 0), 1) / tl.sum(w, 1)
        factor = tl.sqrt(square / mean[:, None])
        factor = tl.where(factor < float("inf"), factor, 1)  # and where it is NaN
        aim = w * (c_i * tl.load(row_weight + head * T + rows, mask=within, other=0) * UNIT)[:, None] * factor
        aim = tl.where(aim < UNIT, tl.maximum(tl.ceil(aim), 1), UNIT)
        r = tl.where(used, aim, 0).to(tl.int32)
        wide: tl.constexpr = tl.int32 if SLOTS < 255 else tl.int64  # which holds a sum of 2^23 over all slots
        total = uniform(row_state(seed, THINNING, b, h, rows))[:, None].to(wide) + tl.cumsum(r.to(wide), 1)
        keep = (total & (UNIT - 1)) < r
        w = tl.where(keep, w * (UNIT / aim), 0)
    tl.store(weights + at, w, mask=used)
    tl.store(m + at, tl.where(keep, slope * w, 0), mask=used)
    tl.store(kept + local * groups + group, tl.sum(tl.sum(keep.to(tl.int32), 1), 0))
    if ESTIMATES:
        added = tl.where(keep, w * (w - weight) * square, 0)
        tl.store(variance + local * groups + group, tl.sum(tl.sum(added, 1), 0))


@triton.jit(do_not_specialize=["first_head"])
def query_gradients(
    k, keys, m, undefined, dq, k_b, k_h, k_t, k_d, first_head, H, K, T, slots,
    D: tl.constexpr, ROWS: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """dq (B, H, T, D), contiguous. One program ROWS rows, SOME slots of each at once."""
    groups = tl.cdiv(T, ROWS)
    local = (tl.program_id(0) // groups).to(tl.int64)
    head = first_head + local
    b, h = head // H, head % H
    rows, d = tl.program_id(0) % groups * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    within = rows < T
    rows_ = rows.to(tl.int64)
    acc = tl.zeros([ROWS, D], tl.float32)
    for start in range(0, slots, SOME):
        slot = start + tl.arange(0, SOME)
        at = (local * T + rows_)[:, None] * slots + slot[None, :]
        key = tl.load(keys + at, mask=within[:, None] & (slot[None, :] < slots), other=-1)
        factor = tl.load(m + at, mask=key >= 0, other=0)
        k_at = k + b * k_b + h // (H // K) * k_h + key[:, :, None].to(tl.int64) * k_t + d[None, None, :] * k_d
        used = factor != 0  # NaN too
        acc += tl.sum(factor[:, :, None] * tl.load(k_at, mask=used[:, :, None], other=0).to(tl.float32), 1)
    acc += tl.load(undefined + local * T + rows_, mask=within, other=0)[:, None]
    tl.store(dq + (head * T + rows_)[:, None] * D + d[None, :], acc.to(dq.dtype.element_ty), mask=within[:, None])


@triton.jit(do_not_specialize=["first_head"])
def key_gradients(
    grad_out, q, c, keys, weights, m, order, starts, dk, dv, g_b, g_h, g_t, g_d, q_b, q_h, q_t, q_d,
    first_head, H, K, T, slots,
    D: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """dk, dv (B, K, T, D), contiguous. One program a tile of keys; BLOCKS blocks at once, and SOME entries of each.

    A sum by key is a product with a matrix that has a 1 where the entry is of that key.
    """
    tiles, blocks = tl.cdiv(T, TILE), tl.cdiv(T, BM)
    tile = tl.program_id(0) % tiles
    local_kv = (tl.program_id(0) // tiles).to(tl.int64)
    group = H // K
    kv = first_head // group + local_kv
    b = kv // K
    key, d = tile * TILE + tl.arange(0, TILE), tl.arange(0, D)
    dk_acc, dv_acc = tl.zeros([TILE, D], tl.float32), tl.zeros([TILE, D], tl.float32)
    for member in range(0, group):
        local = local_kv * group + member
        h = kv % K * group + member
        g_head, q_head = grad_out + b * g_b + h * g_h, q + b * q_b + h * q_h
        starts_at = starts + (local * (tiles + 1) + tile) * blocks
        for first in range(tile * TILE // BM, blocks, BLOCKS):
            block = first + tl.arange(0, BLOCKS)
            start = tl.load(starts_at + block, mask=block < blocks, other=0)
            stop = tl.load(starts_at + blocks + block, mask=block < blocks, other=0)
            block_entries = (local * T + block.to(tl.int64) * BM) * slots
            for done in range(0, tl.max(stop - start, 0), SOME):
                at = start[:, None] + done + tl.arange(0, SOME)[None, :]
                some = at < stop[:, None]
                at = block_entries[:, None] + at
                place = tl.load(order + at, mask=some, other=0)
                at = block_entries[:, None] + place
                row = tl.reshape((block * BM)[:, None] + place // slots, [BLOCKS * SOME]).to(tl.int64)
                entry_key = tl.reshape(tl.load(keys + at, mask=some, other=-1), [BLOCKS * SOME])
                w = tl.reshape(tl.load(weights + at, mask=some, other=0), [BLOCKS * SOME])
                M = tl.reshape(tl.load(m + at, mask=some, other=0), [BLOCKS * SOME])
                used = (w != 0)[:, None]
                g = tl.load(g_head + row[:, None] * g_t + d[None, :] * g_d, mask=used, other=0)
                q_rows = tl.load(q_head + row[:, None] * q_t + d[None, :] * q_d, mask=used, other=0)
                is_key = (key[:, None] == entry_key[None, :]).to(g.dtype)
                g, q_rows = w[:, None] * g.to(tl.float32), M[:, None] * q_rows.to(tl.float32)
                dv_acc = tl.dot(is_key, g.to(is_key.dtype), dv_acc, input_precision=PRECISION)
                dk_acc = tl.dot(is_key, q_rows.to(is_key.dtype), dk_acc, input_precision=PRECISION)
    bad = tl.where(tl.load(c) > 0, 0.0, float("nan"))
    at = (kv * T + key.to(tl.int64))[:, None] * D + d[None, :]
    tl.store(dk + at, (dk_acc + bad).to(dk.dtype.element_ty), mask=key[:, None] < T)
    tl.store(dv + at, (dv_acc + bad).to(dv.dtype.element_ty), mask=key[:, None] < T)
