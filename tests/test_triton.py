"""The Triton backend: its kernels on a GPU, or else interpreted on the CPU, and compiled for GPUs that are absent."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import LAYOUTS, case, check_errors, check_unbiased, float64, inf, nan, rms, same, shaped, spoiled
from model import GPT, GPTConfig
from sus_attn import resolve_backend, sus_attention
from sus_backends import reference, triton
from sus_backends.reference import KAPPA, TILE, UNIT
from sus_backends.triton import cdiv
from test_key_ranges import any_ranges, documents, window
from test_sus_attention import multiplier_of, naive

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parents[1]
HALVES = [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter can't do the latter
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
pytestmark = [  # NumPy's warnings, of what is masked
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]


@pytest.fixture
def large_programs(monkeypatch):
    """Where programs are interpreted, some with many rows: one takes as long, whether of 64 rows or of a GPU's 4."""
    configurations = triton.configurations
    large = dict(sum_parts=dict(ROWS=64, SOME=8, KEYS=64), tile_gradients=dict(SOME=64))
    if DEVICE == "cpu":
        chosen = lambda kernel, *of: [(large[kernel], 4, 1)] if kernel in large else configurations(kernel, *of)
        monkeypatch.setattr(triton, "configurations", chosen)
        triton._kernel.cache_clear()
    yield
    triton._kernel.cache_clear()


many_programs = pytest.mark.usefixtures("large_programs")


class Result(NamedTuple):
    """All on the CPU. tiles, masses: the proposals. kept: what their tiles weigh after thinning, else 0."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    stats: Tensor
    tiles: Tensor
    masses: Tensor
    kept: Tensor
    m: Tensor  # kept as a mask (B, H, T, T)


def propose(tensors, c=1.5, seed=1, c_max=None, u=None, **sees):
    """out, lse, tiles, masses of the forward, on DEVICE; checks the form of the proposals."""
    q, k, v = (x.to(DEVICE) for x in tensors[:3])
    c_max, u = c if c_max is None else c_max, None if u is None else u.to(DEVICE)
    saved = triton.forward(q, k, v, q.shape[3] ** -0.5, True, torch.tensor(c), c_max, torch.tensor(seed), u, **sees)
    tiles = saved[2].cpu()
    lo, hi = (x[:, None, :, None].expand_as(tiles) for x in ranges_of(tensors, **sees).unbind(-1))
    proposed = tiles >= 0
    assert torch.equal(proposed, proposed.cumprod(-1).bool()) and (tiles.diff(dim=-1)[proposed[..., 1:]] > 0).all()
    assert ((tiles * TILE < hi) & (tiles * TILE + TILE > lo))[proposed].all()
    return saved


def ranges_of(tensors, is_causal=True, key_ranges=None, **_):
    """(1 or B, T, 2), on the CPU."""
    ranges = None if key_ranges is None else key_ranges.cpu()
    return reference.ranges_of(ranges, is_causal, tensors[0].shape[2], tensors[1].shape[2], "cpu")


def run(tensors, c=1.5, seed=1, c_max=None, u=None, row_weight=None, **sees) -> Result:
    """Forward and backward, in one round, with what stands between the kernels."""
    saved = out, lse, tiles, masses = propose(tensors, c, seed, c_max, u, **sees)
    q, k, v, grad_out = (x.to(DEVICE) for x in tensors)
    row_weight = reference.row_weights(grad_out) if row_weight is None else row_weight.to(DEVICE)
    c_max, launch, seen = c if c_max is None else c_max, triton._launch, []

    def spy(name, q, programs, *args, **constants):
        launch(name, q, programs, *args, **constants)
        if name == "thin":
            seen.append(args[8].cpu().clone())

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(triton, "_launch", spy)
        rest = q.shape[3] ** -0.5, torch.tensor(c), c_max, torch.tensor(seed), row_weight, True
        grads = triton.backward(grad_out, q, k, v, *saved, *rest, **sees)
    tiles, (kept,) = tiles.cpu(), seen
    kept = kept.view(tiles.shape)
    assert not kept[tiles < 0].any()
    key, ranges = torch.arange(k.shape[2]), ranges_of(tensors, **sees)
    m = mask_of(tiles, kept, k.shape[2]) * ((key >= ranges[..., :1]) & (key < ranges[..., 1:]))[:, None]
    return Result(out.cpu(), lse.cpu(), *(x.cpu() for x in grads), tiles, masses.cpu(), kept, m)


def mask_of(tiles, values, N):
    """(B, H, T, N): a tile's value on all its keys."""
    of_tiles = torch.zeros(*tiles.shape[:3], -(-N // TILE) + 1)
    # an index of -1 becomes the last, which is no tile
    of_tiles.scatter_(-1, tiles.long() % of_tiles.shape[-1], torch.where(tiles >= 0, values, 0))
    return of_tiles.repeat_interleave(TILE, -1)[..., :N]


def grads(tensors, c=1.5, seed=1, **kwargs):
    """out, dq, dk, dv of the operator."""
    q, k, v, grad_out = (x.detach().to(DEVICE).requires_grad_() for x in tensors)
    out = sus_attention(q, k, v, c, seed=seed, backend="triton", **kwargs)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out.detach())


# -- the kernels against float64 ---------------------------------------------------------------

CASES = [  # B, H, K, T, D, weights
    pytest.param(*x, id="B{}H{}K{}T{}D{}-{}".format(*x))
    for x in [
        (1, 1, 1, 1, 32, "random"), (1, 2, 2, 63, 32, "peaked"), (1, 2, 1, 64, 64, "flat"), (1, 1, 1, 65, 64, "sink"),
        (2, 2, 1, 131, 32, "random"), (1, 1, 1, 300, 64, "one-hot"), (1, 2, 1, 330, 32, "flat"),
        (1, 1, 1, 200, 32, "sink"), (1, 1, 1, 150, 64, "high"), (1, 1, 1, 150, 64, "low"),
    ]
]  # fmt: skip


def check_gradients(ours, tensors, dtype):
    """Those of `run` beside naive PyTorch's under the mask that was drawn."""
    truth, plain = naive(*float64(tensors), ours.m.double()), naive(*tensors, ours.m.to(dtype))
    # W = exp(s - lse) with s summed anew, in another order: where scores are large, it has their rounding
    rounding = 2 * torch.finfo(torch.float32).eps * ours.lse.abs().max()
    check_errors(["dq", "dk", "dv"], ours[2:5], plain[1:4], truth[1:4], dtype, beside=rounding)
    assert ours.stats[:2].tolist() == [(ours.m > 0).sum(), 0]


@DTYPES
@pytest.mark.parametrize("B, H, K, T, D, weights", CASES)
def test_error_within_twice_that_of_pytorch(B, H, K, T, D, weights, dtype, poisoned):
    """The forward beside SDPA, the backward beside naive PyTorch under the mask that was drawn."""
    tensors = shaped(weights, B, H, K, T, D, dtype)
    ours = run(tensors)
    sdpa = F.scaled_dot_product_attention(*tensors[:3], is_causal=True, enable_gqa=True)
    truth, lse = reference.forward(*float64(tensors[:3]), True, D**-0.5)
    for of in (rms, lambda x: x.abs().max()):
        check_errors(["out"], [ours.out], [sdpa], [truth], dtype, of)
    assert (ours.lse - lse).abs().max() <= 8 * torch.finfo(torch.float32).eps * lse.abs().max().clamp_min(1)
    check_gradients(ours, tensors, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_head_dim_128(dtype, poisoned):
    tensors = shaped("random", 1, 1, 1, 140, 128, dtype)
    check_gradients(run(tensors), tensors, dtype)


@many_programs
@pytest.mark.parametrize("c, c_max", [(0.3, None), (1.5, 2.5), (8.0, None), (1.2, inf)])
def test_any_retention(c, c_max, poisoned):
    tensors = shaped("random", 1, 2, 1, 200, 32, torch.float32)
    check_gradients(run(tensors, c, c_max=c_max), tensors, torch.float32)


@many_programs
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, poisoned):
    views = [LAYOUTS[layout](x) for x in case(2, 2, 1, 70, 32)]
    copies = [x.clone(memory_format=torch.contiguous_format) for x in views]
    ours = run(views)
    check_draw(ours.tiles, ours.masses, copies, 1.5)
    for a, b in zip((ours.out, *ours[2:5]), naive(*float64(copies), ours.m.double())):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


# -- the draw ----------------------------------------------------------------------------------


def weights(q, k, ranges):
    """W (B, H, T, N)."""
    s, key = q.shape[3] ** -0.5 * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT, torch.arange(k.shape[2])
    seen = ((key >= ranges[..., :1]) & (key < ranges[..., 1:]))[:, None]
    return torch.softmax(s.masked_fill(~seen, -inf), -1).masked_fill(~seen, 0)


def check_draw(tiles, masses, tensors, c, seed=1, u=None, c_max=None, share=0.95, **sees):
    """The proposals beside the reference's: the same but where the forward's rough logarithm decides."""
    q, T, N = tensors[0], tensors[0].shape[2], tensors[1].shape[2]
    mass = reference.tile_masses(weights(*tensors[:2], ranges_of(tensors, **sees)))  # (B, H, T, tiles)
    units = reference.inclusion_units(mass, torch.tensor(KAPPA * c))
    u = reference.row_uniforms(torch.tensor(seed), *q.shape[:2], range(T), "cpu") if u is None else u
    want, _ = reference.keep_systematic(units, u, N)
    got = torch.zeros(*want.shape[:-1], want.shape[-1] + 1, dtype=torch.bool)
    tiles, masses, proposed = tiles.cpu(), masses.cpu(), tiles.cpu() >= 0
    got = got.scatter_(-1, tiles.long() % got.shape[-1], proposed)[..., :-1]
    assert (got & want).sum() >= share * (got | want).sum()
    assert tiles.shape[-1] == reference.tile_slots(c_max or c, N)
    exact = mass[*proposed.nonzero()[:, :3].T, tiles[proposed].long()]
    torch.testing.assert_close(masses[proposed], exact, rtol=0.02, atol=1e-30)


@pytest.mark.parametrize("c, c_max", [(0.3, None), (1.5, 2.5), (8.0, None), (1.2, inf)])
@pytest.mark.parametrize("weights", ["random", "flat", "sink"])
def test_draw_is_that_of_the_reference(weights, c, c_max, poisoned):
    tensors = shaped(weights, 1, 2, 1, 330, 32, torch.float32)
    check_draw(*propose(tensors, c, c_max=c_max)[2:], tensors, c, c_max=c_max)


def test_draw_with_given_uniforms(poisoned):
    tensors = shaped("flat", 2, 2, 1, 200, 32, torch.float32)
    for u in (torch.full((2, 2, 200), UNIT - 1), torch.randint(UNIT, (200, 2, 2)).movedim(0, 2)):
        check_draw(*propose(tensors, 0.8, u=u)[2:], tensors, 0.8, u=u)


@many_programs
def test_draws_follow_the_whole_seed():
    tensors, seeds = shaped("flat", 1, 1, 1, 200, 32, torch.float32), (1, 2, 2**32 + 1, 2**63 - 1, -1)
    found = [run(tensors, 0.7, seed) for seed in seeds]
    for seed, ours in zip(seeds, found):
        check_draw(ours.tiles, ours.masses, tensors, 0.7, seed)
    for drawn in ("tiles", "kept"):
        assert len({tuple(getattr(ours, drawn).flatten().tolist()) for ours in found}) == 5


@many_programs
def test_infinite_c_is_exact():
    tensors = case(1, 2, 1, 140, 32)
    for a, b in zip(run(tensors, inf)[2:5], naive(*float64(tensors))[1:4]):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # test_unbiased_over_seeds is quicker
@many_programs
def test_unbiased_by_integrating_over_u():
    """Over the first draw. With c_i far above c the second cuts nothing: a few rows have all of the gradient."""
    N, T = 64, 80
    tensors = case(1, 1, 1, T, 32)
    tensors[0] /= 3
    tensors[3][:, :, :-8] = 0
    u = ((torch.arange(N, dtype=torch.float64) + 0.5) / N)[:, None, None]
    draws = grads([x.expand(N, -1, -1, -1) for x in tensors], 0.35, u=u)[1:]
    for draw, exact in zip(draws, naive(*float64(tensors))[1:4]):
        assert (draw.cpu().double().mean(0) - exact[0]).norm() <= 0.04 * exact.norm()
        assert (draw[0].cpu() - exact[0]).norm() > 0.3 * exact.norm()  # one draw alone is far off


# -- thinning ----------------------------------------------------------------------------------


def test_thinning_is_that_of_the_reference():
    """Of the same proposals the same ones are kept, but for those that float32's rounding decides."""
    c, T = 1.2, 330
    tensors = shaped("flat", 1, 2, 1, T, 32, torch.float32)
    tensors[3] *= torch.rand(1, 2, T, 1, generator=torch.Generator().manual_seed(3)) ** 3  # rows of unequal weight
    ours = run(tensors, c)
    proposed = ours.tiles >= 0
    mass = torch.where(proposed, ours.masses, 0)
    units = reference.inclusion_units(mass, torch.tensor(KAPPA * c))
    known = reference.Known(reference.row_weights(tensors[3]).unsqueeze(-1), None, None)
    r = reference.thinning_units(proposed, mass, units, torch.tensor(c), "tiles", known)
    u = reference.row_uniforms(torch.tensor(1), 1, 2, range(T), "cpu", reference.STREAM_THINNING)
    keep, _ = reference.keep_systematic(r, u, T)
    both = keep & (ours.kept > 0)
    assert both.sum() >= 0.99 * (keep | (ours.kept > 0)).sum() and both.sum() < 0.8 * proposed.sum()
    torch.testing.assert_close(ours.kept[both], (UNIT / units * (UNIT / r))[both], rtol=1e-4, atol=0)
    own = multiplier_of(ours.m)
    theirs = reference.backward(tensors[3], *tensors[:3], ours.out, ours.lse, own, True, 32**-0.5, with_stats=True)
    torch.testing.assert_close(ours.stats, theirs[3], rtol=1e-3, atol=0)


@many_programs
@pytest.mark.parametrize("H, seeds", [(1, 2), pytest.param(2, 10, marks=pytest.mark.slow)])
def test_unbiased_over_seeds(H, seeds):
    """16 draws a seed. A bias is found that is 4.5 standard errors: of 32 draws 0.8 of one's standard deviation, of 160
    a third. Smaller ones are left to the test above and to the kernels' likeness to the reference.
    """
    tensors = case(1, H, 1, 75, 32)
    tensors[0] /= 3
    tensors[3] *= torch.arange(75)[:, None] / 40
    many = [x.expand(16, -1, -1, -1) for x in tensors]
    check_unbiased(lambda seed: [x.cpu() for x in grads(many, 0.4, seed)[1:]], tensors, seeds)


@many_programs
def test_what_is_kept_fits(poisoned):
    """Of a part of the rows all may weigh much: there is room for all that they propose."""
    tensors = shaped("flat", 1, 2, 1, 320, 32, torch.float32)
    ours = run(tensors, 1.2, row_weight=torch.full((1, 2, 320), 4.0))
    assert torch.equal(ours.kept > 0, ours.tiles >= 0) and ours.stats[0] == (ours.m > 0).sum()
    for a, b in zip(ours[2:5], naive(*float64(tensors), ours.m.double())[1:4]):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


# -- rounds, repetition, what isn't finite -----------------------------------------------------


@many_programs
def test_rounds_and_repetition_change_no_bit(monkeypatch, poisoned):
    tensors = shaped("flat", 1, 4, 2, 200, 32, torch.float32)
    whole = grads(tensors)
    assert same(grads(tensors), whole)
    monkeypatch.setattr(triton, "ROUND", 1)  # one key/value head at a time
    monkeypatch.setattr(triton, "TABLE", 1), monkeypatch.setattr(triton, "PROGRAMS", 1)  # 128 rows at a time
    rounds, launch = [], triton._launch
    count = lambda name, *args, **kwargs: (rounds.append(name), launch(name, *args, **kwargs))
    monkeypatch.setattr(triton, "_launch", count)
    stats = torch.empty(3, device=DEVICE)
    assert same(grads(tensors, stats=stats), whole)
    assert rounds.count("forward") == rounds.count("draw") == 8 and rounds.count("thin") == 2 and stats[0] > 0


@pytest.mark.parametrize("heads, T", [(1, 1), (12, 8192), (12, 131_000), (3, 1 << 20), (1000, 1 << 20)])
@pytest.mark.parametrize("sees_all", [False, True])
def test_rounds_of_the_forward(heads, T, sees_all):
    """They are all rows of all heads, fit into the room that there is, and there are few of them."""
    past = T if sees_all else 0
    rounds, room = triton.rounds_of(heads, T, T, past), max(triton.TABLE, cdiv(T, TILE) * triton.ROWS * triton.PROGRAMS)
    assert sum(some * rows for _, some, _, rows in rounds) == heads * T
    ends = {(head, row + rows) for head, _, row, rows in rounds}
    assert all(row == 0 or (head, row) in ends and row % triton.ROWS == 0 for head, _, row, _ in rounds)
    sizes = [some * rows * cdiv(min(T, row + rows + past), TILE) for _, some, row, rows in rounds]
    share = 1 if sees_all else 0.5
    assert max(sizes) <= room + heads * T and len(rounds) <= 1.5 * share * heads * T * cdiv(T, TILE) / room + 2


@many_programs
def test_a_round_of_the_forward_with_some_rows_of_several_heads(monkeypatch, poisoned):
    tensors = shaped("flat", 1, 3, 1, 300, 32, torch.float32)
    whole = propose(tensors)
    monkeypatch.setattr(triton, "TABLE", 2 * triton.ROWS * 5), monkeypatch.setattr(triton, "PROGRAMS", 1)
    rounds = [(some, rows) for _, some, _, rows in triton.rounds_of(3, 300, 300, 0)]
    assert rounds == [(2, 128), (2, 128), (2, 44), (1, 256), (1, 44)]
    assert same(propose(tensors), whole)


def test_a_tile_that_many_rows_keep_is_several_jobs(monkeypatch, poisoned):
    tensors = shaped("sink", 1, 2, 1, 200, 32, torch.float32)
    whole = grads(tensors)
    monkeypatch.setattr(triton, "JOB", 64)
    for a, b in zip(grads(tensors), whole):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max())


def test_lists_of_rows_at_a_long_context():
    T, tiles = 20_000, (0, 1, 100, 311)  # more words than are looked at in one go
    regions = cdiv(T, TILE)
    keeps = torch.rand(T, len(tiles), generator=torch.Generator().manual_seed(1)) < torch.tensor([1.0, 0.5, 0.02, 0.3])
    keeps &= torch.arange(T)[:, None] >= torch.tensor(tiles) * TILE
    bits = torch.zeros(regions, cdiv(T, 32), dtype=torch.int64)
    for tile, column in zip(tiles, keeps.T):
        bits[tile] = (torch.nn.functional.pad(column, (0, -T % 32)).view(-1, 32) << torch.arange(32)).sum(1)
    counts = torch.zeros(regions, dtype=torch.int32)
    counts[list(tiles)] = keeps.sum(0, dtype=torch.int32)
    ends = counts.cumsum(0, dtype=torch.int32)
    listed = torch.full((int(ends[-1]) + 1,), -1, dtype=torch.int32, device=DEVICE)
    q, given = torch.zeros(1, 1, T, 32, device=DEVICE), [x.to(DEVICE) for x in (bits.int(), counts, ends)]
    triton._launch("list_rows", q, regions, *given, listed, 0, T, bits.shape[1])
    assert listed.tolist() == [*torch.cat([column.nonzero()[:, 0] for column in keeps.T]).tolist(), -1]


@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize("which", ["q", "k", "v", "grad_out"])
def test_what_is_not_finite_is_not_hidden(which, value, poisoned):
    T, at = 100, 80
    tensors = spoiled(which, value, at, 1, 1, 1, T, 32)
    ours = run(tensors)
    assert ours.lse[:, :, :at].isfinite().all()
    assert all(x[:, :, :64].isfinite().all() for x in (ours.out, ours.dq))  # rows of another block
    undefined = ~((ours.out * tensors[3]).sum(-1).isfinite() & ours.lse.isfinite())
    assert undefined.any() and ours.dq[undefined].isnan().all()
    if which == "grad_out":
        assert undefined.sum() == 1 and ours.dq[~undefined].isfinite().all()
        assert not ours.dk.isfinite().all() and not ours.dv.isfinite().all()


@many_programs
@pytest.mark.parametrize("c", [nan, -1.0, 0.0])
def test_a_c_that_is_no_retention_gives_no_gradients(c):
    q, k, v, grad_out = (x.to(DEVICE) for x in case(1, 2, 1, 70, 32))
    saved = triton.forward(q, k, v, 0.2, True, torch.tensor(c), 8.0, torch.tensor(1), None)
    rest = 0.2, torch.tensor(c), 8.0, torch.tensor(1), reference.row_weights(grad_out)
    *gradients, _ = triton.backward(grad_out, q, k, v, *saved, *rest)
    assert all(x.isnan().all() for x in gradients)


# -- key ranges, and rows that are a part of a whole ---------------------------------------------


def causal(T):
    return torch.stack([torch.zeros(T), torch.arange(T) + 1], -1).int()


B, H, K, D = 2, 2, 1, 32
THIRD = 3 * torch.arange(100)
SEES = {  # name: (T, N, what they see)
    "any ranges": (150, 333, dict(key_ranges=any_ranges(150))),
    "by batch": (150, 333, dict(key_ranges=any_ranges(B, 150))),
    "documents": (150, 150, dict(key_ranges=documents([1, 63, 1, 20, 64, 1]))),
    "a long document": (210, 210, dict(key_ranges=documents([7, 200, 3]))),
    "window": (200, 200, dict(key_ranges=window(200, 50))),
    "one key each": (100, 333, dict(key_ranges=torch.stack([THIRD, THIRD + 1], -1).int())),
    "nothing": (70, 70, dict(key_ranges=torch.zeros(70, 2, dtype=torch.int32))),
    "most see nothing": (150, 333, dict(key_ranges=any_ranges(150) * (torch.arange(150)[:, None] % 73 == 3))),
    "some see nothing": (
        100, 100, dict(key_ranges=torch.where(torch.arange(100)[:, None] % 3 > 0, documents([100]), 10).int())
    ),
    "the last positions": (70, 333, dict(is_causal=True)),
    "more rows than keys": (333, 100, dict(is_causal=True)),
    "all keys": (70, 333, dict(is_causal=False)),
    "all of few keys": (150, 70, dict(is_causal=False)),
}  # fmt: skip


def of_lengths(T, N):
    """q, k, v, grad_out, of heads of one projection."""
    g = torch.Generator().manual_seed(0)
    sizes = (T, H), (N, K), (N, K), (T, H)
    return [torch.randn(B, *size, D, generator=g).transpose(1, 2) for size in sizes]


@many_programs
@pytest.mark.parametrize("name, c", [*((name, 0.6) for name in SEES), ("by batch", inf), ("more rows than keys", inf)])
def test_what_rows_see(name, c, poisoned):
    """The draw is that of the reference; so are the results, under the mask that was drawn."""
    T, N, sees = SEES[name]
    tensors = of_lengths(T, N)
    if "key_ranges" in sees:
        sees = dict(key_ranges=sees["key_ranges"].mT.contiguous().mT.to(DEVICE))
    ours = run(tensors, c, **sees)
    check_draw(ours.tiles, ours.masses, tensors, c, share=0.9, **sees)
    q, k, v, grad_out = float64(tensors)
    ranges = ranges_of(tensors, **sees).expand(B, T, 2)
    out, lse = reference.forward(q, k, v, True, D**-0.5, ranges)
    under = lambda w, rows, _, at: (ours.m[:, :, rows.start : rows.stop, at : at + w.shape[-1]].double(), 0)
    truth = reference.backward(grad_out, q, k, v, out, lse, under, True, D**-0.5, True, ranges)
    for a, b in zip((ours.out, ours.lse, *ours[2:5]), (out, lse, *truth[:3]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.stats, truth[3], rtol=1e-3, atol=0)
    nothing = (ranges[..., 0] == ranges[..., 1])[:, None].expand(B, H, T)
    assert all(not x[nothing].any() for x in (ours.out, ours.lse, ours.dq)) and (ours.tiles[nothing] == -1).all()


@many_programs
def test_a_row_whose_scores_are_all_infinitely_low_is_not_hidden():
    q, k, v, grad_out = of_lengths(100, 200)
    q, k[:, :, 70:90] = q.abs(), -inf
    ranges = torch.tensor([[75, 85], [0, 70], [100, 200], [65, 80]] * 25, dtype=torch.int32)
    undefined = torch.arange(100) % 4 == 0
    for draws in (False, True):
        out, lse, *_ = triton.forward(
            *(x.to(DEVICE) for x in (q, k, v)), 0.2, draws, torch.tensor(1.0), 1.0, torch.tensor(1), None,
            key_ranges=ranges.to(DEVICE),
        )  # fmt: skip
        assert out[:, :, undefined].isnan().all() and lse[:, :, undefined].isnan().all()
        assert out[:, :, ~undefined].isfinite().all() and lse[:, :, ~undefined].isfinite().all()


@many_programs
def test_causal_ranges_give_the_bits_of_none():
    tensors = of_lengths(140, 140)
    for a, b in zip(run(tensors), run(tensors, key_ranges=causal(140).to(DEVICE)), strict=True):
        assert torch.equal(a, b)


@many_programs
@pytest.mark.parametrize("ranges", [causal(200), documents([7, 120, 73]), window(200, 70), any_ranges(200)])
def test_a_part_of_the_rows_and_heads_draws_what_the_whole_does(ranges, poisoned):
    """Given the same keys, and what its rows weigh in the whole: to the bit, whatever rows share a row's block."""
    q, k, v, grad_out = case(B, 2, 2, 200, D)
    row_weight, ranges = reference.row_weights(grad_out), (ranges % 201).to(DEVICE)
    whole = run((q, k, v, grad_out), 0.8, row_weight=row_weight, key_ranges=ranges)
    rows = slice(90, 170)
    part = q[:, 1:, rows], k[:, 1:], v[:, 1:], grad_out[:, 1:, rows]
    rest = dict(key_ranges=ranges[rows], first_row=90, first_head=1)
    ours = run(part, 0.8, row_weight=row_weight[:, 1:, rows], **rest)
    for name in ("out", "lse", "tiles", "masses", "m"):
        assert torch.equal(getattr(ours, name), getattr(whole, name)[:, 1:, rows]), name
    torch.testing.assert_close(ours.dq, whole.dq[:, 1:, rows], rtol=1e-5, atol=1e-5)


# -- the operator ------------------------------------------------------------------------------


def test_what_is_kept_for_the_backward():
    saved = []
    q, k, v, grad_out = (x.to(DEVICE).requires_grad_() for x in case(1, 2, 1, 330, 32))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        sus_attention(q, k, v, 1.2, seed=1, backend="triton")
    sizes = sorted(x.numel() for x in saved if x.numel() > 1)
    rows, slots = 2 * 330, math.ceil(2 * 1.2) + 1
    of_inputs, of_forward = [q.numel(), k.numel(), v.numel()], [q.numel(), rows, rows * slots, rows * slots]
    assert sizes == sorted(of_inputs + of_forward)  # q, k, v; out, lse, the proposals
    with torch.no_grad():
        assert not triton.forward(q, k, v, 1.0, False, torch.tensor(1.2), 1.2, torch.tensor(1), None)[2].numel()


@many_programs
def test_compiled_without_a_graph_break():
    tensors, ranges = case(1, 2, 1, 80, 32), documents([30, 50]).to(DEVICE)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(q, k, v, c, seed):
        return sus_attention(q, k, v, c, c_max=8.0, seed=seed, backend="triton", key_ranges=ranges) * 1.0

    q, k, v, grad_out = (x.to(DEVICE).requires_grad_() for x in tensors)
    for seed in (1, 2):
        out = f(q, k, v, torch.tensor(5.0, device=DEVICE), torch.tensor(seed, device=DEVICE))
        got = out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out.detach())
        assert same(got, grads(tensors, 5.0, seed, c_max=8.0, key_ranges=ranges))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_captured_in_a_cuda_graph():
    """Nothing waits for the device: replayed with another seed and c, the same as called with them."""
    q, k, v, grad_out = (x.to(DEVICE, torch.bfloat16) for x in case(2, 4, 2, 300, 64))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    c, seed = torch.tensor(5.0, device=DEVICE), torch.tensor(1, device=DEVICE)

    def step():
        out = sus_attention(q, k, v, c, c_max=16.0, seed=seed, backend="triton")
        return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)

    step()  # compiles, and measures
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    c.fill_(9.0), seed.fill_(7)
    graph.replay()
    assert same(captured, step())


REFUSED = [
    (dict(dtype=torch.float64), "float64"),
    *([(dict(dtype=torch.bfloat16), "interpreter")] if DEVICE == "cpu" else []),
    (dict(D=40), "head dims 32, 64, 128, not 40"),
    (dict(sampler="poisson"), "poisson"),
    (dict(dtype=torch.float32, D=128), "head dims up to 64"),
]


@pytest.mark.parametrize("changes, reason", REFUSED, ids=[r for _, r in REFUSED])
def test_what_it_does_not_do_is_refused_by_name(changes, reason):
    case_ = {**dict(device_type=DEVICE, dtype=torch.float32, D=64), **changes}
    with pytest.raises(ValueError, match="backend='triton' can't be had: .*" + reason):
        resolve_backend("triton", **case_)
    if DEVICE == "cuda":
        name, why = resolve_backend("auto", **case_)
        assert name == "reference" and reason in why


def test_without_a_gpu_it_says_what_it_needs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton.missing.cache_clear()
    with pytest.raises(ValueError, match="backend='triton' can't be had: it is for CUDA, not cpu"):
        resolve_backend("triton", "cpu", torch.float32, 64)
    triton.missing.cache_clear()


@many_programs
def test_a_model_trains_as_with_the_reference():
    """Same draws, so the same losses, but for an entry here and there that rounding decides.

    Such entries make a difference of about 2e-4. With other draws it is 1e-3 to 8e-3.
    """
    sizes = dict(block_size=160, vocab_size=65, n_layer=2, n_head=1, n_embd=64, bias=False)
    losses = {}
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        sus = dict(attn_backward="sus", sus_c=0.8, sus_backend=backend)
        model = GPT(GPTConfig(**sizes, pos="rope", norm="rmsnorm", **sus)).to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        x = torch.randint(65, (1, 161)).to(DEVICE)
        losses[backend] = []
        for step in range(5):
            loss = model(x[:, :-1], x[:, 1:], sus_seed=torch.tensor(step))[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["reference"], rel=2e-3)
    assert losses["triton"][-1] < losses["triton"][0] - 0.5


def test_what_is_fastest_is_measured_for_each_kind_of_call(monkeypatch):
    """A first call at a toy length must not choose for long ones, nor one that draws for one that does not."""
    kinds = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: None

    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(triton, "_kernel", lambda *key: kinds.append(key) or Kernel())
    calls = [(100, False), (1000, False), (1023, False), (1000, True), (131072, False)]
    for T, draws in calls:
        triton._launch("forward", torch.empty(1, 1, T, 64), 1, DRAWS=draws)
    assert kinds[1] == kinds[2] and len(set(kinds)) == len(calls) - 1
    with monkeypatch.context() as patch:  # where nothing is measured, one for all
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        kinds.clear()
        for T, draws in calls:
            triton._launch("forward", torch.empty(1, 1, T, 64), 1, DRAWS=draws)
        assert len(set(kinds)) == 1


def test_what_was_chosen_is_launched_without_asking_again(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    tuner = triton._kernel("plan", 32, 4, False, False, ())
    counts, ends, job_ends, job_regions = (torch.ones(5, dtype=torch.int32, device=DEVICE) for _ in range(4))
    for _ in range(2):
        triton._launch("plan", torch.empty(1, 1, 1, 32), 1, counts, ends, job_ends, job_regions, 5, JOB=1)
        monkeypatch.setattr(tuner, "run", None)
    assert ends.tolist() == job_ends.tolist() == [1, 2, 3, 4, 5] and job_regions.tolist() == [0, 1, 2, 3, 4]


def test_a_gpu_with_little_shared_memory(monkeypatch):
    """An RTX 4090, L40S or A10: smaller blocks, and no float32 at head dim 64."""
    of = lambda *sizes, ranges=False: [x["BM"] for x, *_ in triton.configurations("forward", *sizes, ranges)]
    assert of(128, 2) == of(64, 2) == of(128, 2, ranges=True) == [128, 64]
    monkeypatch.setattr(triton, "shared_memory", lambda: 166_912)
    assert of(128, 2) == [128, 64] and of(128, 2, ranges=True) == [64]
    monkeypatch.setattr(triton, "shared_memory", lambda: 101_376)
    assert of(128, 2) == [64] and of(64, 2) == [128, 64]
    why = "it takes float32 with head dims up to 32 on GPUs with 99 kB of shared memory"
    assert triton.unsupported(torch.float32, 64, "tiles") == why
    assert triton.unsupported(torch.float32, 32, "tiles") is None
    assert triton.unsupported(torch.bfloat16, 64, "tiles") is None or triton.interpreted()


# -- compiled for GPUs that need not be there --------------------------------------------------


OLDER = ROOT / ".venv" / "triton-3.6"  # pip install --no-deps --target=.venv/triton-3.6 triton==3.6.0


@pytest.mark.slow
@pytest.mark.parametrize("capability, shared", [(80, 163 * 1024), (89, 99 * 1024), (90, 227 * 1024)])
@pytest.mark.parametrize("version", ["installed", "3.6"])
def test_every_configuration_compiles_and_spills_nothing(version, capability, shared, tmp_path):
    """Its registers suffice, and a block's shared memory is there. Prints what each takes (pytest -s).

    For A100, RTX 4090 and H100 or H200, by the Triton that is installed, and by that of PyTorch 2.11 for CUDA, which
    makes other code of the same kernel.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    if version == "3.6":
        if not OLDER.is_dir():
            pytest.skip(f"Triton 3.6 is not in {OLDER}: pip install --no-deps --target={OLDER} triton==3.6.0")
        env["PYTHONPATH"] = str(OLDER)
    command = [sys.executable, ROOT / "tests" / "compile_triton.py", str(capability)]
    done = subprocess.run(command, text=True, capture_output=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    of_kernel = "registers a thread, bytes of stack, bytes of shared memory; constants"
    print(f"\nTriton {version}, sm_{capability}: kernel, dtype, D, warps, stages: {of_kernel}")
    for x in lines:
        constants = ", ".join(f"{k}={v}" for k, v in x["constants"].items())
        of_config = f"{x['kernel']:16}{x['dtype']:9}{x['D']:4}{x['warps']:3}{x['stages']:3}"
        print(f"{of_config}:{x['registers']:4}{x['stack']:4}{x['shared']:8}  {constants}")
    of_forward, of_backward = {"forward", "draw"}, {"thin", "plan", "list_rows", "tile_gradients", "sum_parts"}
    assert {x["kernel"] for x in lines} == of_forward | of_backward
    assert not [x for x in lines if x["stack"]], "spills"
    assert not [x for x in lines if x["shared"] > shared]
