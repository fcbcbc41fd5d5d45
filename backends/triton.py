"""The Triton backend: the kernels of triton_kernels.py on a CUDA device, or interpreted on CPU tensors.

The forward stores nothing for the backward but the log-sum-exp. The backward draws, in a pass over the scores of its
own, and then works on the kept entries alone. They are there while it runs only: 16 * slots bytes a query row and head,
slots = ceil(c) + 9 of the c which is drawn with, and T / 1024 bytes (float32: T / 512) for where tiles begin. It goes in
rounds of so many key/value heads, with their query heads, as have ROUND_ENTRIES slots, but at least one.

Nothing waits for the device, and all shapes are those of the arguments: calls can be captured in a CUDA graph, if c and
seed are tensors on the device, after a first call with that dtype and head dim. Then the fastest configuration of the
larger kernels is measured. There are no atomics: the same configurations give the same bits. Another process may choose
others; under torch.use_deterministic_algorithms(True) it is always the first.

TRITON_INTERPRET=1, set before Python starts, runs the kernels on CPU tensors, one program after the other in NumPy: for tests.

Deliberately missing: what `unsupported` names. The reference does that.
"""

import functools
import math
import os

import torch
from torch import Tensor

from backends.reference import KAPPA, STRIDES, THINNED, proposal_c, row_weights

HEAD_DIMS, MAX_C = (32, 64, 128), 1023
SAMPLERS = "strided", "weighted"
ROUND_ENTRIES = 1 << 24
# s * scale + offset in one instruction, whatever Triton's default: two would round twice
OPTIONS = dict(enable_fp_fusion=True)


def slots_of(c_max: float, T: int) -> int:
    """The most entries a row may keep: of each class of keys one more than its expected number, and one for the rounding."""
    return T if c_max >= T else min(math.ceil(c_max) + STRIDES + 1, T)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def missing(device_type: str) -> str | None:
    """Why the kernels can't be had on this kind of device, or None."""
    try:
        from backends import triton_kernels  # noqa: F401
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


def spills(dtype: torch.dtype, D: int, capability: tuple[int, int]) -> bool:
    """Whether registers don't suffice: before Hopper, those that hold three parts of a product for one, at this D."""
    return dtype == torch.float32 and D == 128 and capability < (9, 0)


def unsupported(dtype: torch.dtype, D: int, is_causal: bool, sampler: str, c_max: float) -> str | None:
    """What of these the kernels don't do, or None."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {dtype}".replace("torch.", "")
    if dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter computes wrongly with bfloat16; it takes float32 and float16"
    if D not in HEAD_DIMS:
        return f"it takes head dims {', '.join(map(str, HEAD_DIMS))}, not {D}"
    if torch.cuda.is_available() and spills(dtype, D, torch.cuda.get_device_capability()):
        return "float32 with head dim 128 needs compute capability 9.0 (Hopper)"
    if not is_causal:
        return "it is for causal attention"
    if sampler not in SAMPLERS:
        return f"it has the samplers {' and '.join(SAMPLERS)}, not {sampler}"
    if (proposals := proposal_c(c_max, sampler)) > MAX_C:
        return f"with c = {c_max:g} it would store up to {proposals:g} entries a row; it takes up to {MAX_C}"
    return None


# ---------------------------------------------------------------------------------------------
# Configurations: constants of a kernel, warps, stages. D and the bytes of an element decide what fits.
# ---------------------------------------------------------------------------------------------


def region(itemsize: int) -> dict:
    """Rows and keys of the regions which `draw` writes and `key_gradients` reads."""
    return dict(BM=64, TILE=32 if itemsize == 4 else 64)


def configurations(kernel: str, D: int, itemsize: int) -> list[tuple[dict, int, int]]:
    """(constants, warps, stages) of a kernel to choose from; the first is taken where nothing is measured.

    float32 has three products on the tensor cores for one, and needs smaller tiles for the registers to suffice.
    """
    if kernel == "forward":
        if itemsize == 4:
            return [(dict(BM=32, BN=32), 8, 2)]
        if D == 128:
            return [(dict(BM=128, BN=32), 8, 3), (dict(BM=64, BN=64), 4, 2)]
        return [(dict(BM=128, BN=64), 8, 3), (dict(BM=64, BN=64), 4, 3)]
    if kernel == "draw":
        return [(region(itemsize), 4, 2 if itemsize == 4 else 3)]
    if kernel == "key_gradients":
        if itemsize == 4:
            return [(region(itemsize) | dict(BLOCKS=4, SOME=8), 8, 2)]
        other = (dict(BLOCKS=4, SOME=16), 8, 2) if D == 128 else (dict(BLOCKS=2, SOME=16), 4, 2)
        return [(region(itemsize) | constants, warps, stages) for constants, warps, stages in ((dict(BLOCKS=4, SOME=8), 8, 2), other)]
    if kernel == "thin":
        return [({}, 4, 1)]  # its constants follow the slots
    return [(dict(ROWS=2 if D == 128 else 4, SOME=16), 4, 2)]  # slopes, query_gradients


@functools.cache
def _kernel(name: str, D: int, itemsize: int, measure: bool):
    import triton

    from backends import triton_kernels

    some = configurations(name, D, itemsize)[: None if measure else 1]
    configs = [triton.Config(constants, num_warps=warps, num_stages=stages) for constants, warps, stages in some]
    return triton.autotune(configs, key=[])(getattr(triton_kernels, name))


def _launch(name: str, q: Tensor, programs, *args, **constants) -> None:
    """Run a kernel on inputs such as q. programs: how many, or a function of BM that tells."""
    measure = not (interpreted() or torch.are_deterministic_algorithms_enabled())
    grid = (lambda meta: (programs(meta["BM"]),)) if callable(programs) else (programs,)
    _kernel(name, q.shape[3], q.element_size(), measure)[grid](*args, **constants, **OPTIONS)


# ---------------------------------------------------------------------------------------------
# Attention.
# ---------------------------------------------------------------------------------------------


def _precision(q: Tensor) -> str:
    """Of float32's products. TF32's three, as in PyTorch's memory-efficient attention, are about as good as float32's one."""
    return "tf32x3" if q.dtype == torch.float32 else "tf32"


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Exact causal attention. q (B, H, T, D); k, v (B, K, T, D), of any strides. Returns out (B, H, T, D) and the
    log-sum-exp, float32 (B, H, T), contiguous."""
    B, H, T, D = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)
    with torch.cuda.device_of(q):
        _launch(
            "forward", q, lambda BM: B * H * cdiv(T, BM),
            q, k, v, out, lse, *q.stride(), *k.stride(), *v.stride(), scale, H, k.shape[1], T, D=D, PRECISION=_precision(q),
        )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, c: Tensor, c_max: float,
    seed: Tensor, u: Tensor | None, with_stats: bool = False, sampler: str = "strided",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, and stats: see `reference.backward`. c, seed: 0-d; u: None, or int64 (B, H, T).

    A c that isn't > 0 gives NaN gradients.
    """
    B, H, T, D = q.shape
    K = k.shape[1]
    G, slots = H // K, slots_of(proposal_c(c_max, sampler), T)
    c, seed = c.to(q.device, torch.float32), seed.to(q.device)
    thins = sampler in THINNED
    kappa = KAPPA if thins else 1.0
    out, lse = out.contiguous(), lse.contiguous()
    tile = region(q.element_size())
    blocks, tiles = cdiv(T, tile["BM"]), cdiv(T, tile["TILE"])
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))  # contiguous, whatever the inputs' strides
    new = functools.partial(torch.empty, device=q.device)
    importance = [new(0)] * 4
    if thins or with_stats:
        square = lambda x: torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square_()  # noqa: E731
        importance = [row_weights(grad_out), square(grad_out), square(q), square(k)]
    u = None if u is None else u.int().contiguous()
    g_strides, q_strides, k_strides, v_strides = (x.stride() for x in (grad_out, q, k, v))
    SLOTS = max(16, 1 << (slots - 1).bit_length())
    ROWS = max(1, 1024 // SLOTS)
    constants = configurations("slopes", D, q.element_size())[0][0]
    groups = cdiv(T, constants["ROWS"])
    sums = []
    heads = min(B * H, max(1, ROUND_ENTRIES // (G * T * slots)) * G)  # of a round
    keys, order = (new(heads, T, slots, dtype=torch.int32) for _ in range(2))
    weights, m = (new(heads, T, slots, dtype=torch.float32) for _ in range(2))
    starts = new(heads, tiles + 1, blocks, dtype=torch.int32)
    dropped, undefined = new(heads, blocks, dtype=torch.int32), new(heads, T, dtype=torch.float32)
    kept, variance = (new(heads, cdiv(T, ROWS), dtype=dtype) for dtype in (torch.int32, torch.float32))
    with torch.cuda.device_of(q):
        for first in range(0, B * H, heads):
            n = min(heads, B * H - first)
            where = first, H, K, T, slots
            _launch(
                "draw", q, n * blocks, q, k, lse, c, seed, u, keys, order, starts, dropped, *q_strides, *k_strides,
                scale, c_max, kappa, *where, HAS_U=u is not None, D=D, PRECISION=_precision(q),
            )  # fmt: skip
            _launch(
                "slopes", q, n * groups, grad_out, q, k, v, out, lse, c, keys, weights, m, undefined,
                *g_strides, *q_strides, *k_strides, *v_strides, scale, *where, D=D,
            )  # fmt: skip
            _launch(
                "thin", q, n * cdiv(T, ROWS), keys, weights, m, c, seed, *importance, kept, variance, c_max, kappa,
                *where, THINS=thins, ESTIMATES=with_stats, SLOTS=SLOTS, ROWS=ROWS,
            )  # fmt: skip
            _launch("query_gradients", q, n * groups, k, keys, m, undefined, dq, *k_strides, *where, D=D)
            _launch(
                "key_gradients", q, n // G * tiles, grad_out, q, c, keys, weights, m, order, starts, dk, dv,
                *g_strides, *q_strides, *where, D=D, PRECISION=_precision(q),
            )  # fmt: skip
            if with_stats:
                sums.append(torch.stack([x.sum(dtype=torch.float32) for x in (kept[:n], dropped[:n], variance[:n])]))
    return dq, dk, dv, sum(sums) if with_stats else q.new_zeros(3, dtype=torch.float32)
