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
"""

import contextlib
import functools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import model as model_module
from bench_attention import DATA, gradients
from configurator import UserError, key, load_config, run_main
from data.loader import load_corpus
from grad_variance import Parts, VarianceConfig, load_model, windows
from lowrank_attn import count_features, lowrank_attention, score_bound, worst_error
from measure import (
    describe_machine,
    environment,
    fit_power,
    idleness,
    in_child,
    mib,
    numbers,
    peak_of,
    product_ms,
    sus_backend,
)
from model import GPT, GPTConfig
from output import COLORS, check_picture, import_pyplot, print_table, progress_bar, save_picture
from sus_attn import fold_in, sus_attention
from training.device import Device, memory_errors, resolve_device
from training.probe import capture, time_attention

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


def main():
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
    report(found, cfg)
    print(f"\n{idle}")
    if cfg.out:
        save_picture(draw(found, middle, lengths[-1], cfg.D), Path(cfg.out), dpi=110)
        print(f"picture: {cfg.out}")


def percent(x: float) -> str:
    return f"{100 * x:.2g}" if x < 1 else f"{100 * x:,.0f}"


# -- attention alone --------------------------------------------------------------------------------


def on_spheres(T: int, D: int, bound: float, seed: int, dtype=torch.float64) -> list[Tensor]:
    """q, k, v, grad_out (1, 2, T, D), such that |q . k| / sqrt(D) <= bound, and nearly reaches it where D is small."""
    q, k, v, grad_out = torch.randn(4, 1, 2, T, D, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    q, k = (math.sqrt(bound * math.sqrt(D)) * F.normalize(x, dim=-1) for x in (q, k))
    return [q, k, v, grad_out]


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def measure_errors(cases: list[tuple[int, float, int]], cfg) -> list[dict]:
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


def gradient_of(model: GPT, parts: Parts, x: Tensor, y: Tensor, seed: int = 0, **keys) -> Tensor:
    """The gradient (P,) float32 with these keys of the model's config."""
    for name, value in keys.items():
        setattr(model.config, name, value)
    return parts.gradient(model(x, y, sus_seed=torch.tensor(seed))[1])


def measure_model(lengths, degrees, bound, cfg, device: Device) -> list[dict]:
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
    parts = Parts(model.train())
    with progress_bar(sum(lengths)) as bar:
        for T in lengths:
            x, y, _ = windows(load_corpus(DATA / cfg.dataset, T), 2)
            for s in range(2):
                sequence = x[[s]].to(device.device), y[[s]].to(device.device)
                truth = gradient_of(model, parts, *sequence, attn_backward="exact")
                squares = parts.squares(truth)
                for degree in degrees:
                    row = {"T": T, "degree": degree}
                    for name, context in (("paper", polynomial_everywhere()), ("ours", contextlib.nullcontext())):
                        with context:
                            got = gradient_of(model, parts, *sequence, attn_backward="lowrank", lowrank_degree=degree)
                        ratio = (parts.squares(got - truth) / squares).sqrt()
                        row[name], row[f"{name} q, k"] = ratio[0].item(), ratio[-1].item()
                    rows.append(row)
            bar.update(T)
    names = ("paper", "paper q, k", "ours", "ours q, k")
    mean = lambda rows, name: sum(row[name] for row in rows) / len(rows)
    of = lambda T, g: [row for row in rows if (row["T"], row["degree"]) == (T, g)]
    return [{"T": T, "degree": g, **{name: mean(of(T, g), name) for name in names}} for T in lengths for g in degrees]


# -- time and memory --------------------------------------------------------------------------------


def make_methods(degrees: list[int]) -> dict:
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


def measure_scaling(lengths, degrees, cfg, device: Device) -> list[dict]:
    methods, rows = make_methods(degrees[:2]), []
    memory_of = functools.partial(in_child, peak_bytes) if device.type == "cpu" else peak_bytes
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
                    "peak": memory_of(name, T, cfg.D, device),
                }
                for name in methods
            ]
            bar.update(T * T)
    return rows


# -- beside SUS -------------------------------------------------------------------------------------


def measure_sides(degrees, cs, cfg, device: Device) -> dict:
    """Gradients of a checkpoint, of `sequences` windows, and two draws of SUS for each. bias: the norm of the mean of
    what is added to the gradient, over that of the mean gradient; its square is estimated, and may come out below 0.
    """
    model, dataset, _ = load_model(VarianceConfig(out_dir=cfg.out_dir))
    config, T = model.config, model.config.block_size
    parts = Parts(model.to(device.device).train())
    x, y, _ = windows(load_corpus(DATA / dataset, T), cfg.sequences)
    D = config.n_embd // config.n_head
    backend, _ = sus_backend("auto", device, D, max(cs))
    methods = {f"SUS c={c:g}": dict(attn_backward="sus", sus_c=c, sus_backend=backend) for c in cs}
    methods |= {f"low-rank g={g}": dict(attn_backward="lowrank", lowrank_degree=g) for g in degrees}
    n = cfg.sequences
    sequence = lambda s: (x[[s]].to(device.device), y[[s]].to(device.device))
    with progress_bar(n * (1 + 2 * len(cs) + len(degrees))) as bar:
        truth = []
        for s in range(n):
            truth.append(gradient_of(model, parts, *sequence(s), attn_backward="exact"))
            bar.update(1)
        truth = torch.stack(truth)
        mean, squares = truth.mean(0), torch.stack([parts.squares(g) for g in truth])
        variance = torch.stack([parts.squares(g - mean) for g in truth]).sum(0) / (n - 1)
        rows = []
        for name, keys in methods.items():
            draws, errors, cosines, halves = (2 if keys["attn_backward"] == "sus" else 1), 0, [], [0, 0]
            for s in range(n):
                for draw in range(draws):
                    got = gradient_of(model, parts, *sequence(s), fold_in(cfg.seed, s, draw), **keys)
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
    model.config.attn_backward = "exact"
    scores, times = [], {}
    for layer in range(config.n_layer):
        inputs = capture(model, layer, x[:1].to(device.device), y[:1].to(device.device), device, None)
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


# -- the tables -------------------------------------------------------------------------------------


def report(found: dict, cfg) -> None:
    if "errors" in found:
        for rows, what in zip(found["errors"], ("bound on scores", "T")):
            print(
                f"\nerrors of (dq, dk, dv) over the {what}, D = {cfg.D}; worst: the largest relative error of a weight "
                "before normalisation; all in %\n"
            )
            print_table(
                [
                    ["T", "bound", "g", "features", "worst", "paper", "operator", "paper: cosine", "operator: cosine"],
                    *(
                        [
                            f"{r['T']:,}",
                            f"{r['bound']:g}",
                            str(r["degree"]),
                            f"{count_features(cfg.D, r['degree'] + 1):,}",
                            percent(r["worst"]),
                            percent(r["paper"]),
                            percent(r["ours"]),
                            f"{r['paper cosine']:.4f}",
                            f"{r['ours cosine']:.4f}",
                        ]
                        for r in rows
                    ),
                ]
            )
    if "model" in found:
        print(
            "\nerrors of the gradient of a model of four layers over T, all in %: of all weights, of those that make "
            "queries "
            "and keys\n"
        )
        print_table(
            [
                ["T", "g", "paper", "paper: q, k", "operator", "operator: q, k"],
                *(
                    [
                        f"{r['T']:,}",
                        str(r["degree"]),
                        *(percent(r[n]) for n in ("paper", "paper q, k", "ours", "ours q, k")),
                    ]
                    for r in found["model"]
                ),
            ]
        )
        print("\nexponents in T of these errors, with g fixed, and growing with log T:\n")
        rows = found["model"]
        lengths, degrees = (list(dict.fromkeys(r[n] for r in rows)) for n in ("T", "degree"))
        growing = {T: degrees[i * len(degrees) // len(lengths)] for i, T in enumerate(lengths)}
        chosen = {f"{g}": [r for r in rows if r["degree"] == g] for g in degrees}
        chosen["..".join(map(str, growing.values()))] = [r for r in rows if r["degree"] == growing[r["T"]]]
        fitted = lambda rows, name: fit_power([r["T"] for r in rows], [r[name] for r in rows])
        print_table(
            [
                ["g", "paper", "operator"],
                *(
                    [g, *(f"{f[0]:.2f}" if (f := fitted(own, n)) else "-" for n in ("paper", "ours"))]
                    for g, own in chosen.items()
                ),
            ]
        )
    if "scaling" in found:
        rows = found["scaling"]
        print(
            "\ntime (ms, medians of 3) and memory (MiB, the peak of forward and backward beyond the inputs) of 2 heads "
            "of "
            f"{cfg.D}\n"
        )
        cells = (
            [f"{r['T']:,}", r["name"], f"{r['forward']:.3g}", f"{r['backward']:.3g}", mib(r["peak"])] for r in rows
        )
        print_table([["T", "method", "forward", "backward", "MiB"], *cells])
        print("\nexponents in T of forward, backward and memory, fitted over all T; and over the larger half:\n")
        table = [["method", "forward", "backward", "memory", "forward", "backward", "memory"]]
        for name in dict.fromkeys(r["name"] for r in rows):
            own = [r for r in rows if r["name"] == name]
            cells = [
                fit_power([r["T"] for r in part], [r[n] or 0 for r in part])
                for part in (own, own[len(own) // 2 :])
                for n in ("forward", "backward", "peak")
            ]
            table.append([name, *(f"{cell[0]:.2f}" if cell else "-" for cell in cells)])
        print_table(table)
    if "sides" in found:
        report_sides(found["sides"], cfg)


def report_sides(sides: dict, cfg) -> None:
    print(
        f"\n{cfg.out_dir}: T = {sides['T']:,}, {sides['heads']} heads of {sides['D']}; the largest score by layer "
        f"{', '.join(f'{s:.2f}' for s in sides['scores'])}, where the polynomial is off by up to "
        f"{', '.join(f'{percent(e)} % (g = {g})' for g, e in sides['worst'].items())}\n"
    )
    times = sides["times"]
    cells = lambda name: [name, f"{sum(times[name]):.3g}", f"{times[name][1]:.3g}"]
    print_table(
        [
            ["method", "fwd+bwd ms", "bwd ms", "cosine", "error %", "q, k: error %", "rho %", "q, k: rho %", "bias %"],
            [*cells("exact"), "1", *"00000"],
            *(
                [
                    *cells(r["name"]),
                    f"{r['cosine']:.4f}",
                    *map(percent, (r[n] for n in ("error", "error q, k", "rho", "rho q, k"))),
                    f"{100 * r['bias']:.2g}",
                ]
                for r in sides["rows"]
            ),
        ]
    )
    for name in [r["name"] for r in sides["rows"] if r["name"].startswith("low-rank")]:
        affordable = [sus for sus in times if sus.startswith("SUS") and sum(times[sus]) <= sum(times[name])]
        print(f"in the time of {name}: {affordable[-1] if affordable else 'none of these c'}")


# -- the picture ------------------------------------------------------------------------------------


def draw(found: dict, middle: float, longest: int, D: int):
    """The figure: four panels."""
    figure, axes = import_pyplot().subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    over_bound, over_T = found["errors"]
    draw_errors(axes[0, 0], over_bound, "bound", f"attention alone, T = {longest:,}, D = {D}", "largest score")
    draw_errors(axes[0, 1], over_T, "T", f"attention alone, scores <= {middle:g}, D = {D}", "T")
    draw_errors(axes[1, 0], found["model"], "T", f"a model of 4 layers, scores <= {middle:g}, D = 4", "T")
    ax, rows = axes[1, 1], found["scaling"]
    for i, name in enumerate(dict.fromkeys(r["name"] for r in rows)):
        own = [r for r in rows if r["name"] == name]
        T, both, backward = zip(*((r["T"], r["forward"] + r["backward"], r["backward"]) for r in own))
        ax.plot(T, both, marker="o", markersize=4, color=COLORS[i], label=name)
        ax.plot(T, backward, linestyle="--", color=COLORS[i])
    ax.set(title=f"time, 2 heads of {D} (dashed: backward alone)", xlabel="T", ylabel="ms", xscale="log", yscale="log")
    label_points(ax, [r["T"] for r in rows])
    for ax in axes[0, 0], axes[1, 1]:  # the other two have the first one's lines
        ax.legend(fontsize=8)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
    return figure


def label_points(ax, xs) -> None:
    xs = sorted(set(xs))
    ax.set_xticks(xs, [f"{x // 1024}k" if x >= 1024 and x % 1024 == 0 else f"{x:g}" for x in xs])
    ax.minorticks_off()


def draw_errors(ax, rows: list[dict], x: str, title: str, label: str) -> None:
    for i, degree in enumerate(dict.fromkeys(r["degree"] for r in rows)):
        own = [r for r in rows if r["degree"] == degree]
        for name, style in (("ours", "-"), ("paper", "--")):
            points = [(r[x], 100 * r[name]) for r in own if r[name] > 0]
            shown = {"label": f"g = {degree}"} if name == "ours" else {}
            ax.plot(*zip(*points), style, marker="o", markersize=4, color=COLORS[i], **shown)
    ax.set(title=title, xlabel=label, ylabel="error of the gradient (%)", xscale="log", yscale="log")
    ax.plot([], [], "--", color="grey", label="polynomial everywhere (paper)")
    label_points(ax, [row[x] for row in rows])


if __name__ == "__main__":
    run_main(main)
