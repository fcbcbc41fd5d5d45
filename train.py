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
from contextlib import ExitStack, suppress

from configurator import TrainConfig, UserError, load_config, run_main  # isort: skip (before torch)

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from backprop import loss_and_gradients
from data.loader import Corpus
from sus_attn import fold_in
from training import checkpoint, report
from training.device import Device, flops_per_token, memory_errors
from training.evaluation import evaluate
from training.optimizer import learning_rate
from training.parallel import Processes, StopSignal, expect_notices, outlasting_readers
from training.probe import probe_attention
from training.record import Record
from training.report import Progress
from training.retention import CALIBRATE, STEER, collect_stats
from training.start import Beginning, begin
from training.state import State


def main() -> None:
    """One run: what it begins from, on what text, the steps, the end."""
    expect_notices()
    cfg = load_config(TrainConfig, sys.argv[1:], usage=__doc__)
    processes = Processes.here()
    with outlasting_readers() as outlets, ExitStack() as held:
        beginning = begin(cfg, processes, held)
        if beginning is None:
            return  # it is finished
        stop = StopSignal(processes.world, outlets)
        run = Run(cfg, processes, beginning)
        if processes.master:
            run.introduce(beginning.attention)
        run.train(stop)
        if run.record is not None:
            run.record.finish()
            if run.is_finished:
                report.print_sample(run.model, run.corpus, run.device, cfg.seed)
                report.print_what_next(cfg.out_dir, run.record.look)
    processes.leave(0 if run.is_finished else run.stop.status)


class Run(State):
    """A State, and what is done with it again and again: steps, evaluations, checkpoints."""

    def __init__(self, cfg: TrainConfig, processes: Processes, beginning: Beginning):
        corpus, device, model = beginning.corpus, beginning.device, beginning.model
        super().__init__(cfg, device, corpus, beginning.saved, model, beginning.lora, processes.master)
        self.processes = processes
        compiles = device.type == "cuda" and cfg.backprop == "autograd" if cfg.compile is None else cfg.compile
        self.compiled: nn.Module = torch.compile(model) if compiles else model
        self.ddp = self.compiled
        if processes.world > 1 and cfg.backprop == "autograd":
            on = [device.device.index] if device.type == "cuda" else None
            self.ddp = DistributedDataParallel(self.compiled, device_ids=on)
        self.record: Record | None = None
        self.val_starts = corpus.val_windows(cfg.eval_iters * cfg.batch_size)
        self.warned = False
        self.kinds: set[bool] = set()  # of steps made: with statistics, and without; the first of each is compiled

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
                run_id=(self.saved or {}).get("wandb_run_id"),
                group=f"{self.corpus.folder.name}-{cfg.n_layer}x{cfg.n_embd}-T{cfg.block_size}",
                wandb_log=cfg.wandb_log,
                wandb_project=cfg.wandb_project,
                checksums=self.corpus.text_checksums,
                resume_iter=self.it if self.saved else None,
                evaluation_owed=self.evaluated_at is None,
            )

    def train(self, stop: StopSignal) -> None:
        """The loop. It ends at max_iters, after the evaluation with eval_only, or where a signal asks for it."""
        self.stop = stop
        self.progress = Progress(self.cfg, self.it, self.processes.master)
        try:
            self.loop()
        except Diverged as error:  # such weights are worth nothing: what was saved before stays
            path = self.out_dir / "ckpt.pt"
            earlier = f"; {path} is from before" if path.exists() else ""
            raise UserError(
                f"{error}{earlier}. Try a lower --learning_rate, a longer --warmup_iters, --grad_clip=1.0, or "
                "--dtype=float32 or bfloat16 instead of float16"
            ) from None
        except Exception:  # whatever it is: the weights are those after the last whole step
            with suppress(Exception):  # what came first is what is to be told
                self.save_and_say("an error")
            raise
        finally:
            self.progress.close()

    def loop(self) -> None:
        cfg = self.cfg
        self.start_clock()
        while True:
            if self.evaluation_is_owed:
                self.progress.note("evaluating")
                self.evaluate()
                self.progress.note("")
                self.start_clock()  # evaluation is no training time
            if (self.it >= cfg.max_iters or cfg.eval_only) and not self.evaluation_is_owed:
                return
            if self.heeds_stop():
                self.save_and_say(self.stop.name)
                return
            loss, norm = self.step()
            if self.compiles:
                self.device.synchronize()
                self.start_clock()  # compilation is no training time
            if self.processes.master and self.logs_after(self.it - 1):
                self.log_steps(loss, norm)
            self.progress.advance()

    def heeds_stop(self) -> bool:
        """Whether a signal asks for an end. A checkpoint that one asks for is saved."""
        stops = self.stop.agreed(self.device)
        if self.stop.saves:
            self.stop.saves = False
            if self.save_latest():
                self.progress.say(f"saved at iteration {self.it}")
        return stops

    def save_and_say(self, cause: str) -> None:
        """Save the run, which `cause` stops; then say so, to those who may still read it."""
        is_saved = self.save_latest()
        if self.processes.master:
            self.progress.close()
            print(report.describe_stop(cause, self.it, self.cfg.out_dir, is_saved), file=sys.stderr)

    def step(self) -> tuple[float, float]:
        """One iteration, and what follows from it for c. Returns (loss, norm of the gradient).

        UserError if either is not finite.
        """
        cfg, it, rank, world = self.cfg, self.it, self.processes.rank, self.processes.world
        scale = self.scaler.get_scale()
        steers = self.retention is not None and (it + 1) % STEER == 0
        is_compiled = self.compiled is not self.model
        collects = self.stats is not None and (steers or self.logs_after(it) or (is_compiled and not self.kinds))
        if self.stats is not None:
            collect_stats(self.model, self.stats, collects)
        self.compiles, self.kinds = is_compiled and collects not in self.kinds, self.kinds | {collects}
        loss, norm = train_step(
            cfg, self.ddp, self.optimizer, self.scaler, self.corpus, self.device, it, rank, world, self.window
        )
        check_finite(loss, f"loss of iteration {it}")
        if not self.scaler.is_enabled():  # the scaler skips such a step by itself, and lowers its scale
            check_finite(norm, f"gradient norm of iteration {it}")
        elif self.scaler.get_scale() < 1e-3:
            check_finite(math.nan, f"float16 gradient of iteration {it}, at every loss scale,")
        self.it = it = it + 1
        self.window += cfg.gradient_accumulation_steps * cfg.batch_size
        if self.retention is not None:
            if steers:
                self.retention.observe(scale / (cfg.gradient_accumulation_steps // world), world)
            if it % CALIBRATE == 1:  # after a step: what is compiled is compiled for DDP
                self.retention.calibrate(
                    cfg, self.compiled, self.corpus, self.device, it, self.window, rank, world, self.scaler.get_scale()
                )
            if steers:
                self.retention.steer()
        return loss, norm

    def logs_after(self, it: int) -> bool:
        """Whether iteration `it` is to be logged once it is done."""
        return (it + 1) % self.cfg.log_interval == 0 or it + 1 == self.cfg.max_iters

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
        flops = tok_per_sec * flops_per_token(self.model, cfg.block_size)
        mfu = flops / (peak * self.processes.world) if peak else None
        lr = self.optimizer.param_groups[0]["lr"]
        metrics = {"iter": it, "train/loss": loss, "lr": lr, "train/grad_norm": norm}
        metrics |= {"train/dt": dt, "train/tok_per_sec": tok_per_sec, "train/mfu": mfu}
        self.record.log(metrics | report.sus_metrics(self.model, self.stats, self.retention))
        self.progress.steps(it, loss, dt, tok_per_sec, mfu, self.retention and self.retention.c.item())

    def evaluate(self) -> None:
        """The validation loss, attention's time, and the checkpoints that are due. A signal to stop cuts it off.

        The state is saved before, since all this may take long; but it takes nothing's place if its loss isn't finite.
        """
        due = self.cfg.always_save_checkpoint or self.it == self.cfg.max_iters
        with ExitStack() as stack:
            if self.record is not None and self.it > 0 and due:
                stack.enter_context(checkpoint.put_back(self.out_dir / "ckpt.pt", Diverged))
                self.save("ckpt.pt")
            self.evaluate_now()

    def evaluate_now(self) -> None:
        cfg, it, processes = self.cfg, self.it, self.processes
        where = self.val_starts, cfg.batch_size, self.device, processes.rank, processes.world
        by_position = evaluate(self.compiled, self.corpus, *where, self.heeds_stop)
        if by_position is None:
            return
        probed = {}
        if self.record is not None:
            batch = self.corpus.val_batch(self.val_starts[:1]).to(self.device.device)
            probed = probe_attention(self.model, batch, self.device, torch.tensor(fold_in(cfg.seed, it)))
        val_loss = float(by_position.mean())
        check_finite(val_loss, f"validation loss at iteration {it}")
        self.evaluated_at = it
        improved = val_loss < self.best_val_loss and it > 0
        self.best_val_loss = min(val_loss, self.best_val_loss)
        buckets = report.position_buckets(by_position)
        if processes.master:
            self.progress.say(report.describe_evaluation(it, val_loss, improved, buckets))
        if self.record is None:
            return
        self.record.log({"iter": it, "val/loss": val_loss, "val/loss_by_position": buckets, **probed})
        if (error := probed.get("lowrank/worst_error", 0)) > 1 and not self.warned:
            self.warned = True
            self.progress.say(report.lowrank_warning(cfg, it, probed["lowrank/bound"], error))
        if improved:
            self.save("ckpt_best.pt")
        if improved or cfg.always_save_checkpoint or it == cfg.max_iters:
            self.save_latest()

    def save_latest(self) -> bool:
        """ckpt.pt, and what keep_checkpoints keeps. False before the first step, or where another process saves."""
        if self.record is None or self.it == 0:
            return False
        self.save("ckpt.pt")
        if self.cfg.keep_checkpoints:  # a file of its own: a copy of ckpt.pt by a link would change with it
            self.save(f"ckpt-{self.it}.pt")
            checkpoint.keep_latest(self.out_dir, self.cfg.keep_checkpoints)
        return True

    def save(self, name: str) -> None:
        assert self.record is not None
        checkpoint.save(self.out_dir / name, self.to_save(self.record.run_id))


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
    first: int | None = None,
) -> tuple[float, float]:
    """One iteration: the gradient over all micro-batches, clipped, and a step. Returns (loss, norm of the gradient).

    model: a GPT, compiled or not, in DDP if world > 1; with backprop=analytic a plain GPT. first: the number of the
    iteration's first window of text; None: as if all iterations had been like this one.
    """
    if first is None:
        first = it * cfg.gradient_accumulation_steps * cfg.batch_size
    analytic = cfg.backprop == "analytic"
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(cfg, it)
    micro_steps = cfg.gradient_accumulation_steps // world
    total = torch.zeros((), device=device.device)
    for step in range(micro_steps):
        micro = step * world + rank  # counted over all processes
        seed = fold_in(cfg.seed, it, micro)
        torch.manual_seed(seed)  # dropout
        batch = corpus.batch(cfg.batch_size, cfg.seed, first + micro * cfg.batch_size)
        x, y, documents = batch.to(device.device)
        sus_seed = torch.tensor(seed) if cfg.attn_backward == "sus" else None
        if world > 1:
            model.require_backward_grad_sync = step == micro_steps - 1  # read by DDP's forward
        with device.training_forward(cfg.offload_activations):
            if analytic:
                scale = scaler.scale(torch.ones((), device=device.device)) / micro_steps
                loss = loss_and_gradients(model, x, y, documents=documents, sus_seed=sus_seed, scale=scale)
            else:
                _, loss = model(x, y, documents=documents, sus_seed=sus_seed)
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


class Diverged(UserError):
    """The run's numbers are no longer finite."""


def check_finite(value: float, name: str) -> None:
    if not math.isfinite(value):
        raise Diverged(f"the {name} is {value}")


if __name__ == "__main__":
    with_memory = memory_errors(
        "Try a smaller --batch_size (with more --gradient_accumulation_steps), "
        "--activation_checkpointing=attention, a smaller --block_size or model"
    )
    run_main(with_memory(main))
