"""What grad_variance.py's rows say: which of them can be drawn, the powers they follow, and the tables.

`data` is what its measure() returns, and what --json writes.
"""

import math

from grad_variance_measure import ESTIMATE_DRAWS, FALSE_ALARM
from measure import describe_machine, fit_power
from output import each, pick, print_table

ROUNDING = 1e-9  # a rho below it is float32's own: nothing was cut

# -- what follows from it ---------------------------------------------------------------------------


def typical(rows: list[dict]) -> dict:
    """The row whose rho is nearest to 1 %, in logarithms: what the map shows, and where the estimate is checked."""
    return min(rows, key=lambda row: abs(math.log(max(float(row["rho"][0]), ROUNDING) / 0.01)))


def drawable(rows: list[dict]) -> list[dict]:
    """Those that a logarithmic axis can show, and where anything was cut."""
    return [row for row in rows if math.isfinite(float(row["c"])) and ROUNDING < float(row["rho"][0]) < math.inf]


def leading(rows: list[dict]) -> str:
    """The paper's sampler, or else the first."""
    return "poisson" if pick(rows, sampler="poisson") else rows[0]["sampler"]


def at_equal_kept(row: dict, poisson: list[dict]) -> float | None:
    """rho over what poisson's curve, a line between its points in logarithms, has at as many kept entries a row."""
    curve = sorted((math.log(p["kept_per_row"]), math.log(p["rho"][0])) for p in drawable(poisson))
    if not drawable([row]) or not row["kept_per_row"] > 0:
        return None
    x = math.log(row["kept_per_row"])
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if x0 <= x <= x1:
            share = (x - x0) / (x1 - x0) if x1 > x0 else 0
            return row["rho"][0] / math.exp(y0 + share * (y1 - y0))
    return None


def fits(rows: list[dict]) -> list[dict]:
    """rho = factor * c^exponent, and the same over kept entries a row, of each T and sampler."""
    found = []
    for T in each(rows, "T"):
        for sampler in each(rows, "sampler"):
            points = drawable(pick(rows, T=T, sampler=sampler))
            rho = [p["rho"][0] for p in points]
            powers = [fit_power([p[name] for p in points], rho) for name in ("c", "kept_per_row")]
            if all(powers):
                found.append({"T": T, "sampler": sampler, "c": powers[0][0], "kept": powers[1][0]})
    return found


def toy_factor(data: dict, column: int) -> float | None:
    """The one factor between prediction and rho, over all c and T: the geometric mean of their quotients."""
    rows = drawable(pick(data["results"], sampler=leading(data["results"])))
    predicted = {(a["T"], line[0]): line[column] for a in data["attention"] for line in a["toy"]}
    logs = [math.log(r["rho"][0] / p) for r in rows if (p := predicted[r["T"], r["c"]]) > 0]
    return math.exp(sum(logs) / len(logs)) if logs else None


# -- the tables -------------------------------------------------------------------------------------


TITLES = [
    "T",
    "sampler",
    "c",
    "kept/row",
    "cut %",
    "rho %",
    "+-",
    "q, k: rho %",
    "/ poisson, same c",
    "/ poisson, same kept",
    "fwd ms",
    "bwd ms",
]


def report(data: dict) -> None:
    rows, model, exact = data["results"], data["model"], data["exact"]
    machine, idle = describe_machine(data)
    whose = "; ".join(f"T = {e['T']:,}: {e['windows']['val']} + {e['windows']['train']}" for e in exact)
    print(
        f"{machine}\n{model['from']}: {model['parameters']:,} parameters, {model['layers']} layers of {model['heads']} "
        f"heads; {model['dataset']}, windows of validation + training text: {whose}\n"
    )
    print_table([TITLES, *(result_row(row, pick(rows, T=row["T"], sampler="poisson")) for row in rows)])
    if data["fits"]:
        print("\nrho goes as c, and as kept entries a row, to the power of:\n")
        print_table(
            [
                ["T", "sampler", "c", "kept/row"],
                *([f"{f['T']:,}", f["sampler"], f"{f['c']:.2f}", f"{f['kept']:.2f}"] for f in data["fits"]),
            ]
        )
    last = data["attention"][-1]
    print(
        f"\nattention at T = {last['T']:,}: effective number of attended tokens, by exp(entropy) and by 1 / sum W^2 "
        "(medians over rows); the first key's share; mean distance in tokens\n"
    )
    print_table(
        [
            ["layer", "head", "exp(entropy)", "1/sum W^2", "first key %", "distance"],
            *(
                [
                    str(layer),
                    str(h),
                    f"{head['entropy']:.1f}",
                    f"{head['effective']:.1f}",
                    f"{100 * head['first']:.1f}",
                    f"{head['distance']:.0f}",
                ]
                for layer, heads in enumerate(last["heads"])
                for h, head in enumerate(heads)
            ),
        ]
    )
    print()
    if dropped := sum(row["dropped"] for row in rows):
        print(f"WARNING: entries were dropped for want of slots ({dropped:g} in all): the draws are not unbiased")
    for e in data["estimates"]:
        print(
            f"the estimate of the added variance at layer {e['layer']}'s dq, dk, dv: {float(e['ratio']):.3f} x the "
            f"measured ({e['sampler']}, T = {e['T']:,}, c = {float(e['c']):g}, {ESTIMATE_DRAWS} draws)"
        )
    check = data["check"]
    holds, sign = ("no bias found", "<=") if check["holds"] else ("*** NOT UNBIASED ***", ">")
    print(
        f"{holds}: the largest |z| of {check['count']:,} is {float(check['largest']):.2f} {sign} {check['limit']:.2f} "
        f"({check['place']}); a right estimator exceeds that with probability < {FALSE_ALARM:g}"
    )
    if data["config"]["times"]:
        times = [f"{e['forward_ms']:.3g} + {e['backward_ms']:.3g} ms at T = {e['T']:,}" for e in exact]
        print(f"exact attention, forward + backward of one layer: {'; '.join(times)}\n{idle}")


def result_row(row: dict, poisson: list[dict]) -> list[str]:
    rho, error = map(float, row["rho"])
    same = next((rho / p["rho"][0] for p in drawable(poisson) if p["c"] == row["c"]), None)
    ratios = ["-" if x is None else f"{x:.2f}" for x in (same, at_equal_kept(row, poisson))]
    times = [f"{row[part]:.3g}" if part in row else "-" for part in ("forward_ms", "backward_ms")]
    return [
        f"{row['T']:,}",
        row["sampler"],
        f"{float(row['c']):g}",
        f"{row['kept_per_row']:.1f}",
        f"{100 * row['cut']:.2f}",
        f"{100 * rho:.3g}",
        f"{100 * error:.2g}",
        f"{100 * float(row['queries_and_keys'][0]):.3g}",
        *ratios,
        *times,
    ]
