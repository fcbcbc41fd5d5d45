"""What the benchmarks share: lists on the command line, one layer's attention, the machine, paired ratios, peak memory.

A ratio is that of two things measured in the same round, and is told as its median with the lowest and the highest
round: a machine drifts, and drifts for both. Whether it was idle is looked at by timing one and the same matrix product
now and then.

Dims: B batch, H query heads, K key/value heads, T tokens, D head dimension.
"""

import ctypes
import dataclasses
import gc
import importlib.metadata
import math
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from configurator import UserError
from data.loader import load_corpus
from model import GPT
from sus_attn import resolve_backend
from training.device import Device
from training.probe import capture
from training.start import DATA

Result = TypeVar("Result")
DRIFT = 0.1  # of the matrix product's time: from there on the machine doesn't count as idle


def numbers(name: str, text: str, kind: type, low: float) -> list:
    """The list that `--name=1,2,3` means, ascending and each once. UserError."""
    try:
        values = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        values = []
    if not values or not all(value >= low if kind is int else value > low for value in values):  # NaN fails too
        what, sign = ("integers", ">=") if kind is int else ("numbers", ">")
        raise UserError(
            f"--{name}={text}: write {what} {sign} {low} with commas between them, e.g. --{name}="
            f"{'2048,8192' if kind is int else '10,25'}"
        )
    return values


def sus_backend(backend: str, device: Device, D: int, sampler: str = "tiles") -> tuple[str, str]:
    """The backend of SUS that runs, and why. UserError if the one asked for can't."""
    try:
        return resolve_backend(backend, device.type, device.dtype, D, sampler=sampler)
    except ValueError as error:
        raise UserError(str(error)) from None


# -- one layer's attention --------------------------------------------------------------------------


def gradients(function: Callable, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, **options) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv)"""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = function(q, k, v, **options)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)


def check_sight(model: GPT, config: dict) -> None:
    """Of a run with this config: UserError if it has layers with a window. Says so if documents were apart."""
    if model.config.attn_window:
        raise UserError(
            f"the model's layers see windows (attn_window={model.config.attn_window}), and what is measured here is of "
            "layers that see all"
        )
    if config.get("doc_mask"):
        print("The run was trained with doc_mask=True. Here documents that share a window see one another.")


def trained_inputs(model: GPT, layer: int, dataset: str, T: int, device: Device) -> tuple[Tensor, ...]:
    """(q, k, v, grad_out) of one layer, float32, in a training step on T tokens from the middle of validation text."""
    corpus = load_corpus(DATA / dataset, T)
    batch = corpus.val_batch(corpus.val_windows(3)[1:2]).to(device.device)
    *inputs, _ = capture(model, layer, batch, Device(device.device, torch.float32, ""), None)
    return tuple(inputs)


# -- the machine ------------------------------------------------------------------------------------


def environment(device: Device) -> dict[str, str | int]:
    """What the figures depend on besides the code."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device.device)
    else:
        name = platform.processor() or platform.machine()
        if Path("/proc/cpuinfo").exists() and (
            found := re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
        ):
            name = found[1]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("numba", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return {"device": f"{device.type}: {name}", "threads": torch.get_num_threads(), **versions}


def product_ms(device: Device, repeats: int = 9) -> float:
    """The median time of one matrix product, always the same."""
    n, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(n, n, device=device.device).to(dtype)
    times = []
    for _ in range(repeats + 1):
        device.synchronize()
        start = time.perf_counter()
        a @ a
        device.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def idleness(product: list[float]) -> dict:
    """What the times of the matrix product, in ms, say of the machine."""
    drift = max(product) / min(product) - 1
    return {"product_ms": product, "drift": drift, "idle": drift <= DRIFT}


def heading(benchmark: str, cfg: object, device: Device, product: list[float]) -> dict:
    """What the figures begin with: of which benchmark they are, and how and where they came about. cfg: a dataclass."""
    return {
        "benchmark": benchmark,
        "config": dataclasses.asdict(cfg),
        "environment": environment(device),
        "idle": idleness(product),
    }


def describe_machine(data: dict) -> list[str]:
    """Lines for the head and the foot of a table: (what it was measured on, whether that was idle)."""
    idle = data["idle"]
    line = f"a matrix product took {min(idle['product_ms']):.3g} to {max(idle['product_ms']):.3g} ms meanwhile"
    if not idle["idle"]:
        line = f"WARNING: the machine was not idle: {line}, which is more than {DRIFT:.0%} apart"
    return [
        ", ".join(f"{value}" if name == "device" else f"{name} {value}" for name, value in data["environment"].items()),
        line,
    ]


# -- statistics -------------------------------------------------------------------------------------


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(above: Iterable[float], below: Iterable[float]) -> dict[str, float]:
    """The spread of the quotients of what was measured in the same round."""
    return spread(a / b for a, b in zip(above, below, strict=True))


def ratio_text(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}..{ratio['high']:.2f})"


def fit_power(x: list[float], y: list[float]) -> tuple[float, float] | None:
    """(exponent, factor) of y = factor * x^exponent, by least squares on the logarithms; None of one point."""
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if a > 0 and b > 0]
    if len({a for a, _ in points}) < 2:
        return None
    exponent, intercept = statistics.linear_regression(*zip(*points))
    return exponent, math.exp(intercept)


# -- memory -----------------------------------------------------------------------------------------


def peak_of(run: Callable[[], object], device: Device) -> int | None:
    """The most bytes of memory that run() takes at once beyond what is taken before; None where that can't be known.

    On the CPU it is the process's resident memory (Linux), so for a fresh process, see `apart`. Not getrusage's
    ru_maxrss: a process starts with that of the one which started it, and it never falls.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device.device)
        before = torch.cuda.memory_allocated(device.device)
        run()
        return torch.cuda.max_memory_allocated(device.device) - before
    clear = Path("/proc/self/clear_refs")
    if device.type != "cpu" or not os.access(clear, os.W_OK):
        run()
        return None
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # or else what is free but not given back could be used without being seen
    clear.write_text("5")  # the peak (VmHWM) starts anew from what is resident now
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def free_memory(device: Device) -> int | None:
    """Bytes; None where it isn't known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device.device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    found = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())
    return 1024 * int(found[1]) if found else None


def apart(device: Device, function: Callable[..., Result], *arguments: object) -> Result:
    """function(*arguments), on the CPU `in_child`: what peak_of needs."""
    return in_child(function, *arguments) if device.type == "cpu" else function(*arguments)


def in_child(function: Callable[..., Result], *arguments: object) -> Result:
    """function(*arguments) in a fresh process, with as many threads as here. UserError if it is killed."""
    # spawn: a forked process would hold this one's memory, and threads that do not exist in it
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise UserError(
                "the process that measures memory was killed, perhaps for want of memory: give a smaller --T "
                "or leave the memory out by --memory=False"
            ) from None


def mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.0f}" if size >= 10 * 2**20 else f"{size / 2**20:.1f}"
