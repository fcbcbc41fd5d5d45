"""How far the low-rank backward is from the exact gradient, what it takes, and how it compares with SUS.

    python experiments/lowrank_error.py --out=docs/lowrank.png      # attention alone, and a model at its start
    python experiments/lowrank_error.py --parts=sides --out_dir=out-lowrank    # beside SUS, on a trained model

Errors are |approximate - exact| / |exact| of gradients. "paper" has the polynomial everywhere (`exact_diagonal=False`);
the operator has exp itself within a query's own chunk. Four parts:

    errors    (dq, dk, dv) of attention alone, float64, over the bound on scores, the degree and T. Queries and keys lie
              on spheres, in random directions, so large that the bound holds, as QK-norm with a fixed gain makes them
    model     the gradient of all weights of a model of four layers, over T: does the error fall, as the paper says?
    scaling   time and memory of attention alone over T, and the exponents fitted to them
    sides     a checkpoint's gradients: exact, SUS and low-rank

Dims: T tokens, D head dimension, g the degree of the polynomial.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import UserError, key, load_config, run_main  # isort: skip (before torch)

import torch
from torch import Tensor
from torch.nn import functional as F

import model as model_module
from data.loader import Batch, load_corpus
from exact_attn import exact_attention
from lowrank_attn import lowrank_attention, score_bound, worst_error
from lowrank_error_report import draw, report
from measure import apart, describe_machine, environment, gradients, idleness, numbers, peak_of, product_ms, sus_backend
from model import GPT, GPTConfig
from model_gradients import Subject, load_model, windows
from output import check_picture, pick, progress_bar, save_picture
from sus_attn import fold_in, sus_attention
from training.device import Device, memory_errors, resolve_device
from training.probe import capture, time_attention
from training.start import DATA

PARTS = ("errors", "model", "scaling", "sides")


@dataclass
class ErrorConfig:
    parts: str = key("errors,model,scaling", f"of {', '.join(PARTS)}", section="What")
    T: str = key("256,512,1024,2048,4096,8192", "context lengths of errors and model")
    long_T: str = key("1024,2048,4096,8192,16384,32768", "context lengths of scaling")
    D: int = key(8, "head dimension of errors and scaling; the model's is 4", low=1)
    degrees: str = key("2,4,6", "degrees of the polynomial")
    bounds: str = key("0.25,0.5,1,2,4,8", "on scores; the middle one is that of errors over T and of the model")
    dataset: str = key("stdlib", "folder under data/, for the model's text")
    out_dir: str = key("", "for sides: a run of train.py")
    c: str = key("1,2,4,8", "for sides: SUS's retention parameters")
    sequences: int = key(8, "for sides: windows of the run's block_size", low=2)

    seed: int = key(0, "of random numbers", low=0, high=2**62, section="How")
    device: str = key("auto", "auto, cpu, cuda, cuda:1, mps")
    out: str = key("", "the picture of errors, model and scaling: .png, .svg or .pdf", section="Output")


def main() -> None:
    cfg = load_config(ErrorConfig, sys.argv[1:], usage=__doc__)
    parts = cfg.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise UserError(f"--parts={cfg.parts}: {unknown[0]!r} is none of {', '.join(PARTS)}")
    if "sides" in parts and not cfg.out_dir:
        raise UserError("--parts=sides needs a trained model: --out_dir=FOLDER of a run of train.py")
    degrees = numbers("degrees", cfg.degrees, int, 2)
    if odd := [g for g in degrees if g % 2]:
        raise UserError(
            f"--degrees={cfg.degrees}: {odd[0]} is odd; the polynomial must be positive, so its degree even"
        )
    lengths, long = numbers("T", cfg.T, int, 2), numbers("long_T", cfg.long_T, int, 2)
    bounds, cs = numbers("bounds", cfg.bounds, float, 0), numbers("c", cfg.c, float, 0)
    if cfg.out:
        if not {"errors", "model", "scaling"} <= set(parts):
            raise UserError(f"--out={cfg.out}: the picture needs --parts=errors,model,scaling")
        check_picture(cfg.out)
    device = resolve_device(cfg.device, "float32")
    middle, found, product = bounds[(len(bounds) - 1) // 2], {}, [product_ms(device)]
    with memory_errors("Give a smaller --T, --long_T or --degrees"):
        if "errors" in parts:
            over_bound = measure_errors([(lengths[-1], b, g) for b in bounds for g in degrees], cfg)
            over_T = measure_errors([(T, middle, g) for T in lengths for g in degrees], cfg)
            found["errors"] = over_bound, over_T
        if "model" in parts:
            found["model"] = measure_model(lengths, degrees, middle, cfg, device)
        if "scaling" in parts:
            found["scaling"] = measure_scaling(long, degrees, cfg, device)
        if "sides" in parts:
            found["sides"] = measure_sides(degrees, cs, cfg, device)
    product.append(product_ms(device))
    machine, idle = describe_machine({"environment": environment(device), "idle": idleness(product)})
    print(machine)
    report(found, cfg.D, cfg.out_dir)
    print(f"\n{idle}")
    if cfg.out:
        save_picture(draw(found, middle, lengths[-1], cfg.D), Path(cfg.out), dpi=110)
        print(f"picture: {cfg.out}")


# -- attention alone --------------------------------------------------------------------------------


def on_spheres(T: int, D: int, bound: float, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, grad_out (1, 2, T, D), such that |q . k| / sqrt(D) <= bound, and nearly reaches it where D is small."""
    q, k, v, grad_out = torch.randn(4, 1, 2, T, D, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    q, k = (math.sqrt(bound * math.sqrt(D)) * F.normalize(x, dim=-1) for x in (q, k))
    return [q, k, v, grad_out]


def measure_errors(cases: list[tuple[int, float, int]], cfg: ErrorConfig) -> list[dict]:
    rows = []
    with progress_bar(sum(T for T, *_ in cases)) as bar:
        for T, bound, degree in cases:
            tensors = on_spheres(T, cfg.D, bound, cfg.seed)
            truth = torch.cat([x.flatten() for x in gradients(exact_attention, *tensors)[1:]])
            row = {"T": T, "bound": bound, "degree": degree, "worst": worst_error(bound, degree)}
            for name, exact_diagonal in (("paper", False), ("ours", True)):
                got = gradients(lowrank_attention, *tensors, degree=degree, exact_diagonal=exact_diagonal)[1:]
                got = torch.cat([x.flatten() for x in got])
                row[name] = ((got - truth).norm() / truth.norm()).item()
                row[f"{name} cosine"] = F.cosine_similarity(got, truth, 0).item()
            rows.append(row)
            bar.update(T)
    return rows


# -- a whole model ----------------------------------------------------------------------------------


@contextlib.contextmanager
def polynomial_everywhere() -> Iterator[None]:
    """The model's low-rank attention is the paper's."""
    model_module.lowrank_attention = functools.partial(lowrank_attention, exact_diagonal=False)
    try:
        yield
    finally:
        model_module.lowrank_attention = lowrank_attention


def measure_model(lengths: list[int], degrees: list[int], bound: float, cfg: ErrorConfig, device: Device) -> list[dict]:
    """Random weights, text as it is: what has to hold is the bound, and it does for any weights."""
    D, rows = 4, []
    torch.manual_seed(cfg.seed)
    config = GPTConfig(
        block_size=lengths[-1],
        vocab_size=257,
        n_layer=4,
        n_head=8,
        n_embd=8 * D,
        bias=False,
        pos="rope",
        norm="rmsnorm",
        qk_norm=True,
        qk_norm_scale=math.sqrt(bound / math.sqrt(D)),
    )
    model = GPT(config).to(device.device)
    for block in model.transformer.h:  # where residual branches count as much as in a trained model
        torch.nn.init.normal_(block.attn.c_attn.weight, std=0.2)
        torch.nn.init.normal_(block.attn.c_proj.weight, std=0.2)
    subject = Subject(model, device)
    with progress_bar(sum(lengths)) as bar:
        for T in lengths:
            x, y, _ = windows(load_corpus(DATA / cfg.dataset, T), 2)
            for s in range(2):
                sequence = x[[s]].to(device.device), y[[s]].to(device.device)
                truth, _ = subject.gradient(*sequence)
                squares = subject.parts.squares(truth)
                for degree in degrees:
                    row = {"T": T, "degree": degree}
                    for name, context in (("paper", polynomial_everywhere()), ("ours", contextlib.nullcontext())):
                        with context:
                            got, _ = subject.gradient(*sequence, attn_backward="lowrank", lowrank_degree=degree)
                        ratio = (subject.parts.squares(got - truth) / squares).sqrt()
                        row[name], row[f"{name} q, k"] = ratio[0].item(), ratio[-1].item()
                    rows.append(row)
            bar.update(T)
    names = ("paper", "paper q, k", "ours", "ours q, k")
    mean = lambda rows, name: sum(row[name] for row in rows) / len(rows)
    return [
        {"T": T, "degree": g, **{name: mean(pick(rows, T=T, degree=g), name) for name in names}}
        for T in lengths
        for g in degrees
    ]


# -- time and memory --------------------------------------------------------------------------------


def make_methods(degrees: list[int]) -> dict[str, Callable]:
    """{name: attention}"""
    methods = {"exact": exact_attention, "SUS c=4": functools.partial(sus_attention, c=4.0, seed=1)}
    for g in degrees:
        methods[f"low-rank g={g}"] = functools.partial(lowrank_attention, degree=g)
    methods["low-rank g=2, forward too"] = functools.partial(lowrank_attention, degree=2, approximate_forward=True)
    return methods


def peak_bytes(name: str, T: int, D: int, device: Device) -> int | None:
    tensors = [x.to(device.device) for x in on_spheres(T, D, 1.0, 0, torch.float32)]
    method = make_methods([int(name[11:])] if name[11:].isdigit() else [])[name]
    short = [x[:, :, :300].contiguous() for x in tensors]
    gradients(method, *short)  # what is loaded at the first call doesn't count
    return peak_of(lambda: gradients(method, *tensors), device)


def measure_scaling(lengths: list[int], degrees: list[int], cfg: ErrorConfig, device: Device) -> list[dict]:
    methods, rows = make_methods(degrees[:2]), []
    with progress_bar(sum(T * T for T in lengths)) as bar:
        for T in lengths:
            tensors = [x.to(device.device) for x in on_spheres(T, cfg.D, 1.0, cfg.seed, torch.float32)]
            times = time_attention(methods, *tensors, device, 3)
            rows += [
                {
                    "T": T,
                    "name": name,
                    "forward": times[name][0],
                    "backward": times[name][1],
                    "peak": apart(device, peak_bytes, name, T, cfg.D, device),
                }
                for name in methods
            ]
            bar.update(T * T)
    return rows


# -- beside SUS -------------------------------------------------------------------------------------


def measure_sides(degrees: list[int], cs: list[float], cfg: ErrorConfig, device: Device) -> dict:
    """Gradients of a checkpoint, of `sequences` windows, and two draws of SUS for each. bias: the norm of the mean of
    what is added to the gradient, over that of the mean gradient; its square is estimated, and may come out below 0.
    """
    model, dataset, _ = load_model(cfg.out_dir)
    config, T = model.config, model.config.block_size
    subject = Subject(model, device)
    parts = subject.parts
    x, y, _ = windows(load_corpus(DATA / dataset, T), cfg.sequences)
    D = config.D
    backend, _ = sus_backend("auto", device, D)
    methods = {f"SUS c={c:g}": dict(attn_backward="sus", sus_c=c, sus_backend=backend) for c in cs}
    methods |= {f"low-rank g={g}": dict(attn_backward="lowrank", lowrank_degree=g) for g in degrees}
    n = cfg.sequences
    sequence = lambda s: (x[[s]].to(device.device), y[[s]].to(device.device))
    with progress_bar(n * (1 + 2 * len(cs) + len(degrees))) as bar:
        truth = []
        for s in range(n):
            truth.append(subject.gradient(*sequence(s))[0])
            bar.update(1)
        truth = torch.stack(truth)
        mean, squares = truth.mean(0), torch.stack([parts.squares(g) for g in truth])
        variance = torch.stack([parts.squares(g - mean) for g in truth]).sum(0) / (n - 1)
        rows = []
        for name, keys in methods.items():
            draws, errors, cosines, halves = (2 if keys["attn_backward"] == "sus" else 1), 0, [], [0, 0]
            for s in range(n):
                for draw in range(draws):
                    got, _ = subject.gradient(*sequence(s), fold_in(cfg.seed, s, draw), **keys)
                    cosines.append(F.cosine_similarity(got.double(), truth[s].double(), 0).item())
                    off = got.sub_(truth[s])
                    errors = errors + parts.squares(off) / (n * draws)
                    halves[draw] = halves[draw] + off / n
                    bar.update(1)
            if draws == 1:  # the same each time
                halves[1] = halves[0]
            bias = (halves[0] @ halves[1] / mean.square().sum()).item()  # of independent draws: free of their noise
            error, rho = (errors / squares.mean(0)).sqrt(), errors / variance
            rows.append(
                {
                    "name": name,
                    "cosine": sum(cosines) / len(cosines),
                    "error": error[0].item(),
                    "error q, k": error[-1].item(),
                    "rho": rho[0].item(),
                    "rho q, k": rho[-1].item(),
                    "bias": math.copysign(math.sqrt(abs(bias)), bias),
                }
            )
    scores, times = [], {}
    for layer in range(config.n_layer):
        *inputs, _ = capture(model, layer, Batch(x[:1], y[:1]).to(device.device), device, None)
        scores.append(score_bound(*inputs[:2]))
        if layer == config.n_layer // 2:
            functions = {"exact": exact_attention}
            functions |= {f"SUS c={c:g}": functools.partial(sus_attention, c=c, seed=1, backend=backend) for c in cs}
            functions |= {f"low-rank g={g}": functools.partial(lowrank_attention, degree=g) for g in degrees}
            times = time_attention(functions, *inputs, device, 3)
    return {
        "rows": rows,
        "times": times,
        "scores": scores,
        "worst": {g: worst_error(max(scores), g) for g in degrees},
        "T": T,
        "D": D,
        "heads": config.n_head,
    }


if __name__ == "__main__":
    run_main(main)
