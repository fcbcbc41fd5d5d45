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

from data.loader import Batch
from exact_attn import Sight, exact_attention
from lowrank_attn import lowrank_attention, score_bound, worst_error
from model import GPT
from sus_attn import sus_attention
from training.device import Device

Functions = dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]  # q, k, v -> out, by name


def capture(
    model: GPT, layer: int, batch: Batch, device: Device, sus_seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Sight]:
    """q (B, H, T, D), k, v (B, K, T, D), grad_out (B, H, T, D) and what rows see, of one layer's attention, in a
    training step on `batch`. No gradient is stored.
    """
    seen: dict[str, Any] = {}

    def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
        seen["qkv"], seen["sight"] = [t.detach() for t in args[:3]], args[4]
        seen["out"] = out.requires_grad_()  # below the first adapters nothing asks for its gradient

    handle = model.transformer.h[layer].attn.attend.register_forward_hook(hook)
    was_training = model.training
    try:
        model.train()
        with device.training_forward(model.config.offload_activations):
            _, loss = model(batch.x, batch.y, documents=batch.documents, sus_seed=sus_seed)
        # only the gradient of this one tensor: gradients of parameters would wake DDP
        (grad_out,) = torch.autograd.grad(loss, seen["out"])
    finally:
        model.train(was_training)
        handle.remove()
    return *seen["qkv"], grad_out, seen["sight"]


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


def probe_attention(model: GPT, batch: Batch, device: Device, sus_seed: Tensor | None) -> dict:
    """The probe's line for the record, from a batch: milliseconds of the middle layer's attention, and, for SUS, how
    many entries a query row keeps and which fraction of those it sees that is; for low-rank, the largest score of all
    layers, and the largest relative error that its polynomial has up to there.
    """
    config = model.config
    q, k, v, grad_out, sight = capture(model, config.n_layer // 2, batch, device, sus_seed)
    B, H, T, _ = q.shape
    functions = {"exact": lambda q, k, v: exact_attention(q, k, v, sight)}
    result = {}
    if config.attn_backward == "sus":
        stats = torch.zeros(3, device=q.device)
        sus: dict[str, Any] = dict(
            c_max=config.sus_c_max,
            seed=sus_seed,
            sampler=config.sus_sampler,
            backend=config.sus_backend,
            key_ranges=sight.ranges,
        )
        functions["sus"] = lambda q, k, v: sus_attention(q, k, v, config.sus_c, **sus)
        q_ = q.detach().requires_grad_()
        torch.autograd.grad(sus_attention(q_, k, v, config.sus_c, stats=stats, **sus), q_, grad_out)
        kept = stats[0].item()
        result["sus/kept_per_row"] = kept / (B * H * T)
        seen = B * T * (T + 1) / 2
        if sight.ranges is not None:
            seen = sight.ranges.expand(B, T, 2).diff(dim=-1).sum().item()
        result["sus/kept_fraction"] = kept / (H * seen)
    if config.attn_backward == "lowrank":
        approximate = config.lowrank_forward == "approximate"
        functions["lowrank"] = lambda q, k, v: lowrank_attention(
            q, k, v, config.lowrank_degree, approximate_forward=approximate
        )
        result["lowrank/bound"] = largest_score(model, batch.x, device)
        result["lowrank/worst_error"] = worst_error(result["lowrank/bound"], config.lowrank_degree)
    times = time_attention(functions, q, k, v, grad_out, device)
    result["attn/exact_forward_ms"], result["attn/exact_backward_ms"] = times["exact"]
    result["attn/forward_ms"], result["attn/backward_ms"] = times[config.attn_backward]
    return result
