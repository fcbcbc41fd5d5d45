"""What attention costs in a run: one layer's real q, k, v and output gradient, timed alone, exact beside SUS or
low-rank.

Dims: B batch, H query heads, K key/value heads, T tokens, D head dimension.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_attn import lowrank_attention, score_bound, worst_error
from model import GPT
from sus_attn import sus_attention
from training.device import Device

Functions = dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]  # q, k, v -> out, by name


def capture(
    model: GPT, layer: int, x: Tensor, y: Tensor, device: Device, sus_seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (B, H, T, D), k, v (B, K, T, D) and grad_out (B, H, T, D) of one layer's attention, in a training step.

    x, y (B, T) int64: the step's batch. No gradient is stored.
    """
    seen: dict[str, Any] = {}

    def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
        seen["qkv"] = [t.detach() for t in args[:3]]
        seen["out"] = out.requires_grad_()  # below the first adapters nothing asks for its gradient

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


@torch.no_grad()
def largest_score(model: GPT, x: Tensor, device: Device) -> float:
    """The largest absolute score, q . k / sqrt(D), of all heads and layers on x (B, T)."""
    found = []
    handles = [
        block.attn.attend.register_forward_hook(lambda module, args, out: found.append(score_bound(args[0], args[1])))
        for block in model.transformer.h
    ]
    try:
        with device.autocast():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return max(found)


def take_turns(
    functions: Functions, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, device: Device, rounds: int
) -> Iterator[tuple[int, str, float, float]]:
    """Times each functions(q, k, v) and its backward, all by turns: yields (round, name, forward ms, backward ms).

    Every second round goes through the functions in reverse, so that none is always the first. Round 0 is a warm-up.
    A function that makes no graph (under no_grad) has no backward: 0 ms.
    """
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))

    def clock() -> float:
        device.synchronize()
        return time.perf_counter()

    for i in range(rounds):
        for name in reversed(functions) if i % 2 else functions:
            start = clock()
            out = functions[name](q, k, v)
            middle = end = clock()
            if out.requires_grad:
                torch.autograd.grad(out, (q, k, v), grad_out)
                end = clock()
            del out  # with its graph, before the next one makes its own
            yield i, name, 1e3 * (middle - start), 1e3 * (end - middle)


def time_attention(
    functions: Functions, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, device: Device, repeats: int = 3
) -> dict[str, tuple[float, float]]:
    """{name: (forward ms, backward ms)}: medians over `repeats` runs of functions(q, k, v), taking turns."""
    times: dict[str, list] = {name: [] for name in functions}
    for i, name, *pair in take_turns(functions, q, k, v, grad_out, device, repeats + 1):
        if i:
            times[name].append(pair)
    return {name: tuple(map(statistics.median, zip(*pairs))) for name, pairs in times.items()}


def probe_attention(model: GPT, x: Tensor, y: Tensor, device: Device, sus_seed: Tensor | None) -> dict:
    """The probe's line for the record, from the batch (x, y): milliseconds of the middle layer's attention, and, for
    SUS, how many entries a query row keeps and which fraction of the causal ones that is; for low-rank, the largest
    score of all layers, and the largest relative error that its polynomial has up to there.
    """
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
        sus: dict[str, Any] = dict(
            c_max=config.sus_c_max, seed=sus_seed, sampler=config.sus_sampler, backend=config.sus_backend
        )
        functions["sus"] = lambda q, k, v: sus_attention(q, k, v, config.sus_c, **sus)
        q_ = q.detach().requires_grad_()
        torch.autograd.grad(sus_attention(q_, k, v, config.sus_c, stats=stats, **sus), q_, grad_out)
        kept = stats[0].item()
        result["sus/kept_per_row"] = kept / (B * H * T)
        result["sus/kept_fraction"] = kept / (B * H * T * (T + 1) / 2)
    if config.attn_backward == "lowrank":
        approximate = config.lowrank_forward == "approximate"
        functions["lowrank"] = lambda q, k, v: lowrank_attention(
            q, k, v, config.lowrank_degree, approximate_forward=approximate
        )
        result["lowrank/bound"] = largest_score(model, x, device)
        result["lowrank/worst_error"] = worst_error(result["lowrank/bound"], config.lowrank_degree)
    times = time_attention(functions, q, k, v, grad_out, device)
    result["attn/exact_forward_ms"], result["attn/exact_backward_ms"] = times["exact"]
    result["attn/forward_ms"], result["attn/backward_ms"] = times[config.attn_backward]
    return result
