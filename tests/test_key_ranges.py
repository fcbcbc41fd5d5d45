"""Key ranges: row i of the queries attends to the keys [lo_i, hi_i). And parts of a whole, which draw what it would."""

import math

import pytest
import torch
import torch.nn.functional as F

from sus_attn import sus_attention
from sus_backends import reference
from sus_backends.reference import TILE
from test_sus_attention import naive

inf = math.inf
BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])
B, H, K, T, N, D = 2, 4, 2, 150, 333, 24


def tensors(T=T, N=N, H=H, K=K, dtype=torch.float32, seed=0):
    """Detached q, k, v, grad_out."""
    g = torch.Generator().manual_seed(seed)
    shapes = (B, H, T, D), (B, K, N, D), (B, K, N, D), (B, H, T, D)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def grads(q, k, v, grad_out, c=inf, **kwargs):
    """[out, dq, dk, dv]."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = sus_attention(q, k, v, c, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)]


def seen_by(ranges, N):
    ranges, key = ranges.view(-1, *ranges.shape[-2:]).clamp(0, N), torch.arange(N)
    return (key >= ranges[..., :1]) & (key < ranges[..., 1:])


def documents(lengths):
    """Causal attention within documents of these lengths, side by side."""
    ends = torch.tensor(lengths).cumsum(0)
    i = torch.arange(int(ends[-1]))
    starts = F.pad(ends, (1, 0))
    return torch.stack([starts[torch.searchsorted(ends, i, right=True)], i + 1], -1).int()


def window(T, size):
    i = torch.arange(T)
    return torch.stack([i + 1 - size, i + 1], -1).int()


def any_ranges(*shape):
    """Unsorted, some empty, some beyond the keys on either side."""
    g = torch.Generator().manual_seed(1)
    lo = torch.randint(-20, N, shape, generator=g)
    ranges = torch.stack([lo, lo + torch.randint(-30, 200, shape, generator=g)], -1).int()
    ranges[..., 5, :], ranges[..., 6, :] = torch.tensor([9, 9]), torch.tensor([70, 71])  # nothing, and one key
    return ranges


# name: (rows, keys, ranges)
CASES = {
    "any": (T, N, any_ranges(T)),
    "by batch": (T, N, any_ranges(B, T)),
    "documents": (T, T, documents([1, 63, 1, 20, 64, 1])),
    "a document longer than a block": (300, 300, documents([7, 290, 3])),
    "window": (N, N, window(N, 50)),
    "one key each": (T, N, torch.stack([torch.arange(T) * 2, torch.arange(T) * 2 + 1], -1).int()),
    "nothing at all": (T, N, torch.zeros(T, 2, dtype=torch.int32)),
    "most see nothing": (T, N, torch.tensor([[100, N]] * T).int() * (torch.arange(T)[:, None] % 73 == 3)),
}
RANGES = pytest.mark.parametrize("rows, keys, ranges", CASES.values(), ids=CASES)


# -- exactness ------------------------------------------------------------------------------------------


@BACKENDS
@RANGES
def test_infinite_c_is_exact(poisoned, backend, rows, keys, ranges):
    x = tensors(rows, keys)
    truth = naive(*(t.double() for t in x), seen=seen_by(ranges, keys))[:4]
    for got, want in zip(grads(*x, key_ranges=ranges, backend=backend), truth, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranges", [any_ranges(7), any_ranges(2, 7)], ids=["all batches", "by batch"])
def test_gradcheck(ranges):
    q, k, v, _ = (x[..., :3].requires_grad_() for x in tensors(7, 9, dtype=torch.float64))
    f = lambda q, k, v: sus_attention(q, k, v, inf, key_ranges=ranges % 10, seed=0)
    assert torch.autograd.gradcheck(f, (q, k, v))


@BACKENDS
@pytest.mark.parametrize("rows, keys", [(T, N), (1, N), (T, T), (N, T), (T, 1)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_without_ranges_the_rows_are_the_last_positions(backend, rows, keys, is_causal):
    x = tensors(rows, keys)
    i, j = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)
    seen = (j <= i if is_causal else torch.ones(rows, keys, dtype=torch.bool))[None]
    for got, want in zip(grads(*x, is_causal=is_causal, backend=backend), naive(*x, seen=seen)[:4], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@BACKENDS
def test_documents_are_as_if_they_stood_alone(backend):
    """In the forward and, at c = inf, in the backward."""
    lengths = [1, 100, 30, 19]
    x = tensors(T, T)
    together = grads(*x, key_ranges=documents(lengths), backend=backend)
    apart = [grads(*parts, backend=backend) for parts in zip(*(t.split(lengths, 2) for t in x), strict=True)]
    for got, want in zip(together, (torch.cat(t, 2) for t in zip(*apart, strict=True)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@BACKENDS
def test_causal_ranges_are_none(backend):
    """Bit for bit."""
    x, i = tensors(N, N), torch.arange(N)
    ranges = torch.stack([0 * i, i + 1], -1).int()
    for c in (inf, 1.5):
        a, b = (grads(*x, c, seed=3, backend=backend, key_ranges=r) for r in (ranges, None))
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


# -- the draw ---------------------------------------------------------------------------------------------


def mask_of(x, ranges, c, seed=5):
    """The reference's draw, 1/q where an entry is kept, for whole weights; all in float64."""
    q, k, v, grad_out = x
    w = naive(*x, seen=seen_by(ranges, k.shape[2]))[4]
    known = reference.Known(reference.row_weights(grad_out).unsqueeze(-1), None, None)
    draw = reference.sus_multiplier(torch.tensor(c), c, "tiles", torch.tensor(seed), None, k.shape[2])
    return draw(w, range(q.shape[2]), known)[0]


@BACKENDS
@RANGES
def test_backward_is_that_under_the_exported_mask(poisoned, backend, rows, keys, ranges):
    """float32 and float64 draw the same here, but for a tile in a few hundred, if at all."""
    c = 0.4  # of 6 tiles
    x = tensors(rows, keys)
    truth = [t.double() for t in x]
    m = mask_of(truth, ranges, c)
    stats = torch.zeros(3)
    got = grads(*x, c, seed=5, key_ranges=ranges, backend=backend, stats=stats)
    want = naive(*truth, m, seen=seen_by(ranges, keys))[:4]
    for a, b in zip(got, want, strict=True):
        wrong = (a - b).abs().amax(-1) > 1e-4
        assert wrong.double().mean() <= 0.02
    assert abs(stats[0] - (m > 0).sum()) <= 0.02 * (m > 0).sum() and stats[1] == 0


@BACKENDS
def test_unbiased_over_seeds(backend):
    """A bias of 4 % of the gradient's norm along it would be found: 400 draws, a standard error of some 1 %."""
    x = tensors(60, 200)
    ranges = any_ranges(60) % 201
    exact = grads(*x, key_ranges=ranges, backend=backend)[1:]
    along = lambda g: torch.stack([(a * b).sum() / (b * b).sum() for a, b in zip(g, exact, strict=True)])
    draws = torch.stack([along(grads(*x, 0.5, seed=s, key_ranges=ranges, backend=backend)[1:]) for s in range(400)])
    error = draws.std(0) / 20
    assert (error < 0.02).all() and ((draws.mean(0) - 1).abs() < 4 * error).all()


@BACKENDS
@RANGES
def test_a_part_of_the_rows_draws_what_the_whole_does(backend, rows, keys, ranges):
    """Its gradients of queries are the whole's, and those of keys add up to the whole's."""
    x = tensors(rows, keys)
    x[3] /= x[3].norm(dim=-1, keepdim=True)  # rows weigh alike, in whatever part they are counted
    ranges = ranges.expand(B, rows, 2).contiguous()
    whole = grads(*x, 0.4, seed=2, key_ranges=ranges, backend=backend)
    dq, dk, dv = [], 0, 0
    for at in torch.arange(rows).split(47):
        q, grad_out, part = x[0][:, :, at], x[3][:, :, at], ranges[:, at]
        got = grads(q, x[1], x[2], grad_out, 0.4, seed=2, key_ranges=part, backend=backend, first_row=int(at[0]))
        dq, dk, dv = [*dq, got[1]], dk + got[2], dv + got[3]
    for got, want in zip((torch.cat(dq, 2), dk, dv), whole[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("sampler", ["tiles", "poisson", "weighted", "rows+values"])
def test_some_of_the_heads_draw_what_all_do(backend, sampler):
    if backend == "cpu" and sampler not in ("tiles", "poisson"):
        pytest.skip("the CPU's kernels don't have it")
    x = tensors(T, T, H=4, K=2)
    c, kwargs = (0.4 if sampler == "tiles" else 9.0), dict(seed=2, backend=backend, sampler=sampler)
    whole = grads(*x, c, **kwargs)
    heads = [t[:, t.shape[1] // 2 :] for t in x]
    part = grads(*heads, c, first_head=2, **kwargs)
    for got, want in zip(part, whole, strict=True):
        torch.testing.assert_close(got, want[:, want.shape[1] // 2 :], rtol=1e-5, atol=1e-6)


@BACKENDS
def test_work_follows_the_ranges(backend, monkeypatch):
    """Keys that no row of a block sees are not looked at: they may be NaN."""
    monkeypatch.setattr(reference, "CPU_BLOCK_ENTRIES", B * H * 4 * TILE * TILE)  # blocks of a tile's rows
    q, k, v, grad_out = tensors(4 * TILE, 4 * TILE)
    k[:, :, : 2 * TILE], v[:, :, : 2 * TILE] = math.nan, math.nan
    got = grads(q, k, v, grad_out, 0.5, seed=1, key_ranges=window(4 * TILE, 30), backend=backend)
    assert all(g[:, :, 3 * TILE :].isfinite().all() for g in got)


# -- the operator -----------------------------------------------------------------------------------------


@BACKENDS
def test_compiled_checkpointed_and_strided(backend):
    torch._dynamo.reset()
    x = tensors(T, T)
    kwargs = dict(key_ranges=documents([100, 50]), seed=4, backend=backend)
    want = grads(*x, 0.5, **kwargs)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in x[:3])
    f = lambda q, k, v: sus_attention(q, k, v, 0.5, **kwargs)
    for attend in (
        torch.compile(f, backend="aot_eager", fullgraph=True),
        lambda *qkv: torch.utils.checkpoint.checkpoint(f, *qkv, use_reentrant=False),
    ):
        out = attend(q, k, v)
        got = [out.detach(), *torch.autograd.grad(out, (q, k, v), x[3])]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def shared_rows(rank, world, port, path):
    """One of `world` processes: every other row is its own. Writes its gradients to path."""
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=world)
    x, half = tensors(), T // 2
    rows = slice(rank * half, (rank + 1) * half)
    part = x[0][:, :, rows], *x[1:3], x[3][:, :, rows] * (1 + torch.arange(T)[rows, None] / T)
    kwargs = dict(key_ranges=any_ranges(T)[rows], first_row=rank * half, group=torch.distributed.group.WORLD)
    results = [grads(*part, 0.4, seed=2, backend=backend, **kwargs) for backend in ("reference", "cpu")]
    torch.save(results, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_that_share_rows_draw_what_one_does(tmp_path):
    """Rows are weighed over both: with weights of its own, each would keep other tiles."""
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(shared_rows, (2, port, tmp_path), 2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    x = tensors()
    x[3] = x[3] * (1 + torch.arange(T)[:, None] / T)
    for n, backend in enumerate(("reference", "cpu")):
        whole = grads(*x, 0.4, seed=2, key_ranges=any_ranges(T), backend=backend)
        (out0, dq0, dk0, dv0), (out1, dq1, dk1, dv1) = parts[0][n], parts[1][n]
        together = torch.cat([out0, out1], 2), torch.cat([dq0, dq1], 2), dk0 + dk1, dv0 + dv1
        for got, want in zip(together, whole, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
