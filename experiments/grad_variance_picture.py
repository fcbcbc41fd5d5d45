"""The picture of grad_variance.py's figures, six panels.

Above: rho over c, over T, and over kept entries. Below: rho by layer and head, the attention weights, the toy model.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from grad_variance_measure import BINS, LOWEST
from grad_variance_report import drawable, leading, toy_factor, typical
from output import COLORS, add_caption, each, import_pyplot, label_powers, pick, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER_C = 25.0  # with which the paper has a rho of about 1 %
DEFAULT = "tiles"
BLUE = "#005C99"


def draw(data: dict) -> "Figure":
    """The figure: six panels."""
    rows, attention = data["results"], data["attention"]
    figure, axes = import_pyplot().subplots(2, 3, figsize=(17, 9.6), layout="constrained")
    draw_over_c(axes[0, 0], rows)
    draw_over_T(axes[0, 1], rows)
    draw_over_kept(axes[0, 2], rows)
    draw_map(axes[1, 0], rows)
    draw_weights(axes[1, 1], attention)
    draw_toy(axes[1, 2], data)
    model = data["model"]
    add_caption(
        figure,
        f"{model['from']} on {model['dataset']}: {model['parameters']:,} parameters, {data['config']['sequences']} "
        f"sequences, {data['config']['dtype']}",
    )
    return figure


def plot(ax: "Axes", points: list[tuple], **style) -> None:
    """points: (x, (rho, its error)), drawn in %."""
    points = sorted(points)
    x, rho, error = [p[0] for p in points], [100 * p[1][0] for p in points], [100 * p[1][1] for p in points]
    below = [min(e, 0.9 * r) for r, e in zip(rho, error)]  # a logarithmic axis has no zero
    ax.errorbar(x, rho, (below, error), marker="o", markersize=4.5, capsize=2.5, linewidth=1.6, **style)


def finish(ax: "Axes", ticks: Iterable[float] = (), legend: str = "", low: float = 1.12, **options) -> None:
    """Logarithmic axes with plain numbers, and ticks at the x that were measured, where they do not touch."""
    ax.grid(alpha=0.25)
    if not ax.has_data():
        ax.text(0.5, 0.5, "no variance was added", transform=ax.transAxes, ha="center", color="dimgrey")
        ax.set(xticks=[], yticks=[])
        return
    ax.set(xscale="log", yscale="log")
    bottom, top = ax.get_ylim()
    if top < 4 * bottom:  # one point, or nearly level: some room, or else the axis has no label
        ax.set_ylim(bottom / 2, top * 2)
    label_powers(ax.yaxis, ".6g", between=top < 30 * bottom)
    if ticks := sorted(ticks):
        shown = [t for i, t in enumerate(ticks) if i == 0 or t > 1.15 * ticks[i - 1]]
        ax.set_xticks(shown, [f"{t:g}" for t in shown])
        ax.set_xticks([], minor=True)
        ax.set_xlim(ticks[0] / low, ticks[-1] * low)
    else:
        left, right = ax.get_xlim()
        label_powers(ax.xaxis, ".6g", between=right < 30 * left)
    ax.legend(title=legend or None, fontsize=9, title_fontsize=9, **options)


def draw_over_c(ax: "Axes", rows: list[dict]) -> None:
    sampler = leading(rows)
    ax.set(title=f"variance added over c, {sampler} draws", xlabel="c, the retention parameter", ylabel="rho, %")
    points = drawable(pick(rows, sampler=sampler))
    Ts = each(points, "T")
    for T, color in zip(Ts, shades(BLUE, len(Ts))):
        plot(ax, [(p["c"], p["rho"]) for p in pick(points, T=T)], color=color, label=f"T = {T:,}")
    ticks = each(points, "c")
    if ticks:
        ax.plot(
            [25, 30], [1, 1], color=COLORS[1], linewidth=5, solid_capstyle="round", label="the paper's 1 %, T = 2,000"
        )
    finish(ax, {*ticks, 25, 30} if ticks else ())


def draw_over_T(ax: "Axes", rows: list[dict]) -> None:
    sampler = leading(rows)
    ax.set(title=f"variance added over T, {sampler} draws", xlabel="T, context in tokens", ylabel="rho, %")
    points = drawable(pick(rows, sampler=sampler))
    cs, Ts = each(points, "c"), each(points, "T")
    for c, color in zip(cs, shades(BLUE, len(cs))):
        plot(ax, [(p["T"], p["rho"]) for p in pick(points, c=c)], color=color, label=f"{c:g}")
    low = 1.12 if len(Ts) > 1 else 2
    finish(ax, Ts, "c", low, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_over_kept(ax: "Axes", rows: list[dict]) -> None:
    T = rows[-1]["T"]
    ax.set(title=f"samplers by kept entries, T = {T:,}", xlabel="kept entries a row", ylabel="rho, %")
    for sampler, color in zip(each(rows, "sampler"), COLORS):
        points = [p for p in drawable(pick(rows, T=T, sampler=sampler)) if p["kept_per_row"] > 0]
        if points:
            plot(ax, [(p["kept_per_row"], p["rho"]) for p in points], color=color, label=sampler)
    finish(ax)


def draw_map(ax: "Axes", rows: list[dict]) -> None:
    row = typical(pick(rows, T=rows[-1]["T"], sampler=DEFAULT if pick(rows, sampler=DEFAULT) else leading(rows)))
    table = [[100 * float(cell[0]) for cell in (layer, *heads)] for layer, heads in zip(row["layers"], row["heads"])]
    ax.set(
        title=f"rho in % by layer and head, {row['sampler']}, T = {row['T']:,}, c = {float(row['c']):g}",
        xlabel="head",
        ylabel="layer",
    )
    ax.imshow(table, cmap="YlGnBu", aspect="auto", vmin=0)
    largest = max(max(line) for line in table)
    size = 9.5 if len(table[0]) <= 9 else 7.5 if len(table[0]) <= 17 else 5
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            color = "white" if value > 0.55 * largest else "black"
            ax.text(x, y, number(value), ha="center", va="center", fontsize=size, color=color)
    ax.axvline(0.5, color="white", linewidth=5)
    ax.set_xticks(range(len(table[0])), ["all of\nthe layer", *map(str, range(len(table[0]) - 1))])
    ax.set_yticks(range(len(table)))
    ax.spines[:].set_visible(False)


def number(value: float) -> str:
    """Three characters or so."""
    if 0 < value < 0.005:
        return f"{value:.0e}"
    return "0" if value == 0 else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def draw_weights(ax: "Axes", attention: list[dict]) -> None:
    last = attention[-1]
    ax.set(title=f"attention weights at T = {last['T']:,}, all heads", xlabel="weight W", ylabel="share in each bin, %")
    edges = [10 ** (LOWEST * (1 - i / BINS)) for i in range(BINS + 1)]
    labels = ("of the causal entries", "of the attention")
    for label, shares, color in zip(labels, last["histogram"], COLORS):
        ax.stairs([100 * share for share in shares], edges, color=color, fill=True, alpha=0.35)
        ax.stairs([100 * share for share in shares], edges, color=color, label=label)
    ax.set_xscale("log")
    ax.axvline(1 / PAPER_C, color="dimgrey", linewidth=1, linestyle="--")
    ax.text(
        1.15 / PAPER_C,
        0.99,
        f"1/c for\nc = {PAPER_C:g}",
        transform=ax.get_xaxis_transform(),
        va="top",
        fontsize=9,
        color="dimgrey",
    )
    ax.set_xlim(10**LOWEST, 1)
    ax.margins(y=0.2)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=9, loc="upper left")


def draw_toy(ax: "Axes", data: dict) -> None:
    rows = drawable(pick(data["results"], sampler=leading(data["results"])))
    ax.set(
        title=f"the toy model's prediction, {leading(data['results'])} draws",
        xlabel="c, the retention parameter",
        ylabel="rho, %",
    )
    factors = toy_factor(data, 1), toy_factor(data, 2)
    Ts = each(rows, "T")
    for T, color in zip(Ts, shades(BLUE, len(Ts))):
        plot(ax, [(p["c"], p["rho"]) for p in pick(rows, T=T)], color=color, label=f"measured, T = {T:,}", linestyle="")
        lines = sorted(next(a["toy"] for a in data["attention"] if a["T"] == T), key=lambda line: float(line[0]))
        for column, dashes, name in ((1, "-", "rows of k equal weights"), (2, ":", "rows as they are")):
            curve = [
                (line[0], 100 * factors[column - 1] * line[column])
                for line in lines
                if factors[column - 1] and math.isfinite(float(line[0])) and line[column] > 0
            ]
            if curve:
                shown = name if T == Ts[-1] else None
                ax.plot(*zip(*curve), color=color, linestyle=dashes, linewidth=1.4, label=shown)
    ticks = each(rows, "c")
    finish(ax, ticks, low=1.12 if len(ticks) > 1 else 2)
