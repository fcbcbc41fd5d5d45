"""The low-rank backward against dense sums with the same polynomial, its condition, and the model under it."""

import math

import pytest
import torch
from torch.nn import functional as F

import lowrank_attn
from lowrank_attn import (
    CHUNK,
    _features,
    _features_backward,
    _inverse_factorials,
    count_features,
    lowrank_attention,
    score_bound,
    worst_error,
)
from test_model import LONG, gradient, tiny, tokens
from test_sus_attention import inputs
from training.device import resolve_device
from training.probe import largest_score

SHAPES = [(1, 1, 1, 1, 3), (2, 2, 2, 5, 4), (1, 2, 1, CHUNK + 1, 3), (2, 4, 2, 2 * CHUNK + 37, 2)]  # B, Hq, Hkv, T, D


def taylor(s, degree):
    return sum(s**m / math.factorial(m) for m in range(degree + 1))


def dense(q, k, v, grad_out, degree, is_causal=True, derivative_degree=None, exact_diagonal=True):
    """(out, dq, dk, dv), with T^2 weights: p_g in exp's place, and p of derivative_degree in that of its derivative."""
    G, T, D = q.shape[1] // k.shape[1], *q.shape[2:]
    k, v = (x.repeat_interleave(G, 1) for x in (k, v))
    s, i = q @ k.mT / D**0.5, torch.arange(T)
    seen = (i <= i[:, None]) | (not is_causal)
    near = (i // CHUNK == i[:, None] // CHUNK) & is_causal & exact_diagonal
    degrees = degree, degree if derivative_degree is None else derivative_degree
    p, dp = (torch.where(near, s.exp(), taylor(s, n)) * seen for n in degrees)
    z = p.sum(-1, keepdim=True)
    out = p @ v / z
    ds = dp / z * (grad_out @ v.mT - (grad_out * out).sum(-1, keepdim=True))
    dk, dv = ds.mT @ q / D**0.5, (p / z).mT @ grad_out
    return out, ds @ k / D**0.5, *(x.unflatten(1, (-1, G)).sum(2) for x in (dk, dv))


def ours(q, k, v, grad_out, *args, **kwargs):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = lowrank_attention(q, k, v, *args, **kwargs)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)


def exact(q, k, v, grad_out, is_causal=True):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)


def case(shape, dtype=torch.float64, seed=0):
    return [x.detach() for x in inputs(*shape, dtype, seed)]


def assert_same(a, b, tolerance=1e-10):
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def distance(a, b):
    a, b = (torch.cat([x.flatten() for x in xs[1:]]) for xs in (a, b))
    return ((a - b).norm() / b.norm()).item()


# -- the arithmetic ----------------------------------------------------------------------------


@pytest.mark.parametrize("D, degree", [(1, 5), (3, 4), (8, 3)])
def test_features_give_the_taylor_polynomial(D, degree):
    a, k = torch.randn(2, 2, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    phi = _features(a, degree)
    assert phi.shape[1] == count_features(D, degree) == len(_inverse_factorials(D, degree))
    product = phi.mT @ (_inverse_factorials(D, degree) * _features(k, degree))
    torch.testing.assert_close(product, taylor(a @ k.mT, degree), rtol=1e-12, atol=1e-12)


def test_the_gradient_of_features_equals_the_paper_s_kronecker_products():
    """p_g is the derivative of p_{g+1}.

    The paper sums phi(k) x V x K, r_g D (D + 1) numbers, instead of r_{g+1} (D + 1).
    """
    a, k, v1, u = torch.randn(4, 1, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g, D = 2, 3
    w = {n: _inverse_factorials(D, n)[:, 0] for n in (g, g + 1)}
    kronecker = torch.einsum("njr,r,njc,njd->nrcd", _features(k, g).mT, w[g], v1, k)
    paper = torch.einsum("nir,nic,nrcd->nid", _features(a, g).mT, u, kronecker)
    state = torch.einsum("njr,r,njc->nrc", _features(k, g + 1).mT, w[g + 1], v1)
    grad_phi = torch.einsum("nrc,nic->nri", state, u)
    got = _features_backward(a, _features(a, g + 1), grad_phi, g + 1)
    torch.testing.assert_close(got, paper, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, (taylor(a @ k.mT, g) * (u @ v1.mT)) @ k, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("exact_diagonal", [True, False], ids=["exp-in-chunks", "polynomial-in-chunks"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_is_that_with_the_polynomial_in_place_of_exp(shape, degree, is_causal, exact_diagonal):
    tensors = case(shape)
    out, *grads = ours(*tensors, degree, is_causal=is_causal, exact_diagonal=exact_diagonal)
    assert_same([out], exact(*tensors, is_causal)[:1])
    assert_same(grads, dense(*tensors, degree, is_causal, exact_diagonal=exact_diagonal)[1:])


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_approximate_forward_and_its_derivative(shape, is_causal):
    tensors = case(shape)
    got = ours(*tensors, 2, is_causal=is_causal, approximate_forward=True)
    assert_same(got, dense(*tensors, 2, is_causal, derivative_degree=1))


@pytest.mark.parametrize("exact_diagonal", [True, False], ids=["exp-in-chunks", "polynomial-in-chunks"])
def test_gradcheck_of_the_approximate_forward(monkeypatch, exact_diagonal):
    monkeypatch.setattr(lowrank_attn, "CHUNK", 3)
    tensors = [x.requires_grad_() for x in case((1, 2, 1, 8, 3))[:3]]
    for is_causal in (True, False):
        options = dict(is_causal=is_causal, approximate_forward=True, exact_diagonal=exact_diagonal)
        assert torch.autograd.gradcheck(lambda q, k, v: lowrank_attention(q, k, v, 2, **options), tensors)


def test_a_larger_degree_comes_nearer_to_the_exact_gradient():
    tensors = case((1, 2, 1, 2 * CHUNK + 5, 3))
    truth = exact(*tensors)
    errors = [distance(ours(*tensors, g), truth) for g in (2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-2 and errors[-1] < 1e-4
    assert_same(ours(*tensors, 30), truth, 1e-9)


def test_within_one_chunk_it_is_exact():
    tensors = case((1, 2, 2, CHUNK, 4))
    assert_same(ours(*tensors, 2), exact(*tensors))


def test_heads_in_turn_are_heads_at_once(monkeypatch):
    tensors = case((2, 4, 2, CHUNK + 9, 3))
    at_once = ours(*tensors, 2)
    monkeypatch.setattr(lowrank_attn, "BUFFER", 1)
    assert_same(ours(*tensors, 2), at_once, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    tensors = case((2, 4, 2, CHUNK + 20, 4), dtype)
    got, truth = ours(*tensors, 2), dense(*(x.double() for x in tensors), 2)
    assert all(x.dtype == dtype and x.shape == y.shape for x, y in zip(got, truth))
    eps = torch.finfo(dtype).eps
    for x, y in zip(got[1:], truth[1:]):
        assert (x - y).norm() < (30 if dtype == torch.float32 else 2) * eps * y.norm()


@pytest.mark.parametrize("size", [100.0, -100.0])
def test_scores_beyond_the_range_of_exp(size):
    """float32's exp overflows at 89, and underflows to nothing at -104: rows of one key, of a chunk, of several."""
    q, k, v, grad_out = case((1, 1, 1, CHUNK + 30, 2), torch.float32)
    q = q / q.norm(dim=-1, keepdim=True) + 3
    k = size * (q / 9)
    for approximate_forward in (False, True):
        assert all(x.isfinite().all() for x in ours(q, k, v, grad_out, 2, approximate_forward=approximate_forward))


def test_rows_see_no_future():
    tensors = case((1, 1, 1, CHUNK + 40, 3))
    cut = CHUNK + 9
    changed = [torch.cat([x[:, :, :cut], x[:, :, cut:] + 1], 2) for x in tensors[:3]]
    a, b = (lowrank_attention(*xs, 2, approximate_forward=True) for xs in (tensors[:3], changed))
    torch.testing.assert_close(a[:, :, :cut], b[:, :, :cut], rtol=0, atol=0)
    assert not torch.equal(a, b)


def test_the_memory_of_the_backward_does_not_hold_features_of_all_tokens(monkeypatch):
    seen = []
    features = lowrank_attn._features
    monkeypatch.setattr(lowrank_attn, "_features", lambda x, degree: seen.append(features(x, degree)) or seen[-1])
    ours(*case((1, 4, 2, 4 * CHUNK, 3)), 2)
    # two heads of k and v, two queries each
    assert max(x.numel() for x in seen) == 2 * count_features(3, 3) * 2 * CHUNK


def test_opcheck_and_compile():
    q, k, v, grad_out = case((1, 2, 1, CHUNK + 3, 2), torch.float32)
    ops, options = torch.ops.nanosus, (2, True, False, True)
    without_autograd = dict(test_utils=("test_schema", "test_faketensor"))  # double backward is refused on purpose
    torch.library.opcheck(ops.lowrank_attention_backward.default, (grad_out, q, k, v, *options), **without_autograd)
    torch.library.opcheck(ops.lowrank_attention.default, (q.requires_grad_(), k.requires_grad_(), v, *options))
    compiled = torch.compile(lowrank_attention, backend="aot_eager", fullgraph=True)
    (a,), (b,) = (torch.autograd.grad(f(q, k, v, 2).sum(), q) for f in (compiled, lowrank_attention))
    assert torch.equal(a, b)


def test_autocast_and_double_backward():
    q, k, v, _ = case((1, 2, 1, 9, 4), torch.float32)
    q.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert lowrank_attention(q, k, v).dtype == torch.bfloat16
    (dq,) = torch.autograd.grad(lowrank_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dq.sum().backward()


@pytest.mark.parametrize("degree", [0, 3, -2, 2.0, True])
def test_degrees_that_are_refused(degree):
    with pytest.raises(ValueError, match="degree must be an even integer"):
        lowrank_attention(*case((1, 1, 1, 4, 2))[:3], degree)


def test_shapes_that_are_refused():
    q, k, v, _ = case((1, 3, 1, 4, 2))
    with pytest.raises(ValueError, match="k and v must be"):
        lowrank_attention(q, k[:, :, 1:], v)


# -- its condition -----------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [2, 4, 6])
@pytest.mark.parametrize("bound", [0.1, 1.0, 5.0])
def test_worst_error_is_the_largest_on_a_grid(bound, degree):
    s = torch.linspace(-bound, bound, 10_001, dtype=torch.float64)
    largest = ((taylor(s, degree) - s.exp()).abs() / s.exp()).max().item()
    assert worst_error(bound, degree) == pytest.approx(largest, rel=1e-6)
    assert worst_error(1e4, degree) == math.inf


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_score_bound(shape):
    q, k, *_ = case(shape)
    scores = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT).tril() / q.shape[3] ** 0.5
    assert score_bound(q, k) == pytest.approx(scores.abs().max().item())
    assert score_bound(q, k) <= q.norm(dim=-1).max() * k.norm(dim=-1).max() / q.shape[3] ** 0.5 * (1 + 1e-12)


# -- the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"activation_checkpointing": True}], ids=["", "checkpointing"])
def test_a_model_s_gradient_comes_nearer_with_the_degree(keys):
    T = 2 * CHUNK + 30
    shape = dict(LONG, block_size=T, qk_norm_scale=0.7)
    x, y = tokens(1, T), tokens(1, T, seed=1)
    exact = gradient(tiny(**shape).train().double(), x, y)
    errors = []
    for degree in (2, 4, 6):
        ours = gradient(tiny(**shape, **keys, attn_backward="lowrank", lowrank_degree=degree).train().double(), x, y)
        errors.append(((ours - exact).norm() / exact.norm()).item())
    assert 0 < errors[2] < errors[1] / 10 < errors[0] / 100 < 1e-3


def test_the_approximate_forward_is_for_training_alone():
    T = CHUNK + 30
    model = tiny(**LONG, block_size=T, attn_backward="lowrank", lowrank_forward="approximate")
    exact, x, y = tiny(**LONG, block_size=T), tokens(1, T), tokens(1, T, seed=1)
    loss = lambda m: m(x, y)[1].item()
    assert loss(model.eval()) == loss(exact.eval()) and loss(model.train()) != loss(exact.train())


def test_a_fixed_gain_bounds_scores_and_is_no_parameter():
    fixed, learned = tiny(**LONG, qk_norm_scale=0.5), tiny(**LONG)
    assert fixed.num_params() == learned.num_params() - 2 * 2 * 8
    assert not any("_norm" in name for name in fixed.state_dict())
    attention, x = fixed.transformer.h[0].attn, torch.randn(1, 9, 4, 8)
    for norm in (attention.q_norm, attention.k_norm):
        torch.testing.assert_close(norm(x).norm(dim=-1), torch.full((1, 9, 4), 0.5 * math.sqrt(8)), rtol=1e-4, atol=0)
    assert attention.q_norm(x.bfloat16()).dtype == torch.float32


def test_the_largest_score_is_that_of_all_layers():
    model = tiny(**LONG | {"qk_norm": False}).double().eval()
    x = tokens(T=31)
    with torch.no_grad():
        for layer, block in enumerate(model.transformer.h):  # each layer in turn has the largest
            weight = block.attn.c_attn.weight
            weight.mul_(10.0 * (layer + 1))
            seen = []
            keep = lambda module, args, out: seen.append(args[:2])
            handles = [b.attn.attend.register_forward_hook(keep) for b in model.transformer.h]
            model(x)
            for handle in handles:
                handle.remove()
            products = [q.unflatten(1, (k.shape[1], -1)) @ k.unsqueeze(2).mT for q, k in seen]
            scores = [(p / seen[0][0].shape[3] ** 0.5).tril().abs().max().item() for p in products]
            assert largest_score(model, x, resolve_device("cpu", "float32")) == pytest.approx(max(scores))
            assert max(scores) == scores[layer] and len(scores) > 1
