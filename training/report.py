"""Train a GPT, with attention's gradient exact, by SUS backprop, or low-rank.

    python train.py config/long_ctx.py                                    # SUS, on whatever this machine has
    python train.py config/long_ctx.py --attn_backward=exact --out_dir=out-exact
    python train.py config/long_ctx.py --init_from=resume
    python train.py config/lora_long_ctx.py                               # a trained model at a longer context, by LoRA
    torchrun --standalone --nproc_per_node=8 train.py config/long_ctx_124m.py

Every batch, dropout mask and draw of SUS is a function of (seed, iteration, micro-batch, layer) alone: a resumed run
repeats the uninterrupted one, and the number of processes changes nothing but the rounding (and what sus_c=auto sees).
"""

import dataclasses
import itertools
import math
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from backprop import loss_and_gradients
from configurator import TrainConfig, UserError, load_config, run_main, validate
from data.loader import load_corpus
from data.tokenizer import tokenizer_from_meta
from lowrank_attn import count_features
from model import (
    ARCHITECTURE_KEYS,
    GPT,
    PRETRAINED,
    TRAINING_KEYS,
    GPTConfig,
    adapted_model,
    load_base,
    load_pretrained,
    model_args,
    model_from_checkpoint,
)
from sus_attn import fold_in, resolve_backend
from training import checkpoint
from training.device import Device, memory_errors, resolve_device
from training.lora import adapter_state, add_adapters, fingerprint
from training.probe import probe_attention
from training.record import Record
from training.retention import CALIBRATE, HIGH, START, STEER, Retention, collect_stats

DATA = Path(__file__).resolve().parent / "data"
MOST_FEATURES = 1 << 20  # of the low-rank backward: a chunk of them takes half a gigabyte, a few times


def main():
    # -- what to do: everything that can be wrong is looked at before any work is done ------------
    cfg = load_config(TrainConfig, sys.argv[1:], usage=__doc__)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    master = rank == 0
    out_dir = Path(cfg.out_dir)
    saved = checkpoint.load(out_dir / "ckpt.pt") if cfg.init_from == "resume" else None
    base_path = find_base(cfg)
    base = load_base(base_path) if base_path else None
    if saved is not None:
        adopt(cfg, saved, master)
    elif base is not None:
        adopt_base(cfg, architecture_of(base), str(base_path))
    validate(cfg)
    if cfg.gradient_accumulation_steps % world:
        raise UserError(
            f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} must be a multiple of the {world} processes"
        )
    local_rank = int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None
    device = resolve_device(cfg.device, cfg.dtype, local_rank)
    attention = describe_attention(cfg, device)
    if saved is not None and saved["iter_num"] >= cfg.max_iters and not cfg.eval_only:
        if master:
            print(
                f"{out_dir} is finished: its checkpoint is at iteration {saved['iter_num']} of {cfg.max_iters}. "
                "Raise --max_iters to train on."
            )
        return
    if not cfg.eval_only:
        check_writable(out_dir)
    torch.manual_seed(cfg.seed)
    model, lora = None, None  # lora: what a checkpoint keeps of the adapters and their base
    if saved is not None:
        model, lora = resumed_model(cfg, saved)
    elif cfg.init_from != "scratch":
        model, lora = fine_tuned_model(cfg, base, base_path)

    # -- data --------------------------------------------------------------------------------------
    if world > 1:
        dist.init_process_group(ddp_backend(cfg, device))
    if master:
        prepare_stdlib(cfg)
    if world > 1:
        if master:
            load_corpus(
                DATA / cfg.dataset, cfg.block_size, cfg.windows
            )  # looks at the checksums, once for all processes
        dist.barrier()
    corpus = load_corpus(DATA / cfg.dataset, cfg.block_size, cfg.windows)
    tokenizer = {"name": "gpt2"} if cfg.init_from in PRETRAINED else (saved or base or {}).get("tokenizer")
    if tokenizer is not None and tokenizer != corpus.tokenizer_meta:
        raise UserError(
            f"dataset={cfg.dataset} is in tokens of the {corpus.tokenizer_meta['name']} tokenizer, but the "
            f"model's are {tokenizer['name']}'s: choose a data set made with --tokenizer={tokenizer['name']}"
        )
    if model is not None and tokenizer is None and corpus.vocab_size > model.config.vocab_size:
        raise UserError(f"dataset={cfg.dataset} has {corpus.vocab_size} token ids, the model {model.config.vocab_size}")
    if master and (saved or {}).get("train_sha256") not in (None, corpus.checksum):
        print(f"resume: the training text in {corpus.folder} is not the one that the run began with")

    # -- model and optimizer -------------------------------------------------------------------------
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as nanoGPT
    model = (model or new_model(cfg, corpus.vocab_size)).to(device.device)
    optimizer, scaler = new_optimizer(cfg, model, device)
    it, best_val_loss = 0, math.inf
    if saved is not None:
        checkpoint.restore_optimizer(saved, out_dir / "ckpt.pt", optimizer, scaler)
        it, best_val_loss = saved["iter_num"], saved["best_val_loss"]
    first_it = it
    stats = collect_stats(model) if cfg.attn_backward == "sus" else None
    retention = None
    if cfg.attn_backward == "sus" and cfg.sus_c == "auto":
        retention = Retention(model, stats, cfg.sus_rho)
        if (saved or {}).get("retention"):
            retention.state = saved["retention"]
    compiles = device.type == "cuda" and cfg.backprop == "autograd" if cfg.compile is None else cfg.compile
    compiled = torch.compile(model) if compiles else model
    ddp = compiled
    if world > 1 and cfg.backprop == "autograd":
        ddp = DistributedDataParallel(compiled, device_ids=[device.device.index] if device.type == "cuda" else None)

    if master:
        if saved is None and not cfg.eval_only:
            checkpoint.keep_earlier_run(out_dir)
        cfg.wandb_run_name = (
            cfg.wandb_run_name or f"{'lora-' if cfg.lora_rank else ''}{describe_backward(cfg)}-{os.urandom(2).hex()}"
        )
        print_summary(cfg, device, attention, corpus, model, compiled is not model, world, it)
    record = None
    if master and not cfg.eval_only:
        record = Record(
            out_dir,
            dataclasses.asdict(cfg),
            run_name=cfg.wandb_run_name,
            run_id=saved.get("wandb_run_id") if saved else None,
            group=f"{corpus.folder.name}-{cfg.n_layer}x{cfg.n_embd}-T{cfg.block_size}",
            wandb_log=cfg.wandb_log,
            wandb_project=cfg.wandb_project,
            resume_iter=it if saved else None,
        )

    # -- the loop ------------------------------------------------------------------------------------
    tokens_per_iter = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    peak = device.peak_flops(cfg.peak_tflops)
    val_starts = corpus.val_windows(cfg.eval_iters * cfg.batch_size)

    def save(name):
        checkpoint.save(
            out_dir / name,
            {
                "model": adapter_state(model) if lora else checkpoint.unwrap(ddp).state_dict(),
                "lora": lora,
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "model_args": model_args(model.config),
                "iter_num": it,
                "best_val_loss": best_val_loss,
                "config": dataclasses.asdict(cfg),
                "tokenizer": corpus.tokenizer_meta,
                "train_sha256": corpus.checksum,
                "wandb_run_id": record.run_id,
                "retention": retention.state if retention else None,
            },
        )

    stop = StopSignal(world)
    python = os.path.relpath(sys.executable) if sys.prefix != sys.base_prefix else "python"  # for commands to copy
    warned = False
    evaluated_at = it if saved is not None and not cfg.eval_only else None  # evaluated before it was saved
    progress = tqdm(
        total=cfg.max_iters,
        initial=it,
        disable=not (master and sys.stdout.isatty()) or cfg.eval_only,
        file=sys.stdout,
        dynamic_ncols=True,
        unit="it",
    )
    say = progress.write if not progress.disable else print
    clock, clock_it = time.perf_counter(), it
    while True:
        if (it % cfg.eval_interval == 0 or it == cfg.max_iters or cfg.eval_only) and it != evaluated_at:
            evaluated_at = it
            progress.set_postfix_str("evaluating")
            by_position = evaluate(compiled, corpus, val_starts, cfg.batch_size, device, rank, world)
            val_loss = float(by_position.mean())
            check_finite(val_loss, f"validation loss at iteration {it}", out_dir)
            improved = val_loss < best_val_loss and it > 0
            best_val_loss = min(val_loss, best_val_loss)
            buckets = position_buckets(by_position)
            if master:
                say(
                    f"iter {it}: val loss {val_loss:.4f}{' (best)' if improved else ''}; by position "
                    + " ".join(f"<{int(name.split('-')[1]) + 1} {value:.2f}" for name, value in buckets.items())
                )
            if record is not None:
                x, y = (t.to(device.device) for t in corpus.val_batch(val_starts[:1]))
                seed = torch.tensor(fold_in(cfg.seed, it))
                probed = probe_attention(model, x, y, device, seed)
                record.log({"iter": it, "val/loss": val_loss, "val/loss_by_position": buckets, **probed})
                if (error := probed.get("lowrank/worst_error", 0)) > 1 and not warned:
                    warned = True
                    say(lowrank_warning(cfg, it, probed["lowrank/bound"], error))
                if improved:
                    save("ckpt_best.pt")
                if it > 0 and (improved or cfg.always_save_checkpoint or it == cfg.max_iters):
                    save("ckpt.pt")
            progress.set_postfix_str("")
            clock, clock_it = time.perf_counter(), it  # evaluation is no training time
        if it >= cfg.max_iters or cfg.eval_only:
            break
        if stop.agreed(device):
            if record is not None and it > 0:
                save("ckpt.pt")
            if master:
                saved_in = (
                    f"saved in {out_dir}. To go on:\n    {python} train.py --init_from=resume --out_dir={out_dir}"
                )
                say(f"stopped by {stop.name} at iteration {it}, {saved_in if it > 0 else 'with nothing to save yet'}")
            break

        scale = scaler.get_scale()
        loss, norm = train_step(cfg, ddp, optimizer, scaler, corpus, device, it, rank, world)
        check_finite(loss, f"loss of iteration {it}", out_dir)
        if not scaler.is_enabled():  # the scaler skips such a step by itself, and lowers its scale
            check_finite(norm, f"gradient norm of iteration {it}", out_dir)
        elif scaler.get_scale() < 1e-3:
            check_finite(math.nan, f"float16 gradient of iteration {it}, at every loss scale,", out_dir)
        it += 1
        if retention is not None:
            retention.observe(scale / (cfg.gradient_accumulation_steps // world), world)
            if it % CALIBRATE == 1:  # after a step: what is compiled is compiled for DDP
                retention.calibrate(cfg, compiled, corpus, device, it, rank, world, scaler.get_scale())
            if it % STEER == 0:
                retention.steer()
        if it == first_it + 1 and compiled is not model:
            device.synchronize()
            clock, clock_it = time.perf_counter(), it  # compilation is no training time

        if master and it > clock_it and (it % cfg.log_interval == 0 or it == cfg.max_iters):
            device.synchronize()
            dt = (time.perf_counter() - clock) / (it - clock_it)
            clock, clock_it = time.perf_counter(), it
            tok_per_sec = tokens_per_iter / dt
            mfu = tok_per_sec * model.flops_per_token(cfg.block_size) / (peak * world) if peak else None
            record.log(
                {
                    "iter": it,
                    "train/loss": loss,
                    "lr": optimizer.param_groups[0]["lr"],
                    "train/grad_norm": norm,
                    "train/dt": dt,
                    "train/tok_per_sec": tok_per_sec,
                    "train/mfu": mfu,
                    **sus_metrics(model, stats, retention),
                }
            )
            c = f", c {retention.c:.1f}" if retention else ""
            progress.set_postfix_str(f"loss {loss:.3f}, {tok_per_sec:,.0f} tok/s{c}", refresh=False)
            if progress.disable:
                eta = tqdm.format_interval((cfg.max_iters - it) * dt)
                print(
                    f"iter {it}/{cfg.max_iters}: loss {loss:.4f}, {dt * 1e3:.0f} ms, {tok_per_sec:,.0f} tok/s, "
                    f"{f'mfu {mfu:.1%}, ' if mfu else ''}ETA {eta}{c}",
                    flush=True,
                )
        progress.update()

    # -- the end -------------------------------------------------------------------------------------
    progress.close()
    if record is not None:
        record.finish()
        if it >= cfg.max_iters > 0:
            print_sample(model, corpus, device, cfg.seed)
            print(
                f"checkpoint and record are in {out_dir}. To go on:\n"
                f"    {python} sample.py --out_dir={out_dir}\n"
                f"    {python} experiments/compare_runs.py {out_dir}    # a picture; needs requirements-dev.txt"
                + (f"\n    {record.look}    # the curves in wandb" if record.look else "")
            )
    status = 128 + stop.number if stop.number and it < cfg.max_iters else 0  # as a shell reports a signal's victim
    if world > 1:
        dist.destroy_process_group()
        # Freeing DDP, torch waits for gloo's threads with Python's lock in hand, for which they may be waiting: no
        # freeing.
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


# -- before the loop --------------------------------------------------------------------------------


def adopt(cfg: TrainConfig, saved: dict, master: bool) -> None:
    """Fill cfg from a checkpoint: its architecture, and of the other keys those that neither a file nor the command
    line gives. What differs from the earlier run is printed.
    """
    take_architecture(cfg, architecture_of(saved), "the checkpoint")
    lora = saved.get("lora") or {"rank": 0}
    adapters = {f"lora_{name}": lora[name] for name in ("rank", "alpha", "targets") if name in lora}
    for name, value in adapters.items():
        if name in cfg.explicit and getattr(cfg, name) != value:
            raise UserError(
                f"{name}={getattr(cfg, name)} conflicts with the checkpoint, which has {value}: leave {name} out, or "
                "begin a fine-tuning by --init_from=PATH and another out_dir"
            )
        setattr(cfg, name, value)
    for name, value in saved["config"].items():
        if not hasattr(cfg, name) or name in (
            "out_dir",
            "init_from",
            "eval_only",
            "lora_base",
            *ARCHITECTURE_KEYS,
            *adapters,
        ):
            continue
        if name not in cfg.explicit:
            setattr(cfg, name, value)
        elif getattr(cfg, name) != value and master:
            print(f"resume: {name} was {value!r}, is now {getattr(cfg, name)!r}")


def architecture_of(saved: dict) -> dict:
    """A checkpoint's keys of the architecture, all of them."""
    defaults = dataclasses.asdict(
        GPTConfig()
    )  # for checkpoints of nanoGPT and of earlier versions, which lack some keys
    return {k: saved["model_args"].get(k, defaults[k]) for k in ARCHITECTURE_KEYS}


def adopt_base(cfg: TrainConfig, architecture: dict, owner: str) -> None:
    """Set cfg's keys of the architecture to those of a model that is to be fine-tuned, but for its
    context, if given.
    """
    if (
        "block_size" in cfg.explicit
        and architecture["pos"] == "learned"
        and cfg.block_size > architecture["block_size"]
    ):
        raise UserError(
            f"block_size={cfg.block_size} is above the {architecture['block_size']} of {owner}, which has learned "
            "positions, and so none beyond: only models trained with pos=rope can go further"
        )
    free = cfg.explicit & {"block_size", "rope_scaling"}
    take_architecture(cfg, {k: v for k, v in architecture.items() if k not in free}, owner)


def find_base(cfg: TrainConfig) -> Path | None:
    """The checkpoint to be fine-tuned that init_from is the path of; None if it is another word. UserError."""
    if cfg.init_from in ("scratch", "resume", *PRETRAINED):
        return None
    path = checkpoint.find(cfg.init_from)
    if not path.is_file():
        raise UserError(
            f"init_from={cfg.init_from} must be one of scratch, resume, {', '.join(PRETRAINED)}, or the path of a "
            f"checkpoint or its folder, and there is no {path}: train that model first"
        )
    if path.resolve().parent == Path(cfg.out_dir).resolve() and not cfg.eval_only:
        raise UserError(
            f"out_dir={cfg.out_dir} is the folder of init_from, whose run would be replaced: choose another "
            "out_dir, or --init_from=resume to go on with that run"
        )
    return path


def take_architecture(cfg: TrainConfig, architecture: dict, owner: str) -> None:
    """Set cfg's keys of the architecture to those of a model that exists; UserError if cfg was given others."""
    n_head = architecture["n_head"]
    for name, value in architecture.items():
        given = getattr(cfg, name, None)  # vocab_size is no key
        same = given == value or (name == "n_kv_head" and (given or n_head) == (value or n_head))
        if name in cfg.explicit and not same:
            free = name in ("block_size", "rope_scaling") and architecture["pos"] == "rope"
            other = "begin another run, by --init_from=PATH and another out_dir" if free else "train from scratch"
            raise UserError(
                f"{name}={given} conflicts with {owner}, whose model has {value}: leave {name} out (of the config "
                "file, "
                f"too), or {other}"
            )
        if hasattr(cfg, name):
            setattr(cfg, name, value)


def prepare_stdlib(cfg: TrainConfig) -> None:
    """Make the default corpus if it is wanted and not there."""
    if cfg.dataset == "stdlib" and not (DATA / "stdlib" / "meta.json").exists():
        from data.stdlib.prepare import prepare

        print("preparing data/stdlib, the sources of Python's standard library (once)")
        prepare()


def training_keys(cfg: TrainConfig) -> dict:
    """GPTConfig's keys of training. Where sus_c is auto, its Retention sets it in the model's config."""
    keys = {name: getattr(cfg, name) for name in TRAINING_KEYS}
    return keys | ({"sus_c": START} if cfg.sus_c == "auto" else {})


def new_model(cfg: TrainConfig, vocab_size: int) -> GPT:
    architecture = {k: getattr(cfg, k) for k in ARCHITECTURE_KEYS if k != "vocab_size"}
    return GPT(GPTConfig(vocab_size=vocab_size, **architecture, **training_keys(cfg)))


def new_optimizer(cfg: TrainConfig, model: GPT, device: Device):
    """AdamW, and the scaler of float16's loss (disabled for other dtypes)."""
    optimizer = model.configure_optimizers(cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), device.type)
    return optimizer, torch.amp.GradScaler(device.type, enabled=device.dtype == torch.float16)


def ddp_backend(cfg: TrainConfig, device) -> str:
    if cfg.backend == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    if cfg.backend == "nccl" and device.type != "cuda":
        raise UserError(f"backend=nccl needs CUDA devices, not {device.type}: leave it out, or --backend=gloo")
    return cfg.backend


def check_writable(out_dir: Path) -> None:
    """UserError if out_dir can't be written to, or can't be made; it isn't made yet."""
    there = next(folder for folder in (out_dir, *out_dir.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise UserError(f"out_dir={out_dir} can't be used: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"out_dir={out_dir} can't be used: no permission to write in {there}")


def resumed_model(cfg: TrainConfig, saved: dict) -> tuple[GPT, dict | None]:
    """The model of out_dir's checkpoint, and the checkpoint's `lora` (None: it has no adapters)."""
    path = Path(cfg.out_dir, "ckpt.pt")
    lora = saved.get("lora")
    if not lora:
        return model_from_checkpoint(saved, path, **training_keys(cfg)), None
    model = adapted_model(saved, path, cfg.lora_base, cfg.lora_dropout, **training_keys(cfg))
    return model, lora | ({"base": base_from(cfg.out_dir, cfg.lora_base)} if cfg.lora_base else {})


def fine_tuned_model(cfg: TrainConfig, base: dict | None, base_path: Path | None) -> tuple[GPT, dict | None]:
    """A model that begins as the one in the checkpoint `base`, or as GPT-2, and what a checkpoint keeps as `lora`.

    In the latter case cfg takes the architecture; a conflicting key is a UserError.
    """
    if base is not None:
        model = model_from_checkpoint(base, base_path, **training_keys(cfg))
    else:
        model = load_pretrained(cfg.init_from, **training_keys(cfg))
        adopt_base(cfg, model_args(model.config), cfg.init_from)
    lora = None
    if cfg.lora_rank:  # the fingerprint is of the base as it is, before its context is changed
        lora = {
            "rank": cfg.lora_rank,
            "alpha": cfg.lora_alpha,
            "targets": cfg.lora_targets,
            "base": base_from(cfg.out_dir, cfg.init_from),
            "fingerprint": fingerprint(model),
        }
    model.set_context(cfg.block_size, cfg.rope_scaling)
    if lora:
        add_adapters(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, cfg.lora_dropout)
    return model, lora


def base_from(out_dir: str, base: str) -> str:
    """The base of adapters, as their checkpoint keeps it: by its path from out_dir, or GPT-2's name."""
    if base in PRETRAINED:
        return base
    return os.path.relpath(checkpoint.find(base).resolve(), Path(out_dir).resolve())


def describe_backward(cfg: TrainConfig) -> str:
    if cfg.attn_backward == "lowrank":
        return f"lowrank-g{cfg.lowrank_degree}" + ("-approximate" if cfg.lowrank_forward == "approximate" else "")
    if cfg.attn_backward != "sus":
        return cfg.attn_backward
    return f"sus-c{cfg.sus_c if cfg.sus_c == 'auto' else f'{cfg.sus_c:g}'}" + (
        "" if cfg.sus_sampler == "tiles" else f"-{cfg.sus_sampler}"
    )


def describe_attention(cfg: TrainConfig, device: Device) -> str:
    """The summary's line on attention. UserError if the backend that is asked for can't be had here."""
    if cfg.attn_backward == "lowrank":
        D = cfg.n_embd // cfg.n_head
        features = count_features(D, cfg.lowrank_degree + 1)
        if features > MOST_FEATURES:
            raise UserError(
                f"lowrank_degree={cfg.lowrank_degree} means {features:,} features a token with heads of {D}, too many "
                "for any "
                "memory: set a lower --lowrank_degree, or smaller heads by a larger --n_head"
            )
        return (
            f"low-rank backward, degree {cfg.lowrank_degree}, {features:,} features a token; "
            f"{cfg.lowrank_forward} forward"
        )
    if cfg.attn_backward != "sus":
        return "exact backward"
    try:
        backend, why = resolve_backend(
            cfg.sus_backend,
            device.type,
            device.dtype,
            cfg.n_embd // cfg.n_head,
            sampler=cfg.sus_sampler,
            c_max=HIGH if cfg.sus_c == "auto" else cfg.sus_c,
        )
    except ValueError as error:
        raise UserError(f"sus_{error}") from None
    c = f"c set by itself for rho = {cfg.sus_rho:g}" if cfg.sus_c == "auto" else f"c = {cfg.sus_c:g}"
    return f"SUS backward, {c}, sampler {cfg.sus_sampler}, {backend} backend ({why})"


def print_summary(cfg, device, attention, corpus, model, is_compiled, world, it):
    rows = {
        "device": f"{device.reason}; {'compiled' if is_compiled else 'not compiled'}"
        + (f"; {world} processes" if world > 1 else ""),
        "data": f"{cfg.dataset}: {corpus.train_tokens:,} training and {corpus.val_tokens:,} validation tokens, "
        f"{corpus.tokenizer_meta['name']} tokenizer",
        "model": f"{model.num_params() / 1e6:.2f} M parameters: {cfg.n_layer} layers, {cfg.n_head} heads, width "
        f"{cfg.n_embd}, context {cfg.block_size}"
        + (f", positions / {cfg.rope_scaling:g}" if cfg.rope_scaling != 1 else "")
        + ("" if cfg.init_from in ("scratch", "resume") else f", from {cfg.init_from}"),
        "step": f"{cfg.gradient_accumulation_steps} x {cfg.batch_size} x {cfg.block_size} = "
        f"{cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size:,} tokens"
        + ("; gradients without autograd" if cfg.backprop == "analytic" else ""),
        "attention": attention,
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


# -- in the loop --------------------------------------------------------------------------------------


def train_step(cfg: TrainConfig, model, optimizer, scaler, corpus, device: Device, it: int, rank=0, world=1):
    """One iteration: the gradient over all micro-batches, clipped, and a step. Returns (loss, norm of the gradient).

    model: a GPT, compiled or not, in DDP if world > 1; with backprop=analytic a plain GPT.
    """
    analytic = cfg.backprop == "analytic"
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(cfg, it)
    micro_steps = cfg.gradient_accumulation_steps // world
    total = torch.zeros((), device=device.device)
    for step in range(micro_steps):
        micro = step * world + rank  # counted over all processes
        seed = fold_in(cfg.seed, it, micro)
        torch.manual_seed(seed)  # dropout
        batch = corpus.batch(cfg.batch_size, cfg.seed, it, micro, cfg.gradient_accumulation_steps)
        x, y = (t.to(device.device) for t in batch)
        sus_seed = torch.tensor(seed) if cfg.attn_backward == "sus" else None
        if world > 1:
            model.require_backward_grad_sync = step == micro_steps - 1  # read by DDP's forward
        with device.autocast():
            if analytic:
                scale = scaler.scale(torch.ones((), device=device.device)) / micro_steps
                loss = loss_and_gradients(model, x, y, sus_seed=sus_seed, scale=scale)
            else:
                _, loss = model(x, y, sus_seed=sus_seed)
            loss = loss / micro_steps
        if not analytic:
            scaler.scale(loss).backward()
        total += loss.detach()
    if world > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None] if analytic else []  # else by DDP
        for tensor in (total, *gradients):
            dist.all_reduce(tensor)
            tensor /= world
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total.item(), norm.item()


def learning_rate(cfg: TrainConfig, it: int) -> float:
    """Linear warm-up, cosine decay to min_lr, then constant."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    if it >= cfg.lr_decay_iters:
        return cfg.min_lr
    progress = (it - cfg.warmup_iters) / (cfg.lr_decay_iters - cfg.warmup_iters)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.learning_rate - cfg.min_lr)


def check_finite(value: float, name: str, out_dir: Path) -> None:
    if not math.isfinite(value):
        earlier = f"; {out_dir / 'ckpt.pt'} is from before" if (out_dir / "ckpt.pt").exists() else ""
        raise UserError(
            f"the {name} is {value}{earlier}. Try a lower --learning_rate, a longer --warmup_iters, "
            "--grad_clip=1.0, or --dtype=float32 or bfloat16 instead of float16"
        )


@torch.no_grad()
def evaluate(model, corpus, starts, batch_size, device, rank, world) -> torch.Tensor:
    """The mean validation loss at each position of the context, (T,) float64, over the fixed windows at `starts`."""
    total = torch.zeros(corpus.block_size, dtype=torch.float64)
    mine = starts[rank::world]
    model.eval()
    for i in range(0, len(mine), batch_size):
        x, y = (t.to(device.device) for t in corpus.val_batch(mine[i : i + batch_size]))
        with device.autocast():
            _, losses = model(x, y, reduction="none")
        total += losses.float().sum(0).cpu().double()
    model.train()
    if world > 1:
        total = total.to(device.device)
        dist.all_reduce(total)
    return total.cpu() / len(starts)


def position_buckets(by_position) -> dict[str, float]:
    """{"0-63": loss, "64-127": loss, "128-255": ...}: does a longer context help?"""
    T = len(by_position)
    edges = [0, *(2**i for i in range(6, 64) if 2**i < T), T]
    return {f"{a}-{b - 1}": float(by_position[a:b].mean()) for a, b in zip(edges, edges[1:])}


def sus_metrics(model: GPT, stats, retention: Retention | None) -> dict:
    """What the record keeps of SUS: c; by layer, its own estimate of the variance that the last micro-batch's draw
    added.
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
    off = f"up to {error:.0%}" if error < 10 else "more than 1000%"
    return (
        f"WARNING: at iteration {it} scores of attention reach {bound:.1f}, where the polynomial of lowrank_degree="
        f"{cfg.lowrank_degree} is off by {off}: the gradient may mean little. --attn_backward=sus has no such limit; "
        "or train a model "
        "with bounded scores from scratch, by --qk_norm=True --qk_norm_scale=0.6 and small heads (a larger --n_head)"
    )


class StopSignal:
    """SIGINT and SIGTERM ask for an end after the iteration that runs; a second Ctrl-C ends at once."""

    def __init__(self, world: int):
        self.number = 0
        self.world = world
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        if not self.number:  # os.write, since a handler may have interrupted a print
            os.write(2, b"\nstopping after what runs now, and saving ...\n")
        self.number = number
        if self.world == 1:  # torchrun sends on a Ctrl-C that its processes got themselves: the second one is no wish
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self, device) -> bool:
        """Whether any process got a signal: all must leave the loop at the same iteration."""
        if self.world == 1:
            return self.number > 0
        seen = torch.tensor(self.number, device=device.device)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        self.number = self.number or int(seen)  # a signal may have come since: it is for the next iteration
        return int(seen) > 0

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name


def print_sample(model: GPT, corpus, device, seed: int, prompt_tokens: int = 48, new_tokens: int = 208) -> None:
    """Continue the first validation text, as a look at what was learnt."""
    try:
        tokenizer = tokenizer_from_meta(corpus.tokenizer_meta)
    except UserError as error:
        print(f"no sample: {error}")
        return
    prompt = corpus.val_batch(np.zeros(1, dtype=np.int64))[0][0, :prompt_tokens].tolist()
    model.eval()
    with device.autocast():
        drawn = model.generate(
            prompt,
            new_tokens,
            temperature=0.8,
            n_vocab=tokenizer.n_vocab,
            generator=torch.Generator().manual_seed(seed),
        )
        new = list(itertools.takewhile(lambda token: token != tokenizer.eot, drawn))
    print(
        f"--- a sample: the first {prompt_tokens} tokens of the validation text [...] and how the model goes on\n"
        f"{tokenizer.decode(prompt)}[...]{tokenizer.decode(new)}\n---"
    )


if __name__ == "__main__":
    with_memory = memory_errors(
        "Try a smaller --batch_size (with more --gradient_accumulation_steps), "
        "--activation_checkpointing=True, a smaller --block_size or model"
    )
    run_main(with_memory(main))
