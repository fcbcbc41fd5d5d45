"""The operator: gradients against independent oracles, unbiasedness, torch.compile, autocast, checkpointing, errors."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from backprop import attention_backward
from sus_attn import SAMPLERS, UNIT, fold_in, resolve_backend, sus_attention
from sus_backends import cpu, reference

SHAPES = [  # B, Hq, Hkv, T, D
    pytest.param(*shape, id="B{}H{}K{}T{}D{}".format(*shape))
    for shape in [(1, 1, 1, 1, 1), (2, 3, 3, 2, 5), (1, 4, 2, 17, 8), (2, 4, 1, 65, 3), (1, 6, 3, 130, 64)]
]


def inputs(B, Hq, Hkv, T, D, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    randn = lambda H: torch.randn(B, H, T, D, generator=g, dtype=torch.float64).to(dtype)
    q, k, v, grad_out = randn(Hq), randn(Hkv), randn(Hkv), randn(Hq)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad_out


def naive(q, k, v, grad_out, m=None, is_causal=True, seen=None):
    """(out, dq, dk, dv, W): the formulas with whole T x N matrices, all in q's dtype. m multiplies the backward's W.
    seen: None, or which keys each row sees, bool (B or 1, T, N), instead of is_causal.
    """
    G, T = q.shape[1] // k.shape[1], q.shape[2]
    scale = q.shape[3] ** -0.5
    with torch.no_grad():
        k_, v_ = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
        s = scale * q @ k_.mT
        if seen is None and is_causal:
            seen = torch.ones(1, T, T, dtype=torch.bool).tril()
        if seen is not None:
            s = s.masked_fill(~seen[:, None], -math.inf)
        w = torch.softmax(s, -1)
        if seen is not None:
            w = torch.where(seen.any(-1)[:, None, :, None], w, 0)
        out = w @ v_
        delta = (out * grad_out).sum(-1, keepdim=True)
        w_cut = w if m is None else w * m
        dv = w_cut.mT @ grad_out
        ds = w_cut * (grad_out @ v_.mT - delta)
        dq, dk = scale * ds @ k_, scale * ds.mT @ q
        ungroup = lambda x: x.unflatten(1, (-1, G)).sum(2)
        return out, dq, ungroup(dk), ungroup(dv), w


def grads(q, k, v, grad_out, c=25.0, **kwargs):
    out = sus_attention(q, k, v, c, **kwargs)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)


def exported_mask(w, c, sampler, seed):
    """The reference's mask for whole weights (B, H, T, T)."""
    T = w.shape[-1]
    return reference.sus_multiplier(torch.tensor(c), c, sampler, torch.tensor(seed), None, T)(w, range(T))[0]


def multiplier_of(m):
    """What reference.backward wants: m (B, H, T, T), whatever the weights."""
    return lambda w, rows, *_: (m[:, :, rows.start : rows.stop, : w.shape[-1]].to(w.dtype), 0)


# -- exactness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("B, Hq, Hkv, T, D", SHAPES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_infinite_c_is_exact(B, Hq, Hkv, T, D, is_causal, sampler):
    q, k, v, grad_out = inputs(B, Hq, Hkv, T, D)
    ours = grads(q, k, v, grad_out, math.inf, is_causal=is_causal, sampler=sampler, seed=3)
    sdpa = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    exact = (sdpa, *torch.autograd.grad(sdpa, (q, k, v), grad_out))
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("Hkv", [1, 2])
def test_gradcheck_of_the_exact_path(Hkv, is_causal):
    q, k, v, _ = inputs(2, 2, Hkv, 6, 3)
    f = lambda q, k, v: sus_attention(q, k, v, math.inf, is_causal=is_causal, scale=0.7, seed=0)
    assert torch.autograd.gradcheck(f, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("c", [3.0, math.inf])
@pytest.mark.parametrize("is_causal", [True, False])
def test_error_within_twice_that_of_naive_pytorch(dtype, c, is_causal):
    """Against float64 under the same mask, for the output and each gradient: root mean square error."""
    q, k, v, grad_out = inputs(2, 4, 2, 130, 16, dtype)
    w = naive(*(x.double() for x in (q, k, v, grad_out)), is_causal=is_causal)[-1]
    m = exported_mask(w, c, "systematic", 5)
    truth = naive(*(x.double() for x in (q, k, v, grad_out)), m, is_causal)
    plain = naive(q, k, v, grad_out, m.to(dtype), is_causal)
    out, lse = reference.forward(q, k, v, is_causal, 16**-0.5)
    ours = (out, *reference.backward(grad_out, q, k, v, out, lse, multiplier_of(m), is_causal, 16**-0.5)[:3])
    for name, a, b, t in zip(("out", "dq", "dk", "dv"), ours, plain, truth):
        assert a.dtype == dtype
        error, naive_error = ((x.double() - t).square().mean().sqrt() for x in (a, b))
        assert error <= 2 * naive_error, name


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("sampler", ["systematic", "poisson"])
@pytest.mark.parametrize("B, Hq, Hkv, T, D", SHAPES)
def test_sparse_backward_equals_the_formulas_under_the_exported_mask(B, Hq, Hkv, T, D, sampler, is_causal):
    q, k, v, grad_out = inputs(B, Hq, Hkv, T, D)
    m = exported_mask(naive(q, k, v, grad_out, is_causal=is_causal)[-1], 2.0, sampler, 9)
    ours = grads(q, k, v, grad_out, 2.0, is_causal=is_causal, sampler=sampler, seed=9)
    for a, b in zip(ours, naive(q, k, v, grad_out, m, is_causal)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    if T > 60:
        assert (m == 0).double().mean() > 0.8  # the mask does cut


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_seed_nearly_the_same_mask_at_any_dtype(dtype):
    """The mask is a function of float32 weights; those of float64 round differently in a few places only."""
    q, k, v, grad_out = inputs(1, 2, 2, 200, 8, dtype)
    stats, exact_stats = torch.zeros(3), torch.zeros(3)
    low = grads(q, k, v, grad_out, 0.8, seed=2, stats=stats)[3].double()
    x64 = [x.detach().double().requires_grad_() for x in (q, k, v)]
    high = grads(*x64, grad_out.double(), 0.8, seed=2, stats=exact_stats)[3]
    assert abs(stats[0] - exact_stats[0]) / exact_stats[0] < 0.02
    assert (low - high).norm() / high.norm() < 0.05


@pytest.mark.parametrize("is_causal", [True, False])
def test_blocks_of_any_size_give_the_same(monkeypatch, is_causal):
    q, k, v, grad_out = inputs(2, 4, 2, 70, 8)
    whole = grads(q, k, v, grad_out, 0.4, seed=1, is_causal=is_causal)
    for entries in (1, 2 * 4 * 70 * 3, 2 * 4 * 70 * 11):
        monkeypatch.setattr(reference, "CPU_BLOCK_ENTRIES", entries)
        for a, b in zip(grads(q, k, v, grad_out, 0.4, seed=1, is_causal=is_causal), whole):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_strided_inputs():
    q, k, v, grad_out = inputs(2, 2, 2, 20, 8)
    want = grads(q, k, v, grad_out, 0.4, seed=1)
    got = grads(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, grad_out)), 0.4, seed=1)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [100, 128])
@pytest.mark.parametrize("backend, sampler", [("cpu", "tiles"), *(("reference", sampler) for sampler in SAMPLERS)])
def test_dq_and_dk_are_the_closed_form_s_with_the_w_that_dv_shows(backend, sampler, T):
    """dV = W~^T G: with a diagonal G the operator shows its own W~, whatever drew it. dQ and dK are made of it too."""
    if backend == "cpu" and cpu.missing():
        pytest.skip(cpu.missing())
    q, k, v, _ = inputs(1, 2, 2, T, T, torch.float32)
    g = torch.linspace(0.3, 2, T)  # rows of different weight, which thinning looks at
    grad_out = g.diag().expand(1, 2, T, T).contiguous()
    c = 0.5 if sampler == "tiles" else 3.0
    _, dq, dk, dv = grads(q, k, v, grad_out, c, seed=3, backend=backend, sampler=sampler)
    q, k, v, grad_out, shown = (x.detach().double() for x in (q, k, v, grad_out, (dv / g).mT))
    m = shown / naive(q, k, v, grad_out)[-1].where(shown != 0, 1)
    assert 0.01 < (m != 0).double().mean() < 0.4
    for name, got, want in zip("qk", (dq, dk), attention_backward(q, k, v, grad_out, m)):
        assert (got - want).norm() <= 1e-5 * want.norm(), name


# -- unbiasedness ------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("Hkv, is_causal", [(2, True), (1, False)])
def test_unbiased_over_seeds(sampler, Hkv, is_causal):
    """z-scores of the mean of random projections of dQ, dK, dV over 50 seeds x 40 batch entries.

    n = 2000 draws: a bias of a tenth of one draw's standard deviation, in any projection, is 4.5 standard errors.
    """
    c = 0.4 if sampler == "tiles" else 2.0  # all 24 keys are of one tile
    q, k, v, grad_out = inputs(1, 2, Hkv, 24, 4)
    exact = naive(q, k, v, grad_out, is_causal=is_causal)[1:4]
    g = torch.Generator().manual_seed(1)
    projections = [torch.randn(12, x.numel(), generator=g, dtype=torch.float64) for x in exact]
    project = lambda gradients: torch.cat([x.flatten(1) @ p.mT for p, x in zip(projections, gradients)], 1)
    many = [x.expand(40, -1, -1, -1) for x in (q, k, v, grad_out)]
    draws = torch.cat([project(grads(*many, c, seed=s, sampler=sampler, is_causal=is_causal)[1:]) for s in range(50)])
    z = (draws.mean(0) - project(exact)[0]) / (draws.std(0) / math.sqrt(len(draws)))
    assert z.abs().max() < 4.5
    assert 0.4 < z.square().mean() < 2.0  # below: the draws are no draws; above: biased


@pytest.mark.parametrize("is_causal", [True, False])
def test_unbiased_by_integrating_over_u(is_causal):
    """Every row's u runs over an even grid: what is left is the grid's own error, far below a bias of 1 %."""
    N = 16384
    q, k, v, grad_out = inputs(1, 2, 1, 16, 4)
    many = [x.expand(N, -1, -1, -1) for x in (q, k, v, grad_out)]
    u = ((torch.arange(N, dtype=torch.float64) + 0.5) / N)[:, None, None]
    draws = grads(*many, 1.5, u=u, is_causal=is_causal, sampler="systematic")[1:]
    for draw, exact in zip(draws, naive(q, k, v, grad_out, is_causal=is_causal)[1:4]):
        assert (draw.mean(0) - exact[0]).norm() / exact.norm() < 1e-3
        assert (draw[0] - exact[0]).norm() / exact.norm() > 0.1  # one draw alone is far off


def test_u_is_taken_by_row():
    q, k, v, grad_out = inputs(1, 2, 2, 30, 4)
    u = reference.row_uniforms(torch.tensor(4), 1, 2, range(30), "cpu").double() / UNIT
    given, drawn = (grads(q, k, v, grad_out, 2.0, sampler="systematic", **which) for which in (dict(u=u), dict(seed=4)))
    assert all(torch.equal(a, b) for a, b in zip(given, drawn))


# -- statistics --------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["systematic", "poisson"])
def test_stats_count_the_mask(sampler):
    q, k, v, grad_out = inputs(2, 4, 2, 90, 8)
    stats = torch.full((3,), math.nan)
    grads(q, k, v, grad_out, 4.0, seed=6, sampler=sampler, stats=stats)
    m = exported_mask(naive(q, k, v, grad_out)[-1], 4.0, sampler, 6)
    assert stats[0] == (m > 0).sum() and stats[1] == 0 and stats[2] > 0
    grads(q, k, v, grad_out, math.inf, seed=6, sampler=sampler, stats=stats)
    assert stats.tolist() == [2 * 4 * 90 * 91 / 2, 0, 0]


def test_a_tile_is_kept_or_cut_as_one():
    """And so that its inclusion probability is c_i times its sum of weights, seen by many seeds."""
    q, k, v, grad_out = inputs(1, 1, 1, 200, 4)
    w = naive(q, k, v, grad_out)[-1]
    row_weight = reference.row_weights(grad_out).unsqueeze(-1)
    known = reference.Known(row_weight, None, None)
    mass = reference.tile_masses(w)
    seen = torch.zeros_like(mass)
    for seed in range(400):
        draw = reference.sus_multiplier(torch.tensor(0.9), 0.9, "tiles", torch.tensor(seed), None, 200)
        m, _ = draw(w, range(200), known)
        first = m[..., ::64]  # of each tile
        assert torch.equal(m, first.repeat_interleave(64, -1)[..., :200].tril())
        seen += first > 0
    q_tiles = torch.minimum(1.8 * mass, 0.9 * row_weight * mass).clamp(max=1)
    z = (seen / 400 - q_tiles) / (q_tiles * (1 - q_tiles) / 400).sqrt().clamp_min(1e-2)
    assert z.abs().max() < 4.5 and 0.1 < q_tiles[..., 128:, :].mean() < 0.4


def test_added_variance_is_the_variance_of_poisson_draws():
    """The estimate's mean over seeds against the variance seen over the same seeds: within 4 standard errors."""
    q, k, v, grad_out = inputs(1, 2, 2, 20, 4)
    exact = torch.cat([x.flatten() for x in naive(q, k, v, grad_out)[1:4]])
    stats = torch.zeros(3)
    estimates, truths = [], []
    for s in range(800):
        one = grads(q, k, v, grad_out, 2.0, seed=s, sampler="poisson", stats=stats)[1:]
        truths.append((torch.cat([x.flatten() for x in one]) - exact).square().sum())
        estimates.append(stats[2].clone())
    difference = torch.stack(truths) - torch.stack(estimates)
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(len(difference))
    assert difference.std() / math.sqrt(len(difference)) < 0.1 * torch.stack(truths).mean()


# -- one function of (inputs, seed) --------------------------------------------------------------


def test_same_seed_bitwise_other_seed_different():
    q, k, v, grad_out = inputs(1, 2, 2, 40, 8, torch.float32)
    a, b, other = (grads(q, k, v, grad_out, 0.4, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert torch.equal(a[0], other[0]) and not torch.equal(a[1], other[1])
    assert all(torch.equal(x, y) for x, y in zip(a, grads(q, k, v, grad_out, 0.4, seed=torch.tensor(1))))


def test_seed_none_comes_from_the_default_generator():
    q, k, v, grad_out = inputs(1, 2, 2, 40, 8)
    draws = []
    for s in (1, 1, 2):
        torch.manual_seed(s)
        draws.append(grads(q, k, v, grad_out, 0.4)[1])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_seed_and_c_may_change_in_place_between_forward_and_backward():
    q, k, v, grad_out = inputs(1, 2, 2, 40, 8)
    seed, c = torch.tensor(1), torch.tensor(0.4)
    out = sus_attention(q, k, v, c, c_max=50.0, seed=seed)
    seed.fill_(2), c.fill_(0.3)
    assert torch.equal(torch.autograd.grad(out, q, grad_out)[0], grads(q, k, v, grad_out, 0.4, seed=1)[1])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("seed", [7, None])
def test_activation_checkpointing_draws_the_same_mask(use_reentrant, seed):
    q, k, v, grad_out = inputs(1, 2, 2, 40, 8)
    torch.manual_seed(3)
    want = grads(q, k, v, grad_out, 0.4, seed=seed)
    torch.manual_seed(3)
    out = checkpoint(lambda q, k, v: sus_attention(q, k, v, 0.4, seed=seed), q, k, v, use_reentrant=use_reentrant)
    out.backward(grad_out)
    assert torch.equal(out, want[0]) and torch.equal(q.grad, want[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    q, k, v, grad_out = inputs(1, 2, 1, 40, 8, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out = sus_attention(q, k, v.to(dtype), 0.4, seed=1)  # mixed, as rotary embeddings make them
        got = torch.autograd.grad(out, (q, k, v), grad_out.to(dtype))
    low = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    want = grads(*low, grad_out.to(dtype), 0.4, seed=1)
    assert out.dtype == dtype and torch.equal(out, want[0])
    for a, b in zip(got, want[1:]):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


# -- torch.compile and the custom op ---------------------------------------------------------------


OPCHECKS = [  # nothing that is checked depends on the sampler: those beside tiles have one each, and the rest is slow
    pytest.param(sampler, dtype, strided, marks=[pytest.mark.slow] * (sampler != "tiles" and i > 0))
    for sampler in SAMPLERS
    for i, (dtype, strided) in enumerate(itertools.product((torch.float32, torch.bfloat16), (True, False)))
]


@pytest.mark.parametrize("sampler, dtype, strided", OPCHECKS, ids=str)
def test_opcheck(dtype, sampler, strided):
    """strided: heads split off one (B, T, H, D) projection, as a model makes them."""
    q, k, v, grad_out = inputs(2, 4, 2, 9, 8, dtype)
    if strided:
        q, k, v, grad_out = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, grad_out))
        q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    c, seed = torch.tensor(2.0), torch.tensor(1)
    op = torch.ops.nanosus.attention.default
    rest = 2.0, True, 0.3, 0, 0, "", sampler, "reference", True
    args = q, k, v, c, seed, None, None, None, *rest
    torch.library.opcheck(op, args)
    forward = op(*args)
    op = torch.ops.nanosus.attention_backward.default
    tensors = [x.detach() for x in (grad_out, q, k, v, *forward)]
    # no autograd test: double backward is refused on purpose
    torch.library.opcheck(op, (*tensors, c, seed, None, None, *rest), test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_a_break_and_a_changing_c_recompiles_nothing():
    torch._dynamo.reset()
    stats = torch.zeros(3)

    def f(q, k, v, c, seed):
        return 2 * sus_attention(torch.sin(q), k, v, c, c_max=100.0, seed=fold_in(seed, 3), stats=stats)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for c, seed in [(0.3, 1), (0.45, 2), (50.0, 3), (0.3, 2**40)]:
            q, k, v, grad_out = inputs(1, 4, 2, 40, 8, seed=seed % 100)
            args = q, k, v, torch.tensor(c), torch.tensor(seed)
            out, want = compiled(*args), f(*args)
            got_grads = torch.autograd.grad(out, (q, k, v), grad_out)
            got_stats = stats.clone()
            for a, b in zip((out, *got_grads), (want, *torch.autograd.grad(want, (q, k, v), grad_out))):
                torch.testing.assert_close(a, b)
            assert torch.equal(got_stats, stats) and stats[0] > 0


def test_a_bad_c_inside_a_compiled_function_gives_nan_gradients():
    """Its value can't be looked at there: it must not pass for a gradient of zero."""
    f = torch.compile(lambda q, c: sus_attention(q, q, q, c, c_max=9.0, seed=1), backend="aot_eager", fullgraph=True)
    q = inputs(1, 2, 2, 10, 4)[0]
    for c in (-1.0, 0.0, math.nan):
        assert torch.autograd.grad(f(q, torch.tensor(c)).sum(), q)[0].isnan().all()
    assert torch.autograd.grad(f(q, torch.tensor(2.0)).sum(), q)[0].isfinite().all()


def test_no_gradients_no_graph():
    q, k, v, _ = inputs(1, 2, 2, 10, 4)
    with torch.no_grad():
        assert not sus_attention(q, k, v).requires_grad
    assert not sus_attention(q.detach(), k.detach(), v.detach()).requires_grad


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_of_some_inputs_only(which):
    tensors = [x.detach() for x in inputs(1, 2, 2, 20, 4)]
    tensors[which].requires_grad_()
    *qkv, grad_out = tensors
    got = torch.autograd.grad(sus_attention(*qkv, 0.4, seed=1), qkv[which], grad_out)[0]
    assert torch.equal(got, grads(*(x.detach().requires_grad_() for x in qkv), grad_out, 0.4, seed=1)[1 + which])


# -- errors ------------------------------------------------------------------------------------


def test_double_backward_says_so():
    q, k, v, grad_out = inputs(1, 1, 1, 5, 2)
    out = sus_attention(q, k, v, 2.0, seed=1)
    (dq,) = torch.autograd.grad(out, q, grad_out, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dq.sum().backward()


@pytest.mark.parametrize("c", [2.0, math.inf])
def test_nan_inputs_give_nan_gradients_as_exact_attention_does(c):
    q, k, v, grad_out = inputs(1, 1, 1, 12, 4)
    with torch.no_grad():
        q[0, 0, 5, 0] = math.nan
    out, dq, dk, dv = grads(q, k, v, grad_out, c, seed=1)
    assert out[0, 0, 5].isnan().all() and dq[0, 0, 5].isnan().all() and dv[0, 0, :6].isnan().all()
    assert not out[0, 0, 6:].isnan().any()


def qkv(**changes):
    x = {name: torch.randn(2, 4, 8, 6) for name in "qkv"}
    return {**x, **changes}


T = torch.tensor
BAD_ARGUMENTS = [
    (dict(q=torch.randn(4, 8, 6)), ValueError, "q must have 4 dims"),
    (dict(k=torch.randn(2, 4, 9, 6)), ValueError, "k and v must be"),
    (dict(zip("kv", torch.randn(2, 2, 4, 0, 6))), ValueError, "k is empty"),
    (dict(zip("kv", torch.randn(2, 2, 3, 8, 6))), ValueError, "4 heads, which is not a multiple of the 3"),
    (dict(v=torch.randn(2, 4, 8, 5)), ValueError, "k and v must be"),
    (dict(v=torch.randn(2, 4, 8, 6).double()), TypeError, "share dtype and device"),
    (dict(q=torch.ones(2, 4, 8, 6, dtype=torch.int64)), TypeError, "q must be float64"),
    (dict(q=torch.randn(2, 4, 0, 6)), ValueError, "q is empty"),
    (dict(c=0.0), ValueError, "c must be > 0"),
    (dict(c=-3.0), ValueError, "c must be > 0"),
    (dict(c=math.nan), ValueError, "c must be > 0"),
    (dict(c=T(3.0)), ValueError, "needs c_max"),
    (dict(c=T(0.0), c_max=5.0), ValueError, "c must be > 0"),
    (dict(c=T([3.0]), c_max=5.0), ValueError, "0-d float tensor"),
    (dict(c=9.0, c_max=5.0), ValueError, "above c_max"),
    (dict(seed=1.5), TypeError, "seed must be"),
    (dict(seed=T(1.0)), ValueError, "seed must be"),
    (dict(seed=2**64), ValueError, "64 bits"),
    (dict(sampler="bernoulli"), ValueError, "sampler must be one of"),
    (dict(backend="cuda"), ValueError, "backend must be one of"),
    (dict(u=0.5, sampler="poisson"), ValueError, "u is an argument of the systematic"),
    (dict(u=7), ValueError, "u must be in"),
    (dict(u=-0.1), ValueError, "u must be in"),
    (dict(u=torch.zeros(3, 1, 1)), ValueError, "u must broadcast"),
    (dict(stats=torch.zeros(4)), ValueError, "stats must be a float32 tensor"),
    (dict(stats=[0, 0, 0]), TypeError, "stats must be a tensor"),
    (dict(q=[1.0]), TypeError, "q must be a tensor"),
    (dict(c="x"), TypeError, "c must be a float"),
    (dict(c=10**400), TypeError, "c must be a float"),
    (dict(scale=10**400), ValueError, "scale must be a finite number"),
    (dict(c=None), TypeError, "c must be a float"),
    (dict(c=T(9.0), c_max=5.0), ValueError, "at most c_max"),
    (dict(c_max=math.nan), ValueError, "c_max must be"),
    (dict(scale="x"), ValueError, "scale must be"),
    (dict(scale=math.nan), ValueError, "scale must be"),
    (dict(is_causal="no"), TypeError, "is_causal must be"),
    (dict(key_ranges=[[0, 8]] * 8), TypeError, "key_ranges must be a tensor"),
    (dict(key_ranges=torch.zeros(8, 2)), TypeError, "key_ranges must be int32"),
    (dict(key_ranges=torch.zeros(4, 8, 2).int()), ValueError, "key_ranges must be .T, 2. = .8, 2. or"),
    (dict(first_row=-1), ValueError, "first_row must be an int"),
    (dict(first_head=1.0), ValueError, "first_head must be an int"),
    (dict(group="all"), TypeError, "group must be None or a process group that this process is in"),
    (dict(dropout_p=0.1), TypeError, "dropout_p"),
    (dict(attn_mask=torch.ones(8, 8)), TypeError, "attn_mask"),
]


@pytest.mark.parametrize("changes, error, message", BAD_ARGUMENTS, ids=[m for _, _, m in BAD_ARGUMENTS])
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        sus_attention(**qkv(**changes))


def test_resolve_backend_gives_a_reason():
    assert resolve_backend("auto", "cpu", torch.float32, 64)[0] == ("reference" if cpu.missing() else "cpu")
    backend, reason = resolve_backend("auto", "cpu", torch.float64, 64)
    assert backend == "reference" and "float64" in reason
    assert resolve_backend("reference", "cpu", torch.float32, 64) == ("reference", "asked for")
