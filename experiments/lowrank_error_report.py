"""What lowrank_error.py shows: a table or two for each of its parts, and the picture.

`found` is {part: what was measured for it}.

Dims: T tokens, D head dimension, g the degree of the polynomial.
"""

from typing import TYPE_CHECKING

from lowrank_attn import count_features
from measure import fit_power, mib
from output import COLORS, each, import_pyplot, label_points, pick, print_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def percent(x: float) -> str:
    return f"{100 * x:.2g}" if x < 1 else f"{100 * x:,.0f}"


# -- the tables -------------------------------------------------------------------------------------


def report(found: dict, D: int, out_dir: str) -> None:
    if "errors" in found:
        for rows, what in zip(found["errors"], ("bound on scores", "T")):
            report_errors(rows, what, D)
    if "model" in found:
        report_model(found["model"])
    if "scaling" in found:
        report_scaling(found["scaling"], D)
    if "sides" in found:
        report_sides(found["sides"], out_dir)


def report_errors(rows: list[dict], what: str, D: int) -> None:
    print(
        f"\nerrors of (dq, dk, dv) over the {what}, D = {D}; worst: the largest relative error of a weight "
        "before normalisation; all in %\n"
    )
    table = [["T", "bound", "g", "features", "worst", "paper", "operator", "paper: cosine", "operator: cosine"]]
    for r in rows:
        table.append(
            [
                f"{r['T']:,}",
                f"{r['bound']:g}",
                str(r["degree"]),
                f"{count_features(D, r['degree'] + 1):,}",
                *(percent(r[name]) for name in ("worst", "paper", "ours")),
                *(f"{r[name]:.4f}" for name in ("paper cosine", "ours cosine")),
            ]
        )
    print_table(table)


def report_model(rows: list[dict]) -> None:
    print(
        "\nerrors of the gradient of a model of four layers over T, all in %: of all weights, of those that make "
        "queries and keys\n"
    )
    table = [["T", "g", "paper", "paper: q, k", "operator", "operator: q, k"]]
    for r in rows:
        cells = (percent(r[name]) for name in ("paper", "paper q, k", "ours", "ours q, k"))
        table.append([f"{r['T']:,}", str(r["degree"]), *cells])
    print_table(table)
    print("\nexponents in T of these errors, with g fixed, and growing with log T:\n")
    lengths, degrees = each(rows, "T"), each(rows, "degree")
    growing = {T: degrees[i * len(degrees) // len(lengths)] for i, T in enumerate(lengths)}
    chosen = {f"{g}": pick(rows, degree=g) for g in degrees}
    chosen["..".join(map(str, growing.values()))] = [r for r in rows if r["degree"] == growing[r["T"]]]
    table = [["g", "paper", "operator"]]
    for g, own in chosen.items():
        table.append([g, *(exponent(own, name) for name in ("paper", "ours"))])
    print_table(table)


def exponent(rows: list[dict], name: str) -> str:
    """In T, of this column; '-' where it can't be fitted."""
    fit = fit_power([r["T"] for r in rows], [r[name] or 0 for r in rows])
    return f"{fit[0]:.2f}" if fit else "-"


def report_scaling(rows: list[dict], D: int) -> None:
    print(
        "\ntime (ms, medians of 3) and memory (MiB, the peak of forward and backward beyond the inputs) of 2 heads of "
        f"{D}\n"
    )
    cells = ([f"{r['T']:,}", r["name"], f"{r['forward']:.3g}", f"{r['backward']:.3g}", mib(r["peak"])] for r in rows)
    print_table([["T", "method", "forward", "backward", "MiB"], *cells])
    print("\nexponents in T of forward, backward and memory, fitted over all T; and over the larger half:\n")
    table = [["method", "forward", "backward", "memory", "forward", "backward", "memory"]]
    for name in each(rows, "name"):
        own = pick(rows, name=name)
        halves = own, own[len(own) // 2 :]
        table.append([name, *(exponent(half, n) for half in halves for n in ("forward", "backward", "peak"))])
    print_table(table)


def report_sides(sides: dict, out_dir: str) -> None:
    print(
        f"\n{out_dir}: T = {sides['T']:,}, {sides['heads']} heads of {sides['D']}; the largest score by layer "
        f"{', '.join(f'{s:.2f}' for s in sides['scores'])}, where the polynomial is off by up to "
        f"{', '.join(f'{percent(e)} % (g = {g})' for g, e in sides['worst'].items())}\n"
    )
    times = sides["times"]
    cells = lambda name: [name, f"{sum(times[name]):.3g}", f"{times[name][1]:.3g}"]
    print_table(
        [
            ["method", "fwd+bwd ms", "bwd ms", "cosine", "error %", "q, k: error %", "rho %", "q, k: rho %", "bias %"],
            [*cells("exact"), "1", *"00000"],
            *(
                [
                    *cells(r["name"]),
                    f"{r['cosine']:.4f}",
                    *map(percent, (r[n] for n in ("error", "error q, k", "rho", "rho q, k"))),
                    f"{100 * r['bias']:.2g}",
                ]
                for r in sides["rows"]
            ),
        ]
    )
    for name in [r["name"] for r in sides["rows"] if r["name"].startswith("low-rank")]:
        affordable = [sus for sus in times if sus.startswith("SUS") and sum(times[sus]) <= sum(times[name])]
        print(f"in the time of {name}: {affordable[-1] if affordable else 'none of these c'}")


# -- the picture ------------------------------------------------------------------------------------


def draw(found: dict, middle: float, longest: int, D: int) -> "Figure":
    """The figure: four panels."""
    figure, axes = import_pyplot().subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    over_bound, over_T = found["errors"]
    draw_errors(axes[0, 0], over_bound, "bound", f"attention alone, T = {longest:,}, D = {D}", "largest score")
    draw_errors(axes[0, 1], over_T, "T", f"attention alone, scores <= {middle:g}, D = {D}", "T")
    draw_errors(axes[1, 0], found["model"], "T", f"a model of 4 layers, scores <= {middle:g}, D = 4", "T")
    ax, rows = axes[1, 1], found["scaling"]
    for i, name in enumerate(each(rows, "name")):
        own = pick(rows, name=name)
        T, both, backward = zip(*((r["T"], r["forward"] + r["backward"], r["backward"]) for r in own))
        ax.plot(T, both, marker="o", markersize=4, color=COLORS[i], label=name)
        ax.plot(T, backward, linestyle="--", color=COLORS[i])
    ax.set(title=f"time, 2 heads of {D} (dashed: backward alone)", xlabel="T", ylabel="ms", xscale="log", yscale="log")
    label_points(ax, [r["T"] for r in rows])
    for ax in axes[0, 0], axes[1, 1]:  # the other two have the first one's lines
        ax.legend(fontsize=8)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
    return figure


def draw_errors(ax: "Axes", rows: list[dict], x: str, title: str, label: str) -> None:
    for i, degree in enumerate(each(rows, "degree")):
        own = pick(rows, degree=degree)
        for name, style in (("ours", "-"), ("paper", "--")):
            points = [(r[x], 100 * r[name]) for r in own if r[name] > 0]
            shown = {"label": f"g = {degree}"} if name == "ours" else {}
            ax.plot(*zip(*points), style, marker="o", markersize=4, color=COLORS[i], **shown)
    ax.set(title=title, xlabel=label, ylabel="error of the gradient (%)", xscale="log", yscale="log")
    ax.plot([], [], "--", color="grey", label="polynomial everywhere (paper)")
    label_points(ax, [row[x] for row in rows])
