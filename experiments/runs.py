"""A training run as its record tells it, and which runs belong together.

Runs that differ in nothing but the seed are a group. They are compared at the last iteration at which all of them were
evaluated. torch isn't needed for it.
"""

import dataclasses
import itertools
import math
import statistics
from pathlib import Path

import numpy as np

from configurator import TrainConfig, UserError, of_today
from training.record import read_record

# What says nothing about how a run trains.
UNRELATED = {
    "seed",
    "out_dir",
    "init_from",
    "eval_only",
    "log_interval",
    "always_save_checkpoint",
    "keep_checkpoints",
    "wandb_log",
    "wandb_project",
    "wandb_run_name",
    "lora_base",
    "train_sha256",
    "val_sha256",
}


@dataclasses.dataclass
class Run:
    name: str
    config: dict
    lines: list[dict]
    folder: Path | None = None

    def series(self, name: str) -> tuple[list[int], list[float]]:
        pairs = [(line["iter"], line[name]) for line in self.lines if line.get(name) is not None]
        return [x for x, _ in pairs], [y for _, y in pairs]

    @property
    def losses(self) -> dict[int, float]:
        return dict(zip(*self.series("val/loss")))

    def seconds(self, iterations: list[int]) -> np.ndarray:
        """Training time up to each iteration. A logged train/dt stands for every step since the log before."""
        its, dts = self.series("train/dt")
        return np.interp(iterations, [0, *its], np.cumsum([0, *np.diff([0, *its]) * dts]))

    @property
    def is_sus(self) -> bool:
        return self.config.get("attn_backward") == "sus"

    @property
    def is_exact(self) -> bool:
        return self.config.get("attn_backward", "exact") == "exact"

    @property
    def c(self) -> str:
        c = self.config["sus_c"] if self.is_sus else "-"
        return c if c in ("-", "auto") else f"{float(c):g}"

    @property
    def is_finished(self) -> bool:
        return max(self.losses, default=-1) >= self.config.get("max_iters", 0)


def read_run(folder: Path) -> Run:
    header, lines = read_record(folder / "metrics.jsonl")
    text = {name: header[name] for name in ("train_sha256", "val_sha256") if header.get(name)}
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    config = {
        name: of_today(fields[name], value) if name in fields else value for name, value in header["config"].items()
    }
    since = {name: fields[name].default for name in ("doc_mask", "attn_window")}  # runs without these keys had that
    return Run(header.get("run_name") or folder.name, since | config | text, lines, folder)


def rank(run: Run) -> tuple:
    """Sorts exact first, then SUS by c, auto last, then low-rank; each by seed."""
    return (
        not run.is_exact,
        not run.is_sus,
        math.inf if run.c in ("-", "auto") else float(run.c),
        run.c == "auto",
        run.config.get("seed", 0),
    )


def matters(name: str, config: dict) -> bool:
    """Whether the key says anything of a run with this config: those of other backwards do not."""
    owner = next((kind for kind in ("sus", "lowrank") if name.startswith(f"{kind}_")), None)
    return owner in (None, config.get("attn_backward"))


def group(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs which differ in nothing but the seed (and what can't matter), under a label of what sets them apart."""
    configs = [
        {name: value for name, value in run.config.items() if name not in UNRELATED and matters(name, run.config)}
        for run in runs
    ]
    differing = sorted(
        {
            name
            for a, b in itertools.combinations(configs, 2)
            for name in a.keys() & b.keys()
            if a[name] != b[name] and name not in ("attn_backward", "sus_c")
        }
    )
    groups = {}
    for run, config in zip(runs, configs):
        label = [
            f"sus c={run.c}" if run.is_sus else run.config.get("attn_backward", "exact"),
            *(f"{n}={config[n]}" for n in differing if n in config),
        ]
        groups.setdefault(", ".join(label), []).append(run)
    return groups


def check_copies(runs: list[Run]) -> None:
    """UserError if a run is there twice: it would count as two seeds. Same seed, same keys, same losses."""
    for members in group(runs).values():
        for a, b in itertools.combinations(members, 2):
            common = a.losses.keys() & b.losses.keys()
            alike = all(a.losses[it] == b.losses[it] for it in common)
            if a.config.get("seed") == b.config.get("seed") and common and alike:
                raise UserError(f"{b.folder or b.name} is the same run as {a.folder or a.name}: give one of them")


def validated_unlike(runs: list[Run]) -> list[str]:
    """The keys in which the runs differ and by which they were validated on different windows of text."""
    number = "eval_iters * batch_size"
    configs = [
        run.config | {number: run.config["eval_iters"] * run.config["batch_size"]}
        if {"eval_iters", "batch_size"} <= run.config.keys()
        else run.config
        for run in runs
    ]
    keys = ("dataset", "val_sha256", "windows", "doc_mask", "block_size", number)
    return [name for name in keys if len({config[name] for config in configs if name in config}) > 1]


def losses_of(runs: list[Run]) -> dict[int, list[float]]:
    """By each iteration at which all were evaluated: the validation loss of each."""
    curves = [run.losses for run in runs]
    return {it: [curve[it] for curve in curves] for it in curves[0] if all(it in curve for curve in curves)}


def comparable(runs: list[Run]) -> tuple[list[Run], int | None]:
    """The finished runs if they are of several groups, else all that were evaluated; and the last iteration at which
    all of these were.
    """
    evaluated = [run for run in runs if run.losses] or runs
    finished = [run for run in evaluated if run.is_finished]
    chosen = finished if len(group(finished)) > 1 else evaluated
    return chosen, max(losses_of(chosen), default=None)


def median(runs: list[Run], name: str) -> float | None:
    values = [statistics.median(values) for run in runs if (values := run.series(name)[1])]
    return statistics.median(values) if values else None
