"""The CPU backend's kernels for single keys, drawn one by one as in the paper (arXiv 2505.15080): the sparse backward.

The forward is cpu_kernels.py's, which also has the draw. Most of this backward's work is waiting for rows of K, V, Q
and G from memory. So entries go through in two orders: by query row, where dQ is a sum in registers and each entry's M
is found; then by bucket of keys, where dK and dV lie in the first-level cache and rows of Q and G come in ascending
order. Between the two stands a counting sort by bucket. Its regions, one for each (bucket, chunk of rows), have one
owner each: the result is the same for any number of threads.

A call does one round, a rectangle of the work, as in cpu_kernels.py, whose conventions and dims are these.
"""

import math

import numpy as np

from sus_backends.cpu_kernels import (
    LANES,
    chunk_of,
    fetch_add,
    fma,
    inclusion_units,
    jit,
    load,
    load_first,
    load_row,
    padded,
    prefetch,
    register_jitable,
    splat,
    store,
    store_first,
    to_floats,
    total,
)
from sus_backends.reference import UNIT

BUCKET = 64  # keys
AHEAD = 8  # records between a prefetch and its use
TERMS = 256  # of a key's sum, before it is added to the whole: a key that all rows attend to has very many


@register_jitable
def buckets_of(N):
    return (N + BUCKET - 1) // BUCKET


@jit
def count_entries(keys, shape, slots, round_, counts, counter):
    """How many entries each region holds. keys: int32 (B, H, T, slots), a row's, then -1. counts: int64 (heads, chunks,
    buckets) of the round, zero before.
    """
    B, H, K, T, N, D = shape
    buckets = buckets_of(N)
    while True:
        task = fetch_add(counter, 1)
        if task >= round_[1] * round_[3]:
            return
        b, kv, h, first, stop = chunk_of(task, shape, round_)
        for i in range(first, stop):
            row = (b * H + h) * T + i
            for slot in range(row * slots, (row + 1) * slots):
                if keys[slot] < 0:
                    break
                counts[task * buckets + keys[slot] // BUCKET] += 1


def row_work(D, slots):
    """float32 elements of work space for one thread of `row_gradients`."""
    return padded(D) + 2 * padded(slots)


@jit
def row_gradients(
    grad_out, k, v, grad_strides, k_strides, v_strides, shape, scale, out, lse, c, keys, weights, slots, round_, places,
    record_ints, record_floats, dq, kept, g_squares, q_squares, k_squares, variance, counter, work,
):  # fmt: skip
    """dQ of the round's rows, and a record of every entry for dK and dV, put into its region.

    For a kept entry, with w = W / q: dQ_i += M K_j, M = scale * w * (G_i . V_j - delta_i), delta_i = G_i . O_i.

    c: what the entries were drawn with. keys, weights: int32 and float32 (B, H, T, slots), of the forward. places:
    int64 (heads, chunks, buckets) of the round, where the regions begin before, and where they end after. record_ints,
    record_floats: one buffer, (entries, 4): key, row, w, M. dq: contiguous. kept: int64 (1,), grows by the entries.
    g_squares, q_squares (B, H, T), k_squares (B, K, N): squared norms, float32, or empty with variance, float64 (heads
    * chunks): the estimate of reference.backward, by task.
    """
    B, H, K, T, N, D = shape
    buckets, width = buckets_of(N), padded(D)
    g_i = work[:width]
    w, m = work[width : width + padded(slots)], work[width + padded(slots) :]
    c_units, unit = splat(np.float32(c * np.float32(UNIT))), splat(np.float32(UNIT))
    estimates = variance.size > 0
    while True:
        task = fetch_add(counter, 1)
        if task >= round_[1] * round_[3]:
            return
        b, kv, h, first, stop = chunk_of(task, shape, round_)
        k_head, v_head = b * k_strides[0] + kv * k_strides[1], b * v_strides[0] + kv * v_strides[1]
        task_kept, task_variance = 0, 0.0
        for i in range(first, stop):
            row = (b * H + h) * T + i
            g_row = b * grad_strides[0] + h * grad_strides[1] + i * grad_strides[2]
            products = splat(np.float32(0))
            for d in range(0, D, LANES):
                g_d = load_row(grad_out, g_row, d, D)
                store(g_i, d, g_d)
                products = fma(g_d, load_row(out, row * D, d, D), products)
            delta = total(products)

            slot, count = row * slots, 0
            while count < slots and keys[slot + count] >= 0:
                count += 1
            for e in range(0, count, LANES):
                n = min(LANES, count - e)
                weight = load_first(weights, slot + e, n)
                store_first(w, e, weight * (unit / to_floats(inclusion_units(weight, c_units))), n)
            for e in range(count):
                # of the next row: it comes at the right time, and a wrong address does no harm
                later = keys[min(slot + slots + e, keys.size - 1)]
                for d in range(0, D, LANES):
                    prefetch(k, k_head + later * k_strides[2] + d)
                    prefetch(v, v_head + later * v_strides[2] + d)
                at = v_head + keys[slot + e] * v_strides[2]
                products = splat(np.float32(0))
                for d in range(0, D, LANES):
                    products = fma(load(g_i, d), load_row(v, at, d, D), products)
                m[e] = np.float32(scale) * w[e] * (total(products) - delta)
            defined = math.isfinite(delta) and math.isfinite(lse[row])
            for d in range(0, D, LANES):
                dq_d = splat(np.float32(0 if defined else np.nan))
                for e in range(count):
                    dq_d = fma(splat(m[e]), load_row(k, k_head + keys[slot + e] * k_strides[2], d, D), dq_d)
                store_first(dq, row * D + d, dq_d, min(LANES, D - d))

            for e in range(count):
                j = keys[slot + e]
                region = task * buckets + j // BUCKET
                place = places[region]
                places[region] = place + 1
                record_ints[4 * place], record_ints[4 * place + 1] = j, i
                record_floats[4 * place + 2], record_floats[4 * place + 3] = w[e], m[e]
            task_kept += count
            if estimates:
                for e in range(count):
                    slope = m[e] / w[e]
                    norms = q_squares[row] + k_squares[(b * K + kv) * N + keys[slot + e]]
                    task_variance += w[e] * (w[e] - weights[slot + e]) * (g_squares[row] + slope * slope * norms)
        fetch_add(kept, task_kept)
        if estimates:
            variance[task] = task_variance


def key_work(D):
    """float32 elements of work space for one thread of `key_gradients`."""
    return 4 * BUCKET * padded(D)


@jit
def move_sums(terms, whole, start, D):
    """Add the D sums at `start` of terms to those of whole, and begin them anew."""
    for i in range(start, start + D, LANES):
        store(whole, i, load(whole, i) + load(terms, i))
        store(terms, i, splat(np.float32(0)))


@jit
def key_gradients(
    grad_out, q, grad_strides, q_strides, shape, round_, starts, ends, record_ints, record_floats, adds, dk, dv,
    counter, work,
):  # fmt: skip
    """dK_j = sum of M Q_i and dV_j = sum of w G_i over the round's records of key j.

    dk, dv: contiguous (heads of the round, N, D). adds: to what is in them. A row whose log-sum-exp isn't finite has no
    entries, and adds nothing.
    """
    B, H, K, T, N, D = shape
    chunks, buckets = round_[3], buckets_of(N)
    width = padded(D)
    size = BUCKET * width
    dk_terms, dv_terms = work[:size], work[size : 2 * size]
    dk_bucket, dv_bucket = work[2 * size : 3 * size], work[3 * size : 4 * size]
    count = np.zeros(BUCKET, np.int64)
    while True:
        task = fetch_add(counter, 1)
        if task >= round_[1] * buckets:
            return
        head, bucket = task // buckets, task % buckets
        first = bucket * BUCKET
        work[: 4 * size] = 0
        count[:] = 0
        for chunk in range(chunks):
            b, kv, h, _, _ = chunk_of(head * chunks + chunk, shape, round_)
            g_head = b * grad_strides[0] + h * grad_strides[1]
            q_head = b * q_strides[0] + h * q_strides[1]
            region = (head * chunks + chunk) * buckets + bucket
            for place in range(starts[region], ends[region]):
                later = record_ints[4 * (place + AHEAD) + 1]  # behind the last, whatever is there does no harm
                for d in range(0, D, LANES):
                    prefetch(grad_out, g_head + later * grad_strides[2] + d)
                    prefetch(q, q_head + later * q_strides[2] + d)
                i = record_ints[4 * place + 1]
                w, m = splat(record_floats[4 * place + 2]), splat(record_floats[4 * place + 3])
                g_row, q_row = g_head + i * grad_strides[2], q_head + i * q_strides[2]
                key = record_ints[4 * place] - first
                sums = key * width
                count[key] += 1
                if count[key] > TERMS:
                    count[key] = 1
                    move_sums(dk_terms, dk_bucket, sums, D)
                    move_sums(dv_terms, dv_bucket, sums, D)
                for d in range(0, D, LANES):
                    store(dk_terms, sums + d, fma(m, load_row(q, q_row, d, D), load(dk_terms, sums + d)))
                    store(dv_terms, sums + d, fma(w, load_row(grad_out, g_row, d, D), load(dv_terms, sums + d)))
        for j in range(min(BUCKET, N - first)):
            move_sums(dk_terms, dk_bucket, j * width, D)
            move_sums(dv_terms, dv_bucket, j * width, D)
            row = (head * N + first + j) * D
            for d in range(0, D, LANES):
                n, dk_j, dv_j = min(LANES, D - d), load(dk_bucket, j * width + d), load(dv_bucket, j * width + d)
                if adds:
                    dk_j, dv_j = dk_j + load_row(dk, row, d, D), dv_j + load_row(dv, row, d, D)
                store_first(dk, row + d, dk_j, n)
                store_first(dv, row + d, dv_j, n)
