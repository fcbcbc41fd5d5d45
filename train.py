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
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from backprop import loss_and_gradients
from configurator import TrainConfig, UserError, load_config, run_main, validate
from data.loader import Corpus
from model import GPT
from sus_attn import fold_in
from training import checkpoint, report
from training.device import Device, memory_errors, resolve_device
from training.lora import adapter_state
from training.optimizer import learning_rate, new_optimizer
from training.parallel import Processes, StopSignal
from training.probe import probe_attention
from training.record import Record
from training.report import Progress
from training.retention import CALIBRATE, STEER, Retention, collect_stats
from training.start import Origin, check_writable, find_origin, new_model, open_corpus
from training.weights import model_args


def main() -> None:
    """One run: what it begins from, on what text, the steps, the end."""
    # Everything that can be wrong is looked at before any work is done.
    cfg = load_config(TrainConfig, sys.argv[1:], usage=__doc__)
    processes = Processes.here()
    origin = find_origin(cfg, processes.master)
    validate(cfg)
    if cfg.gradient_accumulation_steps % processes.world:
        raise UserError(
            f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} must be a multiple of the "
            f"{processes.world} processes"
        )
    device = resolve_device(cfg.device, cfg.dtype, processes.local_rank)
    attention = report.describe_attention(cfg, device)
    if origin.is_finished(cfg):
        if processes.master:
            print(
                f"{cfg.out_dir} is finished: its checkpoint is at iteration {origin.saved['iter_num']} of "
                f"{cfg.max_iters}. Raise --max_iters to train on."
            )
        return
    if not cfg.eval_only:
        check_writable(Path(cfg.out_dir))

    torch.manual_seed(cfg.seed)
    model, lora = origin.model(cfg)
    processes.join(cfg, device)
    corpus = open_corpus(cfg, origin, model, processes)
    run = Run(cfg, processes, device, corpus, origin, model or new_model(cfg, corpus.vocab_size), lora)
    if processes.master:
        run.introduce(attention)
    run.train()
    if run.record is not None:
        run.record.finish()
        if run.it >= cfg.max_iters > 0:
            report.print_sample(run.model, corpus, device, cfg.seed)
            report.print_what_next(cfg.out_dir, run.record.look)
    processes.leave(run.stop.status if run.it < cfg.max_iters else 0)


class Run:
    """What a run has, and what it does again and again: steps, evaluations, checkpoints."""

    def __init__(
        self, cfg: TrainConfig, processes: Processes, device: Device, corpus: Corpus, origin: Origin, model: GPT,
        lora: dict | None,
    ):  # fmt: skip
        """lora: what a checkpoint keeps of the adapters and their base."""
        self.cfg, self.processes, self.device, self.corpus = cfg, processes, device, corpus
        self.out_dir, self.saved, self.lora = Path(cfg.out_dir), origin.saved, lora
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as nanoGPT
        self.model = model.to(device.device)
        self.optimizer, self.scaler = new_optimizer(cfg, model, device)
        self.it, self.best_val_loss = 0, math.inf
        if self.saved is not None:
            checkpoint.restore_optimizer(self.saved, self.out_dir / "ckpt.pt", self.optimizer, self.scaler)
            self.it, self.best_val_loss = self.saved["iter_num"], self.saved["best_val_loss"]
        self.stats = collect_stats(model) if cfg.attn_backward == "sus" else None
        self.retention = None
        if self.stats is not None and cfg.sus_c == "auto":
            self.retention = Retention(model, self.stats, cfg.sus_rho)
            if (self.saved or {}).get("retention"):
                self.retention.state = self.saved["retention"]

        compiles = device.type == "cuda" and cfg.backprop == "autograd" if cfg.compile is None else cfg.compile
        self.compiled: nn.Module = torch.compile(model) if compiles else model
        self.ddp = self.compiled
        if processes.world > 1 and cfg.backprop == "autograd":
            on = [device.device.index] if device.type == "cuda" else None
            self.ddp = DistributedDataParallel(self.compiled, device_ids=on)

        self.record: Record | None = None
        self.val_starts = corpus.val_windows(cfg.eval_iters * cfg.batch_size)
        # A checkpoint's iteration was evaluated before it was saved.
        self.evaluated_at = self.it if self.saved is not None and not cfg.eval_only else None
        self.warned = False

    def introduce(self, attention: str) -> None:
        """Say what the run is, and open its record. attention: of report.describe_attention."""
        cfg = self.cfg
        if self.saved is None and not cfg.eval_only:
            checkpoint.keep_earlier_run(self.out_dir)
        cfg.wandb_run_name = cfg.wandb_run_name or report.run_name(cfg)
        is_compiled = self.compiled is not self.model
        world = self.processes.world
        report.print_summary(cfg, self.device, attention, self.corpus, self.model, is_compiled, world, self.it)
        if not cfg.eval_only:
            self.record = Record(
                self.out_dir,
                dataclasses.asdict(cfg),
                run_name=cfg.wandb_run_name,
                run_id=self.saved.get("wandb_run_id") if self.saved else None,
                group=f"{self.corpus.folder.name}-{cfg.n_layer}x{cfg.n_embd}-T{cfg.block_size}",
                wandb_log=cfg.wandb_log,
                wandb_project=cfg.wandb_project,
                resume_iter=self.it if self.saved else None,
            )

    def train(self) -> None:
        """The loop. It ends at max_iters, after the evaluation with eval_only, or where a signal asks for it."""
        cfg, first_it = self.cfg, self.it
        self.stop = StopSignal(self.processes.world)
        self.progress = Progress(cfg, self.it, self.processes.master)
        self.start_clock()
        while True:
            is_due = self.it % cfg.eval_interval == 0 or self.it == cfg.max_iters or cfg.eval_only
            if is_due and self.it != self.evaluated_at:
                self.progress.note("evaluating")
                self.evaluate()
                self.progress.note("")
                self.start_clock()  # evaluation is no training time
            if self.it >= cfg.max_iters or cfg.eval_only:
                break
            if self.stop.agreed(self.device):
                if self.record is not None and self.it > 0:
                    self.save("ckpt.pt")
                if self.processes.master:
                    self.progress.say(report.describe_stop(self.stop.name, self.it, cfg.out_dir))
                break
            loss, norm = self.step()
            if self.it == first_it + 1 and self.compiled is not self.model:
                self.device.synchronize()
                self.start_clock()  # compilation is no training time
            if self.processes.master and (self.it % cfg.log_interval == 0 or self.it == cfg.max_iters):
                self.log_steps(loss, norm)
            self.progress.advance()
        self.progress.close()

    def step(self) -> tuple[float, float]:
        """One iteration, and what follows from it for c. Returns (loss, norm of the gradient). UserError if not finite."""
        cfg, it, rank, world = self.cfg, self.it, self.processes.rank, self.processes.world
        scale = self.scaler.get_scale()
        loss, norm = train_step(cfg, self.ddp, self.optimizer, self.scaler, self.corpus, self.device, it, rank, world)
        check_finite(loss, f"loss of iteration {it}", self.out_dir)
        if not self.scaler.is_enabled():  # the scaler skips such a step by itself, and lowers its scale
            check_finite(norm, f"gradient norm of iteration {it}", self.out_dir)
        elif self.scaler.get_scale() < 1e-3:
            check_finite(math.nan, f"float16 gradient of iteration {it}, at every loss scale,", self.out_dir)
        self.it = it = it + 1
        if self.retention is not None:
            self.retention.observe(scale / (cfg.gradient_accumulation_steps // world), world)
            if it % CALIBRATE == 1:  # after a step: what is compiled is compiled for DDP
                self.retention.calibrate(
                    cfg, self.compiled, self.corpus, self.device, it, rank, world, self.scaler.get_scale()
                )
            if it % STEER == 0:
                self.retention.steer()
        return loss, norm

    def start_clock(self) -> None:
        self.clock, self.clock_it = time.perf_counter(), self.it

    def log_steps(self, loss: float, norm: float) -> None:
        """Record and show the iterations since the clock was started, if there are any."""
        cfg, it = self.cfg, self.it
        if it == self.clock_it:
            return
        self.device.synchronize()
        dt = (time.perf_counter() - self.clock) / (it - self.clock_it)
        self.start_clock()
        tok_per_sec = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size / dt
        peak = self.device.peak_flops(cfg.peak_tflops)
        flops = tok_per_sec * self.model.flops_per_token(cfg.block_size)
        mfu = flops / (peak * self.processes.world) if peak else None
        lr = self.optimizer.param_groups[0]["lr"]
        metrics = {"iter": it, "train/loss": loss, "lr": lr, "train/grad_norm": norm}
        metrics |= {"train/dt": dt, "train/tok_per_sec": tok_per_sec, "train/mfu": mfu}
        self.record.log(metrics | report.sus_metrics(self.model, self.stats, self.retention))
        self.progress.steps(it, loss, dt, tok_per_sec, mfu, self.retention and self.retention.c.item())

    def evaluate(self) -> None:
        """The validation loss, attention's time, and the checkpoints that are due."""
        cfg, it, processes = self.cfg, self.it, self.processes
        self.evaluated_at = it
        by_position = evaluate(
            self.compiled, self.corpus, self.val_starts, cfg.batch_size, self.device, processes.rank, processes.world
        )
        val_loss = float(by_position.mean())
        check_finite(val_loss, f"validation loss at iteration {it}", self.out_dir)
        improved = val_loss < self.best_val_loss and it > 0
        self.best_val_loss = min(val_loss, self.best_val_loss)
        buckets = report.position_buckets(by_position)
        if processes.master:
            self.progress.say(report.describe_evaluation(it, val_loss, improved, buckets))
        if self.record is None:
            return
        x, y = (t.to(self.device.device) for t in self.corpus.val_batch(self.val_starts[:1]))
        probed = probe_attention(self.model, x, y, self.device, torch.tensor(fold_in(cfg.seed, it)))
        self.record.log({"iter": it, "val/loss": val_loss, "val/loss_by_position": buckets, **probed})
        if (error := probed.get("lowrank/worst_error", 0)) > 1 and not self.warned:
            self.warned = True
            self.progress.say(report.lowrank_warning(cfg, it, probed["lowrank/bound"], error))
        if improved:
            self.save("ckpt_best.pt")
        if it > 0 and (improved or cfg.always_save_checkpoint or it == cfg.max_iters):
            self.save("ckpt.pt")

    def save(self, name: str) -> None:
        """A checkpoint, under nanoGPT's names and our own: see training/checkpoint.py."""
        state = {
            "model": adapter_state(self.model) if self.lora else self.model.state_dict(),
            "lora": self.lora,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "model_args": model_args(self.model.config),
            "iter_num": self.it,
            "best_val_loss": self.best_val_loss,
            "config": dataclasses.asdict(self.cfg),
            "tokenizer": self.corpus.tokenizer_meta,
            "train_sha256": self.corpus.checksum,
            "wandb_run_id": self.record.run_id,
            "retention": self.retention.state if self.retention else None,
        }
        checkpoint.save(self.out_dir / name, state)


def train_step(
    cfg: TrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    corpus: Corpus,
    device: Device,
    it: int,
    rank: int = 0,
    world: int = 1,
) -> tuple[float, float]:
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


if __name__ == "__main__":
    with_memory = memory_errors(
        "Try a smaller --batch_size (with more --gradient_accumulation_steps), "
        "--activation_checkpointing=True, a smaller --block_size or model"
    )
    run_main(with_memory(main))
