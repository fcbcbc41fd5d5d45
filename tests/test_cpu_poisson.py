"""Single keys by the paper's rule, sampler="poisson", as the CPU's kernels have it: held against the reference."""

import math

import pytest
import torch

from cases import LAYOUTS, case, same
from sus_attn import sus_attention
from sus_backends import cpu, reference
from test_cpu_backend import DTYPES, python

SHAPES = pytest.mark.parametrize(
    "B, H, K, T, D", [(1, 1, 1, 1, 8), (2, 4, 2, 90, 24), (1, 3, 1, 300, 64), (1, 2, 2, 700, 17)]
)


def grads(q, k, v, grad_out, c, backend="cpu", seed=2**40 + 3, **kwargs):
    """out, dq, dk, dv, stats."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    stats = torch.zeros(3)
    out = sus_attention(q, k, v, c, seed=seed, sampler="poisson", backend=backend, stats=stats, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out), stats]


def close(ours, theirs, dtype, share=0.0):
    """Equal but for rounding, in all rows but `share` of them."""
    for a, b in zip(ours[:4], theirs[:4], strict=True):
        size = b.float().abs().max()
        wrong = (a.float() - b.float()).abs().amax(-1) > (2e-5 if dtype == torch.float32 else 2e-2) * size
        assert wrong.double().mean() <= share


@DTYPES
@SHAPES
def test_infinite_c_is_exact(poisoned, B, H, K, T, D, dtype):
    tensors = case(B, H, K, T, D, dtype)
    ours, theirs = (grads(*tensors, math.inf, backend) for backend in ("cpu", "reference"))
    close(ours, theirs, dtype)
    assert torch.equal(ours[4], theirs[4]) and ours[4][0] == B * H * T * (T + 1) / 2


@DTYPES
@SHAPES
def test_the_draw_is_the_reference_s(poisoned, B, H, K, T, D, dtype):
    """A weight that differs in its last place flips an entry in a few thousand."""
    tensors = case(B, H, K, T, D, dtype)
    ours, theirs = (grads(*tensors, 6.0, backend) for backend in ("cpu", "reference"))
    close(ours, theirs, dtype, share=0.05)
    torch.testing.assert_close(ours[4], theirs[4], rtol=0.02, atol=2)


def test_unbiased_over_seeds():
    """A bias of 4 % of the gradient's norm along it would be found: 300 draws, a standard error of some 1 %."""
    tensors = case(2, 2, 1, 80, 16)
    exact = grads(*tensors, math.inf)[1:4]
    along = lambda g: torch.stack([(a * b).sum() / (b * b).sum() for a, b in zip(g, exact, strict=True)])
    draws = torch.stack([along(grads(*tensors, 4.0, seed=seed)[1:4]) for seed in range(300)])
    error = draws.std(0) / 300**0.5
    assert (error < 0.015).all() and ((draws.mean(0) - 1).abs() < 4 * error).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    views = [LAYOUTS[layout](x) for x in case(2, 4, 2, 150, 24)]
    plain = [x.clone(memory_format=torch.contiguous_format) for x in views]
    assert same(grads(*views, 5.0), grads(*plain, 5.0))


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads):
    tensors = case(2, 4, 2, 600, 16)
    want, before = grads(*tensors, 5.0), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert same(grads(*tensors, 5.0), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("entries", [1, 4000, 10_000])
def test_rounds_of_the_backward(monkeypatch, poisoned, entries):
    """In many rounds, of some chunks of a head or of some heads, as in one."""
    tensors = case(1, 4, 2, 600, 16)
    whole = grads(*tensors, 5.0)
    monkeypatch.setattr(cpu, "round_entries", lambda N: entries)
    got = grads(*tensors, 5.0)
    close(got, whole, torch.float32)
    torch.testing.assert_close(got[4], whole[4])


@pytest.mark.parametrize("c", [0.5, 1.0, 25.0, 400.0])
def test_slots_are_enough(c):
    """The rows whose number of entries varies most, those of many small weights. The chance of a row is below 1e-19."""
    q, k, v, _ = case(1, 4, 1, 2000, 8)
    keys = cpu.forward(0 * q, k, v, 1.0, True, c, c, torch.tensor(1), None, sampler="poisson")[2]
    kept, slots = (keys >= 0).sum(-1), reference.poisson_slots(c, 2000)
    assert keys.shape[3] == slots and kept.max() < slots - 4 and kept[..., -500:].double().mean().sub(c).abs() < 0.2 * c
    assert (keys[..., 1:] > keys[..., :-1])[keys[..., 1:] >= 0].all()


def test_a_row_that_is_not_finite():
    tensors = case(1, 2, 1, 40, 16)
    tensors[0][0, 0, 7] = math.nan
    out, dq, dk, dv, _ = grads(*tensors, 5.0)
    assert out[0, 0, 7].isnan().all() and dq[0, 0, 7].isnan().all()
    assert out[0, 0, 6].isfinite().all() and dq[0, 0, 6].isfinite().all()


INTERPRETED = """
import sys, torch
sys.path.insert(0, "tests")
from test_cpu_poisson import case, grads
torch.save(grads(*case(1, 2, 1, 40, 20), 4.0), sys.argv[1])
"""


def test_interpreted_kernels_do_the_same(tmp_path):
    """NumPy's meaning of the vector language, and its checks of bounds."""
    python(INTERPRETED, tmp_path / "results", NUMBA_DISABLE_JIT="1")
    for a, b in zip(torch.load(tmp_path / "results"), grads(*case(1, 2, 1, 40, 20), 4.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
