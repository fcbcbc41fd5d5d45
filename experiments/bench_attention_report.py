"""What bench_attention.py shows: the ratios and exponents that follow from the times, the tables, the picture, wandb.

`data` is what its measure() returns, and what --json writes.
"""

import math
import os
import sys
from typing import TYPE_CHECKING

from contenders import label
from measure import describe_machine, fit_power, mib, ratio, ratio_text, spread
from output import COLORS, add_caption, each, import_pyplot, label_points, label_powers, pick, print_table, shades
from training.record import reason, start_wandb

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# -- what follows from it ---------------------------------------------------------------------------


def both(row: dict) -> list[float]:
    return [a + b for a, b in zip(row["forward_ms"], row["backward_ms"])]


def place(row: dict) -> dict:
    """Where it was measured: T and, of inputs from a file, the layer."""
    return {name: row[name] for name in ("T", "layer") if name in row}


def overall(rows: list[dict]) -> list[dict]:
    """All rows; of several layers, those of their median, which is last."""
    return pick(rows, layer=rows[-1]["layer"]) if "layer" in rows[-1] else rows


def over_layers(results: list[dict]) -> list[dict]:
    """Of several layers, a row of each contender that was measured in all of them, whose rounds are those of all."""
    rows, layers = [], {row.get("layer") for row in results}
    for name in each(results, "name") if len(layers) > 1 else []:
        of_layers = pick(results, name=name)
        if len(of_layers) < len(layers):
            continue
        rows.append(of_layers[0] | {"layer": "median"})
        for key_ in ("forward_ms", "backward_ms", "draw_ms"):
            if of_layers[0].get(key_):
                rows[-1][key_] = [time for row in of_layers for time in row[key_]]
        for key_ in ("kept_per_row", "kept_fraction", "peak_bytes", "saved_bytes"):
            if of_layers[0].get(key_) is not None:
                rows[-1][key_] = spread(row[key_] for row in of_layers)["median"]
    return rows


def fastest_exact(results: list[dict], row: dict) -> dict:
    """At the row's place."""
    return min(pick(results, kind="exact", **place(row)), key=lambda row: spread(both(row))["median"])


def find_sus(results: list[dict], line: dict) -> dict:
    """The row of SUS that a line of `compare` is about."""
    (row,) = pick(results, kind="sus", c=line["c"], **place(line))
    return row


def compare(results: list[dict]) -> list[dict]:
    """Exact's time over SUS's, for each place and c: above 1, SUS is faster."""
    lines = []
    for row in pick(results, kind="sus"):
        exact = fastest_exact(results, row)
        ratios = {part: ratio(exact[f"{part}_ms"], row[f"{part}_ms"]) for part in ("forward", "backward")}
        name = {"exact": exact["name"]}
        lines.append(place(row) | {"c": row["c"]} | name | ratios | {"both": ratio(both(exact), both(row))})
    return lines


def fits(results: list[dict]) -> list[dict]:
    """time = factor * T^exponent, in ms, fitted to the medians of each of the curves over T."""
    curves = {"exact backward": {}, "exact forward": {}}
    for T in sorted({row["T"] for row in results}):
        exact = fastest_exact(results, {"T": T})
        for part in ("backward", "forward"):
            curves[f"exact {part}"][T] = spread(exact[f"{part}_ms"])["median"]
        for row in pick(results, T=T, kind="sus"):
            for part in ("backward", "forward", "draw"):
                if row.get(f"{part}_ms"):
                    curves.setdefault(f"{row['name']} {part}", {})[T] = spread(row[f"{part}_ms"])["median"]
    fitted = ((name, fit_power(list(points), list(points.values()))) for name, points in curves.items())
    return [{"name": name, "exponent": fit[0], "factor": fit[1]} for name, fit in fitted if fit]


# -- the tables -------------------------------------------------------------------------------------


TITLES = [  # after the place
    "c",
    "exact fwd",
    "exact bwd",
    "SUS fwd",
    "of it draw",
    "SUS bwd",
    "of it sparse",
    "fwd ratio",
    "bwd ratio",
    "fwd+bwd ratio",
    "kept/row",
    "exact MiB",
    "SUS MiB",
]
ALL_TITLES = ["forward ms", "backward ms", "fwd+bwd / exact's", "peak MiB", "saved MiB"]


def report(data: dict) -> None:
    results, inputs = data["results"], data["inputs"]
    machine, idle = describe_machine(data)
    shape = ", ".join(map(str, inputs["shape"]))
    sight = inputs.get("sight", {})  # files of before have none
    cut = "".join(f", {what} of {sight[what]} tokens" for what in ("documents", "window") if sight.get(what))
    heads = f", {inputs['key_heads']} key heads" if inputs["key_heads"] != inputs["shape"][1] else ""
    print(
        f"{machine}\nq, k, v ({shape}){heads}, {inputs['dtype']}, {inputs['from']}{cut}; "
        f"{data['config']['sampler']} draws\n"
        f"checked: {len(data['checks'])} comparisons, all within their limits\n"
    )
    places = list(place(results[0]))
    print_table([places + TITLES, *(comparison_row(results, line) for line in data["comparisons"])])
    print(
        "\nTimes in ms, medians. Ratios are exact / SUS: median (lowest..highest) of the rounds"
        f"{', or of those of all layers' if 'layer' in places else ''}. MiB: the peak beyond the inputs.\n"
        "All that was measured:\n"
    )
    print_table([["name", "backend", *places, *ALL_TITLES], *(result_row(results, row) for row in results)])
    print(
        "\n* the fastest exact one at this T: exact in all ratios. Saved: by autograd between forward and backward, "
        "beyond q, k, v."
    )
    powers, left_out = {}, {}
    for fit in data["fits"]:
        name, _, part = fit["name"].rpartition(" ")
        powers.setdefault(name, []).append(f"{part} {fit['exponent']:.2f}")
    if powers:
        print(
            "Time grows as T to the power of:",
            "; ".join(f"{name} {', '.join(parts)}" for name, parts in powers.items()),
        )
    for line in data["left_out"]:
        left_out.setdefault((line["name"], line["why"]), []).append(f"{line.get('layer', line['T']):,}")
    for (name, why), where in left_out.items():
        print(f"left out: {name} at {'layer' if 'layer' in places else 'T ='} {', '.join(where)}: {why}")
    print(idle)


def place_cells(row: dict) -> list[str]:
    return [f"{value:,}" if isinstance(value, int) else value for value in place(row).values()]


def comparison_row(results: list[dict], line: dict) -> list[str]:
    exact = fastest_exact(results, line)
    row = find_sus(results, line)
    backward = ms(row["backward_ms"])
    drawn, sparse = ("in bwd", "with draw") if row["draw_ms"] is None else (ms(row["draw_ms"]), backward)
    return [
        *place_cells(line),
        f"{float(line['c']):g}",
        ms(exact["forward_ms"]),
        ms(exact["backward_ms"]),
        ms(row["forward_ms"]),
        drawn,
        backward,
        sparse,
        *(ratio_text(line[part]) for part in ("forward", "backward", "both")),
        f"{row['kept_per_row']:.1f}",
        mib(exact.get("peak_bytes")),
        mib(row.get("peak_bytes")),
    ]


def result_row(results: list[dict], row: dict) -> list[str]:
    exact = fastest_exact(results, row)
    backward, relative = ms(row["backward_ms"]), ratio_text(ratio(both(row), both(exact)))
    if row["kind"] == "undrawn":
        backward = relative = "-"
    return [
        row["name"] + (" *" if row is exact else ""),
        label(row["backend"]),
        *place_cells(row),
        ms(row["forward_ms"]),
        backward,
        relative,
        mib(row.get("peak_bytes")),
        mib(row.get("saved_bytes")),
    ]


def ms(times: list[float]) -> str:
    value = spread(times)["median"]
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# -- the picture ------------------------------------------------------------------------------------


def draw(data: dict) -> "Figure":
    """The figure: backward time over c and over T. Exact is black, SUS blue, what its draw costs orange."""
    figure, (left, right) = import_pyplot().subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    results = overall(data["results"])
    draw_over_c(left, results)
    draw_over_T(right, results, {fit["name"]: fit for fit in data["fits"]})
    machine = data["environment"]
    inputs = data["inputs"]
    add_caption(figure, f"{machine['device']}, threads: {machine['threads']}, {inputs['dtype']}, {inputs['from']}")
    return figure


EXACT, SUS, DRAW = "black", COLORS[0], COLORS[1]


def medians(row: dict, part: str = "backward") -> float | None:
    return spread(row[f"{part}_ms"])["median"] if row.get(f"{part}_ms") else None


def draw_over_c(ax: "Axes", results: list[dict]) -> None:
    ax.set(
        title="backward over c: exact dashed, SUS blue", xlabel="c, the retention parameter", ylabel="ms", yscale="log"
    )
    labels, ticks = [], set()
    for T in sorted({row["T"] for row in results}):
        points = [
            (float(row["c"]), medians(row)) for row in pick(results, T=T, kind="sus") if math.isfinite(float(row["c"]))
        ]
        exact = medians(fastest_exact(results, {"T": T}))
        ax.axhline(exact, color=EXACT, linestyle=(0, (4, 2)), linewidth=1.4)
        labels.append((exact, f"exact, T = {T:,}", EXACT))
        if points:
            ax.plot(*zip(*points), color=SUS, marker="o", linewidth=1.8)
            labels.append((points[-1][1], f"SUS, T = {T:,}", SUS))
            ticks.update(c for c, _ in points)
    if ticks:
        ax.set_xscale("log")
        ax.set_xticks(sorted(ticks), [f"{c:g}" for c in sorted(ticks)])
        ax.set_xticks([], minor=True)
        ax.set_xlim(min(ticks) / 1.1, max(ticks) * 1.1)
    finish(ax, labels)


def draw_over_T(ax: "Axes", results: list[dict], fitted: dict[str, dict]) -> None:
    ax.set(
        title="backward over T, and the power that it grows as",
        xlabel="T, context in tokens",
        ylabel="ms",
        yscale="log",
    )
    Ts = sorted({row["T"] for row in results})
    names = each(pick(results, kind="sus"), "name")
    curves = [("exact backward", "exact", [medians(fastest_exact(results, {"T": T})) for T in Ts], EXACT, "-")]
    for i, (name, color) in enumerate(zip(names, shades(SUS, len(names)))):  # the larger c, the deeper the blue
        of_name = {row["T"]: row for row in results if row["name"] == name}
        curves.append((f"{name} backward", name, [medians(of_name[T]) for T in Ts], color, "-"))
        if i == len(names) // 2:  # all draws cost about the same
            costs = [medians(of_name[T], "draw") for T in Ts]
            if all(cost is not None and cost > 0 for cost in costs):
                curves.append((f"{name} draw", "SUS's draw (in the forward)", costs, DRAW, ":"))
    labels = []
    for key_, text, times, color, dashes in curves:
        ax.plot(Ts, times, color=color, linestyle=dashes, marker="o", linewidth=1.8)
        power = f"  $T^{{\\,{fitted[key_]['exponent']:.2f}}}$" if key_ in fitted else ""
        labels.append((times[-1], text + power, color))
    ax.set_xscale("log", base=2)
    label_points(ax, Ts)
    ax.set_xlim(Ts[0] / 1.15, Ts[-1] * 1.15)
    finish(ax, labels)


def finish(ax: "Axes", labels: list[tuple[float, str, object]]) -> None:
    """A grid, and each curve's name behind its end, pushed apart where they would lie on each other."""
    ax.grid(alpha=0.25)
    ax.margins(y=0.08)
    low, high = ax.get_ylim()
    label_powers(ax.yaxis, ",.10g", between=high < 20 * low)  # few powers of ten: then the steps between want labels
    low, high = math.log(low), math.log(high)
    heights, gap = [], 0.062  # of the axis
    for value, _, _ in sorted(labels, key=lambda label: label[0]):
        place = (math.log(value) - low) / (high - low)
        heights.append(max(place, heights[-1] + gap) if heights else place)
    heights[-1] = min(heights[-1], 1.0)
    for i in reversed(range(len(heights) - 1)):  # those that were pushed beyond the top push back
        heights[i] = min(heights[i], heights[i + 1] - gap)
    for height, (_, text, color) in zip(heights, sorted(labels, key=lambda label: label[0])):
        ax.annotate(
            text,
            (1, height),
            (6, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=color,
        )


# -- wandb ------------------------------------------------------------------------------------------


def log_to_wandb(data: dict) -> None:
    """The curves over c, of each T: exact's are flat."""
    name = f"bench-attention-{os.urandom(2).hex()}"
    mirror, _ = start_wandb(
        project="nanosus",
        name=name,
        id=name,
        group="bench-attention",
        resume="never",
        config=data["config"] | {"environment": data["environment"]},
    )
    if mirror is None:
        return
    results = data["results"]
    try:
        mirror.define_metric("c")
        mirror.define_metric("*", step_metric="c")
        lines = overall(data["comparisons"])
        for c in sorted({float(line["c"]) for line in lines} - {math.inf}):
            metrics = {"c": c}
            for line in lines:
                if float(line["c"]) != c:
                    continue
                T = f"T={line['T']}"
                exact = fastest_exact(results, line)
                row = find_sus(results, line)
                metrics[f"{T}/kept_per_row"] = row["kept_per_row"]
                for part in ("forward", "backward"):
                    metrics[f"{T}/sus_{part}_ms"], metrics[f"{T}/exact_{part}_ms"] = (
                        medians(row, part),
                        medians(exact, part),
                    )
                for part in ("forward", "backward", "both"):
                    metrics[f"{T}/{part}_ratio"] = line[part]["median"]
            mirror.log(metrics)
        mirror.finish()
    except Exception as error:  # the figures are printed and written already
        print(f"wandb stopped ({reason(error)})", file=sys.stderr)
