"""What the tests of fast kernels share: inputs of many kinds, and how their results are held against the truth."""

import math

import torch
import torch.nn.functional as F

from sus_backends import reference
from test_sus_attention import inputs, naive

inf, nan = math.inf, math.nan


def case(B, H, K, T, D, dtype=torch.float32, seed=0):
    """Detached q, k, v, grad_out."""
    return [x.detach() for x in inputs(B, H, K, T, D, dtype, seed)]


def spoiled(which, value, at, *shape):
    """Those of `case`, but for one element of row `at` of one of them."""
    tensors = case(*shape)
    tensors[("q", "k", "v", "grad_out").index(which)][0, 0, at, 3] = value
    return tensors


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def mask_from(w, c, seed=1, c_max=None, u=None):
    """The reference's draw from weights (B, H, T, T)."""
    T = w.shape[-1]
    draw = reference.sus_multiplier(torch.tensor(c), c_max or c, "systematic", torch.tensor(seed), u, T)
    m, dropped = draw(w, range(T))
    assert dropped == 0
    return m


def float64(tensors):
    return [x.double() for x in tensors]


def rms(x):
    return x.double().square().mean().sqrt()


def shaped(weights, B, H, K, T, D, dtype):
    """Inputs with weights of a kind."""
    q, k, v, grad_out = case(B, H, K, T, D, torch.float64)
    G, e = H // K, torch.full((D,), D**-0.5, dtype=torch.float64)
    if weights == "peaked":
        q *= 6
    elif weights == "flat":
        q.zero_()
    elif weights == "one-hot":  # row i looks at key 7 i mod (i + 1)
        i = torch.arange(T)
        q = 20 * k.repeat_interleave(G, 1)[:, :, 7 * i % (i + 1)]
    elif weights == "sink":
        q += 12 * e
        k[:, :, 0] = 12 * e
    elif weights in ("high", "low"):  # scores around 1e4, or -1e4
        q += 100 * D**0.25 * e
        k += 100 * D**0.25 * (e if weights == "high" else -e)
    return [x.to(dtype) for x in (q, k, v, grad_out)]


def check_errors(names, ours, plain, truth, dtype, of=rms, beside=0):
    """At most twice those of `plain`, beside half a unit of the largest last place, and `beside` of the largest."""
    largest = max(t.abs().max() for t in truth)
    for name, a, b, t in zip(names, ours, plain, truth, strict=True):
        assert a.dtype == b.dtype and a.shape == t.shape
        assert of(a - t) <= 2 * of(b - t) + (torch.finfo(dtype).eps / 2 + beside) * largest, name


LAYOUTS = {
    "heads of one projection": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one batch expanded": lambda x: x[:1].expand_as(x),
    "one head expanded": lambda x: x[:, :1].expand_as(x),
    "one row expanded": lambda x: x[:, :, 5:6].expand_as(x),
    "one number expanded": lambda x: x[:1, :1, 5:6, 3:4].expand_as(x),
    "last dim strided": lambda x: x.mT.contiguous().mT,
    "every other element": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "storage offset": lambda x: F.pad(x.flatten(), (7, 7), value=nan)[7:-7].view(x.shape),
    "part of a wider row": lambda x: F.pad(x, (3, 2, 1, 1), value=nan)[:, :, 1:-1, 3:-2],
}


def check_unbiased(draw, tensors, seeds=50):
    """z-scores of random projections of dQ, dK, dV. draw: seed -> gradients of a batch of the same sequence.

    Of n draws in all, the least bias of one projection to be found is 4.5 / sqrt(n) of a draw's standard deviation.
    """
    g = torch.Generator().manual_seed(1)
    exact = naive(*float64(tensors))[1:4]
    projections = [torch.randn(12, x.numel(), generator=g, dtype=torch.float64) for x in exact]
    project = lambda xs: torch.cat([x.double().flatten(1) @ p.mT for p, x in zip(projections, xs)], 1)
    draws = torch.cat([project(draw(seed)) for seed in range(seeds)])
    z = (draws.mean(0) - project(exact)[0]) / (draws.std(0) / math.sqrt(len(draws)))
    assert z.abs().max() < 4.5
    assert 0.4 < z.square().mean() < 2.0  # below: the draws are no draws; above: biased
