"""The Triton backend: its kernels on a GPU or else interpreted on the CPU, and compiled for GPUs that need not be
there.
"""

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
from test_sus_attention import naive

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parents[1]
HALVES = [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter can't do the latter
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, of what is masked


class Result(NamedTuple):
    """All on the CPU. tiles, masses: the proposals. kept: what their tiles weigh after thinning, else 0. m: that as a
    mask.
    """

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    stats: Tensor
    tiles: Tensor
    masses: Tensor
    kept: Tensor
    m: Tensor


def run(tensors, c=1.5, seed=1, c_max=None, u=None) -> Result:
    """Forward and backward, in one round, with what stands between the kernels."""
    q, k, v, grad_out = (x.to(DEVICE) for x in tensors)
    c_max, scale, launch, seen = c if c_max is None else c_max, q.shape[3] ** -0.5, triton._launch, []

    def spy(name, q, programs, *args, **constants):
        launch(name, q, programs, *args, **constants)
        if name == "thin":
            seen.append(args[8].cpu().clone())

    u = None if u is None else u.to(DEVICE)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(triton, "_launch", spy)
        out, lse, tiles, masses = triton.forward(q, k, v, scale, True, torch.tensor(c), c_max, torch.tensor(seed), u)
        grads = triton.backward(
            grad_out, q, k, v, out, lse, tiles, masses, scale, torch.tensor(c), c_max, torch.tensor(seed), True
        )
    T, (kept,) = q.shape[2], seen
    tiles, kept = tiles.cpu(), kept.view(tiles.shape)
    proposed = tiles >= 0
    assert torch.equal(proposed, proposed.cumprod(-1).bool()) and (tiles.diff(dim=-1)[proposed[..., 1:]] > 0).all()
    assert (tiles[proposed] <= (torch.arange(T) // TILE)[:, None].expand_as(tiles)[proposed]).all()
    assert not kept[~proposed].any()
    return Result(out.cpu(), lse.cpu(), *(x.cpu() for x in grads), tiles, masses.cpu(), kept, mask_of(tiles, kept, T))


def mask_of(tiles, values, T):
    """(B, H, T, T): a tile's value on all keys of it which the row sees."""
    of_tiles = torch.zeros(*tiles.shape[:3], -(-T // TILE) + 1)
    of_tiles.scatter_(
        -1, tiles.long() % of_tiles.shape[-1], torch.where(tiles >= 0, values, 0)
    )  # -1: the last, which is none
    return of_tiles.repeat_interleave(TILE, -1)[..., :T].tril()


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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, poisoned):
    views = [LAYOUTS[layout](x) for x in case(2, 2, 1, 70, 32)]
    copies = [x.clone(memory_format=torch.contiguous_format) for x in views]
    for a, b in zip(run(views)[:5], run(copies)[:5]):  # torch's own norm of a row differs by a rounding between strides
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# -- the draw ----------------------------------------------------------------------------------


def check_draw(ours, tensors, c, seed=1, u=None, c_max=None):
    """The proposals beside the reference's: the same but where the forward's rough logarithm decides."""
    q, T = tensors[0], tensors[0].shape[2]
    mass = reference.tile_masses(naive(*tensors)[-1])  # (B, H, T, tiles)
    units = reference.inclusion_units(mass, torch.tensor(KAPPA * c))
    u = reference.row_uniforms(torch.tensor(seed), *q.shape[:2], range(T), "cpu") if u is None else u
    want, _ = reference.keep_systematic(units, u, T)
    got = torch.zeros(*want.shape[:-1], want.shape[-1] + 1, dtype=torch.bool)
    got = got.scatter_(-1, ours.tiles.long() % got.shape[-1], ours.tiles >= 0)[..., :-1]
    assert (got & want).sum() >= 0.95 * (got | want).sum()
    assert ours.tiles.shape[-1] == reference.tile_slots(c_max or c, T)
    rows = (ours.tiles >= 0).nonzero()[:, :3].T
    torch.testing.assert_close(
        ours.masses[ours.tiles >= 0], mass[*rows, ours.tiles[ours.tiles >= 0].long()], rtol=0.02, atol=1e-30
    )


@pytest.mark.parametrize("c, c_max", [(0.3, None), (1.5, 2.5), (8.0, None), (1.2, inf)])
@pytest.mark.parametrize("weights", ["random", "flat", "sink"])
def test_draw_is_that_of_the_reference(weights, c, c_max, poisoned):
    tensors = shaped(weights, 1, 2, 1, 330, 32, torch.float32)
    check_draw(run(tensors, c, c_max=c_max), tensors, c, c_max=c_max)


def test_draw_with_given_uniforms(poisoned):
    tensors = shaped("flat", 2, 2, 1, 200, 32, torch.float32)
    for u in (torch.full((2, 2, 200), UNIT - 1), torch.randint(UNIT, (200, 2, 2)).movedim(0, 2)):
        check_draw(run(tensors, 0.8, u=u), tensors, 0.8, u=u)


def test_draws_follow_the_whole_seed():
    tensors, seeds = shaped("flat", 1, 2, 1, 200, 32, torch.float32), (1, 2, 2**32 + 1, 2**63 - 1, -1)
    found = [run(tensors, 0.7, seed) for seed in seeds]
    for seed, ours in zip(seeds, found):
        check_draw(ours, tensors, 0.7, seed)
    assert (
        len({tuple(ours.tiles.flatten().tolist()) for ours in found})
        == len({tuple(ours.kept.flatten().tolist()) for ours in found})
        == 5
    )


def test_infinite_c_is_exact():
    tensors = case(1, 2, 1, 200, 32)
    for a, b in zip(run(tensors, inf)[2:5], naive(*float64(tensors))[1:4]):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


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
    keep, _ = reference.keep_systematic(
        r, reference.row_uniforms(torch.tensor(1), 1, 2, range(T), "cpu", reference.STREAM_THINNING), T
    )
    both = keep & (ours.kept > 0)
    assert both.sum() >= 0.99 * (keep | (ours.kept > 0)).sum() and both.sum() < 0.8 * proposed.sum()
    torch.testing.assert_close(ours.kept[both], (UNIT / units * (UNIT / r))[both], rtol=1e-4, atol=0)

    def drawn(w, rows, known):
        return ours.m[:, :, rows.start : rows.stop, : w.shape[-1]], 0

    theirs = reference.backward(tensors[3], *tensors[:3], ours.out, ours.lse, drawn, True, 32**-0.5, with_stats=True)
    torch.testing.assert_close(ours.stats, theirs[3], rtol=1e-3, atol=0)


def test_unbiased_over_seeds():
    tensors = case(1, 2, 1, 75, 32)
    tensors[0] /= 3
    tensors[3] *= torch.arange(75)[:, None] / 40
    many = [x.expand(16, -1, -1, -1) for x in tensors]
    check_unbiased(lambda seed: [x.cpu() for x in grads(many, 0.4, seed)[1:]], tensors, seeds=5)


def test_what_is_kept_fits(poisoned):
    """A row that by a rare draw would keep more than its share of `parts` is thinned more, without a bias."""
    T, c = 640, 1.5
    tensors = shaped("flat", 1, 1, 1, T, 32, torch.float32)
    q, k, v, _ = (x.to(DEVICE) for x in tensors)
    out, lse, tiles, masses = triton.forward(q, k, v, 1.0, True, torch.tensor(c), c, torch.tensor(1), None)
    slots = tiles.shape[-1]
    late = slots * TILE  # rows from here on propose as many as there is room for; each has an aim of a half
    tiles[:, :, late:], masses[:, :, late:] = torch.arange(slots, dtype=torch.int32), 0.3 / c
    launch, seen = triton._launch, {}

    def spy(name, q, programs, *args, **constants):
        launch(name, q, programs, *args, **constants)
        if name == "thin":
            seen["w"], seen["counts"] = args[8].cpu().clone(), args[10].cpu().clone()

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(triton, "_launch", spy)
        triton.backward(torch.ones_like(q), q, k, v, out, lse, tiles, masses, 1.0, torch.tensor(c), c, torch.tensor(1))
    kept = (seen["w"] > 0).sum(-1)
    assert seen["counts"].sum() == kept.sum() <= triton.parts_of(c, T) < T * slots
    assert kept.max() <= 1.125 * c + 2 and slots / 2 > 1.125 * c
    aim = (1.125 * c + 1) / slots  # instead of a half, what fits
    assert seen["w"][:, late:].max() == pytest.approx(1 / 0.6 / min(0.5, aim), rel=1e-3)


# -- rounds, repetition, what isn't finite -----------------------------------------------------


def test_rounds_and_repetition_change_no_bit(monkeypatch, poisoned):
    tensors = shaped("flat", 1, 4, 2, 300, 32, torch.float32)
    whole = grads(tensors)
    assert same(grads(tensors), whole)
    monkeypatch.setattr(triton, "ROUND", 1)  # one key/value head at a time
    monkeypatch.setattr(triton, "TABLE", 1), monkeypatch.setattr(triton, "PROGRAMS", 1)  # 128 rows at a time
    rounds, launch = [], triton._launch
    monkeypatch.setattr(
        triton, "_launch", lambda name, *args, **kwargs: (rounds.append(name), launch(name, *args, **kwargs))
    )
    stats = torch.empty(3, device=DEVICE)
    assert same(grads(tensors, stats=stats), whole)
    assert rounds.count("forward") == rounds.count("draw") == 12 and rounds.count("thin") == 2 and stats[0] > 0


def test_a_tile_that_many_rows_keep_is_several_jobs(monkeypatch, poisoned):
    tensors = shaped("sink", 1, 2, 1, 300, 32, torch.float32)
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
    q = torch.zeros(1, 1, T, 32, device=DEVICE)
    triton._launch(
        "list_rows", q, regions, bits.int().to(DEVICE), counts.to(DEVICE), ends.to(DEVICE), listed, T, bits.shape[1]
    )
    assert listed.tolist() == torch.cat([*(column.nonzero()[:, 0] for column in keeps.T), torch.tensor([-1])]).tolist()


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


@pytest.mark.parametrize("c", [nan, -1.0, 0.0])
def test_a_c_that_is_no_retention_gives_no_gradients(c):
    q, k, v, grad_out = (x.to(DEVICE) for x in case(1, 2, 1, 70, 32))
    saved = triton.forward(q, k, v, 0.2, True, torch.tensor(c), 8.0, torch.tensor(1), None)
    *gradients, _ = triton.backward(grad_out, q, k, v, *saved, 0.2, torch.tensor(c), 8.0, torch.tensor(1))
    assert all(x.isnan().all() for x in gradients)


# -- the operator ------------------------------------------------------------------------------


def test_what_is_kept_for_the_backward():
    saved = []
    q, k, v, grad_out = (x.to(DEVICE).requires_grad_() for x in case(1, 2, 1, 330, 32))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        sus_attention(q, k, v, 1.2, seed=1, backend="triton")
    sizes = sorted(x.numel() for x in saved if x.numel() > 1)
    rows, slots = 2 * 330, math.ceil(2 * 1.2) + 1
    assert sizes == sorted(
        [q.numel(), k.numel(), v.numel(), q.numel(), rows, rows * slots, rows * slots]
    )  # q, k, v, out, lse, the proposals
    with torch.no_grad():
        assert not triton.forward(q, k, v, 1.0, False, torch.tensor(1.2), 1.2, torch.tensor(1), None)[2].numel()


def test_compiled_without_a_graph_break():
    tensors = case(1, 2, 1, 200, 32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(q, k, v, c, seed):
        return sus_attention(q, k, v, c, c_max=8.0, seed=seed, backend="triton") * 1.0

    q, k, v, grad_out = (x.to(DEVICE).requires_grad_() for x in tensors)
    for seed in (1, 2):
        out = f(q, k, v, torch.tensor(5.0, device=DEVICE), torch.tensor(seed, device=DEVICE))
        got = out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out.detach())
        assert same(got, grads(tensors, 5.0, seed, c_max=8.0))


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
    (dict(is_causal=False), "causal"),
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


def test_without_a_gpu_it_says_what_it_needs():
    code = "import torch, sus_attn; print(sus_attn.resolve_backend('triton', 'cpu', torch.float32, 64))"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode and "backend='triton' can't be had: it is for CUDA, not cpu" in done.stderr


def test_a_model_trains_as_with_the_reference():
    """Same draws, so the same losses, but for an entry here and there that rounding decides."""
    losses = {}
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        model = GPT(
            GPTConfig(
                block_size=160,
                vocab_size=65,
                n_layer=2,
                n_head=2,
                n_embd=64,
                bias=False,
                pos="rope",
                norm="rmsnorm",
                attn_backward="sus",
                sus_c=0.8,
                sus_backend=backend,
            )
        ).to(DEVICE)
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


# -- compiled for GPUs that need not be there --------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("capability, shared", [(80, 163 * 1024), (90, 227 * 1024)])  # A100, H100 and H200
def test_every_configuration_compiles_and_spills_nothing(capability, shared, tmp_path):
    """Its registers suffice, and a block's shared memory is there. Prints what each takes (pytest -s)."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "compile_triton.py", str(capability)],
        text=True,
        capture_output=True,
        env={**env, "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    print(
        f"\nsm_{capability}: kernel, dtype, D, warps, stages: registers a thread, bytes of stack, bytes of shared "
        "memory; instructions of loops; constants"
    )
    for x in lines:
        constants = ", ".join(f"{k}={v}" for k, v in x["constants"].items())
        print(
            f"{x['kernel']:16}{x['dtype']:9}{x['D']:4}{x['warps']:3}{x['stages']:3}:{x['registers']:4}{x['stack']:4}"
            f"{x['shared']:8}  {x['loops']}  {constants}"
        )
    assert {x["kernel"] for x in lines} == {
        "forward",
        "draw",
        "thin",
        "list_rows",
        "tile_gradients",
        "query_gradients",
        "key_gradients",
    }
    assert not [x for x in lines if x["stack"]], "spills"
    assert not [x for x in lines if x["shared"] > shared]
