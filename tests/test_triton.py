"""The Triton backend: its kernels on a GPU or else interpreted on the CPU, and compiled for GPUs that need not be there."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, case, check_errors, check_unbiased, float64, inf, nan, rms, same, shaped
from test_sus_attention import naive
from torch import Tensor

from backends import reference, triton
from backends.reference import UNIT
from model import GPT, GPTConfig
from sus_attn import resolve_backend, sus_attention

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parents[1]
HALVES = [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter can't do the latter
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, of what is masked


class Drawn(NamedTuple):
    keys: Tensor
    weights: Tensor
    order: Tensor
    starts: Tensor


class Result(NamedTuple):
    """All on the CPU. m: 1/q of the first draw where it keeps an entry, else 0; w: W there; thinned: m after the second."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    stats: Tensor
    drawn: Drawn
    m: Tensor
    w: Tensor
    thinned: Tensor


def run(tensors, c=5.0, seed=1, sampler="strided", c_max=None, u=None) -> Result:
    """Forward and backward, in one round, with what stands between the kernels."""
    q, k, v, grad_out = (x.to(DEVICE) for x in tensors)
    c_max, scale, seen, launch = c if c_max is None else c_max, q.shape[3] ** -0.5, {}, triton._launch
    keys = order = starts = None

    def spy(name, q, programs, *args, **constants):
        nonlocal keys, order, starts
        launch(name, q, programs, *args, **constants)
        if name == "draw":
            keys, order, starts = (x.clone().cpu() for x in args[6:9])
        if name == "slopes":
            seen["drawn"] = Drawn(keys, args[8].clone().cpu(), order, starts)
        if name == "thin":
            seen["w"] = args[1].clone().cpu()

    u = None if u is None else u.to(DEVICE)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(triton, "_launch", spy)
        out, lse = triton.forward(q, k, v, scale)
        grads = triton.backward(grad_out, q, k, v, out, lse, scale, torch.tensor(c), c_max, torch.tensor(seed), u, True, sampler)
    B, H, T, _ = q.shape
    drawn = seen["drawn"]
    keys, weights, w = (x.view(B, H, T, -1) for x in (drawn.keys, drawn.weights, seen["w"]))
    kept, row = (keys >= 0).cumprod(-1).bool(), torch.arange(T)[:, None]
    assert (kept.all(-1) | (keys == -1).any(-1)).all() and (keys <= row)[kept].all() and (weights > 0)[kept].all()
    where = (*kept.nonzero().T[:3], keys[kept].long())
    m, whole, thinned = torch.zeros(3, B, H, T, T)
    whole[where] = weights[kept]
    m[where] = UNIT / ((weights[kept] * (reference.proposal_c(c, sampler) * UNIT)).clamp(max=UNIT - 1).int() + 1).float()
    thinned[where] = w[kept] / weights[kept]
    return Result(out.cpu(), lse.cpu(), *(x.cpu() for x in grads), drawn, m, whole, thinned)


def grads(tensors, c=5.0, seed=1, **kwargs):
    """out, dq, dk, dv of the operator."""
    q, k, v, grad_out = (x.detach().to(DEVICE).requires_grad_() for x in tensors)
    out = sus_attention(q, k, v, c, seed=seed, backend="triton", **kwargs)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out.detach())


# -- the kernels against float64 ---------------------------------------------------------------

CASES = [  # B, H, K, T, D, weights
    pytest.param(*x, id="B{}H{}K{}T{}D{}-{}".format(*x))
    for x in [
        (1, 1, 1, 1, 32, "random"), (2, 2, 1, 2, 64, "random"), (1, 2, 2, 63, 32, "peaked"), (1, 2, 1, 64, 64, "flat"),
        (1, 1, 1, 65, 128, "sink"), (1, 1, 1, 129, 64, "one-hot"), (2, 2, 1, 131, 32, "random"), (1, 1, 1, 80, 128, "high"),
        (1, 1, 1, 200, 32, "sink"), (1, 1, 1, 70, 64, "low"),
    ]
]  # fmt: skip


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
    truth, plain = naive(*float64(tensors), ours.m.double()), naive(*tensors, ours.m.to(dtype))
    # W = exp(s - lse) with s summed anew, in another order: where scores are large, it has their rounding
    rounding = 2 * torch.finfo(torch.float32).eps * lse.abs().max()
    check_errors(["dq", "dk", "dv"], ours[2:5], plain[1:4], truth[1:4], dtype, beside=rounding)
    assert ours.stats[:2].tolist() == [(ours.m > 0).sum(), 0]
    torch.testing.assert_close(ours.thinned, ours.m, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, poisoned):
    views = [LAYOUTS[layout](x) for x in case(2, 2, 1, 70, 32)]
    copies = [x.clone(memory_format=torch.contiguous_format) for x in views]
    assert same(run(views)[:5], run(copies)[:5])


# -- the draw ----------------------------------------------------------------------------------


def strided(w, c, seed=1, u=None):
    """The entries that the reference keeps of weights (B, H, T, T)."""
    m, dropped = reference.sus_multiplier(torch.tensor(c), c, "strided", torch.tensor(seed), u, w.shape[-1])(w, range(w.shape[-1]))
    assert dropped == 0
    return m > 0


def check_draw(ours, want, c):
    """But for a stray rounding of a running sum; and within the slots."""
    kept, T = ours.m > 0, want.shape[-1]
    assert (kept & want).sum() >= 0.99 * (kept | want).sum()
    assert kept.sum(-1).max() <= triton.slots_of(c, T) and ours.stats[1] == 0


@pytest.mark.parametrize("c, c_max", [(0.3, None), (4.5, 20.0), (25.0, None), (5.0, inf)])
@pytest.mark.parametrize("weights", ["random", "flat", "sink"])
def test_draw_is_that_of_the_reference(weights, c, c_max, poisoned):
    tensors = shaped(weights, 1, 2, 1, 135, 32, torch.float32)
    ours, whole = run(tensors, c, c_max=c_max), naive(*tensors)[-1]
    check_draw(ours, strided(whole, c), c)
    torch.testing.assert_close(ours.w[ours.m > 0], whole[ours.m > 0], rtol=1e-4, atol=0)


def test_draw_with_given_uniforms(poisoned):
    tensors = case(2, 2, 1, 40, 32)
    for u in (torch.full((2, 2, 40), UNIT - 1), torch.randint(UNIT, (40, 2, 2)).movedim(0, 2)):
        check_draw(run(tensors, 7.0, u=u), strided(naive(*tensors)[-1], 7.0, u=u), 7.0)


def test_draws_follow_the_whole_seed():
    tensors, seeds = case(1, 2, 1, 40, 32), (1, 2, 2**32 + 1, 2**63 - 1, -1)
    masks = [run(tensors, 4.0, seed) for seed in seeds]
    for seed, ours in zip(seeds, masks):
        check_draw(ours, strided(naive(*tensors)[-1], 4.0, seed), 4.0)
    assert len({tuple(ours.m.flatten().tolist()) for ours in masks}) == len(seeds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_order_by_tile(dtype, poisoned):
    """Every entry of a block stands once in its order, with those of its tile."""
    T, slots, tile = 200, triton.slots_of(5.0, 200), triton.region(dtype.itemsize)
    BM, TILE = tile["BM"], tile["TILE"]
    _, _, order, starts = drawn = run(case(1, 2, 1, T, 32, dtype)).drawn
    for head in range(2):
        for block in range(-(-T // BM)):
            entries = slice(block * BM * slots, (block + 1) * BM * slots)
            keys, places = drawn.keys[head].flatten()[entries], order[head].flatten()[entries]
            found = []
            for t in range(-(-min(T, (block + 1) * BM) // TILE)):
                of_tile = places[starts[head, t, block] : starts[head, t + 1, block]].long()
                assert (keys[of_tile] // TILE == t).all()
                found += of_tile.tolist()
            assert sorted(found) == (keys >= 0).nonzero().flatten().tolist()


def test_infinite_c_is_exact():
    for sampler in triton.SAMPLERS:
        tensors = case(1, 2, 1, 90, 32)
        for a, b in zip(run(tensors, inf, sampler=sampler)[2:5], naive(*float64(tensors))[1:4]):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_unbiased_by_integrating_over_u():
    N = 128
    tensors = case(1, 2, 1, 8, 32)
    tensors[0] /= 3
    u = ((torch.arange(N, dtype=torch.float64) + 0.5) / N)[:, None, None]
    draws = grads([x.expand(N, -1, -1, -1) for x in tensors], 1.5, u=u, sampler="strided")[1:]
    for draw, exact in zip(draws, naive(*float64(tensors))[1:4]):
        assert (draw.cpu().double().mean(0) - exact[0]).norm() / exact.norm() < 0.01
        assert (draw[0].cpu() - exact[0]).norm() / exact.norm() > 0.1  # one draw alone is far off


# -- thinning ----------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("B, H, K, T, D, weights", [(1, 1, 1, 1, 32, "random"), (2, 2, 1, 75, 64, "sink"), (1, 2, 2, 130, 32, "peaked")])
def test_thinned_backward_under_its_own_mask(B, H, K, T, D, weights, dtype, poisoned):
    tensors = shaped(weights, B, H, K, T, D, dtype)
    ours = run(tensors, sampler="weighted")
    lse = ours.lse
    truth, plain = naive(*float64(tensors), ours.thinned.double()), naive(*tensors, ours.thinned.to(dtype))
    # W = exp(s - lse) with s summed anew, in another order: where scores are large, it has their rounding
    rounding = 2 * torch.finfo(torch.float32).eps * lse.abs().max()
    check_errors(["dq", "dk", "dv"], ours[2:5], plain[1:4], truth[1:4], dtype, beside=rounding)
    assert ours.stats[:2].tolist() == [(ours.thinned > 0).sum(), 0]


@pytest.mark.parametrize("c, T", [(6.0, 150), (140.0, 300)])  # the second: more proposals than 32 bits can add up
def test_thinning_is_that_of_the_reference(c, T):
    """Of the same proposals the same ones are kept, but for those that float32's rounding decides."""
    tensors = q, k, v, grad_out = case(1, 2, 1, T, 32)
    grad_out *= torch.rand(1, 2, T, 1, generator=torch.Generator().manual_seed(3)) ** 3  # rows of unequal weight
    ours = run(tensors, c, sampler="weighted")

    def again(weights, rows, known):
        at = slice(rows.start, rows.stop), slice(weights.shape[-1])
        proposed, w = ours.m[:, :, *at], ours.w[:, :, *at]
        units = (UNIT / proposed).nan_to_num(0, 0, 0).round().int()
        r = reference.thinning_units(units > 0, w, units, torch.tensor(c), "weighted", known)
        u = reference.row_uniforms(torch.tensor(1), 1, 2, rows, "cpu", reference.STREAM_THINNING)
        # the second draw goes through a row's entries in the order of the slots
        slot = ours.drawn.keys.view(1, 2, T, -1)[:, :, at[0]].long().clamp(0, weights.shape[-1] - 1)
        some = (ours.drawn.keys.view(1, 2, T, -1)[:, :, at[0]] >= 0).cumprod(-1).bool()
        keep, _ = reference.keep_systematic(r.gather(-1, slot) * some, u, T)
        kept = torch.zeros_like(proposed).scatter_add_(-1, slot, (keep & some).float()) > 0
        want[:, :, *at] = torch.where(kept, proposed * (UNIT / r), 0)
        return want[:, :, *at], 0

    want = torch.zeros(1, 2, T, T)
    theirs = reference.backward(grad_out, q, k, v, ours.out, ours.lse, again, True, 32**-0.5, with_stats=True)
    both = (want > 0) & (ours.thinned > 0)
    assert both.sum() >= 0.995 * ((want > 0) | (ours.thinned > 0)).sum()
    torch.testing.assert_close(ours.thinned[both], want[both], rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.stats, theirs[3], rtol=0.01, atol=0)
    assert both.sum() < 0.95 * (ours.m > 0).sum()  # it does thin


@pytest.mark.parametrize("sampler, K, dtype", [("strided", 1, torch.float32), ("weighted", 2, torch.float16)])
def test_unbiased_over_seeds(sampler, K, dtype):
    tensors = case(1, 2, K, 24, 32, dtype)
    tensors[0] /= 2
    tensors[3] *= torch.arange(24)[:, None] / 12
    many = [x.expand(16, -1, -1, -1) for x in tensors]
    check_unbiased(lambda seed: [x.cpu() for x in grads(many, 2.0, seed, sampler=sampler)[1:]], tensors, seeds=8)


# -- rounds, repetition, what isn't finite -----------------------------------------------------


@pytest.mark.parametrize("sampler", triton.SAMPLERS)
def test_rounds_and_repetition_change_no_bit(monkeypatch, sampler, poisoned):
    tensors = case(2, 4, 2, 70, 32)
    whole = grads(tensors, sampler=sampler)
    assert same(grads(tensors, sampler=sampler), whole)
    monkeypatch.setattr(triton, "ROUND_ENTRIES", 1)  # one key/value head at a time
    rounds, launch = [], triton._launch
    monkeypatch.setattr(triton, "_launch", lambda name, *args, **kwargs: (rounds.append(name), launch(name, *args, **kwargs)))
    stats = torch.empty(3, device=DEVICE)
    assert same(grads(tensors, sampler=sampler, stats=stats), whole)
    assert rounds.count("draw") == 4 and stats[0] > 0


@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize("which", ["q", "k", "v", "grad_out"])
def test_what_is_not_finite_is_not_hidden(which, value, poisoned):
    T, at = 100, 80
    tensors = dict(zip(("q", "k", "v", "grad_out"), case(1, 1, 1, T, 32)))
    tensors[which][0, 0, at, 3] = value
    tensors = list(tensors.values())
    ours = run(tensors, sampler="weighted")
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
    out, lse = triton.forward(q, k, v, 0.2)
    *gradients, _ = triton.backward(grad_out, q, k, v, out, lse, 0.2, torch.tensor(c), 8.0, torch.tensor(1), None)
    assert all(x.isnan().all() for x in gradients)


# -- the operator ------------------------------------------------------------------------------


def test_nothing_is_kept_for_the_backward_but_the_log_sum_exp():
    saved = []
    q, k, v, grad_out = (x.to(DEVICE).requires_grad_() for x in case(1, 2, 1, 70, 32))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        sus_attention(q, k, v, 5.0, seed=1, backend="triton")
    sizes = sorted(x.numel() for x in saved if x.numel() > 1)
    assert sizes == sorted([q.numel(), k.numel(), v.numel(), q.numel(), q.numel() // 32])  # q, k, v, out, lse


def test_compiled_without_a_graph_break():
    tensors = case(1, 2, 1, 70, 32)

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
    (dict(c_max=inf), "up to inf entries"),
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
        model = GPT(GPTConfig(block_size=48, vocab_size=65, n_layer=2, n_head=2, n_embd=64, bias=False, pos="rope", norm="rmsnorm",
                              attn_backward="sus", sus_c=4.0, sus_backend=backend, sus_sampler="strided")).to(DEVICE)  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        x = torch.randint(65, (2, 49)).to(DEVICE)
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
    done = subprocess.run([sys.executable, ROOT / "tests" / "compile_triton.py", str(capability)], text=True, capture_output=True,
                          env={**env, "TRITON_CACHE_DIR": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    print(f"\nsm_{capability}: kernel, dtype, D, warps, stages: registers a thread, bytes of stack, bytes of shared memory; "
          "instructions of loops; constants")
    for x in lines:
        print(f"{x['kernel']:16}{x['dtype']:9}{x['D']:4}{x['warps']:3}{x['stages']:3}:{x['registers']:4}{x['stack']:4}{x['shared']:8}  {x['loops']}  "
              + ", ".join(f"{k}={v}" for k, v in x["constants"].items()))  # fmt: skip
    assert {x["kernel"] for x in lines} == {"forward", "draw", "slopes", "thin", "query_gradients", "key_gradients"}
    assert not [x for x in lines if x["stack"]], "spills"
    assert not [x for x in lines if x["shared"] > shared]
