"""SUS attention: an exact forward, and a Sparse Unbiased Stochastic backward (Pankov & Harik, arXiv 2505.15080).

One head, one sequence: S = scale * Q K^T with the causal mask, W = softmax(S), O = W V. With G = dL/dO and
delta_i = G_i . O_i the exact backward is

    dV = W^T G      M_ij = W_ij (G_i . V_j - delta_i)      dQ = scale * M K      dK = scale * M^T Q

SUS replaces W by W * m wherever it stands in these lines: m_ij = 1/q_ij with probability q_ij, else 0, and

    q_ij = min(1, c * W_ij)

The gradients are linear in m and E[m] = 1, so they stay unbiased for any draw that includes entry ij with
probability q_ij. The rows of W sum to one, so at most c entries of a row (below: tiles) are kept in expectation: the
backward needs O(T c D) work instead of O(T^2 D). c is the attention retention parameter; c = inf keeps all.

Samplers. The default keeps or cuts the weights of a row in 64 neighbouring keys, a tile J, as one:

    tiles        q_ij = min(1, 2 c W_iJ, c_i W_iJ)      W_iJ = sum over j in J of W_ij      c_i = c |G_i| / mean |G|

                 so that rows which matter are kept more. A systematic draw of tiles with 2c in the forward proposes;
                 the backward, which knows G, thins what was proposed. About c tiles a row are kept at most, on average
                 over rows. Dense products of rows and tiles are what processors are good at, and the variance is far
                 below that of single keys that are as many, or take as long.

The paper's rule draws single keys:

    poisson      an independent draw for each entry; the number kept is random.

What was tried on the way from there is in the reference backend only:

    systematic   one uniform u a row; keep j where floor(C_j + u) > floor(C_{j-1} + u), C the running sum of q.
                 A row never keeps more than ceil(c) entries (+ 1 by the rounding of q), and the variance is lower.
    weighted     a systematic draw with 2c proposes, and is thinned to

                     q_ij = min(1, 2 c W_ij, c_i W_ij f_ij)      f_ij = h_ij / rms_j h_ij

                 h_ij^2 = |G_i|^2 + scale^2 (G_i . V_j - delta_i)^2 (|K_j|^2 + |Q_i|^2), the squared norm of what
                 W_ij = 1 would add to (dV, dQ, dK).
    rows, values, rows+values     the same with other weights.

Dims: B batch, Hq query heads, Hkv key/value heads, T query rows, N keys, D head dim. (In sus_backends/ H is Hq, and K
is Hkv.)

This file is the operator: argument checks, the custom op with its fake and its autograd formula, the choice
of a backend. The arithmetic is in sus_backends/.

Deliberately missing: attention dropout, masks other than a range of keys for each row, double backward.
Each is refused by name.
"""

import math
import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group

from sus_backends import cpu, reference, triton
from sus_backends.reference import UNIT, fold_in  # noqa: F401  (fold_in is part of this module's interface)

SAMPLERS = (*reference.THINNED, "systematic", "poisson")
BACKENDS = ("auto", "reference", "cpu", "triton")
FASTEST = {"cpu": "cpu", "cuda": "triton"}  # device type: backend
F = TypeVar("F", bound=Callable)
_warned: set[str] = set()  # of reasons; warnings' own memory is lost where an import changes its filters, as torch's do


def sus_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: float | Tensor = 8.0,
    *,
    key_ranges: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    seed: int | Tensor | None = None,
    first_row: int = 0,
    first_head: int = 0,
    group: ProcessGroup | None = None,
    sampler: str = "tiles",
    backend: str = "auto",
    c_max: float | None = None,
    stats: Tensor | None = None,
    u: float | Tensor | None = None,
) -> Tensor:
    """Attention with an exact forward and a sparse, unbiased, stochastic backward. Returns (B, Hq, T, D) in q's dtype.

    q: (B, Hq, T, D); k, v: (B, Hkv, N, D), Hq a multiple of Hkv (grouped-query attention). All of one dtype
    (float64, float32, bfloat16, float16; under autocast they are cast to its dtype) and on one device.
    c: the retention parameter, a float > 0: about how many tiles a row keeps. 8 is what pays for a model with sharp
        attention (measured, see docs/variance.md); 4 does for small ones. `math.inf` gives the exact gradient through
        the same code. Or a 0-d float tensor with `c_max`, a float that bounds it: changing its value recompiles
        nothing. A tensor's value is checked where that needs no synchronisation (eagerly, on the CPU); elsewhere c_max
        clamps it, and a value that isn't > 0 gives NaN gradients.
    key_ranges: int32, (T, 2) or (B, T, 2): row i attends to the keys [lo, hi) of its pair; what is out of [0, N] is
        clamped. It makes documents that share a window, packed batches, and sliding windows. A row that sees nothing
        is 0, and so are its gradients. Any ranges are right; fast are those that neighbouring rows nearly share.
    is_causal: without key_ranges, the rows are the last T of N positions, and each attends to all positions up to its
        own (SDPA takes them for the first T instead, where T < N), so that of more rows than keys the first T - N see
        nothing; otherwise to all keys. With key_ranges it is not looked at.
    scale: multiplies the scores; 1/sqrt(D) if None.
    seed: an int or a 0-d int64 tensor; the draw is a function of it alone. None: drawn from torch's default
        generator, once a call. Layers and micro-batches need different seeds: see `fold_in`.
    first_row, first_head: where q is a part of longer rows, or of more heads, which of the whole is its first. A part
        that is given the same keys, by key_ranges, then draws what the whole would, if its rows are weighed as there,
        see `group`. It moves no mask: without key_ranges the rows are still the last T of N.
    group: a process group whose processes have rows of the same batches and heads each. A row keeps more where its
        gradient is larger than its head's mean, and the mean is then over all of them: they are asked once in the
        backward, all together. Without it the gradient is as unbiased, but drawn otherwise than the whole's.
    sampler: "tiles", or another one, see above.
    backend: "reference" (plain PyTorch, any device); "cpu" (compiled kernels: float32 and bfloat16, D <= 128);
        "triton" (CUDA: bfloat16, float16 and float32, D = 32, 64, and 128 but in float32; the same bits every time, in
        one process); both have the sampler tiles, and the CPU has poisson, too; or "auto", the fastest that can do it.
        A request that can't be met raises; where auto falls back to the slow reference, it warns once of the reason.
    stats: None or a float32 tensor (3,) on q's device, overwritten in the backward with three sums over the call: the
        kept entries (of a kept tile, the keys that the row sees), the dropped entries (0 by construction), and an
        estimate of the added gradient variance (Poisson: unbiased; the others: a proxy).
    u: for tests: the uniforms of the systematic draw, in [0, 1), a float or a tensor that broadcasts to (B, Hq, T).

    Raises TypeError or ValueError that names the argument. Double backward is not supported and says so.
    The backward is a pure function of (inputs, seed): the same under activation checkpointing and torch.compile.
    """
    arguments = _arguments(
        q, k, v, c, key_ranges, is_causal, scale, seed, first_row, first_head, group, sampler, backend, c_max, stats, u
    )
    draws = torch.is_grad_enabled() and any(x.requires_grad for x in arguments[:3])
    out, *_ = _attention(*arguments, draws)
    return out


def sus_attention_and_backward(
    q: Tensor, k: Tensor, v: Tensor, c: float | Tensor = 8.0, *, key_ranges: Tensor | None = None,
    is_causal: bool = True, scale: float | None = None, seed: int | Tensor | None = None, first_row: int = 0,
    first_head: int = 0, group: ProcessGroup | None = None, sampler: str = "tiles", backend: str = "auto",
    c_max: float | None = None, stats: Tensor | None = None, u: float | Tensor | None = None,
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:  # fmt: skip
    """`sus_attention` for who does without autograd: (out, backward), where backward(grad_out) gives (dq, dk, dv).

    The arguments, and the bits, are sus_attention's. out, grad_out, dq (B, Hq, T, D); dk, dv (B, Hkv, N, D).
    """
    arguments = _arguments(
        q, k, v, c, key_ranges, is_causal, scale, seed, first_row, first_head, group, sampler, backend, c_max, stats, u
    )
    q, k, v, c_, seed_, u, key_ranges, stats, *static = arguments
    with torch.no_grad():
        outputs = _attention(*arguments, True)
    c_, seed_ = c_.clone(), seed_.clone()  # as in _setup_context

    @torch.no_grad()
    def backward(grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        saved = (q, k, v, *outputs, c_, seed_, u, key_ranges)
        dq, dk, dv, found = _attention_backward(grad_out, *saved, *static, stats is not None)
        if stats is not None:
            stats.copy_(found)
        return dq, dk, dv

    return outputs[0], backward


def resolve_backend(
    backend: str, device_type: str, dtype: torch.dtype, D: int, *, sampler: str = "tiles"
) -> tuple[str, str]:
    """The backend that `backend` means for such a call, and the reason, for a line to print.

    Raises ValueError where what is asked for can't be had.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, not {backend!r}")
    if backend == "reference":
        return backend, "asked for"
    if backend == "cpu" and device_type != "cpu":
        raise ValueError(f"backend='cpu' is for tensors on the CPU, not on {device_type}")
    asked_for = backend != "auto"
    if not asked_for:
        if device_type not in FASTEST:
            return "reference", f"the only SUS backend for {device_type}"
        backend = FASTEST[device_type]
    if backend == "cpu":
        obstacle = cpu.missing() or cpu.unsupported(dtype, D, sampler)
    else:
        obstacle = triton.missing(device_type) or triton.unsupported(dtype, D, sampler)
    if asked_for:
        if obstacle:
            raise ValueError(f"backend={backend!r} can't be had: {obstacle}")
        return backend, "asked for"
    return ("reference", f"not the faster {backend}: {obstacle}") if obstacle else (backend, "the fastest here")


def constant_in_graphs(function: F) -> F:
    """The mark of torch.compiler.assume_constant_result, which imports all of the compiler, and takes a second for it:
    in compiled code the function is called once per graph, and its result is part of that.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs  # resolved, and any warning given, once per compiled graph
def _resolve_backend(backend: str, device_type: str, dtype: torch.dtype, D: int, sampler: str) -> str:
    name, reason = resolve_backend(backend, device_type, dtype, D, sampler=sampler)
    if backend == "auto" and device_type in FASTEST and name == "reference" and reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"sus_attention uses the slow reference backend, {reason}", stacklevel=4)
    return name


# ---------------------------------------------------------------------------------------------
# Argument checks.
# ---------------------------------------------------------------------------------------------


def _arguments(
    q, k, v, c, key_ranges, is_causal, scale, seed, first_row, first_head, group, sampler, backend, c_max, stats, u
) -> tuple:
    """sus_attention's arguments, checked, as those of the custom op but for `draws`."""
    check_inputs(q, k, v, same_length=False)
    q, k, v = autocast_inputs(q, k, v)
    c, c_max = check_c(c, c_max, q.device)
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {SAMPLERS}, not {sampler!r}")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be True or False, not {is_causal!r}")
    if key_ranges is not None:
        _check_ranges(key_ranges, q)
    for name, first in (("first_row", first_row), ("first_head", first_head)):
        if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < 2**31:
            raise ValueError(f"{name} must be an int from 0 to 2^31 - 1, not {first!r}")
    if group is not None and not isinstance(group, ProcessGroup):
        raise TypeError(f"group must be None or a process group that this process is in, not {_describe(group)}")
    D = q.shape[3]
    if q.device.type == "cpu" and D <= cpu.MAX_D and backend != "triton":
        D = cpu.MAX_D  # where compiled code has it as a symbol, only this is fixed
    backend = _resolve_backend(backend, q.device.type, q.dtype, int(D), sampler)
    if scale is not None and not (_is_number(scale) and abs(scale) < math.inf):  # isfinite takes no symbol
        raise ValueError(f"scale must be a finite number or None, not {scale!r}")
    if u is not None:
        if sampler == "poisson":
            raise ValueError("u is an argument of the systematic samplers; sampler is 'poisson'")
        u = _check_u(u, q)
    if stats is not None:
        _check_tensor("stats", stats)
        if stats.shape != (3,) or stats.dtype != torch.float32 or stats.device != q.device:
            raise ValueError(f"stats must be a float32 tensor of shape (3,) on {q.device}, not {_describe(stats)}")
    # scaled_dot_product_attention's own default, also where it is exact: D ** -0.5
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    part = first_row, first_head, "" if group is None else group.group_name
    seed = _seed_tensor(seed, q.device)
    return q, k, v, c, seed, u, key_ranges, stats, c_max, is_causal, scale, *part, sampler, backend


def _describe(x) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else f"{type(x).__name__}"


def _is_number(x) -> bool:
    return isinstance(x, float) or isinstance(x, int) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


def _check_tensor(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {_describe(x)}")


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of any shapes, cast as autocast does for scaled_dot_product_attention: to its dtype; float64 stays."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check_ranges(key_ranges: Tensor, q: Tensor) -> None:
    _check_tensor("key_ranges", key_ranges)
    B, _, T, _ = q.shape
    if key_ranges.shape not in ((T, 2), (B, T, 2)):
        raise ValueError(
            f"key_ranges must be (T, 2) = ({T}, 2) or (B, T, 2) = ({B}, {T}, 2), the keys [lo, hi) of each row, "
            f"not {_describe(key_ranges)}"
        )
    if key_ranges.dtype != torch.int32 or key_ranges.device != q.device:
        raise TypeError(f"key_ranges must be int32 (.int()) on {q.device}, not {_describe(key_ranges)}")


def check_inputs(q: Tensor, k: Tensor, v: Tensor, same_length: bool = True) -> None:
    """Raise TypeError or ValueError, by the tensor's name, unless q is (B, Hq, T, D), k and v are (B, Hkv, N, D), N = T
    if same_length, Hq is a multiple of Hkv, and all are of one device and one floating dtype, which autocast may make.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dims (batch, heads, T, D), not {_describe(x)}")
        if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, not {x.dtype}")
        if x.device != q.device or (x.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type)):
            raise TypeError(f"q, k and v must share dtype and device; q is {_describe(q)}, {name} is {_describe(x)}")
    B, H, T, D = q.shape
    for name, x in (("q", q), ("k", k)):
        if min(x.shape) < 1:
            raise ValueError(f"{name} is empty: {tuple(x.shape)}")
    N, letter = (T, "T") if same_length else (k.shape[2], "N")
    if k.shape != v.shape or k.shape[0] != B or k.shape[2:] != (N, D):
        raise ValueError(
            f"k and v must be (B, Hkv, {letter}, D) = ({B}, Hkv, {N}, {D}), not {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if H % k.shape[1]:
        raise ValueError(f"q has {H} heads, which is not a multiple of the {k.shape[1]} heads of k and v")


def check_c(c: float | Tensor, c_max: float | None, device: torch.device) -> tuple[Tensor, float]:
    """c as a 0-d float32 tensor, and the Python float that bounds it."""
    if c_max is not None and not (_is_number(c_max) and c_max > 0):
        raise ValueError(f"c_max must be a number > 0, not {c_max!r}")
    if isinstance(c, Tensor):
        if c.dim() != 0 or not c.is_floating_point():
            raise ValueError(f"c must be a float or a 0-d float tensor, not {_describe(c)}")
        if c_max is None:
            raise ValueError("a tensor c needs c_max, a float that bounds it")
        if c.device.type == "cpu" and not torch.compiler.is_compiling() and not 0 < c <= c_max:
            raise ValueError(f"c must be > 0 and at most c_max = {c_max}, not {c.item()}")
        return c.detach().float(), float(c_max)
    if not _is_number(c):
        raise TypeError(f"c must be a float or a 0-d float tensor, not {_describe(c)}")
    if not c > 0:  # also refuses NaN
        raise ValueError(f"c must be > 0 (math.inf for the exact gradient), not {c!r}")
    if c_max is not None and c > c_max:
        raise ValueError(f"c is {c}, above c_max = {c_max}")
    # where it is needed, and without a copy, which a CUDA graph could not capture
    return torch.full((), c, dtype=torch.float32, device=device), float(c if c_max is None else c_max)


def _check_u(u: float | Tensor, q: Tensor) -> Tensor:
    """The test hook's uniforms in units of the sampler, int64 (B, Hq, T)."""
    u = torch.as_tensor(u, dtype=torch.float64, device="cpu")  # not every device has float64
    if not ((u >= 0) & (u < 1)).all():
        raise ValueError("u must be in [0, 1)")
    try:
        u = u.expand(q.shape[:3])
    except RuntimeError:
        raise ValueError(f"u must broadcast to (B, Hq, T) = {tuple(q.shape[:3])}, not {tuple(u.shape)}") from None
    return (u * UNIT).long().to(q.device)


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(2**62, (), dtype=torch.int64)
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64:
            raise ValueError(f"seed must be an int, a 0-d int64 tensor or None, not {_describe(seed)}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, a 0-d int64 tensor or None, not {_describe(seed)}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit into 64 bits, not {seed}")
    return torch.full((), seed, dtype=torch.int64, device=device)


# ---------------------------------------------------------------------------------------------
# The custom op: forward, its fake, backward, its fake, autograd.
# ---------------------------------------------------------------------------------------------


@torch.library.custom_op("nanosus::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor, seed: Tensor, u: Tensor | None, key_ranges: Tensor | None,
    stats: Tensor | None, c_max: float, is_causal: bool, scale: float, first_row: int, first_head: int, group: str,
    sampler: str, backend: str, draws: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out, the log-sum-exp, and the proposals of a backend that draws in the forward (see `proposals_like`)."""
    sees, part = (is_causal, key_ranges), (first_row, first_head)
    if backend == "cpu":
        return cpu.forward(q, k, v, scale, draws, _bounded(c, c_max), c_max, seed, u, *sees, *part, sampler)
    with torch.autocast(q.device.type, enabled=False):  # the backend chooses its accumulation dtype itself
        if backend == "triton":
            return triton.forward(q, k, v, scale, draws, c, c_max, seed, u, *sees, *part)
        return *reference.forward(q, k, v, is_causal, scale, key_ranges), *reference.proposals_like(q, 0)


@_attention.register_fake
def _(
    q, k, v, c, seed, u, key_ranges, stats, c_max, is_causal, scale, first_row, first_head, group, sampler, backend,
    draws,
):  # fmt: skip
    slots = reference.slots_of(sampler, c_max, k.shape[2]) if draws and backend != "reference" else 0
    lse = q.new_empty(q.shape[:3], dtype=reference.accumulate_dtype(q.dtype))
    return q.new_empty(q.shape), lse, *reference.proposals_like(q, slots)


@torch.library.custom_op("nanosus::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor, masses: Tensor,
    c: Tensor, seed: Tensor, u: Tensor | None, key_ranges: Tensor | None,
    c_max: float, is_causal: bool, scale: float, first_row: int, first_head: int, group: str, sampler: str,
    backend: str, with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.autocast(q.device.type, enabled=False):
        processes = _resolve_process_group(group) if group else None  # type: ignore[arg-type]  # newer torch: a NewType
        row_weight = reference.row_weights(grad_out, processes)
        sees, part = (is_causal, key_ranges), (first_row, first_head)
        if backend == "cpu":
            if not c > 0:  # a bad c must not pass unseen
                nans = lambda x: torch.full_like(x, math.nan)
                return nans(q), nans(k), nans(v), torch.full((3,), math.nan)
            return cpu.backward(
                grad_out, q, k, v, out, lse, tiles, masses, scale, _bounded(c, c_max), seed, row_weight, with_stats,
                *sees, *part, sampler,
            )  # fmt: skip
        if backend == "triton":
            return triton.backward(
                grad_out, q, k, v, out, lse, tiles, masses, scale, c, c_max, seed, row_weight, with_stats, *sees, *part
            )
        c = c.to(q.device)
        grad_out = grad_out * torch.where(c > 0, 1, math.nan).to(grad_out.dtype)  # the same, without a synchronisation
        multiplier = reference.sus_multiplier(c, c_max, sampler, seed.to(q.device), u, k.shape[2], *part)
        return reference.backward(
            grad_out, q, k, v, out, lse, multiplier, is_causal, scale, with_stats, key_ranges, row_weight
        )


def _bounded(c: Tensor, c_max: float) -> float:
    return torch.clamp(c, max=c_max).item()


@_attention_backward.register_fake
def _(
    grad_out, q, k, v, out, lse, tiles, masses, c, seed, u, key_ranges, c_max, is_causal, scale, first_row, first_head,
    group, sampler, backend, with_stats,
):  # fmt: skip
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(3, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    q, k, v, c, seed, u, key_ranges, ctx.stats, *ctx.static, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    # c and seed are cloned: a training loop overwrites them in place, perhaps before this backward runs.
    ctx.save_for_backward(q, k, v, *output, c.clone(), seed.clone(), u, key_ranges)


def _backward(ctx, grad_out, *_):
    *grads, stats = torch.ops.nanosus.attention_backward(
        grad_out, *ctx.saved_tensors, *ctx.static, ctx.stats is not None
    )
    if ctx.stats is not None:
        ctx.stats.copy_(stats)
    return *grads, *(None,) * 14


def _double_backward(ctx, *grads):
    raise NotImplementedError("sus_attention does not support double backward (gradients of its gradients)")


_attention.register_autograd(_backward, setup_context=_setup_context)
_attention_backward.register_autograd(_double_backward)
