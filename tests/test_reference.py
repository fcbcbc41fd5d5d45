"""The pieces that every backend must agree on: the hash, the fixed-point probabilities, the samplers' laws."""

import math

import pytest
import torch

from sus_attn import SAMPLERS
from sus_backends import reference
from sus_backends.reference import UNIT, UNIT_BITS

inf = math.inf


# -- the hash ----------------------------------------------------------------------------------


def lowbias32_chain(words):
    """The specification, written again in plain Python."""
    state = 0
    for word in words:
        x = ((state + 0x9E3779B9) % 2**32) ^ word
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        state = x ^ (x >> 16)
    return state


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**40 + 7, 2**63 - 1, -(2**63)])
def test_row_uniforms_follow_the_specification(seed):
    u = reference.row_uniforms(torch.tensor(seed), 2, 3, range(5, 9), "cpu")
    assert u.shape == (2, 3, 4)
    lo, hi = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for b, h, i in [(0, 0, 0), (1, 2, 3), (1, 0, 2)]:
        assert u[b, h, i] == lowbias32_chain([lo, hi, reference.STREAM_SYSTEMATIC, b, h, 5 + i]) >> (32 - UNIT_BITS)


def test_known_answers():
    """Frozen: a change here changes every run, and every kernel that repeats the hash."""
    uniforms = reference.row_uniforms(torch.tensor(1337), 1, 2, range(2), "cpu")
    assert uniforms.flatten().tolist() == [6969893, 112482, 7644470, 7617135]
    assert reference.fold_in(1337, 10, 3, 2) == 116009758


def test_fold_in_is_the_same_on_ints_and_tensors():
    for seed in (0, 1337, 2**62 + 5):
        for words in [(0,), (3, 1), (2**33, 7, 0)]:
            tensor = reference.fold_in(torch.tensor(seed), *(torch.tensor(w) for w in words))
            assert reference.fold_in(seed, *words) == tensor.item()
    folded = {reference.fold_in(1, i, m, layer) for i in range(20) for m in range(5) for layer in range(10)}
    assert len(folded) == 1000


def test_uniforms_are_uniform_and_unrelated():
    """Mean, variance, and correlations between neighbouring rows, heads, batches, seeds: |z| < 4.5."""
    N = 64
    u = torch.stack([reference.row_uniforms(torch.tensor(s), N, N, range(N), "cpu") for s in (7, 8)]).double() / UNIT
    n = u.numel()
    assert abs(u.mean() - 0.5) * math.sqrt(12 * n) < 4.5
    assert abs(u.var() - 1 / 12) * math.sqrt(180 * n) < 4.5
    centred = (u - 0.5) * math.sqrt(12)
    for dim in range(4):
        product = centred.narrow(dim, 1, u.shape[dim] - 1) * centred.narrow(dim, 0, u.shape[dim] - 1)
        assert abs(product.mean()) * math.sqrt(product.numel()) < 4.5, f"dim {dim}"
    counts = torch.histc(u.flatten(), 256, 0, 1)
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi2 - 255) / math.sqrt(2 * 255) < 4.5


# -- inclusion probabilities -------------------------------------------------------------------


def softmax_rows(R, T, sharpness, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.softmax(sharpness * torch.randn(R, T, generator=g, dtype=dtype), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inclusion_units(dtype):
    w = torch.tensor([0.0, 1e-30, 1e-7, 0.01, 0.04, 0.5, 1.0], dtype=dtype)
    units = reference.inclusion_units(w, torch.tensor(25.0))
    expected = [0, 1, math.ceil(25e-7 * UNIT), math.ceil(0.25 * UNIT), UNIT, UNIT, UNIT]
    assert units.dtype == torch.int32 and (units - torch.tensor(expected)).abs().max() <= 1  # w is rounded to its dtype
    assert units[0] == 0 and units[1] == 1
    assert reference.inclusion_units(w, torch.tensor(inf)).tolist() == [0] + [UNIT] * 6


def test_inclusion_units_of_nan_are_zero():
    assert reference.inclusion_units(torch.tensor([float("nan"), 0.5]), torch.tensor(4.0)).tolist() == [0, UNIT]


def test_slot_bound():
    bounds = [reference.slot_bound(c, 1000) for c in (0.5, 1.0, 25.0, 25.5, 999.5, 5000.0, inf)]
    assert bounds == [2, 2, 26, 27, 1000, 1000, 1000]


# -- systematic sampling -----------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.5, 2.0, 25.0, 300.0])
@pytest.mark.parametrize("T, sharpness", [(50, 1.0), (2048, 0.0), (2048, 3.0), (131072, 0.0), (131072, 2.0)])
def test_systematic_inclusion_is_exact(T, sharpness, c):
    """Entry j is kept for exactly q_j of the 2^23 values of u: probe the ends of its interval of u."""
    units = reference.inclusion_units(softmax_rows(1, T, sharpness), torch.tensor(c))[0]
    slots = reference.slot_bound(c, T)
    total = units.long().cumsum(0)
    for j in torch.linspace(0, T - 1, 12).long().tolist():
        if units[j] == UNIT:
            continue
        first = -int(total[j]) % UNIT  # the first u for which the sum crosses an integer at j
        after = first + int(units[j])
        for u, kept in [(first, True), (first - 1, False), (after - 1, True), (after, False)]:
            keep, dropped = reference.keep_systematic(units[None], torch.tensor([u % UNIT]), slots)
            assert keep[0, j] == kept and dropped == 0


@pytest.mark.parametrize("c", [1.0, 4.0, 25.0, 60.5])
@pytest.mark.parametrize("T", [300, 32768, 131072])
@pytest.mark.parametrize("kind", ["flat", "peaked", "geometric", "sink"])
def test_systematic_never_keeps_more_than_its_bound(T, kind, c):
    if kind == "flat":
        w = torch.full((8, T), 1 / T)
    elif kind == "peaked":
        w = softmax_rows(8, T, 6.0)
    elif kind == "geometric":
        w = torch.softmax(-torch.arange(T) / (c + 1) * torch.linspace(0.1, 3, 8)[:, None], -1)
    else:  # half of the weight on key 0, the rest flat
        w = torch.cat([torch.full((8, 1), 0.5), torch.full((8, T - 1), 0.5 / (T - 1))], -1)
    units = reference.inclusion_units(w, torch.tensor(c))
    for u in (0, 1, UNIT // 3, UNIT - 1):
        keep, dropped = reference.keep_systematic(units, torch.full((8,), u), reference.slot_bound(c, T))
        assert keep.sum(-1).max() <= math.ceil(c) + 1
        assert dropped == 0
        # it keeps either the floor or the ceiling of its total
        total = units.double().sum(-1) / UNIT
        assert ((keep.sum(-1) - total).abs() < 1).all()


def test_fixed_point_sums_do_not_depend_on_the_tiling():
    """At T = 131072 a float32 running sum stalls. The integer one is the same in one scan, in tiles, at any width."""
    T, c = 131072, 25.0
    units = reference.inclusion_units(softmax_rows(4, T, 1.0), torch.tensor(c))
    whole = units.cumsum(-1, dtype=torch.int64)
    tiles = units.reshape(4, 128, 1024)
    offsets = tiles.sum(-1, dtype=torch.int64).cumsum(-1) - tiles.sum(-1, dtype=torch.int64)
    assert torch.equal((tiles.cumsum(-1, dtype=torch.int64) + offsets[..., None]).reshape(4, T), whole)
    u = reference.row_uniforms(torch.tensor(3), 1, 1, range(4), "cpu")[0, 0]
    narrow, _ = reference.keep_systematic(units, u, slots=26)  # int32 sums
    wide, _ = reference.keep_systematic(units, u, slots=300)  # int64 sums
    assert torch.equal(narrow, wide)


def test_slots_beyond_the_bound_are_dropped_and_counted():
    units = torch.full((1, 10), UNIT, dtype=torch.int32)
    keep, dropped = reference.keep_systematic(units, torch.tensor([0]), slots=4)
    assert keep[0].tolist() == [True] * 4 + [False] * 6 and dropped == 6


# -- both samplers, with their real randomness -------------------------------------------------


@pytest.mark.parametrize("sampler", ["systematic", "poisson"])
def test_inclusion_frequencies_match_q(sampler):
    B, H, T, c = 500, 4, 40, 5.0
    w = softmax_rows(1, T, 2.5).expand(B, H, 3, T)
    multiplier = reference.sus_multiplier(torch.tensor(c), c, sampler, torch.tensor(11), None, T)
    m, dropped = multiplier(w, range(7, 10))
    q = reference.inclusion_units(w[0, 0, 0], torch.tensor(c)).double() / UNIT
    n = B * H * 3
    frequency = (m > 0).double().mean((0, 1, 2))
    z = (frequency - q) / (q * (1 - q) / n).sqrt().clamp_min(1e-12)
    certain = q == 1
    assert certain.any() and (~certain).sum() > 20
    assert (frequency[certain] == 1).all()
    assert z[~certain].abs().max() < 4.5 and dropped == 0
    # a kept entry weighs 1/q: its contribution is max(w, 1/c), up to the rounding of q
    kept = (m > 0) & (w > 1e-3)
    assert torch.allclose((m * w)[kept], torch.clamp(w, min=1 / c)[kept], rtol=1e-4)


def test_systematic_keeps_fewer_at_most_than_poisson():
    w = torch.full((1, 4, 400, 400), 1 / 400)
    draw = lambda sampler: reference.sus_multiplier(torch.tensor(25.0), 25.0, sampler, torch.tensor(5), None, 400)
    counts = {s: (draw(s)(w, range(400))[0] > 0).sum(-1) for s in ("systematic", "poisson")}
    assert set(counts["systematic"].unique().tolist()) <= {24, 25, 26}
    assert counts["poisson"].max() > 35 and abs(counts["poisson"].double().mean() - 25) < 0.6


@pytest.mark.parametrize("sampler", ["systematic", "poisson"])
def test_draws_differ_between_seeds_batches_heads_and_rows(sampler):
    w = torch.full((2, 2, 8, 64), 1 / 64)
    draw = lambda seed: reference.sus_multiplier(torch.tensor(8.0), 8.0, sampler, torch.tensor(seed), None, 64)
    m = torch.stack([draw(seed)(w, range(8))[0] for seed in (0, 1)])
    masks = {tuple(row.tolist()) for row in (m > 0).reshape(-1, 64)}
    # flat rows at c = 8 have 8 different systematic masks; Poisson rows nearly never repeat
    assert len(masks) == 8 if sampler == "systematic" else len(masks) > 60


# -- thinning ----------------------------------------------------------------------------------


def known(shape, seed=0):
    """Made-up knowledge of a block of weights (B, H, R, N), of very unequal contributions."""
    g = torch.Generator().manual_seed(seed)
    square, distance = (torch.randn(2, *shape, generator=g) * 2).exp()
    return reference.Known(torch.rand(*shape[:-1], 1, generator=g) * 4 + 0.125, lambda: square, lambda: distance)


@pytest.mark.parametrize("sampler", reference.THINNED)
def test_thinning_aims_at_c_times_what_a_contribution_weighs(sampler):
    c, w = 6.0, torch.softmax(torch.randn(2, 3, 4, 50, generator=torch.Generator().manual_seed(0)) * 2, -1)
    about = known(w.shape)
    q_units = reference.inclusion_units(w, torch.tensor(2 * c))
    proposed, _ = reference.keep_systematic(q_units, torch.full((2, 3, 4), 12345), 50)
    got = reference.thinning_units(proposed, w, q_units, torch.tensor(c), sampler, about)
    assert (got[~proposed] == 0).all() and (got[proposed] >= 1).all() and got.max() == UNIT
    w, q, square, distance = (x.double() for x in (w, q_units / UNIT, about.square(), about.distance()))
    aim = c * w * (about.row_weight.double() if reference.THINNED[sampler][0] else 1)
    if "values" in sampler:
        square = 0.75 * distance / (w * distance).sum(-1, keepdim=True) + 0.25
    if reference.THINNED[sampler][1]:
        mean = torch.where(proposed, w / q * square, 0).sum(-1) / torch.where(proposed, w / q, 0).sum(-1)
        aim = aim * (square / mean[..., None]).sqrt()
    want = torch.clamp(aim / q, max=1)
    torch.testing.assert_close((got / UNIT)[proposed].double(), want[proposed], rtol=1e-5, atol=2 / UNIT)
    assert 0.2 < (want[proposed] < 1).double().mean() < 1


# tiles is rows, of other weights
@pytest.mark.parametrize("sampler", [name for name in reference.THINNED if name != "tiles"])
def test_thinning_is_unbiased_given_the_proposals(sampler):
    """Whatever it looks at, also at which entries were proposed: the mean over its own draws is the proposals' 1/q."""
    N, T, c = 4000, 40, 5.0
    w = softmax_rows(1, T, 2.5).expand(1, 1, T)
    about = known((1, 1, 1, T))
    about = about._replace(row_weight=about.row_weight.expand(N, 1, 1, 1))
    u = torch.full((N, 1, 1), 4_000_000)  # the same proposals in all rows
    draw = lambda s: reference.sus_multiplier(torch.tensor(c), c, s, torch.tensor(3), u, T)
    m, dropped = draw(sampler)(w.expand(N, 1, 1, T), range(1), about)
    q_units = reference.inclusion_units(w, torch.tensor(2 * c))
    proposed = reference.keep_systematic(q_units, u[0], T)[0].flatten()
    want = torch.where(proposed, UNIT / q_units.flatten().double(), 0)
    m = m.double().flatten(0, 2)
    assert dropped == 0 and (m[:, ~proposed] == 0).all()
    error = (m.std(0) / N**0.5)[proposed]
    z = ((m.mean(0) - want)[proposed] / error.clamp_min(1e-9))[error > 1e-6]
    assert len(z) > 3 and z.abs().max() < 4.5
    assert torch.allclose(m.mean(0)[proposed][error <= 1e-6], want[proposed][error <= 1e-6], rtol=1e-5)


@pytest.mark.parametrize(
    "grad, want",
    [
        ([[1.0, 3.0]], [0.5, 1.5]),
        ([[0.0, 0.0]], [1, 1]),
        ([[0.0] + [1.0] * 20], [0.125] + [1.05] * 20),
        ([[100.0] + [1.0] * 99], [4] + [1 / 1.99] * 99),
        ([[math.nan, 1.0]], [1, 1]),
        ([[math.inf, 1.0]], [1, 1]),
    ],
)
def test_row_weights(grad, want):
    """Relative to the mean over the rows of the same batch and head, within bounds, and 1 where there is no number."""
    rows = torch.tensor(grad)[..., None]  # (1, T, 1): the norms
    got = reference.row_weights(torch.stack([rows, torch.ones_like(rows)], 1))
    assert got[0, 0].tolist() == pytest.approx(want) and (got[0, 1] == 1).all()


# -- memory ------------------------------------------------------------------------------------


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                LargestTensor.numel = max(LargestTensor.numel, x.numel())
        return out


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_of_size_t_squared_is_stored(sampler):
    B, H, T, D = 1, 2, 2000, 4
    q, k, v, g = (torch.randn(B, H, T, D) for _ in range(4))
    multiplier = reference.sus_multiplier(torch.tensor(9.0), 9.0, sampler, torch.tensor(0), None, T)
    LargestTensor.numel = 0
    with LargestTensor():
        out, lse = reference.forward(q, k, v, True, 0.5)
        reference.backward(g, q, k, v, out, lse, multiplier, True, 0.5, with_stats=True)
    assert T * D * H < LargestTensor.numel <= reference.CPU_BLOCK_ENTRIES < B * H * T * T / 10
