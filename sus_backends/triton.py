"""The Triton backend: the kernels of triton_kernels.py on a CUDA device, or interpreted on CPU tensors.

The forward proposes tiles, and stores them for the backward: 8 * slots bytes a query row and head, where slots is
ceil(2c) + 1, or the number of tiles if that is less. It goes in rounds of rows, see TABLE. The backward works on the
tiles kept of these, in rounds of so many key/value heads, with their query heads, as ROUND has room for, but at least
one. While a round runs, each of its rows has (4 * D + 8) * slots bytes for `parts` and the like, a third of that for
what goes to dK and dV, and N / 512 of a bitmap.

Each round costs the host some tenths of a millisecond, so it is as large as a 40 GB card can bear: 1 GiB, of which a
call takes what it needs. With 12 heads, D = 64 and c = 4 the backward needs so much from some 35,000 tokens on, when a
model's activations are many times that. It stays the same for more, until one head alone takes more: at T = 1M its
parts and bitmap are 4.6 GB, and the table of as many rows as keep the device busy is 2.2 GB.

Nothing waits for the device, and all shapes are those of the arguments: calls can be captured in a CUDA graph, if c and
seed are tensors on the device, after a first call that is like them in dtype, head dim, T, number of slots, strides and
with_stats. A call that is not may compile a kernel anew. The first call of a kind also measures the fastest
configuration of the larger kernels: T counts by its power of 2, as what is best for 1k need not be for 128k.

No float is added atomically: the same configurations give the same bits. Another process may choose others; under
torch.use_deterministic_algorithms(True) it is always the first.

TRITON_INTERPRET=1, set before Python starts, is for tests: the kernels run on CPU tensors, one program after the other
in NumPy.

Dims: B batch, H query heads, K key/value heads, T query rows, N keys, D head dim, n the number of tiles, slots: the
most tiles that a row proposes.

Deliberately missing: what `unsupported` names. The reference does that.
"""

import functools
import math
import os

import torch
from torch import Tensor

from sus_backends import reference
from sus_backends.reference import TILE, proposals_like, tile_slots, tiles_of

HEAD_DIMS = 32, 64, 128
ROUND = 1 << 28  # floats, of parts and bitmap, of a round of the backward
TABLE = 1 << 28  # floats, of a round of the forward,
PROGRAMS = 264  # or what so many blocks of ROWS rows need: two for each of an H200's multiprocessors
ROWS = 128  # of one program of draw
# Bytes of shared memory: what the forward takes with blocks of 128 rows and head dim 128, and tile_gradients with
# float32 and head dim 64. An sm_80 has 166,912 and an sm_90 232,448, but an sm_86 and an sm_89 have 101,376. With
# ranges such blocks spill registers, except where tensor cores read shared memory: from sm_90 on.
SHARED_LARGE, SHARED_LARGE_RANGES, SHARED_FLOAT32 = 163_840, 196_608, 114_688
JOB = 1024  # rows of one program of tile_gradients, at most
# s * scale + offset in one instruction, whatever Triton's default: two would round twice
OPTIONS = dict(enable_fp_fusion=True)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def words_of(T: int) -> int:
    """Words of 32 rows, of a tile's bits; so many that what lies behind them is aligned."""
    return cdiv(T, 128) * 4


def rounds_of(all_heads: int, T: int, N: int, past: int) -> list[tuple[int, int, int, int]]:
    """The rounds of a forward that draws: (first head, heads, first row, rows). Row i sees what is up to i + past.

    A round has as many rows of all heads as the table has room for, so that its blocks have nearly equal lengths; of
    fewer heads where ROWS rows of all are too many.
    """
    n = tiles_of(N)
    room = max(TABLE, n * ROWS * PROGRAMS)
    heads = min(all_heads, room // (n * ROWS))
    rounds = []
    for head in range(0, all_heads, heads):
        some, row = min(heads, all_heads - head), 0
        while row < T:
            # they need r * (row + past + r) / TILE floats a head, and r * n at most
            of_head, before = room // some, row + past
            r = max(of_head // n, (math.isqrt(before * before + 4 * of_head * TILE) - before) // 2)
            r = min(T - row, max(ROWS, r // ROWS * ROWS))
            rounds.append((head, some, row, r))
            row += r
    return rounds


def sight_of(key_ranges: Tensor | None, is_causal: bool, q: Tensor, k: Tensor) -> tuple[Tensor | None, int, int]:
    """ranges, ranges_b and past of triton_kernels.sight. Where there are no ranges, every row sees something."""
    T, N = q.shape[2], k.shape[2]
    if key_ranges is None and is_causal and T > N:
        key_ranges = reference.ranges_of(None, True, T, N, q.device)[0]
    if key_ranges is None:
        return None, 0, N - T if is_causal else N
    return key_ranges.contiguous(), 2 * T if key_ranges.dim() == 3 else 0, N


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def missing(device_type: str) -> str | None:
    """Why the kernels can't be had on this kind of device, or None."""
    try:
        from sus_backends import triton_kernels  # noqa: F401
    except Exception as error:  # not installed, or of a version that doesn't fit, which it says in its own words
        return f"it needs the package triton, which can't be used here: {error}"
    if interpreted():
        return None
    if device_type != "cuda":
        return f"it is for CUDA, not {device_type} (where TRITON_INTERPRET=1 interprets it, for tests)"
    if torch.version.hip:
        return "it is for NVIDIA's GPUs"
    if (capability := torch.cuda.get_device_capability()) < (8, 0):
        return f"it needs compute capability 8.0 (Ampere) or later, not {capability[0]}.{capability[1]}"
    return None


@functools.cache
def shared_memory() -> int:
    """Bytes of shared memory that a block can have on this device; without end where kernels are interpreted."""
    if interpreted():
        return 1 << 30
    from triton.runtime import driver  # torch's device properties have it in some versions only

    return driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]


def unsupported(dtype: torch.dtype, D: int, sampler: str) -> str | None:
    """What of these the kernels don't do, or None."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {dtype}".replace("torch.", "")
    if dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter computes wrongly with bfloat16; it takes float32 and float16"
    if D not in HEAD_DIMS:
        return f"it takes head dims {', '.join(map(str, HEAD_DIMS))}, not {D}"
    if dtype == torch.float32 and D == 128:
        return (
            "it takes float32 with head dims up to 64: a product of float32 is three on the tensor cores, and "
            "registers don't suffice"
        )
    if dtype == torch.float32 and D == 64 and shared_memory() < SHARED_FLOAT32:
        return f"it takes float32 with head dims up to 32 on GPUs with {shared_memory() // 1024} kB of shared memory"
    if sampler != "tiles":
        return f"it has the sampler tiles, not {sampler}"
    return None


# ---------------------------------------------------------------------------------------------
# Configurations: constants of a kernel, warps, stages. D and the bytes of an element decide what fits.
# ---------------------------------------------------------------------------------------------


def configurations(kernel: str, D: int, itemsize: int, ranges: bool) -> list[tuple[dict, int, int]]:
    """(constants, warps, stages) of a kernel to choose from; the first is taken where nothing is measured.

    float32 has three products on the tensor cores for one, and needs fewer rows at once for the registers to suffice.
    """
    if kernel == "forward":
        if itemsize == 4:
            return [(dict(BM=64), 8, 2) if D == 32 else (dict(BM=32), 4, 2)]
        enough = D < 128 or shared_memory() >= (SHARED_LARGE_RANGES if ranges else SHARED_LARGE)
        large = [(dict(BM=128), 8, 2 if D == 32 else 3)] if enough else []
        return [*large, (dict(BM=64), 4, 2 if D == 128 else 3)]
    if kernel == "draw":
        return [(dict(SOME=8), 4, 1), (dict(SOME=16), 4, 1)]
    if kernel == "tile_gradients":
        if itemsize == 4:
            return [(dict(SOME=16), 8, 1)]
        if D == 128:
            return [(dict(SOME=32), 8, 1)]
        some = dict(SOME=16 if D == 32 else 32)
        return [(some, 4, 1), (some, 8, 1)]
    if kernel == "list_rows":
        return [(dict(SOME=256), 4, 1)]
    if kernel == "sum_parts":
        return [(dict(ROWS=4, SOME=8 if D < 128 else 4, KEYS=1024 // D), 4, 1)]
    if kernel == "plan":
        return [(dict(SOME=2048), 8, 1)]
    return [({}, 4, 1)]


@functools.cache
def _kernel(name: str, D: int, itemsize: int, ranges: bool, measure: bool, kind: tuple = ()):
    """The kernel with its configurations; one of its own, which is measured by itself, for each `kind` of call."""
    import triton

    from sus_backends import triton_kernels

    some = configurations(name, D, itemsize, ranges)[: None if measure else 1]
    configs = [triton.Config(constants, num_warps=warps, num_stages=stages) for constants, warps, stages in some]
    return triton.autotune(configs, key=[])(getattr(triton_kernels, name))


def _launch(name: str, q: Tensor, programs, *args, **constants) -> None:
    """Run a kernel on inputs such as q. programs: how many, or a function of BM that tells."""
    measure = not (interpreted() or torch.are_deterministic_algorithms_enabled())
    kind = (q.dtype, q.shape[2].bit_length(), *sorted(constants.items())) if measure else ()
    kernel = _kernel(name, q.shape[3], q.element_size(), constants.get("RANGES", False), measure, kind)
    if chosen := getattr(kernel, "best_config", None):  # what chose it needs time, too, and is not asked again
        kernel, constants = kernel.fn, constants | chosen.all_kwargs()
    grid = (lambda meta: (programs(meta["BM"]),)) if callable(programs) else (programs,)
    kernel[grid](*args, **constants, **OPTIONS)


# ---------------------------------------------------------------------------------------------
# Attention.
# ---------------------------------------------------------------------------------------------


def _precision(q: Tensor) -> str:
    """Of products of float32: three of TF32, as in PyTorch's memory-efficient attention, are about as good as one."""
    return "tf32x3" if q.dtype == torch.float32 else "tf32"


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, draws: bool, c: Tensor, c_max: float, seed: Tensor, u: Tensor | None,
    is_causal: bool = True, key_ranges: Tensor | None = None, first_row: int = 0, first_head: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Exact attention, and the proposals of the backward if `draws`.

    q (B, H, T, D); k, v (B, K, N, D), of any strides. c, seed: 0-d; u: None, or int64 (B, H, T). is_causal, key_ranges:
    see reference.ranges_of. first_row, first_head: where the first ones stand in the whole that the seed is for.

    Returns out (B, H, T, D), the log-sum-exp, float32 (B, H, T), and reference.proposals_like's (B, H, T, slots).
    """
    B, H, T, D = q.shape
    K, N = k.shape[1:3]
    out, lse = q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)
    slots = tile_slots(c_max, N) if draws else 0
    tiles, masses = proposals_like(q, slots)
    ranges, ranges_b, past = sight_of(key_ranges, is_causal, q, k)
    seen = lambda row: tiles_of(min(N, row + past))
    rounds, floats = [(0, B * H, 0, T)], 0
    if draws:
        c, seed = c.to(q.device, torch.float32), seed.to(q.device)
        u = None if u is None else u.int().contiguous()
        rounds = rounds_of(B * H, T, N, past)
        floats = max(heads * rows * seen(row + rows) for _, heads, row, rows in rounds)
    table = q.new_empty(floats, dtype=torch.float32)
    strides = *q.stride(), *k.stride(), *v.stride()
    with torch.cuda.device_of(q):
        for head, heads, row, rows in rounds:
            of_round = ranges_b, past, head, heads, row, rows, seen(row + rows)
            _launch(
                "forward", q, lambda BM: heads * cdiv(rows, BM),
                q, k, v, ranges, out, lse, table, *strides, scale, *of_round, H, K, T, N,
                RANGES=ranges is not None, DRAWS=draws, D=D, PRECISION=_precision(q),
            )  # fmt: skip
            if draws:
                _launch(
                    "draw", q, heads * cdiv(rows, ROWS),
                    table, ranges, lse, tiles, masses, c, seed, u, c_max, reference.KAPPA, *of_round, H, T, N, slots,
                    first_row, first_head, RANGES=ranges is not None, HAS_U=u is not None, ROWS=ROWS,
                )  # fmt: skip
    return out, lse, tiles, masses


def heads_at_once(all_heads: int, group: int, T: int, N: int, D: int, slots: int) -> int:
    """Query heads of a round of the backward. group: query heads of a key/value head."""
    of_head = T * slots * D + tiles_of(N) * words_of(T)
    return min(all_heads, max(1, ROUND // (group * of_head)) * group)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor, masses: Tensor,
    scale: float, c: Tensor, c_max: float, seed: Tensor, row_weight: Tensor, with_stats: bool = False,
    is_causal: bool = True, key_ranges: Tensor | None = None, first_row: int = 0, first_head: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, and stats: see `reference.backward`. A c that isn't > 0 gives NaN.

    grad_out, q, out (B, H, T, D); k, v (B, K, N, D); lse (B, H, T) and tiles, masses (B, H, T, slots) of `forward`.
    c, seed: 0-d. row_weight (B, H, T): of reference.row_weights.

    Returns dq (B, H, T, D), dk and dv (B, K, N, D), and stats, float32 (3,).
    """
    B, H, T, D = q.shape
    K, N, slots = *k.shape[1:3], tiles.shape[3]
    if not slots:
        raise RuntimeError("this forward was told that no gradient would be wanted (draws=False)")
    G, n, words = H // K, tiles_of(N), words_of(T)
    c, seed = c.to(q.device, torch.float32), seed.to(q.device)
    out, lse, tiles, masses = (x.contiguous() for x in (out, lse, tiles, masses))
    row_weight = row_weight.float().contiguous()
    ranges, ranges_b, past = sight_of(key_ranges, is_causal, q, k)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))  # contiguous, whatever the inputs' strides
    of_head = T * slots  # pairs (row, tile) that it may keep: where rows are a part of a whole, all may weigh much
    heads = heads_at_once(B * H, G, T, N, D, slots)
    jobs = cdiv(heads * (n + cdiv(of_head, JOB)), 4) * 4  # the next round's begin aligned
    SLOTS = max(16, 1 << (slots - 1).bit_length())
    thin_rows = max(1, 512 // SLOTS)
    of_sums = configurations("sum_parts", D, q.element_size(), key_ranges is not None)[0][0]
    floats, ints = (functools.partial(torch.empty, dtype=x, device=q.device) for x in (torch.float32, torch.int32))
    w, places, delta = floats(heads, T, slots), ints(heads, T, slots), floats(heads, T)
    kept = ints(B * H, cdiv(T, thin_rows))
    zeros, ends, job_ends, job_regions = ints(heads * n * (words + 1)), ints(heads * n), ints(heads * n), ints(jobs)
    listed, parts, dkv_parts = ints(heads * of_head), floats(heads * of_head, D), floats(jobs, 2, TILE, D)
    bits, counts = zeros[: heads * n * words], zeros[heads * n * words :]
    variance = floats(cdiv(B * H, heads) if with_stats else 0, jobs)
    g_strides, q_strides, k_strides, v_strides = (x.stride() for x in (grad_out, q, k, v))
    with torch.cuda.device_of(q):
        for round_, first in enumerate(range(0, B * H, heads)):
            some = min(heads, B * H - first)
            regions = some * n
            zeros.zero_()
            _launch(
                "thin", q, some * cdiv(T, thin_rows), grad_out, out, lse, tiles, masses, c, seed, row_weight,
                w, bits, counts, delta, kept, ranges, *g_strides, c_max, reference.KAPPA, ranges_b, past,
                first, H, T, N, slots, words, first_row, first_head,
                RANGES=ranges is not None, D=D, SLOTS=SLOTS, ROWS=thin_rows,
            )  # fmt: skip
            _launch("plan", q, 1, counts, ends, job_ends, job_regions, regions, JOB=JOB)
            _launch("list_rows", q, regions, bits, counts, ends, listed, past, N, words)
            _launch(
                "tile_gradients", q, jobs, grad_out, q, k, v, lse, tiles, w, delta, counts, ends, job_ends, job_regions,
                listed, places, parts, ranges, dkv_parts, variance[round_] if with_stats else None,
                *g_strides, *q_strides, *k_strides, *v_strides, scale, ranges_b, past,
                first, H, K, T, N, slots, regions,
                RANGES=ranges is not None, ESTIMATES=with_stats, JOB=JOB, D=D, PRECISION=_precision(q),
            )  # fmt: skip
            _launch(
                "sum_parts", q, some * cdiv(T, of_sums["ROWS"]) + regions // G * (TILE // of_sums["KEYS"]),
                parts, w, places, delta, lse, c, dkv_parts, counts, job_ends, dq, dk, dv,
                first, some, H, K, T, N, slots, D=D, JOB=JOB,
            )  # fmt: skip
    stats = q.new_zeros(3, dtype=torch.float32)
    if with_stats:
        torch.sum(kept.view(1, -1), 1, dtype=torch.float32, out=stats[:1])
        torch.sum(variance.view(1, -1), 1, out=stats[2:])
    return dq, dk, dv, stats
