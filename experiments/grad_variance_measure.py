"""What grad_variance.py measures at one context length: rho and its self-check, the estimate of the added variance, the
attention of the model.

Dims: n sequences, T tokens, P weights, L layers, H query heads.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from exact_attn import exact_attention
from measure import gradients
from model_gradients import Parts, Subject
from sus_attn import fold_in, sus_attention

SIGNS = 8  # random directions of the self-check
FALSE_ALARM = 1e-3  # how often a right estimator may fail it
ESTIMATE_DRAWS = 64
LOOKED_AT = 4  # sequences whose attention weights are looked at
LOWEST, BINS = -8, 48  # of the histogram of log10 W


# -- statistics -------------------------------------------------------------------------------------


def relative_variance(errors: Tensor, deviations: Tensor) -> tuple[Tensor, Tensor]:
    """rho and its standard error by the jackknife, both (parts,).

    errors (n, parts): |ghat_s - g_s|^2, deviations (n, parts): |g_s - gbar|^2, both float64. The denominator is
    sum(deviations) / (n - 1), which is the mean of |g_s|^2 - g_s . (mean of the others). Left out is a sequence as a
    whole: gbar is then the mean of the others too, which takes n / (n - 1) of its deviation from the sum.
    """
    n = len(errors)

    def quotient(above, below):  # what no draw changes has no added variance, whatever its own
        return torch.where(above == 0, 0, above / below)

    rho = quotient(errors.mean(0), deviations.sum(0) / (n - 1))
    others = quotient((errors.sum(0) - errors) / (n - 1), (deviations.sum(0) - deviations * n / (n - 1)) / (n - 2))
    return rho, ((n - 1) / n * (others - others.mean(0)).square().sum(0)).sqrt()


def student_limit(p: float, degrees: int) -> float:
    """What |t| of Student's distribution exceeds with probability p. With t = sqrt(degrees) tan(theta) its density in
    theta is cos(theta)^(degrees - 1), which is summed up here.
    """
    n = 1_000_000
    theta = (torch.arange(n, dtype=torch.float64) + 0.5) * (math.pi / 2 / n)
    density = theta.cos() ** (degrees - 1)
    tail = density.flip(0).cumsum(0).flip(0) / density.sum()
    return math.sqrt(degrees) * theta[(tail > p).sum() - 1].tan().item()


def zscores(along: Tensor, rounding: Tensor) -> Tensor:
    """The mean of along (n, directions) in standard errors; rounding (directions,) is what float32 may be off by."""
    error = along.std(0) / len(along) ** 0.5 + rounding
    return (along.mean(0) / error).abs().nan_to_num(math.inf)


def judge(rows: list[dict], parts: Parts, degrees: int) -> dict:
    """The verdict of the self-check on all z. Bonferroni: the limit is that of the largest of so many."""
    largest, row, i = max((z, n, i) for n, row in enumerate(rows) for i, z in enumerate(row["z"]))
    count = sum(len(row["z"]) for row in rows)
    limit = student_limit(FALSE_ALARM / count, degrees)
    where = [
        *(f"the mean gradient of {name}" for name in parts.directions),
        *(f"sign vector {n}" for n in range(SIGNS)),
    ][i]
    place = f"T = {rows[row]['T']:,}, {rows[row]['sampler']}, c = {rows[row]['c']:g}, along {where}"
    return {"largest": largest, "count": count, "limit": limit, "holds": largest <= limit, "place": place}


# -- measuring --------------------------------------------------------------------------------------


class Method(NamedTuple):
    """SUS, by this sampler, c and backend: an attention of q, k and v."""

    sampler: str
    c: float
    backend: str

    @property
    def keys(self) -> dict:
        """What the model's config calls them."""
        return dict(attn_backward="sus", sus_sampler=self.sampler, sus_c=self.c, sus_backend=self.backend)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, seed: int = 0, stats: Tensor | None = None) -> Tensor:
        return sus_attention(q, k, v, self.c, seed=seed, sampler=self.sampler, backend=self.backend, stats=stats)


def measure_at(
    x: Tensor, y: Tensor, subject: Subject, methods: list[Method], draws: int, seed: int, advance: Callable[[], None]
) -> tuple[list[dict], dict]:
    """A row of results for each method, and what the exact gradients are; x, y (n, T). advance() is called each time
    that another gradient is there.
    """
    parts, (n, T) = subject.parts, x.shape
    truth = torch.empty(n, parts.P, device=x.device)
    for s in range(n):
        truth[s], _ = subject.gradient(x[[s]], y[[s]])
        advance()
    mean = truth.mean(0)
    deviations = torch.stack([parts.squares(g - mean) for g in truth])  # (n, parts)
    square = truth.square().sum(1).double().mean().cpu()
    signs = torch.randint(2, (SIGNS, parts.P), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    signs = (2 * signs - 1).to(x.device)
    # Where all is kept, nothing but rounding is left, and that needn't be zero on average. It has no reason to lie
    # along a sign vector (whose norm is sqrt(P)), but may lie along the mean gradient.
    norms = [truth[:, part].norm(dim=1).mean().item() * mean[part].norm().item() for part in parts.directions.values()]
    rounding = torch.tensor(norms + [square.sqrt()] * SIGNS).double() * 4 * torch.finfo(subject.device.dtype).eps

    layers, rows = slice(1, 1 + parts.L), []
    for method in methods:
        errors, along = torch.zeros_like(deviations), torch.zeros(n, len(rounding), dtype=torch.float64)
        stats = torch.zeros(parts.L, 3, dtype=torch.float64)
        for s in range(n):
            for i in range(draws):
                estimate, drawn = subject.gradient(x[[s]], y[[s]], fold_in(seed, s, i), **method.keys)
                off = estimate.sub_(truth[s])
                errors[s] += parts.squares(off) / draws
                products = [off[part] @ mean[part] for part in parts.directions.values()] + [
                    off @ sign.float() for sign in signs
                ]
                along[s] += torch.stack(products).cpu().double() / draws
                stats += drawn / (n * draws)
                advance()
        rho, error = relative_variance(errors, deviations)
        pairs = torch.stack([rho, error], 1)  # (parts, 2)
        kept, entries = stats[:, 0] / (parts.H * T), (T + 1) / 2
        rows.append(
            {
                "T": T,
                "sampler": method.sampler,
                "c": method.c,
                "backend": method.backend,
                "kept_per_row": kept.mean(),
                "cut": 1 - kept.mean() / entries,
                "rho": pairs[0].tolist(),
                "layers": pairs[layers].tolist(),
                "heads": pairs[1 + parts.L : -1].view(parts.L, parts.H, 2).tolist(),
                "queries_and_keys": pairs[-1].tolist(),
                "layers_kept": kept.tolist(),
                "layers_cut": (1 - kept / entries).tolist(),
                "layers_added": stats[:, 2].tolist(),
                "dropped": stats[:, 1].sum(),
                "z": zscores(along, rounding).tolist(),
            }
        )
    variance = deviations.sum(0) / (n - 1)
    return rows, {"variance": variance[0], "layers_variance": variance[layers].tolist(), "square": square}


def check_estimate(method: Method, inputs: tuple[Tensor, ...]) -> dict:
    """The estimate in sus_attention's stats beside E|(dq, dk, dv) - exact|^2, of one layer's captured attention."""
    _, *truth = gradients(exact_attention, *inputs)
    estimate = measured = 0.0
    for seed in range(ESTIMATE_DRAWS):
        stats = torch.zeros(3, device=inputs[0].device)
        _, *drawn = gradients(method, *inputs, seed=seed, stats=stats)
        estimate += stats[2].item() / ESTIMATE_DRAWS
        measured += sum((a.float() - b).square().sum().item() for a, b in zip(drawn, truth)) / ESTIMATE_DRAWS
    return {"estimate": estimate, "measured": measured, "ratio": estimate / measured if measured else math.nan}


@torch.no_grad()
def look_at_attention(subject: Subject, x: Tensor, cs: list[float]) -> dict:
    """How concentrated attention is, on LOOKED_AT of the sequences x (n, T). `heads`: (L, H) dicts; `toy`: for each c
    what the toy model and its general row predict for rho, up to a factor; `histogram`: entries and attention in each
    bin of log10 W.
    """
    seen = []
    attends = [block.attn.attend for block in subject.model.transformer.h]
    handles = [a.register_forward_hook(lambda _, args, out: seen.append(args[:2])) for a in attends]
    try:
        with subject.device.autocast():
            for tokens in x[:: max(1, len(x) // LOOKED_AT)][:LOOKED_AT]:
                subject.model(tokens[None], tokens[None])
    finally:
        for handle in handles:
            handle.remove()
    L, H, T = subject.parts.L, subject.parts.H, x.shape[1]
    position = torch.arange(T, device=x.device)
    toy, general, histogram, rows_seen = torch.zeros(len(cs)), torch.zeros(len(cs)), torch.zeros(2, BINS).double(), 0
    values = {(layer, h): [] for layer in range(L) for h in range(H)}  # of each row, (4, rows)
    for call, (q, k) in enumerate(seen):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        for h in range(H):
            for i in position.split(max(1, (1 << 22) // T)):
                scores = (q[0, h, i].float() @ k[0, h].float().T) * q.shape[3] ** -0.5
                causal = position <= i[:, None]
                w = scores.masked_fill(~causal, -math.inf).softmax(-1)
                effective = 1 / w.square().sum(-1)
                distance = i - (w * position).sum(-1)
                row = torch.stack([torch.special.entr(w).sum(-1).exp(), effective, w[:, 0], distance])
                values[call % L, h].append(row.cpu())
                rows_seen += len(i)
                for n, c in enumerate(cs):
                    toy[n] += (1 / c - 1 / effective).clamp(min=0).sum().cpu()
                    general[n] += (w * (1 / c - w).clamp(min=0)).sum().cpu()
                entry = w[causal]
                place = ((entry.log10() / -LOWEST + 1) * BINS).clamp(0, BINS - 1).long()
                histogram[0] += place.bincount(minlength=BINS).cpu()
                histogram[1] += place.bincount(entry, BINS).cpu()
    heads = []
    for layer in range(L):
        heads.append([])
        for h in range(H):
            rows = torch.cat(values[layer, h], 1)
            medians, means = rows.median(1).values, rows.mean(1)
            heads[layer].append(
                {"entropy": medians[0], "effective": medians[1], "first": means[2], "distance": means[3]}
            )
    prediction = [[c, toy[n] / rows_seen, general[n] / rows_seen] for n, c in enumerate(cs)]
    return {"heads": heads, "toy": prediction, "histogram": (histogram / histogram.sum(1, keepdim=True)).tolist()}
