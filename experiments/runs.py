"""Train runs to compare, or compare those there are: one picture, and tables of the gaps beside those of seeds.

    python experiments/compare_runs.py config/long_ctx.py --sweep=exact,2,4 --seeds=1,2,3 [--key=value of train.py ...]
    python experiments/compare_runs.py out-sweep [--out=curves.png]          # all the runs in a folder
    python experiments/compare_runs.py OUT_DIR [OUT_DIR ...]                 # these runs; they may still be training

A sweep trains, one run after the other, exact attention, SUS at each c, and lowrank, all with the first seed, then all
with the next: interrupted, it can be compared already. Runs of one seed start from the same weights and see the same
batches. Each has a folder in --runs, with its train.log. Ctrl-C saves and leaves; the same command then goes on from
there.

Whether SUS costs anything is a question of how far apart runs are that differ in the seed only. So runs are grouped by
their configuration, and compared at the last iteration which all have evaluated; those not finished are left out once
others make a comparison. ± is a standard error, of the mean over seeds or, in the distance from exact, over pairs of
runs of one seed. More than 8 runs are drawn as groups, by their mean and a band from the lowest to the highest.
"""

import dataclasses
import itertools
import math
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import TrainConfig, UserError, key, load_config, run_main, validate
from output import COLORS, check_picture, import_pyplot, print_table, progress_bar, save_picture
from training.record import plain, read_record

# What says nothing about how a run trains.
UNRELATED = {
    "seed",
    "out_dir",
    "init_from",
    "eval_only",
    "log_interval",
    "always_save_checkpoint",
    "wandb_log",
    "wandb_project",
    "wandb_run_name",
    "lora_base",
}
MARKERS = "osD^vPX"
MEASURED = ["tok/s", "exact bwd ms", "own bwd ms", "kept/row"]
MANY = 8  # more runs than these are shown as groups only


@dataclasses.dataclass
class CompareConfig(TrainConfig):
    out: str = key("curves.png", "the picture: .png, .svg or .pdf", section="Comparison")
    sweep: str = key("", "train these: exact, lowrank, and SUS by its c, a number or auto; e.g. exact,2,4,auto")
    seeds: str = key("1,2,3", "of the sweep: integers, each for all of it")
    runs: str = key("out-sweep", "folder of the sweep's runs")


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


def main():
    cfg = load_config(CompareConfig, [arg for arg in sys.argv[1:] if arg.startswith("-")], usage=__doc__)
    paths = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    if "sweep" in cfg.explicit:
        check_picture(cfg.out)  # now rather than after hours of training
        train_all(planned := plan(cfg, paths))
        runs = sorted((read_run(run.folder) for run in planned), key=rank)
    else:
        runs = read_all(cfg, [Path(path) for path in paths])
    if len(runs) <= MANY:
        print_table(table(runs))
    lines, groups = summary(runs)
    print("".join(f"{line}\n" for line in lines), end="")
    if groups:
        print_table(groups)
    check_picture(cfg.out)
    save_picture(draw(runs), Path(cfg.out))
    print(f"picture: {cfg.out}")


def read_run(folder: Path) -> Run:
    header, lines = read_record(folder / "metrics.jsonl")
    if not lines:
        raise UserError(f"{folder / 'metrics.jsonl'} has no lines yet: wait for the run's first evaluation")
    return Run(header.get("run_name") or folder.name, header["config"], lines, folder)


def read_all(cfg: CompareConfig, paths: list[Path]) -> list[Run]:
    """The runs in these folders, a folder of runs standing for all in it that have lines, under names of their own."""
    for name in sorted(cfg.explicit - {"out"}):
        raise UserError(f"--{name} is for training: leave it out, or give a config file and --sweep=exact,25")
    if not paths:
        raise UserError("which runs? Give the out_dir of one or more, e.g. compare_runs.py out-exact out-sus")
    runs = []
    for path in paths:
        if path.suffix == ".py":
            raise UserError(f"{path} is a config file: give folders of runs alone, or it alone and --sweep=exact,25")
        inside = [] if (path / "metrics.jsonl").exists() else [f.parent for f in path.glob("*/metrics.jsonl")]
        begun = [folder for folder in inside if read_record(folder / "metrics.jsonl")[1]]
        runs += sorted(map(read_run, begun), key=rank) if begun else [read_run((inside or [path])[0])]
    names = [run.name for run in runs]  # the user's, which may repeat
    return [dataclasses.replace(r, name=f"{r.name} ({r.folder})") if names.count(r.name) > 1 else r for r in runs]


def rank(run: Run) -> tuple:
    """Sorts exact first, then SUS by c, auto last, then low-rank; each by seed."""
    return (
        not run.is_exact,
        not run.is_sus,
        math.inf if run.c in ("-", "auto") else float(run.c),
        run.c == "auto",
        run.config.get("seed", 0),
    )


# -- the sweep --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Planned:
    name: str
    folder: Path
    arguments: list[str]  # of train.py
    config: TrainConfig  # which these give
    state: str = "new"  # or "begun", with a checkpoint to resume from, or "finished"
    it: int = 0


def plan(cfg: CompareConfig, paths: list[str]) -> list[Planned]:
    """The runs in their order. UserError, before any is trained, if a key doesn't fit or a folder holds another run."""
    for folder in [path for path in paths if Path(path).is_dir()]:
        raise UserError(f"{folder} is a folder: --sweep takes a config file; to compare runs, leave --sweep out")
    for name in sorted({"attn_backward", "sus_c", "seed", "out_dir", "wandb_run_name"} & cfg.explicit):
        raise UserError(f"--{name} is set by --sweep, --seeds and --runs: leave it out")
    modes, seeds = {}, cfg.seeds.split(",")
    for c in cfg.sweep.split(","):
        try:
            name = c if c in ("exact", "lowrank") else f"sus-c{c}" if c == "auto" else f"sus-c{float(c):g}"
            if name in modes or c not in ("exact", "lowrank", "auto") and not float(c) > 0:
                raise ValueError
        except ValueError:
            raise UserError(
                f"--sweep={cfg.sweep}: {c!r} is not exact, lowrank, auto or a c above 0, or comes twice"
            ) from None
        modes[name] = [f"--attn_backward={c}"] if name == c else ["--attn_backward=sus", f"--sus_c={c}"]
    if not all(seed.isascii() and seed.isdigit() for seed in seeds) or len(set(map(int, seeds))) < len(seeds):
        raise UserError(f"--seeds={cfg.seeds} must be a list of integers, each once, such as 1,2,3")
    given, planned = [a for a in sys.argv[1:] if not a.startswith(("--out=", "--sweep=", "--seeds=", "--runs="))], []
    for seed, mode in itertools.product(map(int, seeds), modes):
        folder = Path(cfg.runs) / f"{mode}-seed{seed}"
        arguments = [*given, *modes[mode], f"--seed={seed}", f"--out_dir={folder}", f"--wandb_run_name={folder.name}"]
        config = load_config(TrainConfig, arguments, usage="")
        validate(config)
        if config.eval_only or config.init_from == "resume":
            raise UserError("a sweep trains, and resumes by itself: leave out eval_only and init_from=resume")
        planned.append(look(Planned(folder.name, folder, arguments, config)))
    return planned


def look(run: Planned) -> Planned:
    """Set its state and it by what is in its folder. UserError if that was trained differently."""
    record, ckpt = run.folder / "metrics.jsonl", run.folder / "ckpt.pt"
    if not record.exists():  # then a checkpoint is of no use here; train.py moves it aside
        return run
    header, lines = read_record(record)
    config = plain(dataclasses.asdict(run.config), nonfinite=str)
    asked_for = (
        config.keys() if run.config.init_from == "scratch" else run.config.explicit
    )  # else the base has the architecture
    for name in (asked_for & header["config"].keys()) - (UNRELATED - {"seed"}):
        was = header["config"][name]
        if was != config[name] and matters(name, config):
            raise UserError(f"{run.folder} has a run with {name}={was}, not {config[name]}: choose another --runs")
    at_end = Run(run.name, config, lines).is_finished
    # The last checkpoint is newer than the record, unless train.py was killed just before, or the files were copied.
    if at_end and ckpt.exists() and ckpt.stat().st_mtime_ns <= record.stat().st_mtime_ns:
        from training.checkpoint import load  # with torch, which takes seconds

        at_end = load(ckpt)["iter_num"] >= run.config.max_iters
    run.state = "finished" if at_end else "begun" if ckpt.exists() else "new"
    run.it = lines[-1]["iter"] if lines and run.state != "new" else 0
    return run


def matters(name: str, config: dict) -> bool:
    """Whether the key says anything of a run with this config: those of other backwards do not."""
    owner = next((kind for kind in ("sus", "lowrank") if name.startswith(f"{kind}_")), None)
    return owner in (None, config.get("attn_backward"))


def train_all(planned: list[Planned]) -> None:
    """Train what isn't finished. A signal has the run saved, and ends the program. UserError if a run fails."""
    counts = ", ".join(f"{[run.state for run in planned].count(s)} {s}" for s in ("finished", "begun", "new"))
    print(f"{len(planned)} runs in {planned[0].folder.parent}: {counts}", flush=True)
    signals = []
    hangup = [n for n in signal.Signals if n.name == "SIGHUP" and signal.getsignal(n) == signal.SIG_DFL]  # else nohup's
    caught = [signal.SIGINT, signal.SIGTERM, *hangup]
    handlers = {number: signal.signal(number, lambda n, frame: signals.append(signal.Signals(n))) for number in caught}
    bar = progress_bar(sum(run.config.max_iters for run in planned))
    bar.n = bar.initial = sum(run.it for run in planned)
    try:
        with bar:
            for run in planned:
                if run.state != "finished" and not signals:
                    train_one(run, bar, signals, f"({planned.index(run) + 1} of {len(planned)})")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if signals:
        print(f"stopped by {signals[0].name}; the same command goes on:\n    {shlex.join(['python', *sys.argv])}")
        sys.exit(130)


def train_one(run: Planned, bar: tqdm, signals: list[int], count: str) -> None:
    """Train it in a child process, the bar following its record. A signal has it saved, a second ends it at once."""
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't make {run.folder}: {error.strerror}; choose another --runs") from error
    record, log = run.folder / "metrics.jsonl", run.folder / "train.log"
    resume = ["--init_from=resume"] if run.state == "begun" else []
    others, passed_on, text = bar.n - run.it, 0, f"{'resumes' if resume else 'starts'} at iteration {run.it}"
    bar.set_description_str(f"{run.name} {text}")
    if bar.disable:
        print(f"{run.name} {text} {count}", flush=True)
    with open(log, "ab") as file:
        begin, started = file.tell(), time.time()
        # In a session of its own, or a terminal's Ctrl-C would reach it too, and ours would be its second one.
        child = subprocess.Popen(
            [sys.executable, ROOT / "train.py", *run.arguments, *resume],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        for tick in itertools.count():
            ended = child.poll() is not None  # asked before the record is read, which is complete then
            if (ended or tick % 10 == 0) and record.exists() and record.stat().st_mtime > started:
                for line in read_record(record)[1][-1:]:
                    run.it = max(run.it, line["iter"])
                    text = f"loss {line.get('val/loss') or line.get('train/loss', math.nan):.4f}"
                bar.n = others + run.it
            if ended:
                break
            for _ in signals[passed_on:]:
                child.send_signal(signal.SIGINT if passed_on else signal.SIGTERM)  # train.py's second one is SIGINT
                passed_on += 1
            if tick % 10 == 0:
                bar.set_description_str(f"{run.name} {'stops' if passed_on else text}")  # and refresh
            time.sleep(0.1)
    finally:  # whatever happens, no process is left behind
        child.terminate()
        child.wait()
    stopped = passed_on and abs(child.returncode) % 128 in (signal.SIGINT, signal.SIGTERM)
    if child.returncode and not stopped:
        end = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()[-8:]
        raise UserError("\n    ".join([f"{run.name} failed with exit status {child.returncode}; {log} ends:", *end]))
    if bar.disable:
        print(f"{run.name} {'stops' if stopped else 'ends'} at iteration {run.it}, {text}", flush=True)


# -- the tables -------------------------------------------------------------------------------------


def cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(runs: list[Run]) -> list[list[str]]:
    """Rows of text, the first of them the titles; '-' where a run has no such number."""
    rows = [["run", "backward", "c", "seed", "iterations", "final val", "best val", *MEASURED]]
    for run in runs:
        val = run.series("val/loss")[1]
        rows.append(
            [
                run.name,
                str(run.config.get("attn_backward", "-")),
                run.c,
                str(run.config.get("seed", "-")),
                str(run.lines[-1]["iter"]),
                cell(val[-1] if val else None, ".4f"),
                cell(min(val, default=None), ".4f"),
                *measured([run]),
            ]
        )
    return rows


def measured(runs: list[Run]) -> list[str]:
    return [
        cell(median(runs, "train/tok_per_sec"), ",.0f"),
        cell(median(runs, "attn/exact_backward_ms"), ".2f"),
        cell(None if runs[0].is_exact else median(runs, "attn/backward_ms"), ".2f"),
        cell(median(runs, "sus/kept_per_row"), ".1f"),
    ]


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


def losses_of(runs: list[Run]) -> dict[int, list[float]]:
    """By each iteration at which all were evaluated: the validation loss of each."""
    curves = [run.losses for run in runs]
    return {it: [curve[it] for curve in curves] for it in curves[0] if all(it in curve for curve in curves)}


def comparable(runs: list[Run]) -> tuple[list[Run], int | None]:
    """The finished runs if they are of several groups, else all; and the last iteration at which all were evaluated."""
    finished = [run for run in runs if run.is_finished]
    chosen = finished if len(group(finished)) > 1 else runs
    return chosen, max(losses_of(chosen), default=None)


def summary(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """(lines of text, the table below them): each group's loss over its seeds, its distance from exact, its times."""
    if len(runs) < 2:
        return [], []
    chosen, at = comparable(runs)
    if at is None:
        return ["", "no gaps: there is no iteration at which all of these runs were evaluated"], []
    left_out = ", ".join(run.name for run in runs if run not in chosen)
    lines = ["", f"validation loss at iteration {at}, the last at which all were evaluated:"]
    lines[1:1] = [f"left out, since not finished: {left_out}"] if left_out else []
    groups = group(chosen)
    base = next((label for label in groups if label.startswith("exact")), next(iter(groups)))
    rows = [["group", "runs", "val loss", "lowest..highest", f"from {base}", "train time", *MEASURED, "median c"]]
    for label, members in groups.items():
        losses = losses_of(members)[at]
        times = [run.seconds([at])[0] for run in members if run.series("train/dt")[0]]
        rows.append(
            [
                label,
                str(len(members)),
                mean_and_error(losses, ".4f"),
                f"{min(losses):.4f}..{max(losses):.4f}",
                "-" if label == base else difference(members, groups[base], at),
                tqdm.format_interval(statistics.median(times)) if times else "-",
                *measured(members),
                cell(median(members, "sus/c") if members[0].c == "auto" else None, ".1f"),
            ]
        )
    return lines, rows if any(run.c == "auto" for run in chosen) else [row[:-1] for row in rows]


def difference(runs: list[Run], base: list[Run], at: int) -> str:
    """The mean over pairs of runs of the same seed, or, without such, the difference of the means."""
    pairs = [a.losses[at] - b.losses[at] for a in runs for b in base if a.config.get("seed") == b.config.get("seed")]
    mean, of_base = (statistics.mean(losses_of(side)[at]) for side in (runs, base))
    return mean_and_error(pairs or [mean - of_base], "+.4f")


def mean_and_error(values: list[float], form: str) -> str:
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return format(statistics.mean(values), form) + error


def median(runs: list[Run], name: str) -> float | None:
    values = [statistics.median(values) for run in runs if (values := run.series(name)[1])]
    return statistics.median(values) if values else None


# -- the picture ------------------------------------------------------------------------------------


def draw(runs: list[Run]):
    """The figure. What is drawn in one colour, a run or the runs of a group, is a line: (name, runs, style)."""
    plt = import_pyplot()
    many = len(runs) > MANY
    lines = []
    for i, (name, members) in enumerate(group(comparable(runs)[0]).items() if many else [(r.name, [r]) for r in runs]):
        dashes = "-" if members[0].is_exact else (0, (4, 2))  # where curves coincide, both are seen
        lines.append(
            (
                name,
                members,
                {
                    "color": COLORS[i % 7],
                    "marker": MARKERS[(i + i // 7) % 7],
                    "linewidth": 1.8,
                    "markersize": max(8 - i, 4),
                    "linestyle": dashes,
                },
            )
        )
    timed = len(lines) > 1 and all(run.series("train/dt")[0] for run in runs)
    shape, size = ((2, 2), (11, 8)) if timed else ((1, 3), (13, 4.2))
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained")
    first, *by_time, third, last = axes.flat
    for ax in (first, *by_time):
        draw_loss(ax, lines, by_time=ax is not first)
    (draw_final if many else draw_positions)(third, lines)
    (draw_throughput if median(runs, "attn/backward_ms") is None else draw_times)(last, lines)
    title = f"{'group: mean' if many else 'run:'} validation loss at its end"
    figure.legend(
        *first.get_legend_handles_labels(),
        loc="outside upper center",
        title=title,
        ncols=math.ceil(len(lines) / math.ceil(len(lines) / 4)),
    )
    return figure


def draw_loss(ax, lines, by_time=False):
    single = all(len(runs) == 1 for _, runs, _ in lines)
    behind = "by training time" if by_time else "(faint: training loss)" if single else "(mean, lowest to highest)"
    ax.set(title=f"validation loss {behind}", xlabel="minutes" if by_time else "iteration")
    for _, (run, *_), style in lines if single and not by_time else []:
        x, y = run.series("train/loss")
        ax.plot(x, y, color=style["color"], alpha=0.06, linewidth=1)
        ax.plot(x, smooth(y), color=style["color"], alpha=0.4, linewidth=1)
    # The first fifth, where the loss falls from its height, would squeeze the rest into the bottom of the panel.
    start, shown = min(run.lines[-1]["iter"] for _, runs, _ in lines for run in runs) / 5, []
    for name, runs, style in lines:
        losses = losses_of(runs)
        x = np.mean([run.seconds([*losses]) for run in runs], axis=0) / 60 if by_time else [*losses]
        y, band = [statistics.mean(v) for v in losses.values()], {"color": style["color"], "alpha": 0.15, "lw": 0}
        ax.plot(x, y, label=f"{name}: {y[-1]:.4f}" if y else name, **style)
        ax.fill_between(x, [min(v) for v in losses.values()], [max(v) for v in losses.values()], **band)
        shown += [(at, value) for it, at in zip(losses, x) if it >= start for value in losses[it]]
    if len(shown) > sum(len(runs) for _, runs, _ in lines):
        low, high = min(y for _, y in shown), max(y for _, y in shown)
        ax.set_ylim(low - 0.2 * (high - low or 0.5), high + 0.2 * (high - low or 0.5))
        ax.set_xlim(left=0.8 * min(x for x, _ in shown))
    ax.grid(alpha=0.25)


def draw_positions(ax, lines):
    ax.set(title="validation loss by position, last evaluation", xlabel="position in the context, up to")
    ends = set()
    for _, (run, *_), style in lines:
        last = dict(*run.series("val/loss_by_position")[1][-1:])
        points = sorted((int(name.split("-")[1]) + 1, loss) for name, loss in last.items() if loss is not None)
        ends.update(end for end, _ in points)
        if points:
            ax.plot(*zip(*points), **style)
    if ends:
        ax.set_xscale("log", base=2)
        ticks = sorted(ends, reverse=True)[:: math.ceil(len(ends) / 7)]  # at most 7, the last of them always
        ax.set_xticks(ticks, [f"{end // 1024}k" if end % 1024 == 0 else str(end) for end in ticks])
        ax.minorticks_off()
    ax.grid(alpha=0.25)


def draw_final(ax, lines):
    ax.set(title="final validation loss: each seed, and the mean", xlim=(-0.6, len(lines) - 0.4))
    for place, (name, runs, style) in enumerate(lines):
        for values in [*losses_of(runs).values()][-1:]:
            color, n = style["color"], len(values)
            if name.startswith("exact"):
                ax.axhspan(min(values), max(values), color=color, alpha=0.15, linewidth=1)
            x = place + 0.3 * (np.arange(n) / max(n - 1, 1) - 0.5 * (n > 1))
            ax.plot(x, values, linestyle="", marker=style["marker"], color=color, markersize=5, alpha=0.8)
            ax.hlines(statistics.mean(values), place - 0.3, place + 0.3, color=color, linewidth=2)
    names = [name.removeprefix("sus ").replace(", ", "\n") for name, _, _ in lines]
    slanted = {"rotation": 30, "ha": "right"} if max(map(len, names)) * len(names) > 60 else {}
    ax.set_xticks(range(len(lines)), names, **slanted)
    ax.grid(alpha=0.25, axis="y")


def draw_times(ax, lines):
    width, times, ways = 0.8 / len(lines), [], ["forward", "backward"]
    ax.set(title="time of attention in one layer", ylabel="ms", xticks=[0, 1], xticklabels=ways)
    for (i, (_, runs, style)), (place, name) in itertools.product(enumerate(lines), enumerate(ways)):
        x, value = place + (i - (len(lines) - 1) / 2) * width, median(runs, f"attn/{name}_ms")
        if value is not None:
            times.append(
                (x, value, None if runs[0].is_exact else median(runs, f"attn/exact_{name}_ms"), style["color"])
            )
    top = max(max(value, exact or 0) for _, value, exact, _ in times)
    for x, value, exact, color in times:
        ax.bar(x, value, 0.9 * width, color=color)
        if exact is not None:
            ax.hlines(exact, x - 0.45 * width, x + 0.45 * width, color="black", linewidth=2)
        height = exact if value < (exact or 0) < value + 0.08 * top else value  # or the number would be on the mark
        ax.annotate(
            f"{value:.3g}",
            (x, height),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            rotation=90 if len(lines) > 6 else 0,
        )
    ax.set_ylim(0, 1.2 * top)
    if any(exact is not None for _, _, exact, _ in times):
        ax.plot([], [], color="black", linewidth=2, label="exact, timed beside it")
        ax.legend(loc="upper left", fontsize=9)


def draw_throughput(ax, lines):
    ax.set(title="training throughput (median)", xlabel="tokens / s", yticks=[])
    for i, (_, runs, style) in enumerate(lines):
        value = median(runs, "train/tok_per_sec") or 0
        ax.barh(-i, value, 0.7, color=style["color"])
        ax.annotate(f"{value:,.0f}", (value, -i), (4, 0), textcoords="offset points", va="center", fontsize=9)
    ax.margins(x=0.2)


def smooth(values: list[float], share: float = 0.1) -> list[float]:
    """Means over a centred window of that share of the values, narrower at both ends."""
    half = int(share * len(values) / 2)
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


if __name__ == "__main__":
    run_main(main)
