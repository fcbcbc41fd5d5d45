"""The CPU backend: numba's kernels (cpu_kernels.py), run on as many threads as PyTorch uses.

The forward draws on the way and stores each row's kept entries, key and weight in 8 bytes; the backward's work is only
those. Beside what exact attention stores that is B * H * T * slots * 8 bytes, slots = ceil(c) + 1 of the c which the
forward draws with: 2c for the weighted sampler, which the backward thins, else c. While it runs, the forward needs
256 * T bytes a thread more; the backward 16 bytes an entry, of `round_entries` entries at a time, and where it does not
take a bfloat16 key/value head at once, that head's dK and dV in float32.

The threads are PyTorch's own, not those of numba's parallel loops: its layers either forbid concurrent calls or don't
survive a fork, and keep a thread count of their own. Kernels release the GIL and take tasks from a shared counter; what
each task computes, and where it writes it, does not depend on the thread that runs it.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from backends import reference
from backends.reference import (
    STREAM_THINNING, THINNED, proposal_c, row_uniforms, row_weights, seed_state, slot_bound,
)  # fmt: skip

MAX_D, MAX_C = 128, 1024
SAMPLERS = "systematic", "weighted"


@functools.cache
def missing() -> str | None:
    """Why the kernels can't be had here, or None."""
    try:
        from backends import cpu_kernels  # noqa: F401
    except Exception as error:  # not installed, or of a version that doesn't fit, which it says in its own words
        return f"it needs the package numba (pip install numba), which can't be used here: {error}"
    return None


def unsupported(dtype: torch.dtype, D: int, is_causal: bool, sampler: str) -> str | None:
    """What of these the kernels don't do, or None. They do any c, but store c + 1 entries a row: up to MAX_C that is wise."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {dtype}".replace("torch.", "")
    if D > MAX_D:
        return f"it takes head dims up to {MAX_D}, not {D}"
    if not is_causal:
        return "it is for causal attention"
    if sampler not in SAMPLERS:
        return f"it has the samplers {' and '.join(SAMPLERS)}, not {sampler}"
    return None


# ---------------------------------------------------------------------------------------------
# Compiling and running.
# ---------------------------------------------------------------------------------------------


@functools.cache
def kernels():
    from backends import cpu_kernels

    specified = hashlib.sha256(Path(reference.__file__).read_bytes()).hexdigest()
    for name in ("forward", "count_entries", "row_gradients", "key_gradients"):
        kernel = getattr(cpu_kernels, name)
        if not cpu_kernels.INTERPRETED:
            try:
                kernel.enable_caching()
            except RuntimeError:
                continue  # no folder can be written: compiled anew in each process
            # what kernels have from reference.py is compiled into them: when it changes, so must they
            file = kernel._cache._cache_file
            file._source_stamp = file._source_stamp, specified
    return cpu_kernels


_compiling = threading.Lock()
_compiled = set()


def _compile(kernel, args) -> None:
    """Compile the kernel for the types of args, or load it from disk; say so if that takes long."""
    # what else the types depend on is the same in every call
    key = kernel, tuple(getattr(arg, "dtype", None) for arg in args)
    if key in _compiled:
        return
    import numba

    types = tuple(numba.typeof(arg) for arg in args)
    with _compiling:
        notice = threading.Timer(0.8, _announce)
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
    text = "compiling the CPU kernels: some ten seconds, the first time only"
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


_pool = None
_forked = False


def _after_fork() -> None:
    """A forked child has none of its parent's threads, OpenMP's would wait for them for ever, and a lock may be held."""
    global _pool, _forked, _compiling
    _pool, _forked, _compiling = None, True, threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def _on_threads(n: int, work) -> None:
    """Call work() on n threads at once, or on fewer if there are no more to be had; the caller is one of them."""
    global _pool
    if n == 1:
        work()
    elif _openmp() and not _forked:
        finished, errors = [], []

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


def _run(kernel, tasks: int, *args, work=()) -> None:
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


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride()[:3]


def _rows(*tensors: Tensor) -> list[Tensor]:
    """The same, with rows of D elements side by side in memory."""
    return [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (t.detach() for t in tensors)]


# ---------------------------------------------------------------------------------------------
# Attention.
# ---------------------------------------------------------------------------------------------


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, draws: bool, c: float, c_max: float, seed: Tensor, u: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Exact causal attention, and the kept entries of the backward if `draws`.

    q (B, H, T, D); k, v (B, K, T, D), float32 or bfloat16. c <= c_max, which sizes the buffers. u: None, or the
    sampler's uniforms, int64 (B, H, T) in [0, 2^23). Returns out (B, H, T, D); the log-sum-exp, float32 (B, H, T);
    entry_key int32 and entry_weight float32, both (B, H, T, slots): a row's kept keys in ascending order, then
    -1, and their weights W, then 0; and dropped, int64 (1,). Without draws, the last three
    are empty.
    """
    ck = kernels()
    q, k, v = _rows(q, k, v)
    B, H, T, D = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)
    slots = slot_bound(c_max, T) if draws else 0
    entry_key, entry_weight = (q.new_empty(B, H, T, slots, dtype=dtype) for dtype in (torch.int32, torch.float32))
    dropped = q.new_zeros(1 if draws else 0, dtype=torch.int64)
    if not draws:
        u = q.new_empty(0, dtype=torch.int32)
    elif u is None:
        u = row_uniforms(seed.cpu(), B, H, range(T), "cpu")
    _run(
        ck.forward, B * H * -(-T // ck.ROWS),
        _flat(q), _flat(k), _flat(v), _strides(q), _strides(k), _strides(v), (B, H, k.shape[1], T, D), float(scale),
        _flat(out), _flat(lse), draws, np.float32(c), _flat(u.int().contiguous()), slots, _flat(entry_key), _flat(entry_weight), dropped.numpy(),
        work=[(ck.forward_work(D, T if draws else ck.KEYS), torch.float32)],
    )  # fmt: skip
    return out, lse, entry_key, entry_weight, dropped


def round_entries(T: int) -> int:
    """The most entries of one round of the backward: few enough for a cache, and worth going through all dK and dV."""
    return max(1 << 18, 32 * T)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, entry_key: Tensor, entry_weight: Tensor,
    dropped: Tensor, scale: float, c: float, seed: Tensor, with_stats: bool = False, sampler: str = "systematic",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, and stats (see `reference.backward`), from what `forward` drew with proposal_c(c)."""
    ck = kernels()
    grad_out, q, k, v = _rows(grad_out, q, k, v)
    out, lse, entry_key, entry_weight = (x.detach().contiguous() for x in (out, lse, entry_key, entry_weight))
    B, H, T, D = q.shape
    K, slots = k.shape[1], entry_key.shape[3]
    if not slots:
        raise RuntimeError("this forward was told that no gradient would be wanted (draws=False)")
    chunks, buckets = H // K * ck.chunks_of(T), ck.buckets_of(T)  # chunks of the rows that attend to one key/value head
    shape = (B, H, K, T, D)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    kept, variance = np.zeros(1, np.int64), 0.0
    stats = q.new_zeros(3, dtype=torch.float32)
    thins = sampler in THINNED
    row_weight = _flat(row_weights(grad_out)) if thins else np.empty(0, np.float32)
    thin_state = seed_state(int(seed), STREAM_THINNING)
    squares = [np.empty(0, np.float32)] * 2
    if thins or with_stats:
        squares = [_flat(torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square_()) for x in (q, k)]
    grad_, q_, k_, v_ = ((_flat(x), _strides(x)) for x in (grad_out, q, k, v))
    entries = _flat(entry_key), _flat(entry_weight)

    round_chunks = max(1, round_entries(T) // (ck.CHUNK * slots))
    round_heads = max(1, round_chunks // chunks)
    for head, chunk in itertools.product(range(0, B * K, round_heads), range(0, chunks, round_chunks)):
        heads = min(round_heads, B * K - head)
        round_ = head, heads, chunk, min(round_chunks, chunks - chunk)
        tasks = heads * round_[3]
        counts = q.new_zeros(heads, round_[3], buckets, dtype=torch.int64)
        _run(ck.count_entries, tasks, entries[0], shape, slots, round_, _flat(counts))
        # regions lie side by side by (head, bucket, chunk), and are looked up by (head, chunk, bucket)
        by_bucket = counts.transpose(1, 2)
        ends = by_bucket.flatten().cumsum(0).view(by_bucket.shape)
        starts = (ends - by_bucket).transpose(1, 2).contiguous()
        places = starts.clone()
        records = q.new_empty(int(ends[-1, -1, -1]) + ck.AHEAD, 4, dtype=torch.float32)
        records = _flat(records.view(torch.int32)), _flat(records)
        task_variance = np.zeros(tasks if with_stats else 0)
        _run(
            ck.row_gradients, tasks,
            grad_[0], k_[0], v_[0], grad_[1], k_[1], v_[1], shape, float(scale), _flat(out), _flat(lse),
            np.float32(proposal_c(c, sampler)), np.float32(c), row_weight, thin_state, *entries, slots, round_, _flat(places),
            *records, _flat(dq), kept, *squares, task_variance,
            work=[(ck.row_work(D, slots), torch.float32), (2 * slots, torch.int32)],
        )  # fmt: skip
        of_round = [x.view(B * K, T, D)[head : head + heads] for x in (dk, dv)]
        if round_chunks >= chunks:
            sums = of_round
        elif chunk == 0:  # several rounds make one head's sums
            sums = [torch.empty_like(x, dtype=torch.float32) for x in of_round]
        _run(
            ck.key_gradients, heads * buckets,
            grad_[0], q_[0], grad_[1], q_[1], shape, round_, _flat(starts), _flat(places), *records, chunk > 0,
            *map(_flat, sums), work=[(ck.key_work(D), torch.float32)],
        )  # fmt: skip
        if chunk + round_[3] == chunks:
            for x, total in zip(of_round, sums):
                x.copy_(total)
        variance += task_variance.sum()
    if with_stats:
        stats[0], stats[1], stats[2] = float(kept[0]), float(dropped), variance
    return dq, dk, dv, stats
