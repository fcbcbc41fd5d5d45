"""The Triton kernels of the triton backend: an exact forward, and a SUS backward over the tiles kept.

    forward           out and the log-sum-exp of each row's scores, as FlashAttention-2 (Dao, arXiv 2307.08691), and
                      the log-sum-exp of those in each tile
    draw              the tiles that each row proposes
    thin              which of these it keeps, and what each weighs; delta_i = G_i . O_i
    plan              where in the lists each tile's rows begin
    list_rows         the rows that keep a tile, tile by tile
    tile_gradients    of one tile and the rows that keep it: P = W times the weight, M = scale * P * (G V^T - delta),
                      and from these sums over rows, P^T G and M^T Q, and each row's M K
    sum_parts         dQ_i: the sum of a row's M K; dK, dV: sums of tile_gradients' sums

What they have in common. B batch, H query heads, K key/value heads, T query rows, N keys, D head dim. TILE keys make a
tile, of which there are `all_tiles`. A row proposes up to `slots` tiles. "local" are the heads of one round, see
triton.py; first_head is the first of them among all B * H. A region is a tile of a local head. What a kept (row, tile)
gives to dQ waits in `parts`, ordered by region and row, until all tiles are done: no sum depends on which program comes
first. The only atomic operations are on integers, whose sums have no order.
"""

import triton
import triton.language as tl

from sus_backends import reference

UNIT_BITS, UNIT = tl.constexpr(reference.UNIT_BITS), tl.constexpr(reference.UNIT)
PROPOSING, THINNING = tl.constexpr(reference.STREAM_SYSTEMATIC), tl.constexpr(reference.STREAM_THINNING)
TILE = tl.constexpr(reference.TILE)
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3e38)


# -- randomness, as specified in reference.py -------------------------------------------------------


@triton.jit
def absorb(state, word):
    x = (state + 0x9E3779B9) ^ word.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_uniforms(seed, STREAM: tl.constexpr, batch, head, rows):
    """int32 in [0, UNIT). seed: pointer to an int64."""
    words = tl.load(seed)
    state = absorb(tl.zeros([], tl.uint32), words & 0xFFFFFFFF)
    state = absorb(state, (words >> 32) & 0xFFFFFFFF)
    state = absorb(absorb(absorb(state, tl.full([], STREAM, tl.uint32)), batch), head)
    return (absorb(state, rows) >> (32 - UNIT_BITS)).to(tl.int32)


@triton.jit
def retention(c, c_max):
    """c, or 0 where it is no number above 0 (its gradients are NaN). c: pointer to a float32."""
    c = tl.load(c)
    return tl.where(c > 0, tl.minimum(c, c_max), 0)


@triton.jit
def inclusion_units(mass, c_units):
    """reference.inclusion_units, as floats: draw and thin must agree on them to the bit. c_units: c * UNIT."""
    return tl.ceil(tl.minimum(mass * c_units, UNIT))


@triton.jit
def sight(ranges, ranges_b, past, b, row, within, N, RANGES: tl.constexpr):
    """lo, hi: the keys [lo, hi) that each row sees; none if it is not within.

    RANGES: of ranges, int32 (B or 1, T, 2), whose batches are ranges_b apart. Else it is those up to row + past.
    """
    if RANGES:
        at = ranges + b * ranges_b + 2 * row
        lo = tl.minimum(tl.maximum(tl.load(at, mask=within, other=0), 0), N)
        hi = tl.minimum(tl.maximum(tl.load(at + 1, mask=within, other=0), lo), N)
    else:
        lo, hi = tl.zeros_like(row), tl.where(within, tl.minimum(row + past + 1, N), 0)
    return lo, hi


@triton.jit
def heads_of(program, per_head, first_head, H):
    """(local head, batch, head) of a program, of which each head has so many."""
    local = (program // per_head).to(tl.int64)
    head = first_head + local
    return local, head // H, head % H


# -- the forward ------------------------------------------------------------------------------------


@triton.jit
def rough_log2(x):
    """log2 of x > 0, within 0.01, in a few instructions: the exponent, and a parabola for the mantissa."""
    bits = x.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    return ((bits >> 23) - 127).to(tl.float32) + mantissa * (1.3465 - 0.3465 * mantissa)


@triton.jit(do_not_specialize=["past", "first_head", "heads", "first_row", "rows", "tabled"])
def forward(
    q, k, v, ranges, out, lse, table, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, scale,
    ranges_b, past, first_head, heads, first_row, rows, tabled, H, K, T, N,
    RANGES: tl.constexpr, DRAWS: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """out (B, H, T, D) and lse (B, H, T), contiguous, for `rows` rows from first_row on of the local heads.

    One program a block of BM rows: those with the most keys first, of all heads, so that the last to finish are short;
    heads that share their keys are neighbours. q (B, H, T, D); k, v (B, K, N, D): their strides are q_b, q_h, q_t, q_d
    and so on. ranges, ranges_b, past: see `sight`. A row that sees nothing is 0, as is its lse.

    table, float32 (local, tabled, rows): in base 2 and nearly, the log-sum-exp of a row's scores in a tile, if DRAWS.
    Of the tiles that these rows may see; it is written where some row of a block sees some of a tile.
    A row whose scores are all -inf is NaN; without ranges a row whose first TILE are, though it is defined. Only
    infinite inputs have such rows.
    """
    local, b, h = heads_of(tl.program_id(0) % heads, 1, first_head, H)
    kv = h // (H // K)
    first = first_row + (tl.cdiv(rows, BM) - 1 - tl.program_id(0) // heads) * BM
    row, cols, d = first + tl.arange(0, BM), tl.arange(0, TILE), tl.arange(0, D)
    row_ = row.to(tl.int64)
    within = row < T
    q_tile = tl.load(q + b * q_b + h * q_h + row_[:, None] * q_t + d[None, :] * q_d, mask=within[:, None], other=0)
    # Pointers are made anew for each tile, from a scalar and int32 offsets. Carried from tile to tile, 64 bits an
    # element, they take all registers where Triton 3.6 compiles them.
    k_head, k_offset = k + b * k_b + kv * k_h, cols[None, :] * k_t + d[:, None] * k_d  # (D, TILE)
    v_head, v_offset = v + b * v_b + kv * v_h, cols[:, None] * v_t + d[None, :] * v_d
    table_head, in_tile = table + local * tabled * rows, row - first_row
    # for ranges a number: -inf less -inf is none, where a row sees nothing of the first tiles
    top = tl.full([BM], LOWEST if RANGES else float("-inf"), tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    # Tiles are visited in their order, so that a row's bits don't depend on what the other rows of its block see. All
    # rows see the whole of those from unmasked on and before masked.
    if RANGES:
        lo, hi = sight(ranges, ranges_b, past, b, row, within, N, RANGES)
        sees = lo < hi
        begin, end = tl.min(tl.where(sees, lo, N)) // TILE * TILE, tl.max(tl.where(sees, hi, 0))
        unmasked = tl.max(tl.where(sees, lo, 0))
        masked = tl.min(tl.where(sees, hi, N))
    else:
        begin, end = 0, tl.minimum(first + BM + past, N)
        masked = tl.minimum(first + past + 1, N) // TILE * TILE
    for MASKED in tl.static_range(1 if RANGES else 0, 2):
        for start in tl.range(masked if MASKED and not RANGES else begin, end if MASKED else masked, TILE):
            at = start + tl.zeros([], tl.int64)
            k_at, v_at = k_head + at * k_t + k_offset, v_head + at * v_t + v_offset
            if MASKED:
                inside = start + cols < N
                k_tile = tl.load(k_at, mask=inside[None, :], other=0)
                v_tile = tl.load(v_at, mask=inside[:, None], other=0)
            else:
                k_tile, v_tile = tl.load(k_at), tl.load(v_at)
            s = tl.dot(q_tile, k_tile, input_precision=PRECISION) * (scale * LOG2_E)
            if RANGES:
                if (start < unmasked) | (start + TILE > masked):
                    if PRECISION == "tf32x3":  # which needs the registers; the other takes fewer instructions
                        seen = (start + cols[None, :] < hi[:, None]) & (start + cols[None, :] >= lo[:, None])
                    else:
                        seen = (cols[None, :] < (hi - start)[:, None]) & (cols[None, :] >= (lo - start)[:, None])
                    s = tl.where(seen, s, float("-inf"))
            elif MASKED:
                s = tl.where((start + cols[None, :] <= (row + past)[:, None]) & inside[None, :], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            mass = tl.sum(p, 1)
            norm = norm * shrink + mass
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
            top = new_top
            if DRAWS:
                tl.store(table_head + at // TILE * rows + in_tile, top + rough_log2(mass), mask=within)
    acc, total = acc / norm[:, None], (top + tl.log2(norm)) * LN_2
    if RANGES:
        total = tl.where(norm > 0, total, float("nan"))
        acc, total = tl.where(sees[:, None], acc, 0), tl.where(sees, total, 0)
    at = (b * H + h) * T + row
    tl.store(out + at[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=within[:, None])
    tl.store(lse + at, total, mask=within)


@triton.jit(
    do_not_specialize=["past", "first_head", "heads", "first_row", "rows", "tabled", "row_of_whole", "head_of_whole"]
)
def draw(
    table, ranges, lse, tiles, masses, c, seed, u, c_max, kappa,
    ranges_b, past, first_head, heads, first_row, rows, tabled, H, T, N, slots, row_of_whole, head_of_whole,
    RANGES: tl.constexpr, HAS_U: tl.constexpr, ROWS: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Each row's systematic draw of tiles with kappa * c. One program ROWS rows, SOME tiles at once.

    table: of `forward`. ranges, ranges_b, past: see `sight`. tiles, masses (B, H, T, slots): of
    reference.proposals_like. u: int32 (B, H, T) in [0, UNIT) if HAS_U; else the uniforms come from the seed.
    row_of_whole, head_of_whole: where the first ones stand in what the seed is for.
    """
    local, b, h = heads_of(tl.program_id(0) % heads, 1, first_head, H)
    first_place = (tl.cdiv(rows, ROWS) - 1 - tl.program_id(0) // heads) * ROWS
    place = first_place + tl.arange(0, ROWS)
    row = first_row + place
    within = (place < rows) & (row < T)
    at = (b * H + h) * T + row
    # less than it may be by rough_log2: there are slots for masses of a row that add up to 1, not to more
    log_norm = tl.load(lse + at, mask=within, other=0) * LOG2_E + 0.01
    drawn_units = retention(c, c_max) * kappa * UNIT
    if HAS_U:
        running = tl.load(u + at, mask=within, other=0)
    else:
        running = row_uniforms(seed, PROPOSING, b, h + head_of_whole, row + row_of_whole)
    tiles_at, masses_at = tiles + at * slots, masses + at * slots
    table_head, some = table + local * tabled * rows, tl.arange(0, SOME)[:, None]
    in_some = some * rows + place[None, :]
    count = tl.zeros([ROWS], tl.int32)
    lo, hi = sight(ranges, ranges_b, past, b, row, within, N, RANGES)
    if RANGES:
        hi = tl.where(lo < hi, hi, 0)  # what sees nothing proposes nothing, wherever its range would be
        begin = tl.min(tl.where(lo < hi, lo, N)) // TILE
        masked = begin
    else:  # where some rows don't see some of SOME tiles
        begin, masked = 0, tl.minimum(first_row + first_place + past, N) // TILE // SOME * SOME
    end = tl.max(hi)
    for MASKED in tl.static_range(2):
        for first in range(masked if MASKED else begin, tl.cdiv(end, TILE) if MASKED else masked, SOME):
            tile = first + some
            mass_at = table_head + (first + tl.zeros([], tl.int64)) * rows + in_some
            if MASKED:
                seen = (tile * TILE < hi[None, :]) & (tile * TILE + TILE > lo[None, :])
                mass = tl.load(mass_at, mask=seen, other=float("-inf"))
            else:
                mass = tl.load(mass_at, mask=within[None, :], other=float("-inf"))
            mass = tl.exp2(mass - log_norm[None, :])
            units = tl.where(mass > 0, inclusion_units(mass, drawn_units), 0).to(tl.int32)
            total = running[None, :] + tl.cumsum(units, 0)
            slot = count[None, :] + (total >> UNIT_BITS) - 1
            kept = ((total & (UNIT - 1)) < units) & (slot < slots)
            tl.store(tiles_at[None, :] + slot, tile + 0 * slot, mask=kept)
            tl.store(masses_at[None, :] + slot, mass, mask=kept)
            running += tl.sum(units, 0)
            count += running >> UNIT_BITS
            running &= UNIT - 1
    for first in range(0, slots, SOME):
        slot = (first + tl.arange(0, SOME))[:, None]
        behind = within[None, :] & (slot >= count[None, :]) & (slot < slots)
        tl.store(tiles + at[None, :] * slots + slot, tl.full([SOME, ROWS], -1, tl.int32), mask=behind)
        tl.store(masses + at[None, :] * slots + slot, tl.zeros([SOME, ROWS], tl.float32), mask=behind)


# -- the backward -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["past", "first_head", "row_of_whole", "head_of_whole"])
def thin(
    grad_out, out, lse, tiles, masses, c, seed, row_weight, w, bits, counts, delta, kept, ranges,
    g_b, g_h, g_t, g_d, c_max, kappa, ranges_b, past, first_head, H, T, N, slots, words, row_of_whole, head_of_whole,
    RANGES: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What each row keeps. One program ROWS rows. SLOTS: a power of 2, at least slots.

    grad_out, out (B, H, T, D), lse and row_weight (B, H, T), tiles and masses (B, H, T, slots) are whole. ranges,
    ranges_b, past: see `sight`. row_of_whole, head_of_whole: as in `draw`. It writes

    w, float32 (local, T, slots): what the entries of a kept tile weigh, 1 / q; 0 where a proposal is cut.
    bits, int32 (local, tiles, words): bit i % 32 of word i / 32 is set where row i keeps the tile. It begins as zeros.
    counts, int32 (local, tiles): how many rows keep it. It begins as zeros.
    delta, float32 (local, T).
    kept, int32 (B, H, groups of ROWS rows): entries.
    """
    groups, all_tiles = tl.cdiv(T, ROWS), tl.cdiv(N, TILE)
    group = tl.program_id(0) % groups
    local, b, h = heads_of(tl.program_id(0), groups, first_head, H)
    rows, slot, d = group * ROWS + tl.arange(0, ROWS), tl.arange(0, SLOTS), tl.arange(0, D)
    within = rows < T
    row = (b * H + h) * T + rows
    g_at = grad_out + b * g_b + h * g_h + rows[:, None].to(tl.int64) * g_t + d[None, :] * g_d
    g = tl.load(g_at, mask=within[:, None], other=0).to(tl.float32)
    o = tl.load(out + row[:, None] * D + d[None, :], mask=within[:, None], other=0).to(tl.float32)
    tl.store(delta + local * T + rows, tl.sum(g * o, 1), mask=within)

    some = within[:, None] & (slot[None, :] < slots)
    at = row[:, None] * slots + slot[None, :]
    tile = tl.load(tiles + at, mask=some, other=-1)
    used = tile >= 0
    mass = tl.load(masses + at, mask=used, other=0)
    all_c = retention(c, c_max)
    row_c = all_c * tl.load(row_weight + row, mask=within, other=0)
    w_drawn = UNIT / inclusion_units(mass, all_c * kappa * UNIT)
    aim = mass * w_drawn * (row_c * UNIT)[:, None]
    aim = tl.where(aim < UNIT, tl.maximum(tl.ceil(aim), 1), UNIT)  # UNIT where it is NaN too
    r = tl.where(used, aim, 0).to(tl.int32)
    wide: tl.constexpr = tl.int32 if SLOTS < 255 else tl.int64  # which holds a sum of 2^23 over all slots
    u = row_uniforms(seed, THINNING, b, h + head_of_whole, rows + row_of_whole)
    total = u[:, None].to(wide) + tl.cumsum(r.to(wide), 1)
    keep = used & ((total & (UNIT - 1)) < r)
    w_at = w + (local * T + rows)[:, None] * slots + slot[None, :]
    tl.store(w_at, tl.where(keep, w_drawn * (UNIT / aim), 0), mask=some)
    region = local * all_tiles + tile
    tl.atomic_add(counts + region, 1, mask=keep, sem="relaxed")
    tl.atomic_or(bits + region * words + rows[:, None] // 32, 1 << (rows[:, None] % 32), mask=keep, sem="relaxed")
    lo, hi = sight(ranges, ranges_b, past, b, rows, within, N, RANGES)
    entries = tl.minimum(hi[:, None], tile * TILE + TILE) - tl.maximum(lo[:, None], tile * TILE)
    tl.store(kept + (b * H + h) * groups + group, tl.sum(tl.sum(tl.where(keep, entries, 0), 1), 0))


@triton.jit
def ones_of(x):
    """How many bits of x, uint32, are set (int32)."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["regions"])
def plan(counts, ends, job_ends, job_regions, regions, JOB: tl.constexpr, SOME: tl.constexpr):
    """Where each region's rows and jobs go, of its counts. One program in all, SOME regions at once.

    ends, job_ends, int32 (regions): the sums of counts, and of jobs, up to and including a region's. A region has a job
    for each JOB of its rows. job_regions, int32 (jobs): a job's region.
    """
    end, job_end = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for first in range(0, regions, SOME):
        region = first + tl.arange(0, SOME)
        count = tl.load(counts + region, mask=region < regions, other=0)
        jobs = tl.cdiv(count, JOB)
        last_job = job_end + tl.cumsum(jobs, 0)
        tl.store(ends + region, end + tl.cumsum(count, 0), mask=region < regions)
        tl.store(job_ends + region, last_job, mask=region < regions)
        for i in range(0, tl.max(jobs, 0)):
            tl.store(job_regions + last_job - 1 - i, region, mask=i < jobs)
        end += tl.sum(count, 0)
        job_end += tl.sum(jobs, 0)


@triton.jit(do_not_specialize=["past"])
def list_rows(bits, counts, ends, listed, past, N, words, SOME: tl.constexpr):
    """listed, int32: the rows that keep a tile, ascending, region after region.

    One program a region, SOME words at once. bits (regions, words): of `thin`. counts, ends, int32 (regions): how many
    rows each has, and the sums of these up to and including it. No row before a tile's first key - past sees the tile.
    """
    region = tl.program_id(0)
    tile = region % tl.cdiv(N, TILE)
    at = tl.load(ends + region) - tl.load(counts + region)
    for first in range(tl.maximum(tile * TILE - past, 0) // 32, words, SOME):
        word = first + tl.arange(0, SOME)
        found = tl.load(bits + region.to(tl.int64) * words + word, mask=word < words, other=0)
        found = found.to(tl.uint32, bitcast=True)
        ones = ones_of(found)
        place = at + tl.cumsum(ones, 0) - ones
        for i in range(0, tl.max(ones, 0)):  # most words have a bit or two: a word's lowest at a time
            lowest = found & (~found + 1)
            bit = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # a power of 2 is its exponent
            tl.store(listed + place + i, word * 32 + bit, mask=found != 0)
            found ^= lowest
        at += tl.sum(ones, 0)


@triton.jit(do_not_specialize=["past", "first_head"])
def tile_gradients(
    grad_out, q, k, v, lse, tiles, w, delta, counts, ends, job_ends, job_regions, listed, places, parts, ranges,
    dkv_parts, variance, g_b, g_h, g_t, g_d, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, scale,
    ranges_b, past, first_head, H, K, T, N, slots, regions,
    RANGES: tl.constexpr, ESTIMATES: tl.constexpr, JOB: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    SOME: tl.constexpr,
):  # fmt: skip
    """One job of `plan`: up to JOB of the rows that keep a tile, SOME at once. Programs beyond the last job do nothing.

    places, int32 (local, T, slots): where in `parts` a kept (row, tile) is. parts, float32 (listed, D): its M K.
    dkv_parts, float32 (jobs, 2, TILE, D): what a job gives to dK and dV.
    variance, float32 (jobs): the estimate of reference.backward, if ESTIMATES.
    """
    job = tl.program_id(0)
    if job >= tl.load(job_ends + regions - 1):
        if ESTIMATES:
            tl.store(variance + job, 0.0)
        return
    region, all_tiles = tl.load(job_regions + job), tl.cdiv(N, TILE)
    tile = region % all_tiles
    local, b, h = heads_of(region, all_tiles, first_head, H)
    kv = h // (H // K)
    count, end = tl.load(counts + region), tl.load(ends + region)
    job_of_region = job - (tl.load(job_ends + region) - tl.cdiv(count, JOB))
    begin = end - count + job_of_region * JOB
    end = tl.minimum(end, begin + JOB)
    cols, d = tile * TILE + tl.arange(0, TILE), tl.arange(0, D)
    cols_, inside = cols[:, None].to(tl.int64), cols[:, None] < N
    k_tile = tl.load(k + b * k_b + kv * k_h + cols_ * k_t + d[None, :] * k_d, mask=inside, other=0)
    v_tile = tl.load(v + b * v_b + kv * v_h + cols_ * v_t + d[None, :] * v_d, mask=inside, other=0)
    g_head, q_head = grad_out + b * g_b + h * g_h + d[None, :] * g_d, q + b * q_b + h * q_h + d[None, :] * q_d
    lse_head = lse + (b * H + h) * T
    dk, dv = tl.zeros([TILE, D], tl.float32), tl.zeros([TILE, D], tl.float32)
    if ESTIMATES:
        k_square = tl.sum(k_tile.to(tl.float32) * k_tile.to(tl.float32), 1)
        added = tl.zeros([SOME], tl.float32)
    for at in range(begin, end, SOME):
        place = at + tl.arange(0, SOME)
        some = place < end
        row = tl.load(listed + place, mask=some, other=0)
        weight, found = tl.zeros([SOME], tl.float32), tl.zeros([SOME], tl.int32)
        for first in range(0, slots, 16):  # which of the row's slots is this tile's
            slot = first + tl.arange(0, 16)[None, :]
            of_row = row[:, None].to(tl.int64) * slots + slot
            proposed = some[:, None] & (slot < slots)
            is_tile = tl.load(tiles + (b * H + h) * T * slots + of_row, mask=proposed, other=-1) == tile
            weight += tl.sum(tl.load(w + local * T * slots + of_row, mask=is_tile, other=0), 1)
            found += tl.sum(tl.where(is_tile, slot, 0), 1)
        tl.store(places + (local * T + row) * slots + found, place, mask=some)
        row_ = row[:, None].to(tl.int64)
        g = tl.load(g_head + row_ * g_t, mask=some[:, None], other=0)
        q_rows = tl.load(q_head + row_ * q_t, mask=some[:, None], other=0)
        log_norm = tl.load(lse_head + row, mask=some, other=0)
        delta_rows = tl.load(delta + local * T + row, mask=some, other=0)
        lo, hi = sight(ranges, ranges_b, past, b, row, some, N, RANGES)
        seen = cols[None, :] < hi[:, None]
        if RANGES:
            seen = seen & (cols[None, :] >= lo[:, None])
        s = tl.dot(q_rows, tl.trans(k_tile), input_precision=PRECISION)
        # the difference first: of large scores, each further product would round away more of it
        p = tl.exp2((s * scale - log_norm[:, None]) * LOG2_E)
        p = tl.where(seen, p, 0)
        slope = (tl.dot(g, tl.trans(v_tile), input_precision=PRECISION) - delta_rows[:, None]) * scale
        slope = tl.where(seen, slope, 0)  # it may be NaN
        if ESTIMATES:
            norms = tl.sum(q_rows.to(tl.float32) * q_rows.to(tl.float32), 1)[:, None] + k_square[None, :]
            square = tl.sum(g.to(tl.float32) * g.to(tl.float32), 1)[:, None] + slope * slope * norms
            added += tl.sum(p * p * square, 1) * weight * (weight - 1) * some.to(tl.float32)
        p *= weight[:, None]
        m = (p * slope).to(g.dtype)
        dv = tl.dot(tl.trans(p.to(g.dtype)), g, dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(m), q_rows, dk, input_precision=PRECISION)
        part = tl.dot(m, k_tile, input_precision=PRECISION)
        tl.store(parts + place[:, None].to(tl.int64) * D + d[None, :], part, mask=some[:, None])
    of_job = dkv_parts + job.to(tl.int64) * 2 * TILE * D + tl.arange(0, TILE)[:, None] * D + d[None, :]
    tl.store(of_job, dk)
    tl.store(of_job + TILE * D, dv)
    if ESTIMATES:
        tl.store(variance + job, tl.sum(added, 0))


@triton.jit(do_not_specialize=["first_head", "heads"])
def sum_parts(
    parts, w, places, delta, lse, c, dkv_parts, counts, job_ends, dq, dk, dv, first_head, heads, H, K, T, N, slots,
    D: tl.constexpr, JOB: tl.constexpr, ROWS: tl.constexpr, SOME: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq (B, H, T, D), dk and dv (B, K, N, D), contiguous, of what tile_gradients left; `heads` local heads.

    One program ROWS rows of dq, SOME slots at once; the programs after these KEYS keys of dk and dv.
    """
    for_queries = heads * tl.cdiv(T, ROWS)
    if tl.program_id(0) < for_queries:
        query_gradients(tl.program_id(0), parts, w, places, delta, lse, c, dq, first_head, H, T, slots, D, ROWS, SOME)
    else:
        program = tl.program_id(0) - for_queries
        key_gradients(program, dkv_parts, counts, job_ends, c, dk, dv, first_head, H, K, N, D, JOB, KEYS)


@triton.jit
def query_gradients(
    program, parts, w, places, delta, lse, c, dq, first_head, H, T, slots,
    D: tl.constexpr, ROWS: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """dq; NaN where the row is not defined."""
    groups = tl.cdiv(T, ROWS)
    local, b, h = heads_of(program, groups, first_head, H)
    rows, d = program % groups * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    within = rows < T
    row = (b * H + h) * T + rows
    acc = tl.zeros([ROWS, D], tl.float32)
    for first in range(0, slots, SOME):
        slot = first + tl.arange(0, SOME)[None, :]
        at = (local * T + rows)[:, None] * slots + slot
        kept = tl.load(w + at, mask=within[:, None] & (slot < slots), other=0) != 0
        place = tl.load(places + at, mask=kept, other=0)[:, :, None].to(tl.int64)
        acc += tl.sum(tl.load(parts + place * D + d[None, None, :], mask=kept[:, :, None], other=0), 1)
    undefined = (tl.load(delta + local * T + rows, mask=within, other=0) + tl.load(lse + row, mask=within, other=0)) * 0
    acc += (undefined + tl.where(tl.load(c) > 0, 0.0, float("nan")))[:, None]
    tl.store(dq + row[:, None] * D + d[None, :], acc.to(dq.dtype.element_ty), mask=within[:, None])


@triton.jit
def key_gradients(
    program, dkv_parts, counts, job_ends, c, dk, dv, first_head, H, K, N,
    D: tl.constexpr, JOB: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dk and dv: sums over the jobs of a tile, of all query heads of a key/value head."""
    all_tiles, group = tl.cdiv(N, TILE), H // K
    tile, first_key = program // (TILE // KEYS) % all_tiles, program % (TILE // KEYS) * KEYS
    local_kv = (program // (all_tiles * (TILE // KEYS))).to(tl.int64)
    within, d = first_key + tl.arange(0, KEYS)[:, None], tl.arange(0, D)[None, :]
    dk_acc, dv_acc = tl.zeros([KEYS, D], tl.float32), tl.zeros([KEYS, D], tl.float32)
    for member in range(0, group):
        region = (local_kv * group + member) * all_tiles + tile
        end = tl.load(job_ends + region)
        begin = end - tl.cdiv(tl.load(counts + region), JOB)
        at = dkv_parts + begin.to(tl.int64) * 2 * TILE * D + within * D + d
        for _ in range(begin, end):
            dk_acc += tl.load(at)
            dv_acc += tl.load(at + TILE * D)
            at += 2 * TILE * D
    bad = tl.where(tl.load(c) > 0, 0.0, float("nan"))
    key = tile * TILE + within
    at = ((first_head // group + local_kv) * N + key) * D + d
    tl.store(dk + at, (dk_acc + bad).to(dk.dtype.element_ty), mask=key < N)
    tl.store(dv + at, (dv_acc + bad).to(dv.dtype.element_ty), mask=key < N)
