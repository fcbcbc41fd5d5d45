"""The cost of attention alone, forward and backward apart: exact beside SUS, and their peers.

    python experiments/bench_attention.py --json=attention.json --out=attention.png     # minutes on a CPU
    python experiments/bench_attention.py --T=2048,8192 --c=4 --wandb
    python experiments/bench_attention.py --inputs=smollm2.pt     # a model's q, k, v, from capture_attention.py
    python experiments/bench_attention.py --T=32768 --documents=4096    # or --window=1024
    python experiments/bench_attention.py --from_json=attention.json --out=attention.png

Exact is the fastest backend that torch's scaled_dot_product_attention has on the device: all are measured, by name.
With --documents it is called for each document; with --window it gets a mask. Inputs are normal random numbers, or
those of a file: then each of its layers is measured, and their median is shown.
All take turns in one process; a time is the median of the rounds, a ratio that of two times of the same round, with its
lowest and highest. Memory is the peak of one forward and backward beyond the inputs, on a CPU in a process of its own.

Nothing is printed unless it is right: SUS's forward and its gradient at c = inf may err twice as much as SDPA's do in
that dtype; at each c the gradient's mean over many draws must be the exact one within its standard errors; and at each
T the forward and one draw are looked at again.

Dims: B batch, H query heads, K key/value heads, T tokens, D head dimension.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import UserError, key, load_config, run_main  # isort: skip (before torch)

import torch
from torch import Tensor
from tqdm import tqdm

from bench_attention_report import compare, draw, fits, log_to_wandb, over_layers, overall, report
from contenders import Check, Contender, Sight, captured_inputs, captured_layer, contenders, key_ranges, random_inputs
from measure import apart, free_memory, gradients, heading, numbers, peak_of, product_ms, sus_backend
from output import check_picture, check_writable, deliver, progress_bar, read_json
from sus_attn import BACKENDS, SAMPLERS
from training.device import Device, memory_errors, resolve_device
from training.probe import take_turns
from training.record import plain, reason

DEFAULTS = {"cuda": ("8192,32768,131072", 12)}  # T and H
CPU_DEFAULTS = ("2048,8192,32768", 4)


@dataclass
class BenchConfig:
    T: str = key("auto", "context lengths; auto: 2048,8192,32768, on CUDA 8192,32768,131072", section="What")
    c: str = key("2,4,8", "SUS's retention parameters")
    sampler: str = key("tiles", "how SUS draws", choices=SAMPLERS)
    H: int = key(0, "heads; 0: 4, on CUDA 12", low=0)
    D: int = key(64, "head dimension", low=1)
    dtype: str = key(
        "auto",
        "auto: bfloat16 where the GPU has it, float32 on a CPU",
        choices=("auto", "float64", "float32", "bfloat16", "float16"),
    )
    backend: str = key("auto", "SUS's kernels", choices=BACKENDS)
    device: str = key("auto", "auto, cpu, cuda, cuda:1")
    inputs: str = key("", "a file of capture_attention.py, which has T, H and D; empty: normal random numbers")
    documents: int = key(0, "attention within documents of so many tokens, side by side; 0: one document", low=0)
    window: int = key(0, "attention to so many keys at most; 0: to all", low=0)
    seed: int = key(0, "seeds the inputs and the draws", low=0, high=2**62)

    repeats: int = key(7, "timed rounds, after one for warming up", low=1, section="How")
    peer_seconds: float = key(10.0, "leave out a peer whose forward and backward would take longer", above=0)
    memory: bool = key(True, "measure the memory too")

    json: str = key("", "file for every figure", section="Output")
    out: str = key("", "the picture: .png, .svg or .pdf")
    from_json: str = key("", "measure nothing: table and picture of such a file")
    wandb: bool = key(False, "log to wandb, with c as the x axis; --wandb will do")


def main() -> None:
    argv = ["--wandb=True" if arg == "--wandb" else arg for arg in sys.argv[1:]]
    cfg = load_config(BenchConfig, argv, usage=__doc__)
    check_writable(cfg.json)
    if cfg.out:
        check_picture(cfg.out)
    with memory_errors("Give a smaller --T"):
        data = (
            read_json(Path(cfg.from_json), "bench_attention") if cfg.from_json else plain(measure(cfg), nonfinite=str)
        )
    deliver(data, report, cfg.json, draw, cfg.out)
    if cfg.wandb:
        log_to_wandb(data)


# -- measuring --------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What is measured at a time."""

    place: dict[str, int]  # T and, of inputs from a file, the layer: what its rows of results begin with
    make_inputs: Callable[[], tuple[Tensor, ...]]  # q, k, v and the output's gradient; another process can call it too


def cases(cfg: BenchConfig, device: Device) -> tuple[str, int, list[Case]]:
    """Where the inputs are from, their D, and what is to be measured. UserError."""
    if not cfg.inputs:
        default_T, default_H = DEFAULTS.get(device.type, CPU_DEFAULTS)
        Ts = numbers("T", default_T if cfg.T == "auto" else cfg.T, int, 16)
        make = lambda T: functools.partial(random_inputs, cfg.H or default_H, T, cfg.D, cfg.seed, device)
        return "normal random numbers", cfg.D, [Case({"T": T}, make(T)) for T in Ts]
    origin, layers = captured_inputs(Path(cfg.inputs))
    _, H, T, D = next(iter(layers.values()))[0].shape
    for name, own in ("T", T), ("H", H), ("D", D):
        if name in cfg.explicit and str(getattr(cfg, name)) not in ("auto", str(own)):
            raise UserError(f"--{name}={getattr(cfg, name)}, but {cfg.inputs} has {name} = {own}: leave --{name} out")
    make = lambda layer: functools.partial(captured_layer, Path(cfg.inputs), layer, device)
    made = [Case({"T": T, "layer": layer}, make(layer)) for layer in layers]
    return origin, D, made


def measure(cfg: BenchConfig) -> dict:
    """Every figure: what `report` and `draw` show, and what --json writes. UserError if SUS's results are wrong."""
    device = resolve_device(cfg.device, cfg.dtype)
    origin, D, to_measure = cases(cfg, device)
    cs = numbers("c", cfg.c, float, 0)
    backend, why = sus_backend(cfg.backend, device, D, cfg.sampler)
    sight = Sight(cfg.documents, cfg.window)
    members = contenders(device, dict.fromkeys(cs, backend), cfg.sampler, sight)
    print(
        device.reason,
        f"SUS c = {', '.join(f'{c:g}' for c in cs)}, sampler {cfg.sampler}, by the {backend} backend ({why})",
        sep="\n",
        flush=True,
    )

    checks, results, left_out, product = [], [], [], [product_ms(device)]
    work = sum(case.place["T"] ** 2 for case in to_measure) * (cfg.repeats + 2) * len(members)
    with progress_bar(work) as bar:
        for case in to_measure:
            place, inputs = case.place, case.make_inputs()
            T, where = place["T"], f"layer {place['layer']}" if "layer" in place else ""
            bar.set_description(where or f"T = {T:,}")
            running, reasons = choose(members, inputs, cfg.peer_seconds, device)
            left_out += [place | reason for reason in reasons]
            bar.update(T**2 * (cfg.repeats + 2) * (len(members) - len(running)))
            check = Check(where)
            results += measure_at(case, running, inputs, cfg, device, check, bar)
            checks += check.findings
            product.append(product_ms(device))
    results += over_layers(results)
    return heading("bench_attention", cfg, device, product) | {
        "inputs": {
            "from": origin,
            "shape": [*inputs[0].shape[:2], "T", inputs[0].shape[3]],
            "key_heads": inputs[1].shape[1],
            "sight": sight._asdict(),
            "dtype": str(device.dtype).removeprefix("torch."),
        },
        "checks": checks,
        "results": results,
        "comparisons": compare(results),
        "fits": fits(overall(results)),
        "left_out": left_out,
    }


def choose(
    members: list[Contender], inputs: tuple[Tensor, ...], limit: float, device: Device
) -> tuple[list[Contender], list[dict]]:
    """Those worth measuring at this T, and why others are not. SUS and the fastest exact one always are."""
    B, H, T, _ = inputs[0].shape
    probe_T = min(T, 2048)
    short = tuple(x[:, :, :probe_T] for x in inputs)
    seconds, reasons = {}, {}
    for member in members:
        if member.kind in ("sus", "undrawn"):
            continue
        needs = 3 * B * H * T**2 * max(4, inputs[0].element_size())  # scores, weights, and the gradient of either
        if member.how == "MATH" and (free := free_memory(device)) is not None and needs > 0.8 * free:
            reasons[member] = f"it needs about {needs / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SDPA's, of the reasons for its error
                runs = list(take_turns({0: member}, *short, device, 2))
        except Exception as error:  # whatever it lacks here, its reason is printed
            reasons[member] = reason(error)
            continue
        pairs, probed = (key_ranges(n, member.sight, device.device).diff().sum().item() for n in (T, probe_T))
        seconds[member] = sum(runs[1][2:]) / 1e3 * pairs / probed
    exact = [member for member in seconds if member.kind == "exact"]
    if not exact:
        reasons = "; ".join(f"{m.name}: {why}" for m, why in reasons.items())
        raise UserError(f"none of SDPA's backends can be had here: {reasons}")
    fastest = min(exact, key=seconds.get)
    for member, expected in seconds.items():
        if member is not fastest and expected > limit:
            reasons[member] = f"it would take about {expected:.0f} s, above --peer_seconds={limit:g}"
    running = [fastest, *(m for m in members if m is not fastest and m not in reasons)]
    return running, [{"name": member.name, "why": why} for member, why in reasons.items()]


def measure_at(
    case: Case,
    members: list[Contender],
    inputs: tuple[Tensor, ...],
    cfg: BenchConfig,
    device: Device,
    check: Check,
    bar: tqdm,
) -> list[dict]:
    """A row of results for each member. members[0] is exact."""
    q, k, v, _ = inputs
    T = case.place["T"]
    sus = [member for member in members if member.kind == "sus"]
    check.start(members[0], sus, *inputs)
    rows = {}
    for m in members:
        row = case.place | {"name": m.name, "kind": m.kind, "backend": m.how, "c": m.c}
        rows[m.name] = row | {"forward_ms": [], "backward_ms": []}
    exact = gradients(members[0], *inputs)
    for member in sus:
        stats = torch.zeros(3, device=q.device)
        check.at(exact, gradients(member, *inputs, seed=cfg.seed, stats=stats), member, q, k, v)
        rows[member.name]["kept_per_row"] = stats[0].item() / q[..., 0].numel()
        seen = key_ranges(T, member.sight, q.device).diff(dim=-1).double().mean().item()
        rows[member.name]["kept_fraction"] = stats[0].item() / (q[..., 0].numel() * seen)
    del exact
    functions = {m.name: functools.partial(m, seed=cfg.seed) for m in members}
    for i, name, forward, backward in take_turns(functions, *inputs, device, cfg.repeats + 1):
        bar.update(T**2)
        if i:
            rows[name]["forward_ms"].append(forward)
            rows[name]["backward_ms"].append(backward)
    for member in members:
        if cfg.memory and member.kind != "undrawn":
            rows[member.name] |= apart(device, memory_of, member, case.make_inputs, device)
        bar.update(T**2)
    undrawn = rows["SUS undrawn"]["forward_ms"]
    for member in sus:
        row = rows[member.name]
        row["draw_ms"] = None
        if member.how != "reference":
            row["draw_ms"] = [a - b for a, b in zip(row["forward_ms"], undrawn)]
    return list(rows.values())


def memory_of(member: Contender, make_inputs: Callable[[], tuple[Tensor, ...]], device: Device) -> dict:
    """{"peak_bytes", "saved_bytes"} of one forward and backward: the most at once beyond the inputs, and what autograd
    keeps in between, beyond q, k and v.
    """
    q, k, v, grad_out = make_inputs()
    gradients(member, *(x[:, :, :128] for x in (q, k, v, grad_out)))  # loads and compiles what it needs
    peak = peak_of(lambda: gradients(member, q, k, v, grad_out), device)
    storages = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = member(*(x.requires_grad_() for x in (q, k, v)))
    inputs = {x.untyped_storage().data_ptr() for x in (q, k, v)}
    saved = sum(size for pointer, size in storages.items() if pointer not in inputs)
    del out
    return {"peak_bytes": peak, "saved_bytes": saved}


if __name__ == "__main__":
    run_main(main)
