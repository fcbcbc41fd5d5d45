"""The cost of attention alone, forward and backward apart: exact beside SUS, and their peers.

    python experiments/bench_attention.py --json=attention.json --out=attention.png     # minutes on a CPU
    python experiments/bench_attention.py --T=2048,8192 --c=4 --wandb
    python experiments/bench_attention.py --inputs=out-long-ctx       # q, k, v of a trained model instead of randn
    python experiments/bench_attention.py --from_json=attention.json --out=attention.png

Exact is the fastest backend that torch's scaled_dot_product_attention has on the device: all are measured, by name.
All take turns in one process; a time is the median of the rounds, a ratio that of two times of the same round, with its
lowest and highest. Memory is the peak of one forward and backward beyond the inputs, on a CPU in a process of its own.

Nothing is printed unless it is right: SUS's forward and its gradient at c = inf may err twice as much as SDPA's do in
that dtype; at each c the gradient's mean over many draws must be the exact one within its standard errors; and at each
T the forward and one draw are looked at again.
"""

import contextlib
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import UserError, key, load_config, run_main
from data.loader import load_corpus
from measure import (
    describe_machine,
    environment,
    fit_power,
    free_memory,
    idleness,
    in_child,
    mib,
    numbers,
    peak_of,
    product_ms,
    ratio,
    ratio_text,
    read_json,
    spread,
    sus_backend,
    write_json,
)
from model import model_from_checkpoint
from output import COLORS, check_picture, check_writable, import_pyplot, print_table, progress_bar, save_picture
from sus_attn import BACKENDS, SAMPLERS, sus_attention
from training import checkpoint
from training.device import Device, memory_errors, resolve_device
from training.probe import capture, take_turns
from training.record import plain, reason, start_wandb

DATA = Path(__file__).resolve().parents[1] / "data"
SDPA = {
    "cpu": ("FLASH_ATTENTION", "MATH"),
    "cuda": ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"),
}
DEFAULTS = {"cuda": ("8192,32768,131072", 12)}  # T and H
CPU_DEFAULTS = ("2048,8192,32768", 4)
SLICE = 512  # tokens of the check in float64
DRAWS, BLOCKS, SIGMAS = 32, 8, 6.0  # of the check of the mean; some hundred numbers are compared


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
    inputs: str = key("", "a run's out_dir: q, k, v of its model's middle layer; empty: normal random numbers")
    seed: int = key(0, "seeds the inputs and the draws", low=0, high=2**62)

    repeats: int = key(7, "timed rounds, after one for warming up", low=1, section="How")
    peer_seconds: float = key(10.0, "leave out a peer whose forward and backward would take longer", above=0)
    memory: bool = key(True, "measure the memory too")

    json: str = key("", "file for every figure", section="Output")
    out: str = key("", "the picture: .png, .svg or .pdf")
    from_json: str = key("", "measure nothing: table and picture of such a file")
    wandb: bool = key(False, "log to wandb, with c as the x axis; --wandb will do")


def main():
    argv = ["--wandb=True" if arg == "--wandb" else arg for arg in sys.argv[1:]]
    cfg = load_config(BenchConfig, argv, usage=__doc__)
    check_writable(cfg.json)
    if cfg.out:
        check_picture(cfg.out)
    with memory_errors("Give a smaller --T"):
        data = (
            read_json(Path(cfg.from_json), "bench_attention") if cfg.from_json else plain(measure(cfg), nonfinite=str)
        )
    if cfg.json:  # first of all: a reader that leaves early, such as head, must not cost the minutes of measuring
        write_json(Path(cfg.json), data)
    if cfg.out:
        save_picture(draw(data), Path(cfg.out))
    report(data)
    if cfg.json:
        print(f"every figure: {cfg.json}")
    if cfg.out:
        print(f"picture: {cfg.out}")
    if cfg.wandb:
        log_to_wandb(data)


# -- what is measured -------------------------------------------------------------------------------


class Contender(NamedTuple):
    """One way to compute causal attention: a function of q (B, H, T, D) and k, v (B, K, T, D) to (B, H, T, D)."""

    name: str
    kind: str  # "exact"; "sus"; "undrawn", SUS's forward where no gradient is wanted, so none is prepared; "peer"
    how: str  # the backend, of SDPA or of SUS; or "flex"
    c: float | None = None
    sampler: str = "tiles"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, seed: int = 0, stats: Tensor | None = None) -> Tensor:
        gqa = q.shape[1] != k.shape[1]
        if self.kind == "exact":
            with sdpa_kernel(getattr(SDPBackend, self.how)):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        if self.how == "flex":
            return compiled_flex()(q, k, v, block_mask=causal_blocks(q.shape[2], q.device), enable_gqa=gqa)
        with torch.set_grad_enabled(self.kind != "undrawn"):
            return sus_attention(q, k, v, self.c, seed=seed, sampler=self.sampler, backend=self.how, stats=stats)


@functools.cache
def compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def causal_blocks(T: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device)


def label(backend: str) -> str:
    return backend.removesuffix("_ATTENTION").lower()


def contenders(device: Device, backends: dict[float, str], sampler: str = "tiles") -> list[Contender]:
    """Everything there is for the device. backends: SUS's, of each c."""
    typical = min(backends, key=lambda c: abs(c - 4))
    backend = backends[typical]
    members = [Contender(f"SDPA {label(name)}", "exact", name) for name in SDPA.get(device.type, ("MATH",))]
    members += [Contender(f"SUS c={c:g}", "sus", how, c, sampler) for c, how in backends.items()]
    members += [
        Contender("SUS undrawn", "undrawn", backend, typical, sampler),
        Contender("FlexAttention", "peer", "flex"),
    ]
    if backend != "reference":
        members.append(Contender(f"reference c={typical:g}", "peer", "reference", typical, sampler))
    return members


def random_inputs(H: int, T: int, D: int, seed: int, device: Device) -> tuple[Tensor, ...]:
    """q, k, v and the output's gradient, each (1, H, T, D), normal random numbers in the device's dtype."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, H, T, D, generator=generator).to(device.device, device.dtype) for _ in range(4))


def captured_inputs(saved: dict, path: Path, T: int, device: Device) -> tuple[Tensor, ...]:
    """The same of a checkpoint's middle layer, in a training step on T tokens of its validation text."""
    model = model_from_checkpoint(saved, path).to(device.device)
    if T > model.config.block_size:
        raise UserError(f"--T={T} is above the {model.config.block_size} tokens of the model in {path}")
    corpus = load_corpus(DATA / saved["config"]["dataset"], T)
    x, y = (t.to(device.device) for t in corpus.val_batch(corpus.val_windows(3)[1:2]))  # from the middle of the text
    float32 = Device(device.device, torch.float32, "")
    return tuple(t.to(device.dtype) for t in capture(model, model.config.n_layer // 2, x, y, float32, None))


# -- is it right? -----------------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned():
    """Memory that torch hands out is full of NaN: what a kernel leaves unwritten can't pass for a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # that fills it; what it warns of is no concern here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def gradients(function: Callable, q, k, v, grad_out, **options) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv)"""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = function(q, k, v, **options)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)


def relative_error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm()).item()


def products(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
    """The inner products of two gradients (dq, dk, dv), of each tensor, head and block of rows: (n,) float64."""
    blocks = [zip(x.double().tensor_split(BLOCKS, 2), y.tensor_split(BLOCKS, 2)) for x, y in zip(a, b)]
    return torch.cat([(x * y).sum((0, 2, 3)) for pairs in blocks for x, y in pairs])


class Check:
    """Finds out whether SUS's results may be believed, and keeps what it compared: {what, value, limit} each."""

    def __init__(self):
        self.findings = []
        self.deviation = {}  # c: of one draw's share of the whole gradient, for dq, dk, dv
        self.rounding = 0.0  # SDPA's own error in the gradients

    def compare(self, what: str, value: float, limit: float) -> None:
        self.findings.append({"what": what, "value": value, "limit": limit})
        if not value <= limit:  # NaN fails
            raise UserError(f"SUS is wrong here, so there are no figures: {what} is {value:.3g}, above {limit:.3g}")

    def start(self, exact: Contender, sus: list[Contender], q, k, v, grad_out) -> None:
        """On a short slice of the inputs: all values in float64's light, and the mean of many draws at each c."""
        inputs = tuple(x[:, :, :SLICE] for x in (q, k, v, grad_out))
        math_ = Contender("", "exact", "MATH")
        truth = gradients(math_, *(x.double() for x in inputs))
        tiny = torch.finfo(q.dtype).eps  # in float64 SDPA's error may be less than one rounding
        own = [relative_error(x, t) for x, t in zip(gradients(exact, *inputs), truth)]
        self.rounding = max(*own, tiny)
        size = products(truth[1:], truth[1:])
        norms = torch.cat([t.norm().expand(BLOCKS * t.shape[1]) for t in truth[1:]])
        room = 2 * self.rounding * norms / size.sqrt() / SIGMAS
        with poisoned():
            full = gradients(sus[0]._replace(c=math.inf), *inputs)
        for name, x, t, error in zip(("forward", "dq at c = inf", "dk at c = inf", "dv at c = inf"), full, truth, own):
            self.compare(f"the relative error of the {name}", relative_error(x, t), 2 * error + tiny)
        for contender in sus:
            with poisoned():
                draws = [gradients(contender, *inputs, seed=seed) for seed in range(DRAWS)]
            self.compare(
                f"the relative error of the forward at c = {contender.c:g}",
                relative_error(draws[0][0], truth[0]),
                2 * own[0] + tiny,
            )
            # How much of the truth is in a draw, block by block: 1 on average. An error that is small beside the whole
            # gradient may be large in a block where that is small.
            off = torch.stack([products(grads, truth[1:]) for _, *grads in draws]) / size - 1  # (draws, n)
            error = off.std(0) / DRAWS**0.5 + room
            self.compare(
                f"the distance of the gradient's mean over {DRAWS} draws at c = {contender.c:g}, in standard errors,",
                (off.mean(0) / error).abs().nan_to_num(math.inf).max().item(),
                SIGMAS,
            )
            self.deviation[contender.c] = whole_shares([grads for _, *grads in draws], truth[1:]).std(0)

    def at(self, exact: tuple[Tensor, ...], results: tuple[Tensor, ...], c: float, q, k, v) -> None:
        """At full length: some rows of the forward in float64's light, and whether one draw is off by too much."""
        T, G = q.shape[2], q.shape[1] // k.shape[1]
        rows = torch.linspace(0, T - 1, min(T, 64), device=q.device).long()
        k, v = (x.double().repeat_interleave(G, 1) for x in (k, v))
        scores = q[:, :, rows].double() @ k.mT * q.shape[3] ** -0.5
        scores.masked_fill_(torch.arange(T, device=q.device) > rows[:, None], -math.inf)
        truth = scores.softmax(-1) @ v
        own = relative_error(exact[0][:, :, rows], truth)
        self.compare(
            f"the relative error of the forward at T = {T}, c = {c:g}",
            relative_error(results[0][:, :, rows], truth),
            2 * own + torch.finfo(q.dtype).eps,
        )
        off = whole_shares([results[1:]], [x.double() for x in exact[1:]])[0] - 1
        # That of the slice, where a large c may have kept all; with even weights it would be 1 / sqrt(c * H * D).
        even = (c * exact[0].shape[1] * exact[0].shape[3]) ** -0.5
        allowed = self.deviation[c].clamp(min=even) + 2 * self.rounding / SIGMAS
        self.compare(
            f"the distance of one draw's gradient at T = {T}, c = {c:g}, in standard deviations,",
            (off.abs() / allowed).nan_to_num(math.inf).max().item(),
            SIGMAS,
        )


def whole_shares(draws: list, truth) -> Tensor:
    """(draws, 3) float64: each draw's share of the exact dq, dk, dv."""
    return torch.tensor(
        [[((g.double() * t).sum() / (t * t).sum()).item() for g, t in zip(grads, truth)] for grads in draws],
        dtype=torch.float64,
    )


# -- measuring --------------------------------------------------------------------------------------


def measure(cfg: BenchConfig) -> dict:
    """Every figure: what `report` and `draw` show, and what --json writes. UserError if SUS's results are wrong."""
    device = resolve_device(cfg.device, cfg.dtype)
    default_T, default_H = DEFAULTS.get(device.type, CPU_DEFAULTS)
    H, saved, path = cfg.H or default_H, None, Path(cfg.inputs) / "ckpt.pt"
    if cfg.inputs:
        if taken := {"H", "D"} & cfg.explicit:
            raise UserError(
                f"--{min(taken)} and --inputs exclude each other: the model in {cfg.inputs} has its own heads"
            )
        saved = checkpoint.load(path)
        default_T = str(saved["model_args"]["block_size"])
    Ts = numbers("T", default_T if cfg.T == "auto" else cfg.T, int, 16)
    cs = numbers("c", cfg.c, float, 0)
    D = saved["model_args"]["n_embd"] // saved["model_args"]["n_head"] if saved else cfg.D
    backends = {c: sus_backend(cfg.backend, device, D, c, cfg.sampler) for c in cs}
    members = contenders(device, {c: backend for c, (backend, _) in backends.items()}, cfg.sampler)
    print(
        device.reason,
        *(
            f"SUS c = {c:g}, sampler {cfg.sampler}, by the {backend} backend ({why})"
            for c, (backend, why) in backends.items()
        ),
        sep="\n",
        flush=True,
    )

    check, results, left_out, product = Check(), [], [], [product_ms(device)]
    work = sum(T**2 for T in Ts) * (cfg.repeats + 2) * len(members)
    with progress_bar(work) as bar:
        for T in Ts:
            bar.set_description(f"T = {T:,}")
            inputs = captured_inputs(saved, path, T, device) if saved else random_inputs(H, T, cfg.D, cfg.seed, device)
            running, reasons = choose(members, inputs, cfg.peer_seconds, device)
            left_out += reasons
            bar.update(T**2 * (cfg.repeats + 2) * (len(members) - len(running)))
            results += measure_at(T, running, inputs, cfg, device, check, bar)
            product.append(product_ms(device))
    return {
        "benchmark": "bench_attention",
        "config": asdict(cfg),
        "environment": environment(device),
        "idle": idleness(product),
        "inputs": {
            "from": cfg.inputs or "normal random numbers",
            "shape": [*inputs[0].shape[:2], "T", inputs[0].shape[3]],
            "key_heads": inputs[1].shape[1],
            "dtype": str(device.dtype).removeprefix("torch."),
        },
        "checks": check.findings,
        "results": results,
        "comparisons": compare(results, Ts),
        "fits": fits(results),
        "left_out": left_out,
    }


def choose(members: list[Contender], inputs, limit: float, device: Device) -> tuple[list[Contender], list[dict]]:
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
        seconds[member] = sum(runs[1][2:]) / 1e3 * (T / probe_T) ** 2
    exact = [member for member in seconds if member.kind == "exact"]
    if not exact:
        reasons = "; ".join(f"{m.name}: {why}" for m, why in reasons.items())
        raise UserError(f"none of SDPA's backends can be had here: {reasons}")
    fastest = min(exact, key=seconds.get)
    for member, expected in seconds.items():
        if member is not fastest and expected > limit:
            reasons[member] = f"it would take about {expected:.0f} s, above --peer_seconds={limit:g}"
    running = [fastest, *(m for m in members if m is not fastest and m not in reasons)]
    return running, [{"name": member.name, "T": T, "why": why} for member, why in reasons.items()]


def measure_at(
    T: int, members: list[Contender], inputs, cfg: BenchConfig, device: Device, check: Check, bar
) -> list[dict]:
    """One context length: a row of results for each member. members[0] is exact."""
    q, k, v, _ = inputs
    sus = [member for member in members if member.kind == "sus"]
    if not check.deviation:
        check.start(members[0], sus, *inputs)
    rows = {
        m.name: {
            "T": T,
            "name": m.name,
            "kind": m.kind,
            "backend": m.how,
            "c": m.c,
            "forward_ms": [],
            "backward_ms": [],
        }
        for m in members
    }
    exact = gradients(members[0], *inputs)
    for member in sus:
        stats = torch.zeros(3, device=q.device)
        check.at(exact, gradients(member, *inputs, seed=cfg.seed, stats=stats), member.c, q, k, v)
        rows[member.name]["kept_per_row"] = stats[0].item() / q[..., 0].numel()
        rows[member.name]["kept_fraction"] = stats[0].item() / (q[..., 0].numel() * (T + 1) / 2)
    del exact
    functions = {m.name: functools.partial(m, seed=cfg.seed) for m in members}
    for i, name, forward, backward in take_turns(functions, *inputs, device, cfg.repeats + 1):
        bar.update(T**2)
        if i:
            rows[name]["forward_ms"].append(forward)
            rows[name]["backward_ms"].append(backward)
    for member in members:
        if cfg.memory and member.kind != "undrawn":
            run = in_child if device.type == "cpu" else lambda function, *arguments: function(*arguments)
            shapes = [tuple(x.shape) for x in inputs]
            rows[member.name] |= run(memory_of, member, shapes, device)
        bar.update(T**2)
    undrawn = rows["SUS undrawn"]["forward_ms"]
    for member in sus:
        row = rows[member.name]
        row["draw_ms"] = None
        if member.how != "reference":
            row["draw_ms"] = [a - b for a, b in zip(row["forward_ms"], undrawn)]
    return list(rows.values())


def memory_of(member: Contender, shapes: list[tuple], device: Device) -> dict:
    """{"peak_bytes", "saved_bytes"} of one forward and backward: the most at once beyond the inputs, and what autograd
    keeps in between, beyond q, k and v.
    """

    def inputs(T=None):
        return [
            torch.randn(B, H, T or shape_T, D, device=device.device).to(device.dtype) for B, H, shape_T, D in shapes
        ]

    gradients(member, *inputs(128))  # loads and compiles what it needs
    q, k, v, grad_out = inputs()
    peak = peak_of(lambda: gradients(member, q, k, v, grad_out), device)
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = member(*(x.requires_grad_() for x in (q, k, v)))
    inputs_ = {x.untyped_storage().data_ptr() for x in (q, k, v)}
    saved = sum(size for pointer, size in storages.items() if pointer not in inputs_)
    del out
    return {"peak_bytes": peak, "saved_bytes": saved}


# -- what follows from it ---------------------------------------------------------------------------


def both(row: dict) -> list[float]:
    return [a + b for a, b in zip(row["forward_ms"], row["backward_ms"])]


def at(results: list[dict], T: int, kind: str) -> list[dict]:
    return [row for row in results if row["T"] == T and row["kind"] == kind]


def fastest_exact(results: list[dict], T: int) -> dict:
    return min(at(results, T, "exact"), key=lambda row: spread(both(row))["median"])


def compare(results: list[dict], Ts: list[int]) -> list[dict]:
    """Exact's time over SUS's, for each T and c: above 1, SUS is faster."""
    lines = []
    for T in Ts:
        exact = fastest_exact(results, T)
        for row in at(results, T, "sus"):
            ratios = {part: ratio(exact[f"{part}_ms"], row[f"{part}_ms"]) for part in ("forward", "backward")}
            lines.append(
                {"T": T, "c": row["c"], "exact": exact["name"], **ratios, "both": ratio(both(exact), both(row))}
            )
    return lines


def fits(results: list[dict]) -> list[dict]:
    """time = factor * T^exponent, in ms, fitted to the medians of each of the curves over T."""
    curves = {"exact backward": {}, "exact forward": {}}
    for T in sorted({row["T"] for row in results}):
        exact = fastest_exact(results, T)
        for part in ("backward", "forward"):
            curves[f"exact {part}"][T] = spread(exact[f"{part}_ms"])["median"]
        for row in at(results, T, "sus"):
            for part in ("backward", "forward", "draw"):
                if row.get(f"{part}_ms"):
                    curves.setdefault(f"{row['name']} {part}", {})[T] = spread(row[f"{part}_ms"])["median"]
    fitted = ((name, fit_power(list(points), list(points.values()))) for name, points in curves.items())
    return [{"name": name, "exponent": fit[0], "factor": fit[1]} for name, fit in fitted if fit]


# -- the tables -------------------------------------------------------------------------------------


TITLES = [
    "T",
    "c",
    "exact fwd",
    "exact bwd",
    "SUS fwd",
    "of it draw",
    "SUS bwd",
    "of it sparse",
    "fwd ratio",
    "bwd ratio",
    "fwd+bwd ratio",
    "kept/row",
    "exact MiB",
    "SUS MiB",
]
ALL_TITLES = ["name", "backend", "T", "forward ms", "backward ms", "fwd+bwd / exact's", "peak MiB", "saved MiB"]


def report(data: dict) -> None:
    results, inputs = data["results"], data["inputs"]
    machine, idle = describe_machine(data)
    shape = ", ".join(map(str, inputs["shape"]))
    heads = f", {inputs['key_heads']} key heads" if inputs["key_heads"] != inputs["shape"][1] else ""
    print(
        f"{machine}\nq, k, v ({shape}){heads}, {inputs['dtype']}, {inputs['from']}; {data['config']['sampler']} draws\n"
        f"checked: {len(data['checks'])} comparisons, all within their limits\n"
    )
    print_table([TITLES, *(comparison_row(results, line) for line in data["comparisons"])])
    print(
        "\nTimes in ms, medians. Ratios are exact / SUS: median (lowest..highest) of the rounds. MiB: the peak beyond "
        "the inputs.\nAll that was measured:\n"
    )
    print_table([ALL_TITLES, *(result_row(results, row) for row in results)])
    print(
        "\n* the fastest exact one at this T: exact in all ratios. Saved: by autograd between forward and backward, "
        "beyond q, k, v."
    )
    powers, left_out = {}, {}
    for fit in data["fits"]:
        name, _, part = fit["name"].rpartition(" ")
        powers.setdefault(name, []).append(f"{part} {fit['exponent']:.2f}")
    if powers:
        print(
            "Time grows as T to the power of:",
            "; ".join(f"{name} {', '.join(parts)}" for name, parts in powers.items()),
        )
    for line in data["left_out"]:
        left_out.setdefault((line["name"], line["why"]), []).append(f"{line['T']:,}")
    for (name, why), Ts in left_out.items():
        print(f"left out: {name} at T = {', '.join(Ts)}: {why}")
    print(idle)


def comparison_row(results: list[dict], line: dict) -> list[str]:
    exact = fastest_exact(results, line["T"])
    row = next(row for row in at(results, line["T"], "sus") if row["c"] == line["c"])
    backward = ms(row["backward_ms"])
    drawn, sparse = ("in bwd", "with draw") if row["draw_ms"] is None else (ms(row["draw_ms"]), backward)
    return [
        f"{line['T']:,}",
        f"{float(line['c']):g}",
        ms(exact["forward_ms"]),
        ms(exact["backward_ms"]),
        ms(row["forward_ms"]),
        drawn,
        backward,
        sparse,
        *(ratio_text(line[part]) for part in ("forward", "backward", "both")),
        f"{row['kept_per_row']:.1f}",
        mib(exact.get("peak_bytes")),
        mib(row.get("peak_bytes")),
    ]


def result_row(results: list[dict], row: dict) -> list[str]:
    exact = fastest_exact(results, row["T"])
    backward, relative = ms(row["backward_ms"]), ratio_text(ratio(both(row), both(exact)))
    if row["kind"] == "undrawn":
        backward = relative = "-"
    return [
        row["name"] + (" *" if row is exact else ""),
        label(row["backend"]),
        f"{row['T']:,}",
        ms(row["forward_ms"]),
        backward,
        relative,
        mib(row.get("peak_bytes")),
        mib(row.get("saved_bytes")),
    ]


def ms(times: list[float]) -> str:
    value = spread(times)["median"]
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# -- the picture ------------------------------------------------------------------------------------


def draw(data: dict):
    """The figure: backward time over c and over T. Exact is black, SUS blue, what its draw costs orange."""
    figure, (left, right) = import_pyplot().subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    draw_over_c(left, data["results"])
    draw_over_T(right, data["results"], {fit["name"]: fit for fit in data["fits"]})
    machine = data["environment"]
    figure.suptitle(
        f"{machine['device']}, threads: {machine['threads']}, {data['inputs']['dtype']}",
        fontsize=9,
        color="dimgrey",
        x=0.01,
        ha="left",
    )
    return figure


EXACT, SUS, DRAW = "black", COLORS[0], COLORS[1]


def medians(row: dict, part: str = "backward") -> float | None:
    return spread(row[f"{part}_ms"])["median"] if row.get(f"{part}_ms") else None


def draw_over_c(ax, results) -> None:
    ax.set(
        title="backward over c: exact dashed, SUS blue", xlabel="c, the retention parameter", ylabel="ms", yscale="log"
    )
    labels, ticks = [], set()
    for T in sorted({row["T"] for row in results}):
        points = [(float(row["c"]), medians(row)) for row in at(results, T, "sus") if math.isfinite(float(row["c"]))]
        exact = medians(fastest_exact(results, T))
        ax.axhline(exact, color=EXACT, linestyle=(0, (4, 2)), linewidth=1.4)
        labels.append((exact, f"exact, T = {T:,}", EXACT))
        if points:
            ax.plot(*zip(*points), color=SUS, marker="o", linewidth=1.8)
            labels.append((points[-1][1], f"SUS, T = {T:,}", SUS))
            ticks.update(c for c, _ in points)
    if ticks:
        ax.set_xscale("log")
        ax.set_xticks(sorted(ticks), [f"{c:g}" for c in sorted(ticks)])
        ax.set_xticks([], minor=True)
        ax.set_xlim(min(ticks) / 1.1, max(ticks) * 1.1)
    finish(ax, labels)


def draw_over_T(ax, results, fitted) -> None:
    ax.set(
        title="backward over T, and the power that it grows as",
        xlabel="T, context in tokens",
        ylabel="ms",
        yscale="log",
    )
    Ts = sorted({row["T"] for row in results})
    names = list(dict.fromkeys(row["name"] for row in results if row["kind"] == "sus"))
    curves = [("exact backward", "exact", [medians(fastest_exact(results, T)) for T in Ts], EXACT, "-")]
    for i, name in enumerate(names):  # the larger c, the deeper the blue
        color = tuple(1 - (1 - x) * (i + 2) / (len(names) + 1) for x in rgb(SUS))
        of_name = {row["T"]: row for row in results if row["name"] == name}
        curves.append((f"{name} backward", name, [medians(of_name[T]) for T in Ts], color, "-"))
        if i == len(names) // 2:  # all draws cost about the same
            costs = [medians(of_name[T], "draw") for T in Ts]
            if all(cost is not None and cost > 0 for cost in costs):
                curves.append((f"{name} draw", "SUS's draw (in the forward)", costs, DRAW, ":"))
    labels = []
    for key_, text, times, color, dashes in curves:
        ax.plot(Ts, times, color=color, linestyle=dashes, marker="o", linewidth=1.8)
        power = f"  $T^{{\\,{fitted[key_]['exponent']:.2f}}}$" if key_ in fitted else ""
        labels.append((times[-1], text + power, color))
    ax.set_xscale("log", base=2)
    ax.set_xticks(Ts, [f"{T // 1024}k" if T % 1024 == 0 else str(T) for T in Ts])
    ax.minorticks_off()
    ax.set_xlim(Ts[0] / 1.15, Ts[-1] * 1.15)
    finish(ax, labels)


def rgb(color: str) -> tuple[float, ...]:
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))


def finish(ax, labels: list[tuple[float, str, object]]) -> None:
    """A grid, and each curve's name behind its end, pushed apart where they would lie on each other."""
    ax.grid(alpha=0.25)
    ax.margins(y=0.08)
    low, high = ax.get_ylim()
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    short = high < 20 * low  # an axis with so few powers of ten that the steps between want labels
    ax.yaxis.set_minor_formatter(lambda value, _: f"{value:,.10g}" if short and f"{value:e}"[0] in "235" else "")
    low, high = math.log(low), math.log(high)
    heights, gap = [], 0.062  # of the axis
    for value, _, _ in sorted(labels, key=lambda label: label[0]):
        place = (math.log(value) - low) / (high - low)
        heights.append(max(place, heights[-1] + gap) if heights else place)
    heights[-1] = min(heights[-1], 1.0)
    for i in reversed(range(len(heights) - 1)):  # those that were pushed beyond the top push back
        heights[i] = min(heights[i], heights[i + 1] - gap)
    for height, (_, text, color) in zip(heights, sorted(labels, key=lambda label: label[0])):
        ax.annotate(
            text,
            (1, height),
            (6, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=color,
        )


# -- wandb ------------------------------------------------------------------------------------------


def log_to_wandb(data: dict) -> None:
    """The curves over c, of each T: exact's are flat."""
    name = f"bench-attention-{os.urandom(2).hex()}"
    mirror, _ = start_wandb(
        project="nanosus",
        name=name,
        id=name,
        group="bench-attention",
        resume="never",
        config=data["config"] | {"environment": data["environment"]},
    )
    if mirror is None:
        return
    results = data["results"]
    try:
        mirror.define_metric("c")
        mirror.define_metric("*", step_metric="c")
        for c in sorted({float(line["c"]) for line in data["comparisons"]} - {math.inf}):
            metrics = {"c": c}
            for line in data["comparisons"]:
                if float(line["c"]) != c:
                    continue
                T = f"T={line['T']}"
                exact = fastest_exact(results, line["T"])
                row = next(row for row in at(results, line["T"], "sus") if row["c"] == line["c"])
                metrics[f"{T}/kept_per_row"] = row["kept_per_row"]
                for part in ("forward", "backward"):
                    metrics[f"{T}/sus_{part}_ms"], metrics[f"{T}/exact_{part}_ms"] = (
                        medians(row, part),
                        medians(exact, part),
                    )
                for part in ("forward", "backward", "both"):
                    metrics[f"{T}/{part}_ratio"] = line[part]["median"]
            mirror.log(metrics)
        mirror.finish()
    except Exception as error:  # the figures are printed and written already
        print(f"wandb stopped ({reason(error)})", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
