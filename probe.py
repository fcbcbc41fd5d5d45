"""What attention costs in a run: one layer's real q, k, v and output gradient, timed alone, exact beside SUS."""

import statistics
import time

import torch
from torch.nn import functional as F

from device import Device
from model import GPT
from sus_attn import sus_attention


def capture(model: GPT, layer: int, x, y, device: Device, sus_seed):
    """(q, k, v, grad_out) of one layer's attention, in a training step on the batch (x, y). No gradient is stored."""
    seen = {}

    def hook(module, args, out):
        seen["qkv"], seen["out"] = [t.detach() for t in args[:3]], out

    handle = model.transformer.h[layer].attn.attend.register_forward_hook(hook)
    was_training = model.training
    try:
        model.train()
        with device.autocast():
            _, loss = model(x, y, sus_seed=sus_seed)
        # only the gradient of this one tensor: gradients of parameters would wake DDP
        (grad_out,) = torch.autograd.grad(loss, seen["out"])
    finally:
        model.train(was_training)
        handle.remove()
    return *seen["qkv"], grad_out


def time_attention(functions: dict, q, k, v, grad_out, device: Device, repeats: int = 3) -> dict:
    """{name: (forward ms, backward ms)}: medians over `repeats` alternating runs of functions(q, k, v), after a warm-up."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    times = {name: ([], []) for name in functions}

    def clock() -> float:
        device.synchronize()
        return time.perf_counter()

    for i in range(repeats + 1):
        for name, function in functions.items():
            start = clock()
            out = function(q, k, v)
            middle = clock()
            torch.autograd.grad(out, (q, k, v), grad_out)
            end = clock()
            if i:  # the first is the warm-up
                times[name][0].append(1e3 * (middle - start))
                times[name][1].append(1e3 * (end - middle))
    return {name: tuple(statistics.median(t) for t in pair) for name, pair in times.items()}


def probe_attention(model: GPT, x, y, device: Device, sus_seed) -> dict:
    """The probe's line for the record, from the batch (x, y): milliseconds of the middle layer's attention, and, for
    SUS, how many entries a query row keeps and which fraction of the causal ones that is."""
    config = model.config
    q, k, v, grad_out = capture(model, config.n_layer // 2, x, y, device, sus_seed)
    B, H, T, _ = q.shape
    functions = {
        "exact": lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
    }
    result = {}
    if config.attn_backward == "sus":
        stats = torch.zeros(3, device=q.device)
        sus = dict(seed=sus_seed, sampler=config.sus_sampler, backend=config.sus_backend)
        functions["sus"] = lambda q, k, v: sus_attention(q, k, v, config.sus_c, **sus)
        q_ = q.detach().requires_grad_()
        torch.autograd.grad(sus_attention(q_, k, v, config.sus_c, stats=stats, **sus), q_, grad_out)
        kept = stats[0].item()
        result["sus/kept_per_row"] = kept / (B * H * T)
        result["sus/kept_fraction"] = kept / (B * H * T * (T + 1) / 2)
    times = time_attention(functions, q, k, v, grad_out, device)
    result["attn/exact_forward_ms"], result["attn/exact_backward_ms"] = times["exact"]
    result["attn/forward_ms"], result["attn/backward_ms"] = times[config.attn_backward]
    return result
