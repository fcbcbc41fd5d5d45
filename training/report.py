"""What a run prints: the summary at its start, a line or a bar for its steps, the sample at its end.

Dims: T tokens in a window (block_size).
"""

import itertools
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configurator import TrainConfig, UserError
from data.loader import Corpus
from data.tokenizer import tokenizer_from_meta
from lowrank_attn import count_features
from model import GPT
from sus_attn import resolve_backend
from training.device import Device
from training.record import relative
from training.retention import Retention

ROOT = Path(__file__).resolve().parents[1]
MOST_FEATURES = 1 << 20  # of the low-rank backward: a chunk of them takes half a gigabyte, a few times


# -- before the steps ---------------------------------------------------------------------------------


def describe_backward(cfg: TrainConfig) -> str:
    """What makes attention's gradient, in the words of a run's name."""
    if cfg.attn_backward == "lowrank":
        return f"lowrank-g{cfg.lowrank_degree}" + ("-approximate" if cfg.lowrank_forward == "approximate" else "")
    if cfg.attn_backward != "sus":
        return cfg.attn_backward
    c = cfg.sus_c if cfg.sus_c == "auto" else f"{cfg.sus_c:g}"
    return f"sus-c{c}" + ("" if cfg.sus_sampler == "tiles" else f"-{cfg.sus_sampler}")


def run_name(cfg: TrainConfig) -> str:
    """The name of a run that the user gave none: what it runs, and four random digits."""
    return f"{'lora-' if cfg.lora_rank else ''}{describe_backward(cfg)}-{os.urandom(2).hex()}"


def describe_attention(cfg: TrainConfig, device: Device) -> str:
    """The summary's line on attention. UserError if the backend that is asked for can't be had here."""
    if cfg.attn_backward == "lowrank":
        features = count_features(cfg.D, cfg.lowrank_degree + 1)
        if features > MOST_FEATURES:
            raise UserError(
                f"lowrank_degree={cfg.lowrank_degree} means {features:,} features a token with heads of {cfg.D}, too "
                "many for any memory: set a lower --lowrank_degree, or smaller heads by a larger --n_head"
            )
        return (
            f"low-rank backward, degree {cfg.lowrank_degree}, {features:,} features a token; "
            f"{cfg.lowrank_forward} forward"
        )
    if cfg.attn_backward != "sus":
        return "exact backward"
    try:
        backend, why = resolve_backend(cfg.sus_backend, device.type, device.dtype, cfg.D, sampler=cfg.sus_sampler)
    except ValueError as error:
        raise UserError(f"sus_{error}") from None
    c = f"c set by itself for rho = {cfg.sus_rho:g}" if cfg.sus_c == "auto" else f"c = {cfg.sus_c:g}"
    return f"SUS backward, {c}, sampler {cfg.sus_sampler}, {backend} backend ({why})"


def describe_sight(cfg: TrainConfig, model: GPT) -> str:
    """What rows see of their past, if not all, for the summary's line on attention."""
    within = "; within documents" if cfg.doc_mask else ""
    if not cfg.attn_window:
        return within
    short = sum(window > 0 for window in model.config.layer_windows)
    return f"{within}; {short} of {cfg.n_layer} layers see the last {cfg.attn_window} tokens"


def print_summary(
    cfg: TrainConfig, device: Device, attention: str, corpus: Corpus, model: GPT, is_compiled: bool, world: int, it: int
) -> None:
    """What the run is, a line each for device, data, model, step, attention. attention: of `describe_attention`."""
    rows = {
        "device": f"{device.reason}; {'compiled' if is_compiled else 'not compiled'}"
        + (f"; {world} processes" if world > 1 else ""),
        "data": f"{cfg.dataset}: {corpus.train_tokens:,} training and {corpus.val_tokens:,} validation tokens, "
        f"{corpus.tokenizer_meta['name']} tokenizer",
        "model": f"{model.num_params() / 1e6:.2f} M parameters: {cfg.n_layer} layers, {cfg.n_head} heads, width "
        f"{cfg.n_embd}, context {cfg.block_size}"
        + (f", positions stretched {cfg.rope_scaling:g} x ({cfg.rope_type})" if cfg.rope_scaling != 1 else "")
        + ("" if cfg.init_from in ("scratch", "resume") else f", from {cfg.init_from}"),
        "step": f"{cfg.gradient_accumulation_steps} x {cfg.batch_size} x {cfg.block_size} = "
        f"{cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size:,} tokens"
        + ("; gradients without autograd" if cfg.backprop == "analytic" else "")
        + {"none": "", "attention": "; all but attention computed again", "full": "; all computed again"}[
            cfg.activation_checkpointing
        ]
        + ("; activations in the host's memory" if cfg.offload_activations else ""),
        "attention": attention + describe_sight(cfg, model),
    }
    if cfg.lora_rank:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows["lora"] = (
            f"rank {cfg.lora_rank} on {cfg.lora_targets.replace(',', ', ')}: {trained:,} of "
            f"{model.num_params() / 1e6:.2f} M weights trained"
        )
    warnings.filterwarnings("ignore", "sus_attention uses the slow reference")  # the line above has said so
    rows["run"] = f"{cfg.wandb_run_name} in {cfg.out_dir}" + (f", resumed at iteration {it}" if it else "")
    for name, text in rows.items():
        print(f"{name:<10} {text}")
    longest = corpus.longest_val_document
    if longest <= cfg.block_size:
        print(
            f"WARNING: no validation document has more than {cfg.block_size} tokens, the longest {longest:,}: the "
            "validation loss says nothing of a context that long. Prepare longer documents, or hold out more"
        )


# -- the steps ----------------------------------------------------------------------------------------


class Progress:
    """A bar with an ETA on a terminal; lines where the output goes elsewhere; nothing where `shown` is False."""

    def __init__(self, cfg: TrainConfig, it: int, shown: bool):
        self.max_iters = cfg.max_iters
        self.bar = tqdm(
            total=cfg.max_iters,
            initial=it,
            disable=not (shown and has_columns(sys.stdout)) or cfg.eval_only,
            file=sys.stdout,
            dynamic_ncols=True,
            unit="it",
        )

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.bar.disable:
            print(text)
        else:
            self.bar.write(text)

    def note(self, text: str) -> None:
        """What stands behind the bar now."""
        self.bar.set_postfix_str(text)

    def steps(self, it: int, loss: float, dt: float, tok_per_sec: float, mfu: float | None, c: float | None) -> None:
        """The latest iterations, of `dt` seconds each."""
        at_c = f", c {c:.1f}" if c else ""
        self.bar.set_postfix_str(f"loss {loss:.3f}, {tok_per_sec:,.0f} tok/s{at_c}", refresh=False)
        if self.bar.disable:
            eta = tqdm.format_interval((self.max_iters - it) * dt)
            print(
                f"iter {it}/{self.max_iters}: loss {loss:.4f}, {dt * 1e3:.0f} ms, {tok_per_sec:,.0f} tok/s, "
                f"{f'mfu {mfu:.1%}, ' if mfu else ''}ETA {eta}{at_c}",
                flush=True,
            )

    def advance(self) -> None:
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


def has_columns(stream: TextIO) -> bool:
    """Whether it is a terminal with room for a bar: some say that they are 0 columns wide."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return False


def describe_evaluation(it: int, val_loss: float, improved: bool, buckets: dict[str, float]) -> str:
    """buckets: of `position_buckets`."""
    by_position = " ".join(f"<{int(name.split('-')[1]) + 1} {value:.2f}" for name, value in buckets.items())
    return f"iter {it}: val loss {val_loss:.4f}{' (best)' if improved else ''}; by position {by_position}"


def position_buckets(by_position: Tensor) -> dict[str, float]:
    """{"0-63": loss, "64-127": loss, "128-255": ...} of the losses by position (T,): does a longer context help?"""
    T = len(by_position)
    edges = [0, *(2**i for i in range(6, 64) if 2**i < T), T]
    return {f"{a}-{b - 1}": float(by_position[a:b].mean()) for a, b in zip(edges, edges[1:])}


def sus_metrics(model: GPT, stats: list[Tensor] | None, retention: Retention | None) -> dict:
    """What the record keeps of SUS: c, and by layer an estimate of the variance that the last micro-batch's draw added.

    stats: of `new_stats`; None without SUS.
    """
    if stats is None:
        return {}
    by_layer = {str(layer): value for layer, value in enumerate(torch.stack(stats)[:, 2].tolist())}
    return {
        "sus/c": float(model.config.sus_c),
        "sus/added_variance": by_layer,
        **({"sus/rho": retention.rho} if retention else {}),
    }


def lowrank_warning(cfg: TrainConfig, it: int, bound: float, error: float) -> str:
    """bound: the largest score; error: the polynomial's largest relative error up to there."""
    off = f"up to {error:.0%}" if error < 10 else "more than 1000%"
    return (
        f"WARNING: at iteration {it} scores of attention reach {bound:.1f}, where the polynomial of lowrank_degree="
        f"{cfg.lowrank_degree} is off by {off}: the gradient may mean little. --attn_backward=sus has no such limit; "
        "or train a model with bounded scores from scratch, by --qk_norm=True --qk_norm_scale=0.6 and small heads "
        "(a larger --n_head)"
    )


# -- the end ------------------------------------------------------------------------------------------


def own_python() -> str:
    """The interpreter that runs this, for commands to copy."""
    return relative(sys.executable) if sys.prefix != sys.base_prefix else "python"


def command(script: str, *arguments: str) -> str:
    """One of ours, to copy into a shell that is where this process is."""
    return " ".join([own_python(), relative(ROOT / script), *map(shlex.quote, arguments)])


def describe_stop(cause: str, it: int, out_dir: str, is_saved: bool) -> str:
    """The last line of a run that stopped after iteration `it`. cause: a signal's name, or what else stopped it."""
    go_on = command("train.py", "--init_from=resume", f"--out_dir={out_dir}")
    saved = f"saved in {out_dir}. To go on:\n    {go_on}"
    return f"stopped by {cause} at iteration {it}, {saved if is_saved else 'with nothing to save yet'}"


def print_what_next(out_dir: str, look: str) -> None:
    """The commands that go on from a finished run. look: the one that shows its curves in wandb, or empty."""
    print(
        f"checkpoint and record are in {out_dir}. To go on:\n"
        f"    {command('sample.py', f'--out_dir={out_dir}')}\n"
        f"    {command('experiments/compare_runs.py', out_dir)}    # a picture; needs requirements-dev.txt"
        + (f"\n    {look}    # the curves in wandb" if look else "")
    )


def print_sample(
    model: GPT, corpus: Corpus, device: Device, seed: int, prompt_tokens: int = 48, new_tokens: int = 208
) -> None:
    """Continue the first validation text, as a look at what was learnt."""
    try:
        tokenizer = tokenizer_from_meta(corpus.tokenizer_meta)
    except UserError as error:
        print(f"no sample: {error}")
        return
    prompt = corpus.val_batch(np.zeros(1, dtype=np.int64)).x[0, :prompt_tokens].tolist()
    model.eval()
    with device.autocast():
        generator = torch.Generator().manual_seed(seed)
        drawn = model.generate(prompt, new_tokens, temperature=0.8, n_vocab=tokenizer.n_vocab, generator=generator)
        new = list(itertools.takewhile(lambda token: token != tokenizer.eot, drawn))
    print(
        f"--- a sample: the first {prompt_tokens} tokens of the validation text [...] and how the model goes on\n"
        f"{tokenizer.decode(prompt)}[...]{tokenizer.decode(new)}\n---"
    )
