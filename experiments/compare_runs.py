"""
Compare training runs by their records: one picture, one table, and the gap between exact and SUS beside that of seeds.

    python experiments/compare_runs.py OUT_DIR [OUT_DIR ...] [--out=curves.png]

The picture: validation loss (the training loss faint behind it), loss by position in the context at the last
evaluation, and the time of attention alone. Runs may still be training.

Whether SUS costs anything is a question of how far apart runs are that differ in the seed only. Give several seeds of
each: they are grouped by their configuration, and compared at the last iteration which all of them have evaluated.
"""

import dataclasses
import itertools
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import UserError, key, load_config, run_main
from output import COLORS, check_picture, import_pyplot, print_table, save_picture
from record import read_record

# What says nothing about how a run trains.
UNRELATED = {"seed", "out_dir", "init_from", "eval_only", "log_interval", "always_save_checkpoint", "wandb_log",
             "wandb_project", "wandb_run_name"}
MARKERS = "osD^vPX"


@dataclasses.dataclass
class CompareConfig:
    out: str = key("curves.png", "the picture: .png, .svg or .pdf")


@dataclasses.dataclass
class Run:
    name: str
    config: dict
    lines: list[dict]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The iterations at which the key was logged, and its values."""
        pairs = [(line["iter"], line[name]) for line in self.lines if line.get(name) is not None]
        return [x for x, _ in pairs], [y for _, y in pairs]

    def median(self, name: str) -> float | None:
        values = self.series(name)[1]
        return statistics.median(values) if values else None

    @property
    def is_sus(self) -> bool:
        return self.config.get("attn_backward") == "sus"

    @property
    def backward(self) -> str:
        return f"sus c={float(self.config['sus_c']):g}" if self.is_sus else "exact"


def main():
    options = [arg for arg in sys.argv[1:] if arg.startswith("-")]
    folders = [Path(arg) for arg in sys.argv[1:] if not arg.startswith("-")]
    cfg = load_config(CompareConfig, options, usage=__doc__)
    if not folders:
        raise UserError("which runs? Give the out_dir of one or more, e.g. compare_runs.py out-exact out-sus")
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run, folder in zip(runs, folders):  # names are the user's and may repeat
        run.name += f" ({folder})" if names.count(run.name) > 1 else ""
    print_table(table(runs))
    print(*gaps(runs), sep="\n")
    check_picture(cfg.out)
    save_picture(draw(runs), Path(cfg.out))
    print(f"picture: {cfg.out}")


def read_run(folder: Path) -> Run:
    header, lines = read_record(folder / "metrics.jsonl")
    if not lines:
        raise UserError(f"{folder / 'metrics.jsonl'} has no lines yet: wait for the run's first evaluation")
    return Run(header.get("run_name") or folder.name, header["config"], lines)


# -- the table --------------------------------------------------------------------------------------


def table(runs: list[Run]) -> list[list[str]]:
    """Rows of text, the first of them the titles; '-' where a run has no such number."""

    def text(value, form):
        return "-" if value is None else format(value, form)

    rows = [["run", "backward", "c", "seed", "iterations", "final val", "best val", "tok/s", "exact bwd ms",
             "sus bwd ms", "kept/row"]]
    for run in runs:
        val = run.series("val/loss")[1]
        rows.append([
            run.name, str(run.config.get("attn_backward", "-")),
            text(float(run.config["sus_c"]) if run.is_sus else None, "g"),
            str(run.config.get("seed", "-")), str(run.lines[-1]["iter"]),
            text(val[-1] if val else None, ".4f"), text(min(val, default=None), ".4f"),
            text(run.median("train/tok_per_sec"), ",.0f"), text(run.median("attn/exact_backward_ms"), ".2f"),
            text(run.median("attn/backward_ms") if run.is_sus else None, ".2f"),
            text(run.median("sus/kept_per_row"), ".1f"),
        ])
    return rows


# -- the gaps ---------------------------------------------------------------------------------------


def group(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs which differ in nothing but the seed (and what can't matter), under a label of what sets them apart."""
    configs = [{name: value for name, value in run.config.items()
                if name not in UNRELATED and (run.is_sus or not name.startswith("sus_"))} for run in runs]
    own = {"attn_backward", "sus_c"}  # in run.backward already
    differing = sorted({name for a, b in itertools.combinations(configs, 2) for name in (a.keys() & b.keys()) - own
                        if a[name] != b[name]})
    groups = {}
    for run, config in zip(runs, configs):
        label = ", ".join([run.backward, *(f"{name}={config[name]}" for name in differing if name in config)])
        groups.setdefault(label, []).append(run)
    return groups


def gaps(runs: list[Run]) -> list[str]:
    """Lines of text: mean and range of the validation loss over the seeds of each group, and the groups' distances."""
    if len(runs) < 2:
        return []
    common = set.intersection(*(set(run.series("val/loss")[0]) for run in runs))
    if not common:
        return ["", "no gaps: there is no iteration at which all of these runs were evaluated"]
    at = max(common)
    losses = {label: [dict(zip(*run.series("val/loss")))[at] for run in members]
              for label, members in group(runs).items()}
    means = {label: statistics.mean(values) for label, values in losses.items()}
    lines = ["", f"validation loss at iteration {at}, the last at which all were evaluated:"]
    width = max(map(len, losses))
    for label, values in losses.items():
        spread = f"{max(values) - min(values):.4f} from lowest to highest of {len(values)} runs"
        lines.append(f"  {label:{width}}  {means[label]:.4f}, {spread if len(values) > 1 else 'one run'}")
    base = next((label for label in means if label.startswith("exact")), next(iter(means)))
    for label, mean in means.items():
        if label != base:
            lines.append(f"  {label} is {mean - means[base]:+.4f} from {base}")
    return lines


# -- the picture ------------------------------------------------------------------------------------


def draw(runs: list[Run]):
    """The figure: three panels, one colour and marker a run."""
    plt = import_pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    styles = []
    for i, (run, color, marker) in enumerate(zip(runs, itertools.cycle(COLORS), itertools.cycle(MARKERS))):
        dashes = (0, (4, 2)) if run.is_sus else "-"  # where curves coincide, both are seen
        styles.append((run, {"color": color, "marker": marker, "markersize": max(8 - i, 4), "linestyle": dashes,
                             "linewidth": 1.8}))
    draw_loss(left, styles)
    draw_positions(middle, styles)
    if any(run.median("attn/backward_ms") is not None for run in runs):
        draw_times(right, styles)
    else:
        draw_throughput(right, styles)
    figure.legend(*left.get_legend_handles_labels(), title="run: validation loss at its end",
                  loc="outside upper center", ncols=math.ceil(len(runs) / math.ceil(len(runs) / 4)))
    return figure


def draw_loss(ax, styles):
    ax.set(title="validation loss (faint: training loss)", xlabel="iteration")
    for run, style in styles:
        x, y = run.series("train/loss")
        ax.plot(x, y, color=style["color"], alpha=0.06, linewidth=1)
        ax.plot(x, smooth(y), color=style["color"], alpha=0.4, linewidth=1)
    for run, style in styles:
        x, y = run.series("val/loss")
        ax.plot(x, y, label=f"{run.name}: {y[-1]:.4f}" if y else run.name, **style)
    # The first fifth, where the loss falls from its height, would squeeze the rest into the bottom of the panel.
    start = min(run.lines[-1]["iter"] for run, _ in styles) / 5
    shown = [y for run, _ in styles for x, y in zip(*run.series("val/loss")) if x >= start]
    if len(shown) > len(styles):
        margin = 0.1 * (max(shown) - min(shown)) or 0.1
        ax.set_ylim(min(shown) - 2 * margin, max(shown) + 2 * margin)
        ax.set_xlim(left=0.8 * start)
    ax.grid(alpha=0.25)


def draw_positions(ax, styles):
    ax.set(title="validation loss by position, last evaluation", xlabel="position in the context, up to")
    ends = set()
    for run, style in styles:
        buckets = run.series("val/loss_by_position")[1]
        last = buckets[-1] if buckets else {}
        points = sorted((int(name.split("-")[1]) + 1, loss) for name, loss in last.items() if loss is not None)
        ends.update(end for end, _ in points)
        if points:
            ax.plot(*zip(*points), **style)
    if ends:
        ax.set_xscale("log", base=2)
        ticks = sorted(ends, reverse=True)[::math.ceil(len(ends) / 7)]  # at most 7, the last of them always
        ax.set_xticks(ticks, [f"{end // 1024}k" if end % 1024 == 0 else str(end) for end in ticks])
        ax.minorticks_off()
    ax.grid(alpha=0.25)


def draw_times(ax, styles):
    ax.set(title="time of attention in one layer", ylabel="ms", xticks=[0, 1], xticklabels=["forward", "backward"])
    width = 0.8 / len(styles)
    times = []
    for i, (run, style) in enumerate(styles):
        for place, name in enumerate(["forward_ms", "backward_ms"]):
            x, value = place + (i - (len(styles) - 1) / 2) * width, run.median(f"attn/{name}")
            if value is not None:
                times.append((x, value, run.median(f"attn/exact_{name}") if run.is_sus else None, style["color"]))
    top = max(max(value, exact or 0) for _, value, exact, _ in times)
    for x, value, exact, color in times:
        ax.bar(x, value, 0.9 * width, color=color)
        height = value
        if exact is not None:
            ax.hlines(exact, x - 0.45 * width, x + 0.45 * width, color="black", linewidth=2)
            height = exact if value < exact < value + 0.08 * top else value  # the number would be on the mark
        ax.annotate(f"{value:.3g}", (x, height), (0, 3), textcoords="offset points", ha="center", fontsize=9,
                    rotation=90 if len(styles) > 6 else 0)
    ax.set_ylim(0, 1.2 * top)
    if any(exact is not None for _, _, exact, _ in times):
        ax.plot([], [], color="black", linewidth=2, label="exact, timed beside it")
        ax.legend(loc="upper left", fontsize=9)


def draw_throughput(ax, styles):
    ax.set(title="training throughput (median)", xlabel="tokens / s", yticks=[])
    for i, (run, style) in enumerate(styles):
        value = run.median("train/tok_per_sec") or 0
        ax.barh(-i, value, 0.7, color=style["color"])
        ax.annotate(f"{value:,.0f}", (value, -i), (4, 0), textcoords="offset points", va="center", fontsize=9)
    ax.margins(x=0.2)


def smooth(values: list[float], share: float = 0.1) -> list[float]:
    """Means over a centred window of that share of the values, narrower at both ends."""
    half = int(share * len(values) / 2)
    return [statistics.fmean(values[max(0, i - half):i + half + 1]) for i in range(len(values))]


if __name__ == "__main__":
    run_main(main)
