"""Whole training steps, the analytic backward (backprop.py) beside autograd's: time, memory, and how far the gradients
differ.

    python experiments/bench_backprop.py config/long_ctx.py                  # T = 2048, 4096, 8192; minutes on a CPU
    python experiments/bench_backprop.py config/long_ctx.py --T=8192 --activation_checkpointing=full --json=b.json

Takes train.py's config files and keys, with each T in turn as block_size. One model takes four kinds of steps by turns,
each on the same batch as the others': attention's gradient exact and by SUS, and each by autograd and by hand. Times
are medians, ratios those of steps of the same round, with their lowest and highest. Memory is the peak of two steps as
bench_train.py has it. On CUDA autograd's steps are compiled, as train.py has them, unless --compile=False.

The gradients that are compared are those of the first step: |by hand - autograd's| / |autograd's|, over all parameters,
and the worst parameter's alone. With SUS a difference in rounding also decides here and there whether a tile is kept.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import UserError, load_config, run_main, validate  # isort: skip (before torch)

import torch
from tqdm import tqdm

from backprop import loss_and_gradients
from bench_train import KINDS, BenchTrainConfig, Trainer, check_keys, describe_steps, measure, memory_of
from data.loader import Corpus
from measure import apart, describe_machine, mib, numbers, ratio, ratio_text, spread
from output import check_writable, deliver, print_table
from training.device import Device, memory_errors
from training.record import plain

WAYS = ("autograd", "analytic")
STEPS = [(kind, way) for kind in KINDS for way in WAYS]
LIMIT = {
    torch.float32: 1e-3,
    torch.bfloat16: 0.1,
    torch.float16: 0.1,
}  # of the exact gradients' difference: beyond, something is wrong


def main() -> None:
    cfg = load_config(BenchTrainConfig, sys.argv[1:], usage=__doc__)
    Ts = numbers("T", cfg.T, int, 2)
    check_writable(cfg.json)
    check_keys(cfg, backprop="both are measured")
    cfg.backprop = "analytic"  # validate then also refuses what it doesn't cover
    validate(cfg)
    with memory_errors("Give a smaller --T"):
        data = plain(measure("bench_backprop", measure_at, (cfg.repeats + 2) * len(STEPS), cfg, Ts), nonfinite=str)
    deliver(data, report, cfg.json)


# -- measuring --------------------------------------------------------------------------------------


def measure_at(cfg: BenchTrainConfig, T: int, device: Device, corpus: Corpus, bar: tqdm) -> list[dict]:
    """One context length: a row of results for each of STEPS."""
    trainer = Trainer(cfg, T, device, corpus)
    rows = {step: {"T": T, "kind": step[0], "way": step[1], "step_ms": []} for step in STEPS}
    for kind in KINDS:
        rows[kind, "analytic"] |= compare_gradients(trainer, kind)
    for it in range(cfg.repeats + 1):
        for kind, way in reversed(STEPS) if it % 2 else STEPS:
            trainer.cfg.backprop = way
            ms = trainer.timed_step(kind, it, trainer.model if way == "analytic" else None)
            if it:  # the first is the warm-up
                rows[kind, way]["step_ms"].append(ms)
            bar.update(T**2)
    parameters = trainer.model.num_params()
    del trainer  # CUDA's memory is measured in this process
    for (kind, way), row in rows.items():
        row["parameters"] = parameters
        if cfg.memory:
            own = dataclasses.replace(cfg, backprop=way)
            row["peak_bytes"] = apart(device, memory_of, own, kind, T, device, corpus)
        bar.update(T**2)
    return list(rows.values())


def compare_gradients(trainer: Trainer, kind: str) -> dict:
    """How far the two gradients of the first micro-batch are apart. UserError if the loss differs, or exact gradients
    by too much.
    """
    model, device, seed = trainer.model, trainer.device, torch.tensor(0)
    model.config.attn_backward = kind
    batch = trainer.corpus.batch(trainer.cfg.batch_size, trainer.cfg.seed, 0).to(device.device)
    found = {}
    for way in WAYS:
        with device.autocast():
            how = dict(documents=batch.documents, sus_seed=seed)
            if way == "autograd":
                _, loss = model(batch.x, batch.y, **how)
            else:
                loss = loss_and_gradients(model, batch.x, batch.y, **how)
        if way == "autograd":
            loss.backward()
        found[way] = loss.item(), [p.grad for p in model.parameters()]
        model.zero_grad(set_to_none=True)
    norm = lambda gradients: torch.stack([g.double().norm() for g in gradients])
    (want_loss, want), (loss, got) = found["autograd"], found["analytic"]
    difference, size = norm([a - b for a, b in zip(got, want, strict=True)]), norm(want)
    whole, worst = (difference.norm() / size.norm()).item(), (difference / size).max().item()
    if not abs(loss - want_loss) <= 8 * torch.finfo(device.dtype).eps * abs(want_loss) or (
        kind == "exact" and not whole <= LIMIT[device.dtype]
    ):
        raise UserError(
            f"the analytic backward is wrong here, so there are no figures: at T = {trainer.cfg.block_size} the loss "
            f"with it is {loss:.8g}, autograd's {want_loss:.8g}, and the {kind} gradients differ by {whole:.2g}"
        )
    return {"loss_difference": loss - want_loss, "difference": whole, "worst_difference": worst}


# -- the table --------------------------------------------------------------------------------------


def report(data: dict) -> None:
    machine, idle = describe_machine(data)
    cfg, results = data["config"], data["results"]
    print(f"{machine}\n{describe_steps(data, 'activation checkpointing: ' + cfg['activation_checkpointing'])}\n")
    rows = [
        [
            "T",
            "attention",
            "autograd ms",
            "analytic ms",
            "autograd / analytic",
            "autograd MiB",
            "analytic MiB",
            "of the MiB",
            "gradients differ by",
            "worst parameter's",
        ]
    ]
    for pair in zip(results[::2], results[1::2]):
        autograd, analytic = pair
        peaks = [row.get("peak_bytes") for row in pair]
        rows.append(
            [
                f"{autograd['T']:,}",
                autograd["kind"],
                *(f"{spread(row['step_ms'])['median']:,.0f}" for row in pair),
                ratio_text(ratio(autograd["step_ms"], analytic["step_ms"])),
                *(mib(peak) for peak in peaks),
                f"{peaks[1] / peaks[0]:.0%}" if all(peaks) else "-",
                f"{analytic['difference']:.1e}",
                f"{analytic['worst_difference']:.1e}",
            ]
        )
    print_table(rows)
    print(
        f"\nOne step: forward, backward, clipping, AdamW; medians of {cfg['repeats']}. Ratio: median (lowest..highest) "
        "of the rounds.\nMiB: the peak of model, optimizer and step. Gradients: |analytic - autograd's| / "
        f"|autograd's|, of the first step.\n{idle}"
    )


if __name__ == "__main__":
    run_main(main)
