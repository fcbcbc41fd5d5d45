"""The CPU backend: numba's kernels (cpu_kernels.py), run on as many threads as PyTorch uses.

The forward draws on the way and stores each row's proposed tiles; the backward thins them, and its work is only what is
left. Beside what exact attention stores that is B * H * T * slots * 8 bytes, slots = reference.tile_slots. While it
runs, the backward needs 4 D bytes for each kept pair of a row and a tile and 16 for each slot of a row, of about
`round_records` pairs at a time, and where it does not take a bfloat16 key/value head at once, that head's dK and dV in
float32.

The threads are PyTorch's own, not those of numba's parallel loops: its layers either forbid concurrent calls or don't
survive a fork, and keep a thread count of their own. Kernels release the GIL and take tasks from a shared counter; what
each task computes, and where it writes it, does not depend on the thread that runs it.

Dims: B batch, H query heads, K key/value heads, T query rows, N keys, D head dim, slots: the most tiles that a row
proposes. Kernels take flat arrays; where they are views of tensors they come with strides (batch, head, position) in
elements.

Deliberately missing: what `unsupported` names. The reference does that.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from sus_backends import reference
from sus_backends.reference import (
    STREAM_POISSON,
    STREAM_THINNING,
    proposals_like,
    ranges_of,
    row_states,
    row_uniforms,
    seed_state,
    slots_of,
)

MAX_D = 128


@functools.cache
def missing() -> str | None:
    """Why the kernels can't be had here, or None."""
    try:
        from sus_backends import cpu_kernels  # noqa: F401
    except Exception as error:  # not installed, or of a version that doesn't fit, which it says in its own words
        return f"it needs the package numba (pip install numba), which can't be used here: {error}"
    return None


def unsupported(dtype: torch.dtype, D: int, sampler: str) -> str | None:
    """What of these the kernels don't do, or None."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {dtype}".replace("torch.", "")
    if D > MAX_D:
        return f"it takes head dims up to {MAX_D}, not {D}"
    if sampler not in ("tiles", "poisson"):
        return f"it has the samplers tiles and poisson, not {sampler}"
    return None


# ---------------------------------------------------------------------------------------------
# Compiling and running.
# ---------------------------------------------------------------------------------------------


@functools.cache
def kernels() -> ModuleType:
    """cpu_kernels, with its compiled code kept on disk where that is possible."""
    from sus_backends import cpu_kernels

    _keep_on_disk(cpu_kernels, "forward", "thin", "tile_gradients", "query_gradients")
    return cpu_kernels


@functools.cache
def poisson_kernels() -> ModuleType:
    """cpu_poisson, likewise."""
    from sus_backends import cpu_poisson

    _keep_on_disk(cpu_poisson, "count_entries", "row_gradients", "key_gradients")
    return cpu_poisson


def _keep_on_disk(module: ModuleType, *names: str) -> None:
    from sus_backends import cpu_kernels

    if cpu_kernels.INTERPRETED:
        return
    # what kernels have from these files is compiled into them: when they change, so must they
    sources = b"".join(Path(m.__file__ or "").read_bytes() for m in (reference, cpu_kernels))
    for name in names:
        kernel = getattr(module, name)
        try:
            kernel.enable_caching()
        except RuntimeError:
            continue  # no folder can be written: compiled anew in each process
        file = kernel._cache._cache_file
        file._source_stamp = file._source_stamp, hashlib.sha256(sources).hexdigest()


_compiling = threading.Lock()
_compiled: set[tuple] = set()


def _compile(kernel, args: tuple) -> None:
    """Compile the kernel for the types of args, or load it from disk; say so if that takes long."""
    # what else the types depend on is the same in every call
    key = kernel, tuple(getattr(arg, "dtype", None) for arg in args)
    if key in _compiled:
        return
    import numba

    types = tuple(numba.typeof(arg) for arg in args)
    with _compiling:
        notice = threading.Timer(3, _announce)  # from the disk it takes one or two, on a busy machine
        notice.start()
        try:
            kernel.compile(types)
        except Exception:  # a file of the cache is damaged or, the disk being full, was not written: do without
            with contextlib.suppress(Exception):
                os.unlink(kernel._cache._cache_file._index_path)  # or it would stand for older code
            kernel._cache = numba.core.caching.NullCache()
            kernel.compile(types)
        finally:
            notice.cancel()
        _compiled.add(key)


@functools.cache  # once
def _announce() -> None:
    text = "compiling the CPU kernels: half a minute or so, the first time only"
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)  # clear of any progress bar
    else:
        print(text, file=sys.stderr, flush=True)


_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _openmp():
    """GOMP_parallel of the OpenMP library that PyTorch computes with, or None where there is none by that name.

    Its threads wait for work by spinning, for milliseconds. Threads of our own would have to share the cores with them
    (at T = 2048 on two cores the backward took twice as long); so the kernels run on those very threads.
    """
    try:
        parallel = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.restype, parallel.argtypes = None, (_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return parallel


_pool: ThreadPoolExecutor | None = None
_forked = False


def _after_fork() -> None:
    """A forked child has none of its parent's threads; OpenMP would wait for them for ever. And a lock may be held."""
    global _pool, _forked, _compiling
    _pool, _forked, _compiling = None, True, threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def _on_threads(n: int, work: Callable[[], object]) -> None:
    """Call work() on n threads at once, or on fewer if there are no more to be had; the caller is one of them."""
    global _pool
    if n == 1:
        work()
    elif _openmp() and not _forked:
        finished: list[int] = []
        errors: list[BaseException] = []

        def body(_):
            try:
                work()
                finished.append(threading.get_ident())
            except BaseException as error:  # C code can't pass it on
                errors.append(error)

        _openmp()(_BODY(body), None, n, 0)
        if errors:
            raise errors[0]
        if threading.get_ident() not in finished:  # Ctrl-C at the very start of body is lost in the C code
            raise KeyboardInterrupt
    else:
        if _pool is None:
            _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="sus_attention")
        others = [_pool.submit(work) for _ in range(n - 1)]
        work()
        for other in others:
            other.result()


def _run(kernel, tasks: int, *args, work: Sequence[tuple[int, torch.dtype]] = ()) -> None:
    """kernel(*args, counter, *work arrays) on PyTorch's number of threads, or as many as there are tasks.

    work: (elements, dtype) of each work array; every thread has its own.
    """
    counter = np.zeros(1, np.int64)  # the next task
    interpreted = kernels().INTERPRETED
    threads = 1 if interpreted else min(torch.get_num_threads(), tasks)
    buffers = [[torch.empty(n, dtype=dtype, device="cpu").numpy() for n, dtype in work] for _ in range(threads)]
    if not interpreted:
        _compile(kernel, (*args, counter, *buffers[0]))
    _on_threads(threads, lambda: kernel(*args, counter, *buffers.pop()))


def _flat(x: Tensor) -> np.ndarray:
    """The elements that x spans in memory, as one NumPy array; bfloat16 as uint16."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
    if x.dtype == torch.bfloat16:
        x = x.view(torch.uint16)
    return x.as_strided((span,), (1,)).numpy() if x.numel() else x.flatten().numpy()


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]


def _rows(*tensors: Tensor) -> list[Tensor]:
    """The same, with rows of D elements side by side in memory."""
    return [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (t.detach() for t in tensors)]


# ---------------------------------------------------------------------------------------------
# Attention.
# ---------------------------------------------------------------------------------------------


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, draws: bool, c: float, c_max: float, seed: Tensor, u: Tensor | None,
    is_causal: bool = True, key_ranges: Tensor | None = None, first_row: int = 0, first_head: int = 0,
    sampler: str = "tiles",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Exact attention, and the proposals of the backward if `draws`.

    q (B, H, T, D); k, v (B, K, N, D), float32 or bfloat16. c <= c_max, which sizes the buffers. seed: 0-d. u: None, or
    the sampler's uniforms, int64 (B, H, T) in [0, 2^23). is_causal, key_ranges: see reference.ranges_of.

    Returns out (B, H, T, D); the log-sum-exp, float32 (B, H, T); and tiles and masses (B, H, T, slots), see
    `reference.proposals_like`: of no slots unless it draws.
    """
    ck = kernels()
    q, k, v = _rows(q, k, v)
    B, H, T, D = q.shape
    K, N = k.shape[1:3]
    out, lse = q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)
    slots, singles = slots_of(sampler, c_max, N) if draws else 0, sampler == "poisson"
    rows = range(first_row, first_row + T)
    tiles, masses = proposals_like(q, slots)
    if not draws:
        u = q.new_empty(0, dtype=torch.int32)
    elif singles:
        u = row_states(seed_state(seed.cpu(), STREAM_POISSON), B, H, rows, "cpu", first_head)
    elif u is None:
        u = row_uniforms(seed.cpu(), B, H, rows, "cpu", first_head=first_head)
    ranges = ranges_of(key_ranges, is_causal, T, N, "cpu")
    _run(
        ck.forward, B * H * -(-T // ck.ROWS),
        _flat(q), _flat(k), _flat(v), _strides(q), _strides(k), _strides(v), (B, H, K, T, N, D), *_per_batch(ranges),
        float(scale), _flat(out), _flat(lse), np.float32(c if singles else reference.KAPPA * c),
        _flat(u.int().contiguous()), slots, singles and draws, _flat(tiles), _flat(masses),
        work=[(ck.forward_work(D, N if draws else ck.KEYS, singles and draws), torch.float32)],
    )  # fmt: skip
    return out, lse, tiles, masses


def _per_batch(ranges: Tensor) -> tuple[np.ndarray, int]:
    """ranges (1 or B, T, 2), flat, and how far the next batch's are."""
    return _flat(ranges), ranges[0].numel() if len(ranges) > 1 else 0


def round_records(N: int) -> int:
    """About the most kept pairs of one round of the backward: few enough for a cache, and worth a pass over dK, dV."""
    return max(1 << 16, 8 * N)


def round_entries(N: int) -> int:
    """The same of single keys."""
    return max(1 << 18, 32 * N)


Round = tuple[int, int, int, int]  # first key/value head of all, heads, first chunk of each, chunks


def _rounds(dk: Tensor, dv: Tensor, chunks: int, round_chunks: int) -> Iterator[tuple[Round, list[Tensor]]]:
    """A backward's rounds, and where the sums for dk and dv (B, K, N, D) of each go: in float32, until they are whole.
    chunks: of the rows of one key/value head. round_chunks: of one round, about.
    """
    B, K, N, D = dk.shape
    round_heads = max(1, round_chunks // chunks)
    for head, chunk in itertools.product(range(0, B * K, round_heads), range(0, chunks, round_chunks)):
        heads, some = min(round_heads, B * K - head), min(round_chunks, chunks - chunk)
        of_round = [x.view(B * K, N, D)[head : head + heads] for x in (dk, dv)]
        if round_chunks >= chunks:
            sums = of_round
        elif chunk == 0:  # several rounds make one head's sums
            sums = [torch.empty_like(x, dtype=torch.float32) for x in of_round]
        yield (head, heads, chunk, some), sums
        if chunk + some == chunks:
            for x, total in zip(of_round, sums):
                x.copy_(total)


def _squares(*tensors: Tensor) -> list[np.ndarray]:
    """The squared norms of their rows."""
    return [_flat(torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square_()) for x in tensors]


NOTHING = [np.empty(0, np.float32)] * 3


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor, masses: Tensor,
    scale: float, c: float, seed: Tensor, row_weight: Tensor, with_stats: bool = False,
    is_causal: bool = True, key_ranges: Tensor | None = None, first_row: int = 0, first_head: int = 0,
    sampler: str = "tiles",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, and stats (see `reference.backward`), from what `forward` proposed.

    grad_out, q, out (B, H, T, D); k, v (B, K, N, D); lse (B, H, T) and tiles, masses (B, H, T, slots) of `forward`.
    seed: 0-d. row_weight (B, H, T): of reference.row_weights.

    Returns dq (B, H, T, D), dk and dv (B, K, N, D), and stats, float32 (3,).
    """
    ck = kernels()
    grad_out, q, k, v = _rows(grad_out, q, k, v)
    out, lse, tiles, masses = (x.detach().contiguous() for x in (out, lse, tiles, masses))
    B, H, T, D = q.shape
    K, N, slots = *k.shape[1:3], tiles.shape[3]
    if not slots:
        raise RuntimeError("this forward was told that no gradient would be wanted (draws=False)")
    if sampler == "poisson":
        return _poisson_backward(grad_out, q, k, v, out, lse, tiles, masses, scale, c, with_stats)
    chunks, n_tiles = H // K * ck.chunks_of(T), reference.tiles_of(N)  # chunks of the rows of one key/value head
    shape = (B, H, K, T, N, D)
    ranges = _per_batch(ranges_of(key_ranges, is_causal, T, N, "cpu"))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    kept, variance = np.zeros(1, np.int64), 0.0
    stats = q.new_zeros(3, dtype=torch.float32)
    weights, thin_state = _flat(row_weight.float().contiguous()), seed_state(int(seed), STREAM_THINNING)
    squares = _squares(grad_out, q, k) if with_stats else NOTHING
    grad_, q_, k_, v_ = ((_flat(x), _strides(x)) for x in (grad_out, q, k, v))
    lse_, proposals = _flat(lse), (_flat(tiles), _flat(masses))
    delta = _flat(torch.empty_like(lse))

    # a row keeps about c tiles, on average over the rows
    round_chunks = max(1, int(round_records(N) // (ck.CHUNK * min(slots, c + 1))))
    most = min(max(1, round_chunks // chunks), B * K) * min(round_chunks, chunks)
    starts = q.new_empty(most * (n_tiles + 1), dtype=torch.int32)
    record_rows, places = (q.new_empty(most * ck.CHUNK * slots, dtype=torch.int32) for _ in range(2))
    record_weights = q.new_empty(2 * len(record_rows), dtype=torch.float32)
    records = _flat(starts), _flat(record_rows), _flat(record_weights)
    # once, and from NumPy, which asks for large pages: by small ones, to get memory takes longer than to fill it. It is
    # of the size that is never exceeded; what isn't written takes no memory
    parts = np.empty(most * ck.CHUNK * slots * ck.padded(D), np.float32)
    for round_, sums in _rounds(dk, dv, chunks, round_chunks):
        tasks = round_[1] * round_[3]
        _run(
            ck.thin, tasks,
            *grad_, shape, *ranges, first_row, first_head, _flat(out), np.float32(reference.KAPPA * c), np.float32(c),
            weights, thin_state, *proposals, slots, round_, delta, *records, _flat(places), kept,
            work=[((2 + 2 * ck.CHUNK) * slots, torch.float32), (ck.CHUNK * slots, torch.int32)],
        )  # fmt: skip
        counts = starts.view(most, n_tiles + 1)[:tasks, -1].long()
        bases = _flat(counts.cumsum(0) - counts)
        task_variance = np.zeros(round_[1] * n_tiles if with_stats else 0)
        _run(
            ck.tile_gradients, round_[1] * n_tiles,
            grad_[0], q_[0], k_[0], v_[0], grad_[1], q_[1], k_[1], v_[1], shape, *ranges, float(scale), lse_, delta,
            slots, round_, records[0], bases, *records[1:], round_[2] > 0, parts, *map(_flat, sums), *squares,
            task_variance,
            work=list(zip(ck.tile_work(D, round_[3]), (torch.float32, torch.int32))),
        )  # fmt: skip
        _run(
            ck.query_gradients, tasks,
            shape, float(scale), lse_, delta, slots, round_, bases, _flat(places), parts, _flat(dq),
        )  # fmt: skip
        variance += task_variance.sum()
    if with_stats:
        stats[0], stats[2] = float(kept[0]), variance
    return dq, dk, dv, stats


def _poisson_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, keys: Tensor, weights: Tensor,
    scale: float, c: float, with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`backward` from the entries that the forward kept: keys and their W, both (B, H, T, slots)."""
    ck, pk = kernels(), poisson_kernels()
    B, H, T, D = q.shape
    K, N, slots = *k.shape[1:3], keys.shape[3]
    chunks, buckets = H // K * ck.chunks_of(T), pk.buckets_of(N)
    shape = (B, H, K, T, N, D)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    kept, variance = np.zeros(1, np.int64), 0.0
    stats = q.new_zeros(3, dtype=torch.float32)
    squares = _squares(grad_out, q, k) if with_stats else NOTHING
    grad_, q_, k_, v_ = ((_flat(x), _strides(x)) for x in (grad_out, q, k, v))
    entries = _flat(keys), _flat(weights)
    round_chunks = max(1, int(round_entries(N) // (ck.CHUNK * min(slots, c + 1))))
    for round_, sums in _rounds(dk, dv, chunks, round_chunks):
        tasks = round_[1] * round_[3]
        counts = q.new_zeros(round_[1], round_[3], buckets, dtype=torch.int64)
        _run(pk.count_entries, tasks, entries[0], shape, slots, round_, _flat(counts))
        # regions lie side by side by (head, bucket, chunk), and are looked up by (head, chunk, bucket)
        by_bucket = counts.transpose(1, 2)
        ends = by_bucket.flatten().cumsum(0).view(by_bucket.shape)
        starts = (ends - by_bucket).transpose(1, 2).contiguous()
        places = starts.clone()
        records = q.new_empty(int(ends[-1, -1, -1]) + pk.AHEAD, 4, dtype=torch.float32)
        record = _flat(records.view(torch.int32)), _flat(records)
        task_variance = np.zeros(tasks if with_stats else 0)
        _run(
            pk.row_gradients, tasks,
            grad_[0], k_[0], v_[0], grad_[1], k_[1], v_[1], shape, float(scale), _flat(out), _flat(lse), np.float32(c),
            *entries, slots, round_, _flat(places), *record, _flat(dq), kept, *squares, task_variance,
            work=[(pk.row_work(D, slots), torch.float32)],
        )  # fmt: skip
        _run(
            pk.key_gradients, round_[1] * buckets,
            grad_[0], q_[0], grad_[1], q_[1], shape, round_, _flat(starts), _flat(places), *record, round_[2] > 0,
            *map(_flat, sums), work=[(pk.key_work(D), torch.float32)],
        )  # fmt: skip
        variance += task_variance.sum()
    if with_stats:
        stats[0], stats[2] = float(kept[0]), variance
    return dq, dk, dv, stats
