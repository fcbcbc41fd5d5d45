"""Whole training steps, exact against SUS: tokens a second, attention's share, memory.

    python experiments/bench_train.py config/long_ctx.py                    # T = 2048, 4096, 8192; minutes on a CPU
    python experiments/bench_train.py config/long_ctx.py --T=8192 --sus_c=2 --json=train.json
    python experiments/bench_train.py config/long_ctx.py --T=8192 --layers=4,12 --modes=none,attention,full
    python experiments/bench_train.py --init_from=models/smollm2 --dataset=NAME --batch_size=1

Takes train.py's config files and keys, with each T in turn as block_size. One model takes exact and SUS steps by turns,
each step on the same batch as the other's and as train.py's. Times are medians, ratios those of steps of the same
round, with their lowest and highest. With --modes each value of activation_checkpointing takes its turn, too.

Without --modes and --layers, attention's share is measured in further steps, which have clocks around each layer's
attention, forward and backward (activation checkpointing's repeated forward included). They are not compiled. Memory is
the peak in a fresh process (on CUDA: as torch counts it) of two steps with what they need: model, gradients, optimizer,
activations.

Dims: T tokens in a window (block_size).
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import TrainConfig, UserError, key, load_config, run_main, validate  # isort: skip (before torch)

import torch
from torch import nn
from tqdm import tqdm

from data.loader import Corpus, load_corpus
from measure import (
    apart,
    describe_machine,
    heading,
    mib,
    numbers,
    peak_of,
    product_ms,
    ratio,
    ratio_text,
    spread,
    sus_backend,
)
from output import check_writable, deliver, print_table, progress_bar
from train import train_step
from training.device import Device, memory_errors, resolve_device
from training.optimizer import new_optimizer
from training.record import plain
from training.start import DATA, find_origin, new_model, prepare_stdlib

KINDS = ("exact", "sus")
SHARE_ROUNDS = 3


@dataclasses.dataclass
class BenchTrainConfig(TrainConfig):
    """train.py's keys, and the benchmark's."""

    T: str = key("2048,4096,8192", "context lengths", section="Benchmark")
    repeats: int = key(5, "timed rounds of steps, after one for warming up", low=1)
    memory: bool = key(True, "measure the memory too")
    layers: str = key("", "numbers of layers, with commas between them; empty: n_layer")
    modes: str = key("", "values of activation_checkpointing, with commas between them; empty: its own")
    json: str = key("", "file for every figure")


def main() -> None:
    cfg = load_config(BenchTrainConfig, sys.argv[1:], usage=__doc__)
    Ts = numbers("T", cfg.T, int, 2)
    check_writable(cfg.json)
    check_keys(cfg, backprop="experiments/bench_backprop.py measures the analytic one")
    layers, modes = layers_of(cfg), modes_of(cfg)
    for n_layer in layers:
        validate(dataclasses.replace(cfg, n_layer=n_layer))
    rounds = (cfg.repeats + share_rounds(cfg) + 2) * len(KINDS) * len(modes) * len(layers)
    with memory_errors("Give a smaller --T"):
        data = plain(measure("bench_train", measure_at, rounds, cfg, Ts), nonfinite=str)
    deliver(data, report, cfg.json)


def layers_of(cfg: BenchTrainConfig) -> list[int]:
    return numbers("layers", cfg.layers, int, 1) if cfg.layers else [cfg.n_layer]


def share_rounds(cfg: BenchTrainConfig) -> int:
    """The table of modes has no column for it."""
    return 0 if cfg.modes or cfg.layers else SHARE_ROUNDS


def modes_of(cfg: BenchTrainConfig) -> list[str]:
    modes = cfg.modes.split(",") if cfg.modes else [cfg.activation_checkpointing]
    known = next(f for f in dataclasses.fields(cfg) if f.name == "activation_checkpointing").metadata["choices"]
    if len({*modes}) < len(modes) or not {*modes} <= {*known}:
        raise UserError(f"--modes must be some of {','.join(known)}, with commas between them, not {cfg.modes!r}")
    return modes


def check_keys(cfg: BenchTrainConfig, **meaningless: str) -> None:
    """Refuse keys that mean nothing to a benchmark of steps, e.g. those that it sets, {name: what else to do};
    UserError. Then attn_backward and backprop of a config file are set aside.
    """
    meaningless |= {"block_size": "give the context lengths by --T", "attn_backward": "both are measured"}
    for name, instead in meaningless.items():
        if any(arg.startswith(f"--{name}=") for arg in sys.argv[1:]):  # a config file may have them, for train.py
            raise UserError(f"--{name} means nothing here: {instead}")
    if cfg.init_from == "resume":
        raise UserError("init_from=resume: no run is gone on with here; give a folder, or leave it out")
    if cfg.init_from != "scratch":
        if getattr(cfg, "layers", ""):
            raise UserError(
                f"--layers={cfg.layers} makes new models, and init_from={cfg.init_from} is one: leave one out"
            )
        find_origin(cfg, True)  # cfg takes its keys
    if cfg.sus_c == "auto":
        raise UserError("sus_c=auto is steered by a whole run: give a number")
    cfg.attn_backward, cfg.backprop = "sus", "autograd"  # validate then also refuses what SUS can't do


# -- a step, as in train.py -------------------------------------------------------------------------


class Trainer:
    """A model of context length T and what trains it."""

    def __init__(self, cfg: BenchTrainConfig, T: int, device: Device, corpus: Corpus):
        self.cfg, self.device, self.corpus = dataclasses.replace(cfg, block_size=T), device, corpus
        self.cfg.explicit = {"block_size"}
        torch.manual_seed(cfg.seed)
        model, _ = find_origin(self.cfg, False).model(self.cfg)
        self.model = (model or new_model(self.cfg, corpus.vocab_size)).to(device.device)
        self.optimizer, self.scaler = new_optimizer(cfg, self.model, device)
        self.compiled = self.model
        if device.type == "cuda" if cfg.compile is None else cfg.compile:
            torch.compiler.reset()  # or else a second T is compiled for any T
            self.compiled = torch.compile(self.model)

    def step(self, kind: str, it: int, model: nn.Module | None = None) -> tuple[float, float]:
        """train.py's iteration `it` with exact or SUS gradients: returns (loss, norm of the gradient)."""
        self.cfg.attn_backward = self.model.config.attn_backward = kind
        return train_step(self.cfg, model or self.compiled, self.optimizer, self.scaler, self.corpus, self.device, it)

    def timed_step(self, kind: str, it: int, model: nn.Module | None = None) -> float:
        """Milliseconds."""
        self.device.synchronize()
        start = time.perf_counter()
        loss, norm = self.step(kind, it, model)
        self.device.synchronize()
        # float16's scale is found by steps whose gradient overflows
        if not (math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled())):
            raise UserError(
                f"the {kind} step at T = {self.cfg.block_size} is wrong, so there are no figures: its loss is "
                f"{loss}, its gradient's norm {norm}"
            )
        return 1e3 * (time.perf_counter() - start)

    def attention_share(self, kind: str, it: int) -> float:
        """The fraction of a step's time that is attention's, forward and backward."""
        spent, handles = [], []

        def clock(*_):
            self.device.synchronize()
            spent.append(time.perf_counter())

        for block in self.model.transformer.h:
            attend = block.attn.attend
            # the backward's hooks: as the gradient of its output is there, and as those of q, k and v are
            handles += [
                attend.register_forward_pre_hook(clock),
                attend.register_forward_hook(clock),
                attend.register_full_backward_pre_hook(clock),
                attend.register_full_backward_hook(clock),
            ]
        try:
            whole = self.timed_step(kind, it, self.model)
        finally:
            for handle in handles:
                handle.remove()
        return 1e3 * sum(end - start for start, end in zip(spent[::2], spent[1::2], strict=True)) / whole


# -- measuring --------------------------------------------------------------------------------------


def measure(benchmark: str, measure_at: Callable, rounds: int, cfg: BenchTrainConfig, Ts: list[int]) -> dict:
    """Every figure. measure_at(cfg, T, device, corpus, bar) gives the rows of a length, and advances the bar `rounds`
    times by T^2; UserError if a step is wrong.
    """
    device = resolve_device(cfg.device, cfg.dtype)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as train.py
    backend, why = sus_backend(cfg.sus_backend, device, cfg.D, cfg.sus_sampler)
    print(f"{device.reason}; SUS c = {cfg.sus_c:g} by the {backend} backend ({why})", flush=True)
    prepare_stdlib(cfg)
    corpora = {
        T: load_corpus(DATA / cfg.dataset, T, cfg.windows, cfg.doc_mask) for T in Ts
    }  # too long a T is an error now
    results, product = [], [product_ms(device)]
    with progress_bar(sum(T**2 for T in Ts) * rounds) as bar:
        for T, corpus in corpora.items():
            bar.set_description(f"T = {T:,}")
            results += measure_at(cfg, T, device, corpus, bar)
            product.append(product_ms(device))
    return heading(benchmark, cfg, device, product) | {
        "sus_backend": backend,
        "dtype": str(device.dtype).removeprefix("torch."),
        "results": results,
    }


def measure_at(cfg: BenchTrainConfig, T: int, device: Device, corpus: Corpus, bar: tqdm) -> list[dict]:
    """One context length: for each number of layers and mode a row of results for exact, and one for SUS."""
    rows = []
    for n_layer in layers_of(cfg):
        rows += measure_model(dataclasses.replace(cfg, n_layer=n_layer), T, device, corpus, bar)
    return rows


def measure_model(cfg: BenchTrainConfig, T: int, device: Device, corpus: Corpus, bar: tqdm) -> list[dict]:
    trainer = Trainer(cfg, T, device, corpus)
    check_forward(trainer)
    rows = [
        {"T": T, "layers": cfg.n_layer, "mode": mode, "kind": kind, "step_ms": [], "attention_share": []}
        for mode in modes_of(cfg)
        for kind in KINDS
    ]
    for it in range(cfg.repeats + 1):
        for row in reversed(rows) if it % 2 else rows:
            trainer.model.config.activation_checkpointing = row["mode"]
            step = trainer.timed_step(row["kind"], it)
            if it:  # the first is the warm-up
                row["step_ms"].append(step)
            bar.update(T**2)
    for it in range(cfg.repeats + 1, cfg.repeats + 1 + share_rounds(cfg)):
        for row in rows:
            row["attention_share"].append(trainer.attention_share(row["kind"], it))
            bar.update(T**2)
    parameters = trainer.model.num_params()
    del trainer  # CUDA's memory is measured in this process
    tokens = cfg.gradient_accumulation_steps * cfg.batch_size * T
    for row in rows:
        if cfg.memory:
            of_mode = dataclasses.replace(cfg, activation_checkpointing=row["mode"])
            row["peak_bytes"] = apart(device, memory_of, of_mode, row["kind"], T, device, corpus)
        bar.update(T**2)
        row["parameters"], row["tok_per_sec"] = parameters, [tokens / (1e-3 * step) for step in row["step_ms"]]
    return rows


@torch.no_grad()
def check_forward(trainer: Trainer) -> None:
    """UserError unless SUS's loss is exact's, as its forward is. Its gradient is checked by bench_attention.py."""
    x, y, documents = trainer.corpus.batch(1, trainer.cfg.seed, 0).to(trainer.device.device)
    losses = {}
    for kind in KINDS:
        trainer.model.config.attn_backward = kind
        with trainer.device.autocast():
            losses[kind] = trainer.model(x, y, documents=documents, sus_seed=torch.tensor(0))[1].item()
    if not abs(losses["sus"] - losses["exact"]) <= torch.finfo(trainer.device.dtype).eps * 8 * abs(losses["exact"]):
        raise UserError(
            f"SUS is wrong here, so there are no figures: at T = {trainer.cfg.block_size} the loss with it is "
            f"{losses['sus']:.8g}, exact's {losses['exact']:.8g}"
        )


def memory_of(cfg: BenchTrainConfig, kind: str, T: int, device: Device, corpus: Corpus) -> int | None:
    """The most bytes that two steps take at once, with the model and all."""

    def two_steps(T, corpus):
        trainer = Trainer(cfg, T, device, corpus)
        for it in range(2):  # the optimizer's state is made in the first
            trainer.step(kind, it)

    short = min(T, 128)
    two_steps(short, dataclasses.replace(corpus, block_size=short))  # loads and compiles what it needs
    return peak_of(lambda: two_steps(T, corpus), device)


# -- the table --------------------------------------------------------------------------------------


def describe_steps(data: dict, *more: str) -> str:
    """What was measured, a line; `more` comes before SUS."""
    cfg = data["config"]
    rows = [{"layers": cfg["n_layer"]} | row for row in data["results"]]
    each_of = lambda name, unit, form: " and ".join(dict.fromkeys(f"{row[name] * unit:{form}}" for row in rows))
    return "; ".join(
        [
            f"{each_of('parameters', 1e-6, '.2f')} M parameters: {each_of('layers', 1, 'g')} layers, {cfg['n_head']} "
            f"heads, width {cfg['n_embd']}",
            data["dtype"],
            f"{cfg['gradient_accumulation_steps']} x {cfg['batch_size']} sequences a step",
            *more,
            *(f"{name}={cfg[name]}" for name in ("doc_mask", "attn_window", "offload_activations") if cfg[name]),
            f"SUS c = {float(cfg['sus_c']):g}, {data['sus_backend']} backend",
        ]
    )


def report(data: dict) -> None:
    machine, idle = describe_machine(data)
    cfg, results = data["config"], data["results"]
    print(f"{machine}\n{describe_steps(data)}\n")
    pairs = list(zip(results[::2], results[1::2]))
    print_table(by_mode(pairs) if cfg["modes"] or cfg["layers"] else by_length(pairs))
    more = (
        "Mode: activation_checkpointing; of none: the ratio to none's."
        if cfg["modes"] or cfg["layers"]
        else "Attention: its share of a step's time, forward and backward."
    )
    print(
        f"\nOne step: forward, backward, clipping, AdamW; medians of {cfg['repeats']}. Ratio: median (lowest..highest) "
        f"of the rounds.\n{more} MiB: the peak of model, optimizer and step.\n{idle}"
    )


def by_length(pairs: list[tuple[dict, dict]]) -> list[list[str]]:
    """A table's rows, from rows of results for exact and SUS."""
    head = ["T", "exact tok/s", "SUS tok/s", "SUS / exact", "exact ms", "SUS ms", "exact attention", "SUS attention"]
    rows = [[*head, "exact MiB", "SUS MiB"]]
    for pair in pairs:
        exact, sus = pair
        rows.append(
            [
                f"{exact['T']:,}",
                *(f"{spread(row['tok_per_sec'])['median']:,.0f}" for row in pair),
                ratio_text(ratio(sus["tok_per_sec"], exact["tok_per_sec"])),
                *(f"{spread(row['step_ms'])['median']:,.0f}" for row in pair),
                *(f"{spread(row['attention_share'])['median']:.0%}" for row in pair),
                *(mib(row.get("peak_bytes")) for row in pair),
            ]
        )
    return rows


def by_mode(pairs: list[tuple[dict, dict]]) -> list[list[str]]:
    """The same, for several numbers of layers and modes, each beside mode none."""
    head = ["layers", "T", "mode", "SUS / exact", "exact ms", "of none", "SUS ms", "of none"]
    rows = [[*head, "exact MiB", "of none", "SUS MiB", "of none"]]
    plain = {(row["layers"], row["T"], row["kind"]): row for pair in pairs for row in pair if row["mode"] == "none"}
    for pair in pairs:
        exact, sus = pair
        times, memory = [], []
        for row in pair:
            of_none = plain.get((row["layers"], row["T"], row["kind"]), {})
            times.append(f"{spread(row['step_ms'])['median']:,.0f}")
            times.append(f"{ratio(row['step_ms'], of_none['step_ms'])['median']:.2f}" if of_none else "-")
            memory.append(mib(row.get("peak_bytes")))
            least = of_none.get("peak_bytes")
            memory.append(f"{row['peak_bytes'] / least:.2f}" if least and row.get("peak_bytes") else "-")
        faster = ratio_text(ratio(sus["tok_per_sec"], exact["tok_per_sec"]))
        rows.append([str(exact["layers"]), f"{exact['T']:,}", exact["mode"], faster, *times, *memory])
    return rows


if __name__ == "__main__":
    run_main(main)
