"""The same operator and model on a GPU, held against the CPU. Skipped where there is none."""

import math

import pytest
import torch

from backprop import loss_and_gradients
from lowrank_attn import lowrank_attention
from model import GPT, GPTConfig
from sus_attn import sus_attention
from training.device import Device
from training.optimizer import make_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MODEL = dict(block_size=256, vocab_size=257, n_layer=2, n_head=4, n_kv_head=2, n_embd=128, bias=False)
MODEL |= dict(pos="rope", norm="rmsnorm")


def inputs(device, dtype, B=2, Hq=4, Hkv=2, T=200, D=64):
    g = torch.Generator().manual_seed(0)
    randn = lambda H: torch.randn(B, H, T, D, generator=g, dtype=torch.float64).to(device, dtype)
    q, k, v, grad_out = randn(Hq), randn(Hkv), randn(Hkv), randn(Hq)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad_out


def grads(q, k, v, grad_out, c, **kwargs):
    out = sus_attention(q, k, v, c, **kwargs)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("sampler, c", [("tiles", 0.8), ("systematic", 8.0), ("poisson", 8.0)])
def test_the_same_seed_gives_the_same_gradient_as_on_the_cpu(sampler, c, is_causal):
    """In float64 the masks agree but for a stray rounding of an exp."""
    kwargs = dict(c=c, seed=3, sampler=sampler, is_causal=is_causal)
    for a, b in zip(grads(*inputs("cuda", torch.float64), **kwargs), grads(*inputs("cpu", torch.float64), **kwargs)):
        assert (a.cpu() - b).norm() / b.norm() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_infinite_c_is_exact(dtype, is_causal):
    """Root mean square error against float64: at most twice that of SDPA at this dtype."""
    tensors = inputs("cuda", dtype)
    *x64, grad_out = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]

    def sdpa(q, k, v, grad_out):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)

    truth, theirs = sdpa(*x64, grad_out), sdpa(*tensors)
    ours = grads(*tensors, math.inf, seed=1, is_causal=is_causal)
    for a, b, t in zip(ours, theirs, truth):
        assert (a - t).square().mean() <= 4 * (b - t).square().mean()


def test_unbiased_over_seeds():
    q, k, v, grad_out = (x[:1, :, :48].detach().expand(256, -1, -1, -1) for x in inputs("cuda", torch.float32))
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    exact = grads(q[:1], k[:1], v[:1], grad_out[:1], math.inf, seed=0)[1:]
    draws = [grads(q, k, v, grad_out, 0.4, seed=s)[1:] for s in range(8)]
    for i, x in enumerate(exact):
        p = torch.randn(16, x.numel(), device="cuda")
        d = torch.cat([one[i].flatten(1) for one in draws]) @ p.T
        z = (d.mean(0) - p @ x.flatten()) / (d.std(0) / math.sqrt(len(d)))
        assert z.abs().max() < 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_training_under_autocast(dtype):
    """Three compiled steps of a small GPT with SUS, new seeds and no recompilation; the loss equals the eager one."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = GPTConfig(**MODEL, qk_norm=True, attn_backward="sus", sus_c=0.8, activation_checkpointing=True)
    model = GPT(config).cuda()
    compiled = torch.compile(model)
    optimizer = make_optimizer(model, 0.1, 1e-3, (0.9, 0.95), "cuda")
    x = torch.randint(257, (2, 256), device="cuda")
    for step in range(3):
        seed = torch.tensor(step)
        with torch.autocast("cuda", dtype=dtype):
            eager = model(x, x, sus_seed=seed)[1]
            loss = compiled(x, x, sus_seed=seed)[1]
        assert abs(loss.item() - eager.item()) < 0.05
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("approximate_forward", [True, False])
def test_lowrank_as_on_the_cpu(approximate_forward):
    def ours(device):
        q, k, v, grad_out = inputs(device, torch.float64, T=300, D=8)
        out = lowrank_attention(q, k, v, 2, approximate_forward=approximate_forward)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)

    for a, b in zip(ours("cuda"), ours("cpu")):
        assert (a.cpu() - b).norm() / b.norm() < 1e-9


@pytest.mark.parametrize("attn_backward", ["exact", "sus"])
def test_the_analytic_backward_gives_autograd_s_gradients(attn_backward):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**MODEL, attn_backward=attn_backward, sus_c=0.8)).cuda().double()
    x, seed = torch.randint(257, (2, 200), device="cuda"), torch.tensor(3)
    loss = model(x, x, sus_seed=seed)[1]
    loss.backward()
    truth = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    assert abs(loss_and_gradients(model, x, x, sus_seed=seed) - loss) < 1e-12
    for name, p in model.named_parameters():
        assert (p.grad - truth[name]).norm() <= 1e-9 * truth[name].norm(), name


@pytest.mark.parametrize("keys", [dict(attn_backward="exact"), dict(attn_backward="sus", sus_c=math.inf)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_documents_and_windows_as_on_the_cpu(keys, dtype):
    """By torch's varlen_attn in bfloat16, a call for each document in float32, and SUS's kernels."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**MODEL, **keys, attn_window=40, window_pattern="SL"))
    x = torch.randint(257, (2, 200))
    documents = torch.tensor([[0] * 90 + [90] * 1 + [91] * 109, [0] * 200], dtype=torch.int32)
    found = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        with torch.autocast(device, dtype=dtype, enabled=device == "cuda" and dtype != torch.float32):
            _, loss = model(x.to(device), x.to(device), documents=documents.to(device))
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten().cpu() for p in model.parameters()])))
    (want, truth), (loss, gradient) = found
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-3
    assert abs(loss - want) < tolerance and (gradient - truth).norm() < tolerance * truth.norm()


def test_what_is_kept_lies_in_the_hosts_memory():
    """The same bits, and less of the GPU's memory."""
    device, found = Device(torch.device("cuda"), torch.bfloat16, ""), []
    for offload in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**MODEL | dict(block_size=4096), attn_backward="sus", offload_activations=offload)).cuda()
        x = torch.randint(257, (1, 4096), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with device.training_forward(offload):
            _, loss = model(x, x, sus_seed=torch.tensor(1))
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        found.append((loss.item(), kept, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, kept, gradient), (loss_moved, kept_moved, moved) = found
    assert loss == loss_moved and torch.equal(gradient, moved) and kept_moved < 0.3 * kept


def test_memory_does_not_grow_with_t_squared():
    q, k, v, grad_out = inputs("cuda", torch.bfloat16, B=1, Hq=2, Hkv=2, T=32768)
    torch.cuda.reset_peak_memory_stats()
    grads(q, k, v, grad_out, 4.0, seed=1)
    assert torch.cuda.max_memory_allocated() < 2 * 32768**2 * 4 / 8  # an eighth of the scores in float32


def test_a_training_step_waits_for_nothing():
    """Neither a seed of the CPU, nor a c that changes, nor activation checkpointing makes the CPU wait for the GPU."""
    config = GPTConfig(**MODEL, attn_backward="sus", activation_checkpointing=True, sus_c_max=8.0)
    model = GPT(config).cuda().bfloat16()
    config.sus_c = torch.tensor(4.0, device="cuda")
    x = torch.randint(257, (2, 256), device="cuda")
    documents = torch.zeros(2, 256, dtype=torch.int32, device="cuda")
    documents[:, 100:] = 100
    for seen in (None, documents):
        model(x, x, documents=seen, sus_seed=torch.tensor(1))[1].backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seen in (None, documents):
            model(x, x, documents=seen, sus_seed=torch.tensor(2))[1].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad.isfinite().all() for p in model.parameters())
