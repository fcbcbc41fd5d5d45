"""What compare_runs.py shows: a table of the runs, a table of the groups and their distances, the picture."""

import itertools
import math
import statistics
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from output import COLORS, import_pyplot, label_points
from runs import Run, comparable, group, losses_of, median

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vPX"
MEASURED = ["tok/s", "exact bwd ms", "own bwd ms", "kept/row"]
MANY = 8  # more runs than these are shown as groups only
Line = tuple[str, list[Run], dict]  # what is drawn in one colour, a run or the runs of a group: (name, runs, style)

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


def summary(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """(lines of text, the table below them): each group's loss over its seeds, its distance from exact, its times."""
    if len(runs) < 2:
        return [], []
    chosen, at = comparable(runs)
    if at is None:
        return ["", "no gaps: there is no iteration at which all of these runs were evaluated"], []
    lines = [""]
    for why, left_out in (
        ("not evaluated yet", [run.name for run in runs if not run.losses]),
        ("not finished", [run.name for run in runs if run.losses and run not in chosen]),
    ):
        lines += [f"left out, since {why}: {', '.join(left_out)}"] if left_out else []
    if len(chosen) < 2:
        return lines, []
    lines += [f"validation loss at iteration {at}, the last at which all were evaluated:"]
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


# -- the picture ------------------------------------------------------------------------------------


def draw(runs: list[Run]) -> "Figure":
    """The figure: runs as lines, or, of more than MANY, their groups."""
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


def draw_loss(ax: "Axes", lines: list[Line], by_time: bool = False) -> None:
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


def draw_positions(ax: "Axes", lines: list[Line]) -> None:
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
        label_points(ax, sorted(ends, reverse=True)[:: math.ceil(len(ends) / 7)])  # at most 7, the last of them always
    ax.grid(alpha=0.25)


def draw_final(ax: "Axes", lines: list[Line]) -> None:
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


def draw_times(ax: "Axes", lines: list[Line]) -> None:
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


def draw_throughput(ax: "Axes", lines: list[Line]) -> None:
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
