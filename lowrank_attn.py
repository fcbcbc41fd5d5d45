"""Low-rank attention: an exact forward, and a backward in almost linear time (Liang et al., arXiv 2408.13233).

One head, one sequence: S = Q K^T / sqrt(D) with the causal mask, W = softmax(S), O = W V. With G = dL/dO the exact
backward is

    dV = W^T G      M_ij = W_ij (G_i . V_j - G_i . O_i)      dQ = M K / sqrt(D)      dK = M^T Q / sqrt(D)

Where the scores are small, exp is nearly its Taylor polynomial, and that is a product of features (the polynomial
method of the paper, section 3; Alman and Song, arXiv 2302.13214):

    exp(s) ~ p_g(s) = sum over m <= g of s^m / m!        p_g(a . k) = sum over |alpha| <= g of a^alpha k^alpha / alpha!

over the r_g = C(D + g, g) monomials of degree g at most. Every sum over keys becomes one over monomials, and the causal
mask a running sum over chunks of C = 128 tokens:

    sum over j <= i of p_g(a_i . k_j) [V_j, 1] = phi(a_i)^T sum over j <= i of phi(k_j) [V_j, 1]^T

gives the numerator and the normaliser. The paper writes those of dQ and dK with row-wise Kronecker products of phi and
V, which take r_g D^2 a token. Here p_g is the derivative of p_{g+1}: with u_i = [G_i, -G_i . O_i] / normaliser_i

    dQ_i = the gradient by a_i of sum over j of p_{g+1}(a_i . k_j) (u_i . [V_j, 1])

whose features are r_{g+1} = r_g (D + g + 1) / (g + 1), at D a token: the same numbers for about one part in g + 1 of
the work.

Within a chunk scores are computed densely anyway, and exp is used itself. That is free, and most of what is right about
the gradient of a trained model, which attends nearby: only what lies outside a query's own chunk is approximated. O, in
u, and the normaliser are those of the approximated weights, so that the rows of W still sum to one and those of M to
zero. g must be even: then p_g > 0 everywhere, and the normaliser too.

Documents that share a window, and windows of keys, are refused where a model asks for them: the running sums are over
all keys before a chunk, and would need to begin anew, or forget, at places that differ from row to row.

What it takes, for a head:  time    T r (D + 1) multiplications, six times, and T C D, with r = r_{g+1}
                            memory  r (C + D + 1) numbers, a few times, beside q, k, v and their gradients: never T r

The condition is that scores outside the chunk are small: see `score_bound` and `worst_error`. The error is a bias, and
not a noise as that of SUS.

Dims: B batch, Hq query heads, Hkv key/value heads, T positions, D head dim, g the degree, r features, C positions of a
chunk. The sweeps compute N of the B * Hkv key/value heads at once, with G = Hq / Hkv query heads each: a chunk has
R = G C query rows a key/value head.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sus_attn import autocast_inputs, check_inputs
from sus_backends.reference import accumulate_dtype

CHUNK = 128
BUFFER = 1 << 24  # numbers in the features of the heads that are computed at once: 64 MiB in float32

FloatOrTensor = TypeVar("FloatOrTensor", float, Tensor)


def lowrank_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    degree: int = 2,
    *,
    is_causal: bool = True,
    approximate_forward: bool = False,
    exact_diagonal: bool = True,
) -> Tensor:
    """Attention with an exact forward and a low-rank backward. Returns (B, Hq, T, D) in q's dtype.

    q: (B, Hq, T, D); k, v: (B, Hkv, T, D), Hq a multiple of Hkv (grouped-query attention). All of one dtype (float64,
        float32, bfloat16, float16; under autocast they are cast to its dtype) and on one device. The backward of half
        precision is computed in float32.
    degree: g, even: p_g takes the place of exp.
    is_causal: row i attends to keys 0..i; otherwise to all.
    approximate_forward: the forward too has p_g in exp's place, and takes almost linear time. The backward is then that
        forward's derivative: dV has p_g, dQ and dK have p_{g-1}, its derivative.
    exact_diagonal: use exp itself within chunks. False: p_g there too, as in the paper. Without is_causal there are no
        such chunks.

    Raises TypeError or ValueError that names the argument. Double backward is not supported and says so.
    """
    check_inputs(q, k, v)
    q, k, v = autocast_inputs(q, k, v)
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 2 or degree % 2:
        raise ValueError(f"degree must be an even integer from 2 on (odd ones give normalisers <= 0), not {degree!r}")
    return _attention(q, k, v, degree, is_causal, approximate_forward, exact_diagonal)


def worst_error(bound: float, degree: int) -> float:
    """The largest of |p_g(s) - exp(s)| / exp(s) for |s| <= bound, g = degree being even.

    p_g(s) exp(-s) has the derivative -exp(-s) s^g / g! <= 0, so it falls from its largest value, at -bound; and it
    falls faster on that side of 0, where exp(-s) is larger.
    """
    try:
        return _taylor(-bound, degree) * math.exp(bound) - 1
    except OverflowError:
        return math.inf


@torch.no_grad()
def score_bound(q: Tensor, k: Tensor) -> float:
    """The largest |q_i . k_j| / sqrt(D) over j <= i, for q (B, Hq, T, D) and k (B, Hkv, T, D), exactly, in O(T^2 D).

    max |q| max |k| / sqrt(D) bounds it in O(T D), but loosely: queries and keys are rarely parallel.
    """
    B, H, T, D = q.shape
    q = q.reshape(B, k.shape[1], -1, T, D).to(accumulate_dtype(q.dtype)) / math.sqrt(D)
    k = k.unsqueeze(2).to(q.dtype)
    largest = [(q[..., i : i + CHUNK, :] @ k[..., : i + CHUNK, :].mT).tril(i).abs().max() for i in range(0, T, CHUNK)]
    return torch.stack(largest).max().item()


# ---------------------------------------------------------------------------------------------
# Monomials. Those of degree m whose last variable is i are x_i times the ones of degree m - 1 in the variables up to i,
# which are the first C(i + m - 1, m - 1) of these: so features are made, and differentiated, in blocks.
# ---------------------------------------------------------------------------------------------


def count_features(D: int, degree: int) -> int:
    """r_g, for g = degree."""
    return math.comb(D + degree, degree)


@cache
def _blocks(D: int, degree: int) -> list[tuple[slice, slice, int]]:
    """(where, parents, i): the monomials at `where` are x_i times those at `parents`."""
    blocks, start, previous = [], 1, 0
    for m in range(1, degree + 1):
        first = start
        for i in range(D):
            n = math.comb(i + m - 1, m - 1)
            blocks.append((slice(start, start + n), slice(previous, previous + n), i))
            start += n
        previous = first
    return blocks


@cache
def _inverse_factorials(D: int, degree: int) -> Tensor:
    """1 / alpha! of each monomial, (r, 1) float64."""
    r = count_features(D, degree)
    last, power = torch.full((r,), -1), torch.zeros(r)  # the last variable, and its power
    inverse = torch.ones(r, dtype=torch.float64)
    for where, parents, i in _blocks(D, degree):
        last[where], power[where] = i, 1 + power[parents] * (last[parents] == i)
        inverse[where] = inverse[parents] / power[where]
    return inverse[:, None]


def _features(x: Tensor, degree: int) -> Tensor:
    """x (N, R, D) -> x^alpha for |alpha| <= degree, in the order of their degrees, (N, r, R)"""
    x = x.mT.contiguous()  # (N, D, R): what is multiplied lies side by side
    N, D, R = x.shape
    phi = x.new_empty(N, count_features(D, degree), R)
    phi[:, 0] = 1
    for where, parents, i in _blocks(D, degree):
        torch.mul(phi[:, parents], x[:, i : i + 1], out=phi[:, where])
    return phi


def _features_backward(x: Tensor, phi: Tensor, grad: Tensor, degree: int) -> Tensor:
    """The gradient by x (N, R, D), from that by phi (N, r, R), which is overwritten."""
    x = x.mT.contiguous()
    grad_x = torch.zeros_like(x)
    for where, parents, i in reversed(_blocks(x.shape[1], degree)):
        grad_x[:, i] += (grad[:, where] * phi[:, parents]).sum(1)
        grad[:, parents].addcmul_(grad[:, where], x[:, i : i + 1])
    return grad_x.mT


def _taylor(s: FloatOrTensor, degree: int) -> FloatOrTensor:
    """p_g(s), by Horner's rule."""
    p = 1 + 0 * s
    for m in range(degree, 0, -1):
        p = 1 + s / m * p
    return p


# ---------------------------------------------------------------------------------------------
# The sweeps over chunks. a (N, G, T, D) is q / sqrt(D), k (N, T, D), v1 (N, T, D + 1) is [v, 1], all of one dtype. The
# query heads of a key/value head are rows side by side.
# ---------------------------------------------------------------------------------------------


def _chunks(T: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, T)) for start in range(0, T, CHUNK)]


def _sum_over(x: Tensor, y: Tensor, degree: int) -> Tensor:
    """sum over rows of phi(x) y^T / alpha!, (N, r, columns of y)"""
    return (_features(x, degree) @ y) * _inverse_factorials(x.shape[2], degree).to(x)


def _diagonal(rows: Tensor, keys: Tensor) -> Tensor:
    """The scores of a chunk's rows (N, R, D) and its own keys (N, C, D), (N, R, C); -inf above the diagonal."""
    C = keys.shape[1]
    above = torch.ones(C, C, dtype=torch.bool, device=rows.device).triu(1).repeat(rows.shape[1] // C, 1)
    return (rows @ keys.mT).masked_fill(above, -math.inf)


def _near_weights(scores: Tensor, log_z: Tensor, degree: int, exact_diagonal: bool) -> Tensor:
    """Weights W of `_diagonal`'s scores (N, R, C), for normalisers of the logarithm log_z (N, R, 1)."""
    if exact_diagonal:
        return (scores - log_z).exp()
    masked = scores == -math.inf
    return (_taylor(scores.masked_fill(masked, 0), degree) * (-log_z).exp()).masked_fill(masked, 0)


def _rows_sweep(
    a: Tensor, k: Tensor, v1: Tensor, degree: int, feature_degree: int, is_causal: bool, exact_diagonal: bool
) -> Iterator[tuple]:
    """For each chunk (at, rows (N, R, D), phi of them (N, r, R) and the running sum (N, r, D + 1) or None twice, scores
    of the diagonal (N, R, C) or None, log of the normaliser (N, R, 1), out (N, R, D)).
    """
    N, G, T, D = a.shape
    r = count_features(D, degree)
    state = None
    if not is_causal:
        state = sum((_sum_over(k[:, at], v1[:, at], feature_degree) for at in _chunks(T)), a.new_zeros(()))
    for at in _chunks(T):
        rows = a[:, :, at].flatten(1, 2)
        total, phi, scores, shift = a.new_zeros(()), None, None, torch.zeros_like(rows[..., :1])
        if is_causal:
            scores = _diagonal(rows, k[:, at])
            if exact_diagonal:  # e^shift is taken out of all weights, which may overflow otherwise
                shift = scores.amax(-1, keepdim=True)
                shift = shift if state is None else shift.clamp(min=0)  # nor may what is far, which is > 0
            total = _near_weights(scores, shift, degree, exact_diagonal) @ v1[:, at]
        if state is not None:
            phi = _features(rows, feature_degree)
            total = total + (-shift).exp() * (phi[:, :r].mT @ state[:, :r])
        yield at, rows, phi, state, scores, shift + total[..., -1:].log(), total[..., :-1] / total[..., -1:]
        if is_causal and at.stop < T:
            added = _sum_over(k[:, at], v1[:, at], feature_degree)
            state = added if state is None else state.add_(added)


def _forward(a: Tensor, k: Tensor, v1: Tensor, degree: int, is_causal: bool, exact_diagonal: bool) -> tuple[Tensor]:
    """out (N, G, T, D), with p_g in exp's place."""
    out = torch.empty_like(a)
    for at, *_, out_rows in _rows_sweep(a, k, v1, degree, degree, is_causal, exact_diagonal):
        out[:, :, at] = out_rows.unflatten(1, (a.shape[1], -1))
    return (out,)


def _backward(
    a: Tensor, k: Tensor, v1: Tensor, grad_out: Tensor,
    degree: int, is_causal: bool, approximate_forward: bool, exact_diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients by a (N, G, T, D), k and v (N, T, D). grad_out (N, G, T, D)."""
    N, G, T, D = a.shape
    r = count_features(D, degree)
    d = degree if approximate_forward else degree + 1  # p_d' takes exp's place in dQ and dK
    grad_a, grad_k, grad_v = torch.empty_like(a), torch.zeros_like(k), torch.zeros_like(k)
    u = torch.empty_like(a[..., :1]).repeat(1, 1, 1, D + 1)

    for at, rows, phi, state, scores, log_z_rows, out in _rows_sweep(a, k, v1, degree, d, is_causal, exact_diagonal):
        g = grad_out[:, :, at].flatten(1, 2)
        # dL/dW_ij, less its mean over the row, is g1_i . v1_j
        g1 = torch.cat([g, -(g * out).sum(-1, keepdim=True)], -1)
        total = a.new_zeros(())
        if is_causal:
            w = dw = _near_weights(scores, log_z_rows, degree, exact_diagonal)
            if d == degree and not exact_diagonal:
                dw = _near_weights(scores, log_z_rows, d - 1, exact_diagonal)
            m = dw * (g1 @ v1[:, at].mT)
            total = m @ k[:, at]
            grad_k[:, at] = m.mT @ rows
            grad_v[:, at] = w.mT @ g
        if state is not None:
            g1 *= (-log_z_rows).exp()
            total = total + _features_backward(rows, phi, state @ g1.mT, d)
        grad_a[:, :, at], u[:, :, at] = (x.unflatten(1, (G, -1)) for x in (total, g1))

    state = None
    if not is_causal:
        sums = (_sum_over(a[:, :, at].flatten(1, 2), u[:, :, at].flatten(1, 2), d) for at in _chunks(T))
        state = sum(sums, a.new_zeros(()))
    for at in reversed(_chunks(T)):
        if state is not None:
            phi = _features(k[:, at], d)
            grad_k[:, at] += _features_backward(k[:, at], phi, state @ v1[:, at].mT, d)
            grad_v[:, at] += phi[:, :r].mT @ state[:, :r, :D]
        if is_causal and at.start > 0:
            added = _sum_over(a[:, :, at].flatten(1, 2), u[:, :, at].flatten(1, 2), d)
            state = added if state is None else state.add_(added)
    return grad_a, grad_k, grad_v


def _by_heads(
    function: Callable[..., tuple[Tensor, ...]], features: int, q: Tensor, k: Tensor, v: Tensor, *others: Tensor
) -> list[Tensor]:
    """function(a, k, v1, *others) of so many heads at a time that memory is bounded; its results, (B * Hkv, ...).

    q and others (B, Hq, T, D); k, v (B, Hkv, T, D).
    """
    B, H, T, D = q.shape
    dtype, K = accumulate_dtype(q.dtype), k.shape[1]
    a, *grouped = (x.to(dtype).reshape(B * K, H // K, T, D) for x in (q, *others))
    a = a / math.sqrt(D)
    k, v = (x.to(dtype).reshape(B * K, T, D) for x in (k, v))
    v1 = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    step = max(1, BUFFER // (features * CHUNK * H // K))
    results = [function(*heads) for heads in zip(*(x.split(step) for x in (a, k, v1, *grouped)))]
    return [torch.cat(parts) for parts in zip(*results)]


# ---------------------------------------------------------------------------------------------
# The custom op: forward, its fake, backward, its fake, autograd.
# ---------------------------------------------------------------------------------------------


@torch.library.custom_op("nanosus::lowrank_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, degree: int, is_causal: bool, approximate_forward: bool, exact_diagonal: bool
) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        if not approximate_forward:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1])
            return out.contiguous()
        run = lambda a, k, v1: _forward(a, k, v1, degree, is_causal, exact_diagonal)
        (out,) = _by_heads(run, count_features(q.shape[3], degree), q, k, v)
        return out.view(q.shape).to(q.dtype)


@_attention.register_fake
def _(q, k, v, degree, is_causal, approximate_forward, exact_diagonal):
    return q.new_empty(q.shape)


@torch.library.custom_op("nanosus::lowrank_attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor,
    degree: int, is_causal: bool, approximate_forward: bool, exact_diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.autocast(q.device.type, enabled=False):
        options = degree, is_causal, approximate_forward, exact_diagonal
        run = lambda a, k, v1, grad_out: _backward(a, k, v1, grad_out, *options)
        grad_a, grad_k, grad_v = _by_heads(run, count_features(q.shape[3], degree + 1), q, k, v, grad_out)
        like = lambda grad, x: grad.view(x.shape).to(x.dtype)
        return like(grad_a / math.sqrt(q.shape[3]), q), like(grad_k, k), like(grad_v, v)


@_attention_backward.register_fake
def _(grad_out, q, k, v, degree, is_causal, approximate_forward, exact_diagonal):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward_formula(ctx, grad_out):
    return *torch.ops.nanosus.lowrank_attention_backward(grad_out, *ctx.saved_tensors, *ctx.options), *(None,) * 4


def _double_backward(ctx, *grads):
    raise NotImplementedError("lowrank_attention does not support double backward (gradients of its gradients)")


_attention.register_autograd(_backward_formula, setup_context=_setup_context)
_attention_backward.register_autograd(_double_backward)
