"""What the draw buys and costs on a model that somebody else trained: rho against milliseconds, by the tile's size.

    python examples/smollm2.py
    python experiments/capture_attention.py models/smollm2 --text=book.txt --layers=2,10,20,24 --T=2048 --out=2k.pt
    python experiments/capture_attention.py models/smollm2 --text=book.txt --layers=2,10,20,24 --T=8192 --out=8k.pt
    python experiments/tile_sizes.py models/smollm2 --text=book.txt --inputs=2k.pt,8k.pt --out=tile-sizes.png

rho is the paper's relative increase of the gradient's variance, over pages of the text: of all weights, and of those of
queries and keys alone. Each page's exact gradient and its estimates come from one and the same forward. A step is the
model's forward and backward on one page, with the attention of the captured layers, on average, in each of its layers.
step x (1 + rho) is what a step costs if noise is paid for with more steps.

A draw is TILE:c, or poisson:c, the paper's rule for single keys. The product has tiles of 64 keys only: for the others
a copy of its backend is made, in which TILE is another number. It runs on the CPU. With --from_json=FILE.json rho is
that of an earlier run, which --json=FILE.json had written; and so are the times, if there are no --inputs. One of the
inputs is of as many tokens as a page.

Dims: B batch (1), H query heads, K key/value heads, T tokens, D head dimension.
"""

import importlib
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import UserError, key, load_config, run_main  # isort: skip (before torch)

import torch
from torch import Tensor

from capture_attention import load
from contenders import captured_inputs
from data.reading import read_text
from exact_attn import exact_attention
from measure import environment, gradients
from output import (
    COLORS,
    check_picture,
    check_writable,
    deliver,
    each,
    import_pyplot,
    pick,
    print_table,
    progress_bar,
    read_json,
)
from sus_backends import cpu, reference
from training.device import memory_errors, resolve_device
from training.probe import time_attention
from training.record import plain

if TYPE_CHECKING:  # these are imported where they are used
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

DRAWS = "64:4,64:8,64:12,64:16,64:24,32:8,32:16,32:24,16:16,16:32,16:48,poisson:25,poisson:100,poisson:200"
Draw = tuple[str, float]  # the tile's size, or poisson; and c


@dataclass
class TilesConfig:
    text: str = key("", "the text to read pages of; .txt or .txt.gz")
    T: int = key(2048, "tokens of a page", low=16)
    pages: int = key(8, "pages, evenly spread over the text", low=2)
    draws: str = key(DRAWS, "what to try: TILE:c or poisson:c, with commas between them")
    inputs: str = key("", "files of capture_attention.py, with commas between them, to measure times on")
    repeats: int = key(7, "rounds of the times, the first of which doesn't count", low=2)
    out: str = key("", "a picture to draw: .png, .svg or .pdf")
    json: str = key("", "a file for all figures")
    from_json: str = key("", "take rho from this file; and the times, without inputs")


def main() -> None:
    cfg = load_config(TilesConfig, [arg for arg in sys.argv[1:] if arg.startswith("-")], usage=__doc__)
    models = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    if cfg.out:
        check_picture(cfg.out)
    check_writable(cfg.json)
    data = read_json(Path(cfg.from_json), "tile_sizes") if cfg.from_json else {"benchmark": "tile_sizes"}
    if not cfg.from_json or cfg.inputs:
        if len(models) != 1 or not cfg.text or not cfg.inputs:
            raise UserError("give a model's folder, a --text and --inputs; or --from_json=FILE.json")
        if cfg.from_json:
            draws = [(row["tile"], float(row["c"])) for row in data["rho"]]
        else:
            draws = [draw_of(text) for text in cfg.draws.split(",")]
        files = {path: captured_inputs(Path(path))[1] for path in cfg.inputs.split(",")}
        T = data["origin"]["T"] if cfg.from_json else cfg.T
        if T not in {next(iter(layers.values()))[0].shape[2] for layers in files.values()}:
            raise UserError(
                f"none of --inputs is of pages of {T} tokens, so a step's parts can't be told apart: write one by "
                f"experiments/capture_attention.py --T={T}"
            )
        attention = Attention()
        model, pages = pages_of(Path(models[0]), cfg, attention)
        with tempfile.TemporaryDirectory() as scratch, memory_errors("Give a smaller --T"):
            attention.backends = {tile: with_tile(tile, scratch) for tile in {tile for tile, _ in draws}}
            if not cfg.from_json:
                data["origin"] = {"model": models[0], "text": cfg.text, "T": cfg.T, "pages": cfg.pages}
                data["rho"] = measure_rho(model, pages, attention, draws)
            data["layers"] = model.config.num_hidden_layers
            data["step"] = measure_step(model, pages[0], attention)
            data["times"] = [
                row for path, layers in files.items() for row in measure_times(path, layers, cfg, draws, attention)
            ]
        data["environment"] = environment(resolve_device("cpu", "float32"))
        data = plain(data, nonfinite=str)
    deliver(data, report, cfg.json, draw_picture, cfg.out)


def draw_of(text: str) -> Draw:
    tile, _, c = text.partition(":")
    try:
        if tile not in ("16", "32", "64", "128", "poisson") or not float(c) > 0:
            raise ValueError
        return tile, float(c)
    except ValueError:
        raise UserError(f"--draws: {text!r} is not 16:c, 32:c, 64:c, 128:c or poisson:c, with a c above 0") from None


def with_tile(tile: str, scratch: str) -> ModuleType:
    """The CPU backend with tiles of that size."""
    if tile in ("poisson", str(reference.TILE)):
        return cpu
    name = f"sus_backends_{tile}"
    (Path(scratch) / name).mkdir()
    for file in Path(cpu.__file__).parent.glob("*.py"):
        source = file.read_text(encoding="utf-8").replace("sus_backends", name)
        source = re.sub(r"^TILE = \d+$", f"TILE = {tile}", source, flags=re.MULTILINE)
        if tile == "16":  # no narrower than the matrix product's register tile
            source = source.replace("HEIGHT, WIDE = (8, 2) if", "HEIGHT, WIDE = (8, 1) if")
        (Path(scratch) / name / file.name).write_text(source, encoding="utf-8")
    sys.path.insert(0, scratch)
    try:
        return importlib.import_module(f"{name}.cpu")
    finally:
        sys.path.remove(scratch)


class _Drawn(torch.autograd.Function):
    """The attention of a CPU backend. stats: of sus_attention."""

    @staticmethod
    def forward(ctx, q, k, v, backend: ModuleType, sampler: str, c: float, seed: Tensor, stats: Tensor | None):
        ctx.backend, ctx.sampler, ctx.c, ctx.seed, ctx.stats = backend, sampler, c, seed, stats
        out, *rest = backend.forward(q, k, v, q.shape[3] ** -0.5, True, c, c, seed, None, sampler=sampler)
        ctx.save_for_backward(q, k, v, out, *rest)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        rest = grad_out.shape[3] ** -0.5, ctx.c, ctx.seed, reference.row_weights(grad_out), ctx.stats is not None
        *grads, found = ctx.backend.backward(grad_out, *ctx.saved_tensors, *rest, sampler=ctx.sampler)
        if ctx.stats is not None:
            ctx.stats.copy_(found)
        return *grads, *(None,) * 5


def drawn(draw: Draw, backends: dict[str, ModuleType], seed: int, stats: Tensor | None = None) -> Callable:
    """A function of q (B, H, T, D) and k, v (B, K, T, D): exact, with the gradient that the draw makes."""
    tile, c = draw
    sampler = "poisson" if tile == "poisson" else "tiles"
    return lambda q, k, v: _Drawn.apply(q, k, v, backends[tile], sampler, c, torch.tensor(seed), stats)


# -- rho ----------------------------------------------------------------------------------------------


class Attention:
    """Of a model of transformers: exact, with the gradient that `draw` makes; exact, too, if it is None."""

    def __init__(self):
        self.backends: dict[str, ModuleType] = {}
        self.draw: Draw | None = None
        self.seed, self.kept = 0, 0.0

    def __call__(self, module, q, k, v, mask, scaling: float | None = None, **_: Any) -> tuple[Tensor, None]:
        """q (B, H, T, D), k and v (B, K, T, D) to (B, T, H, D)."""
        if scaling is not None:  # for functions that multiply scores by 1 / sqrt(D)
            q = q * (scaling * q.shape[3] ** 0.5)
        return _Attention.apply(q, k, v, self, module.layer_idx).transpose(1, 2), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, of: Attention, layer: int):
        ctx.save_for_backward(q, k, v)
        ctx.of, ctx.layer = of, layer
        return exact_attention(q, k, v)

    @staticmethod
    @torch.enable_grad()
    def backward(ctx, grad_out):
        (q, k, v), of, stats = ctx.saved_tensors, ctx.of, torch.zeros(3)
        function = drawn(of.draw, of.backends, of.seed + ctx.layer, stats) if of.draw else exact_attention
        _, *grads = gradients(function, q, k, v, grad_out)
        of.kept += stats[0].item() / q[..., 0].numel()
        return *grads, None, None


def pages_of(folder: Path, cfg: TilesConfig, attention: Attention) -> tuple["PreTrainedModel", list[Tensor]]:
    """The model, and the pages, (1, T) each. UserError."""
    model, tokenizer = load(folder, attention)
    ids = torch.tensor(tokenizer(read_text(Path(cfg.text)), add_special_tokens=False, verbose=False).input_ids)
    if len(ids) < cfg.pages * cfg.T:
        raise UserError(
            f"{cfg.text} has {len(ids):,} tokens, fewer than {cfg.pages} pages of {cfg.T}: give a longer one"
        )
    return model, [page[None, : cfg.T] for page in ids.split(len(ids) // cfg.pages)[: cfg.pages]]


def measure_rho(model: "PreTrainedModel", pages: list[Tensor], attention: Attention, draws: list[Draw]) -> list[dict]:
    """Rows by draw: entries kept of a row, and rho, of all weights and of those of queries and keys."""
    names, weights = zip(*model.named_parameters())
    parts = {"rho": list(range(len(names)))}
    parts["rho_qk"] = [i for i, name in enumerate(names) if re.search(r"\b[qk]_proj\b", name)]
    square = lambda tensors, part: sum(tensors[i].square().sum().double().item() for i in part)
    total, squares = None, dict.fromkeys(parts, 0.0)
    errors = {draw: dict.fromkeys((*parts, "kept"), 0.0) for draw in draws}
    with progress_bar(len(pages) * (2 + len(draws))) as bar:
        bar.set_description_str("rho")
        for n, page in enumerate(pages, start=1):
            loss = model(input_ids=page, labels=page, use_cache=False).loss
            bar.update()
            attention.draw = None
            exact = torch.autograd.grad(loss, weights, retain_graph=True)
            bar.update()
            total = exact if total is None else [a + b for a, b in zip(total, exact)]
            for name, part in parts.items():
                squares[name] += square(exact, part)
            for draw in draws:
                attention.draw, attention.seed, attention.kept = draw, 1000 * n, 0.0
                estimate = torch.autograd.grad(loss, weights, retain_graph=True)
                difference = [a - b for a, b in zip(estimate, exact)]
                for name, part in parts.items():
                    errors[draw][name] += square(difference, part) / len(pages)
                errors[draw]["kept"] += attention.kept / model.config.num_hidden_layers / len(pages)
                bar.update()
            del loss, exact, estimate, difference
    variance = {
        name: (squares[name] - square(total, part) / len(pages)) / (len(pages) - 1) for name, part in parts.items()
    }
    return [
        {"tile": draw[0], "c": draw[1], "kept": e["kept"], **{name: e[name] / variance[name] for name in parts}}
        for draw, e in errors.items()
    ]


# -- times ----------------------------------------------------------------------------------------------


def measure_step(model: "PreTrainedModel", page: Tensor, attention: Attention, repeats: int = 3) -> float:
    """Seconds of an exact step on a page, the median."""
    attention.draw, seconds = None, []
    for _ in range(repeats):
        start = time.perf_counter()
        model(input_ids=page, labels=page, use_cache=False).loss.backward()
        seconds.append(time.perf_counter() - start)
        model.zero_grad()
    return statistics.median(seconds)


def measure_times(name: str, layers: dict, cfg: TilesConfig, draws: list[Draw], attention: Attention) -> list[dict]:
    """Rows by draw, and of exact attention: the median times, in ms, on average over the layers."""
    functions = {"exact": exact_attention}
    functions |= {f"{tile}:{c}": drawn((tile, c), attention.backends, 1) for tile, c in draws}
    times, cpu_ = [], resolve_device("cpu", "float32")
    with progress_bar(len(layers)) as bar:
        bar.set_description_str(f"times on {name}")
        for layer in layers.values():
            times.append(time_attention(functions, *layer, cpu_, cfg.repeats - 1))
            bar.update()
    T, rows = next(iter(layers.values()))[0].shape[2], []
    for (tile, c), of in zip([("exact", None), *draws], zip(*(by.values() for by in times))):
        forward, backward = map(statistics.mean, zip(*of))
        rows.append({"T": T, "tile": tile, "c": c, "forward": forward, "backward": backward})
    return rows


# -- the table and the picture ----------------------------------------------------------------------------


def report(data: dict) -> None:
    origin, env = data["origin"], data["environment"]
    print(
        f"{origin['model']}, {origin['pages']} pages of {origin['T']} tokens; {env['device']}, {env['threads']} "
        f"threads, torch {env['torch']}; ms of one layer, s of a step"
    )
    for T in each(data["times"], "T"):
        times = {(row["tile"], row["c"]): row for row in pick(data["times"], T=T)}
        exact = times["exact", None]
        # what is no attention takes as long for a token whatever T is
        rest = (data["step"] - 1e-3 * data["layers"] * attention_of(data, origin["T"])) * T / origin["T"]
        step = lambda row: rest + 1e-3 * data["layers"] * (row["forward"] + row["backward"])
        titles = ["tile", "c", "kept/row", "rho %", "rho % of q, k", "fwd", "bwd", "bwd ratio", "fwd+bwd ratio", "step"]
        table = [[f"T = {T:,}: tile", *titles[1:], "step x (1 + rho)"]]
        table.append(
            ["exact", "-", "-", "0", "0", *(f"{exact[name]:.1f}" for name in ("forward", "backward")), "1", "1",
             *[f"{step(exact):.2f}"] * 2]
        )  # fmt: skip
        for row in data["rho"]:
            at = times[row["tile"], row["c"]]
            both = (exact["forward"] + exact["backward"]) / (at["forward"] + at["backward"])
            table.append(
                [
                    row["tile"],
                    f"{float(row['c']):g}",
                    f"{row['kept']:.1f}",
                    *(f"{100 * row[name]:.3g}" for name in ("rho", "rho_qk")),
                    *(f"{at[name]:.1f}" for name in ("forward", "backward")),
                    f"{exact['backward'] / at['backward']:.2f}",
                    f"{both:.2f}",
                    f"{step(at):.2f}",
                    f"{step(at) * (1 + row['rho']):.2f}",
                ]
            )
        print_table(table)


def attention_of(data: dict, T: int) -> float:
    """ms of exact attention, forward and backward, at the pages' T, which one of the inputs has."""
    found = pick(data["times"], T=T, tile="exact")
    return found[0]["forward"] + found[0]["backward"]


def draw_picture(data: dict) -> "Figure":
    plt, Ts = import_pyplot(), each(data["times"], "T")
    figure, axes = plt.subplots(1, len(Ts), figsize=(5.2 * len(Ts), 4.2), sharey=True, squeeze=False)
    for axis, T in zip(axes[0], Ts):
        times = {(row["tile"], row["c"]): row["backward"] for row in pick(data["times"], T=T)}
        for color, tile in zip(COLORS, each(data["rho"], "tile")):
            rows = pick(data["rho"], tile=tile)
            name = "single keys, the paper's rule" if tile == "poisson" else f"tiles of {tile}"
            xy = [times[tile, row["c"]] for row in rows], [100 * row["rho"] for row in rows]
            axis.plot(*xy, "o-", color=color, label=name)
            for x, y, row in zip(*xy, rows):
                axis.annotate(
                    f"{float(row['c']):g}", (x, y), (4, 4), textcoords="offset points", fontsize=8, color=color
                )
        axis.set(xlabel="backward, ms a layer", yscale="log", title=f"times at T = {T:,}")
        axis.set_xlim(left=0)
    axes[0][0].set_ylabel(f"rho, %, at T = {data['origin']['T']:,}")
    axes[0][-1].legend()  # where the curves leave most room
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    run_main(main)
