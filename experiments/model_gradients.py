"""What c costs: the variance that SUS adds to a model's gradient, beside the variance which that has anyway.

    python experiments/grad_variance.py --out_dir=out-long-ctx --json=variance.json --out=variance.png
    python experiments/grad_variance.py --init_from=gpt2 --dataset=NAME --T=1024 --c=2,4,8
    python experiments/grad_variance.py --from_json=variance.json --out=variance.png

    rho(c, T) = E|ghat_s - g_s|^2 / E|g_s - gbar|^2

over sequences s and draws of the mask. g_s is the exact gradient of one sequence's mean loss, ghat_s its SUS estimate.
It is measured for the whole model, each layer, each head (its rows of c_attn), and all that makes queries and keys. All
samplers and all c see the same sequences. Standard errors are the jackknife's, over sequences. docs/variance.md says
more.

It checks itself: ghat_s - g_s must be zero on average along many directions. Where it isn't, the exit status is 1.
"""

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_attention import DATA, gradients
from configurator import UserError, key, load_config, run_main
from data.loader import Corpus, load_corpus
from measure import (
    describe_machine,
    environment,
    fit_power,
    free_memory,
    idleness,
    numbers,
    product_ms,
    read_json,
    sus_backend,
    write_json,
)
from model import GPT, load_pretrained, model_from_checkpoint
from output import COLORS, check_picture, check_writable, import_pyplot, print_table, progress_bar, save_picture
from sus_attn import BACKENDS, SAMPLERS, fold_in, sus_attention
from sus_backends import reference
from training import checkpoint
from training.device import Device, memory_errors, resolve_device
from training.probe import capture, time_attention
from training.record import plain

PAPER_C = 25.0  # with which the paper has a rho of about 1 %
DEFAULT = "tiles"
SIGNS = 8  # random directions of the self-check
FALSE_ALARM = 1e-3  # how often a right estimator may fail it
ESTIMATE_DRAWS = 64
LOOKED_AT = 4  # sequences whose attention weights are looked at
LOWEST, BINS = -8, 48  # of the histogram of log10 W
ROUNDING = 1e-9  # a rho below it is float32's own: nothing was cut


@dataclass
class VarianceConfig:
    out_dir: str = key("out", "a run of train.py", section="What")
    init_from: str = key(
        "resume",
        "the checkpoint in out_dir, or GPT-2",
        choices=("resume", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"),
    )
    dataset: str = key("", "folder under data/; empty: the run's own")
    c: str = key("2,4,8,25,50", "retention parameters")
    T: str = key("auto", "context lengths; auto: 512,1024,2048,4096 as far as the model's block_size goes")
    samplers: str = key("poisson,systematic,tiles", f"of {', '.join(SAMPLERS)}")
    kappa: float = key(0.0, "samplers that thin propose with kappa * c; 0: as they are", low=0)

    sequences: int = key(32, "windows of T tokens, evenly spread, validation text first", low=4, section="How")
    draws: int = key(1, "masks drawn for each sequence", low=1)
    seed: int = key(0, "seeds the draws", low=0, high=2**62)
    device: str = key("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = key("float32", "of the forward", choices=("float32", "bfloat16"))
    backend: str = key("auto", "SUS's kernels", choices=BACKENDS)
    times: bool = key(True, "time attention too")

    json: str = key("", "file for every figure", section="Output")
    out: str = key("", "the picture: .png, .svg or .pdf")
    from_json: str = key("", "measure nothing: tables and picture of such a file")


def main():
    cfg = load_config(VarianceConfig, sys.argv[1:], usage=__doc__)
    check_writable(cfg.json)
    if cfg.out:
        check_picture(cfg.out)
    with memory_errors("Give a smaller --T or fewer --sequences"):
        data = read_json(Path(cfg.from_json), "grad_variance") if cfg.from_json else plain(measure(cfg), nonfinite=str)
    if cfg.json:
        write_json(Path(cfg.json), data)
    if cfg.out:
        save_picture(draw(data), Path(cfg.out), dpi=110)
    report(data)
    for what, path in (("every figure", cfg.json), ("picture", cfg.out)):
        if path:
            print(f"{what}: {path}")
    if not data["check"]["holds"]:
        raise UserError("the gradients measured here are NOT UNBIASED, see above")


# -- what is measured on ----------------------------------------------------------------------------


def load_model(cfg: VarianceConfig) -> tuple[GPT, str, dict | None]:
    """The model, the folder of its corpus, and the tokenizer that its corpus must have (None: not known). UserError."""
    if cfg.init_from != "resume":
        if not cfg.dataset:
            raise UserError(f"--init_from={cfg.init_from} needs --dataset=NAME, a folder under data/ in GPT-2's tokens")
        return load_pretrained(cfg.init_from), cfg.dataset, {"name": "gpt2"}
    path = Path(cfg.out_dir) / "ckpt.pt"
    saved = checkpoint.load(path)
    if dropout := saved["config"].get("dropout"):
        raise UserError(f"{path} was trained with dropout={dropout}, which SUS does not support: its gradients differ")
    dataset = cfg.dataset or saved["config"].get("dataset")
    if not dataset:
        raise UserError(f"{path} does not say what it was trained on: give --dataset=NAME")
    return model_from_checkpoint(saved, path), dataset, saved.get("tokenizer")


def choose_lengths(T: str, block_size: int) -> list[int]:
    if T == "auto":
        return [n for n in (512, 1024, 2048, 4096) if n <= block_size] or [block_size]
    lengths = numbers("T", T, int, 8)
    if lengths[-1] > block_size:
        raise UserError(f"--T={lengths[-1]} is above the {block_size} tokens of the model's block_size")
    return lengths


def choose_samplers(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in SAMPLERS]:
        raise UserError(f"--samplers={text}: {unknown[0]!r} is none of {', '.join(SAMPLERS)}")
    return names


def windows(corpus: Corpus, count: int) -> tuple[Tensor, Tensor, dict]:
    """(x, y), both (count, T), no two overlapping: a sequence seen twice would count as two. And how many are whose."""
    T = corpus.block_size
    room = {"val": (corpus.val_tokens - 1) // T, "train": (corpus.train_tokens - 1) // T}
    taken = {"val": min(count, room["val"])}
    taken["train"] = count - taken["val"]
    if taken["train"] > room["train"]:
        raise UserError(
            f"{corpus.folder} has {sum(room.values())} windows of {T} tokens, not {count}: give fewer "
            "--sequences or a smaller --T"
        )
    parts = []
    for split, n in taken.items():
        last = (corpus.val_tokens if split == "val" else corpus.train_tokens) - T - 1
        if n:
            parts.append(corpus.read(split, [[(i * last // max(n - 1, 1), T)] for i in range(n)]))
    x, y = (torch.cat(tensors) for tensors in zip(*parts))
    return x, y, taken


class Parts:
    """The model's gradient as one vector (P,) float32, and the parts of it that are looked at: the whole, the L layers,
    the L * H heads, and the queries and keys of all of them. A head's part is its query's rows of c_attn, and those of
    its key and value.
    """

    def __init__(self, model: GPT):
        self.parameters = list(model.parameters())
        attention = model.transformer.h[0].attn
        self.L, self.H, self.K = len(model.transformer.h), attention.n_head, attention.n_kv_head
        starts, self.P = {}, 0
        for p in self.parameters:
            starts[p] = self.P
            self.P += p.numel()
        span = lambda p: slice(starts[p], starts[p] + p.numel())
        self.layers, self.c_attn = [], []
        for block in model.transformer.h:
            own = [span(p) for p in block.parameters()]  # side by side
            self.layers.append(slice(own[0].start, own[-1].stop))
            self.c_attn.append([span(p) for p in block.attn.c_attn.parameters()])
        # Along these parts of the mean gradient the self-check looks for a bias. What is wrong in dK alone would be
        # lost among a layer's other parameters, so the rows of c_attn for q, k and v have their own.
        self.directions = {f"layer {i}": layer for i, layer in enumerate(self.layers)}
        for i, (weight, *_) in enumerate(self.c_attn):
            row = (weight.stop - weight.start) // (self.H + 2 * self.K)
            ends = [weight.start + n * row for n in (0, self.H, self.H + self.K, self.H + 2 * self.K)]
            for name, start, stop in zip("qkv", ends, ends[1:]):
                self.directions[f"layer {i}'s rows of {name}"] = slice(start, stop)

    def gradient(self, loss: Tensor) -> Tensor:
        """(P,) float32"""
        return torch.cat([g.flatten().float() for g in torch.autograd.grad(loss, self.parameters)])

    def squares(self, x: Tensor) -> Tensor:
        """The squared norm of each part of x (P,): (1 + L + L * H + 1,) float64 on the CPU."""
        layers = [x[layer].square().sum() for layer in self.layers]
        heads, queries_and_keys = [], 0
        head = torch.arange(self.H, device=x.device)
        for spans in self.c_attn:  # the rows of q for each head, then those of k and of v for each key/value head
            rows = sum(x[span].view(self.H + 2 * self.K, -1).square().sum(1) for span in spans)
            kv = self.H + head // (self.H // self.K)
            heads.append(rows[head] + rows[kv] + rows[kv + self.K])
            queries_and_keys += rows[: self.H + self.K].sum(0, keepdim=True)
        return torch.cat([torch.stack([x.square().sum(), *layers]), *heads, queries_and_keys]).cpu().double()


def check_memory(parts: Parts, sequences: int, device: Device) -> None:
    """UserError where the exact gradients of all sequences do not fit; besides them a dozen such vectors are needed."""
    free, vector = free_memory(device), 4 * parts.P
    if free is not None and (fit := max(0, free // vector - 12)) < sequences:
        raise UserError(
            f"the gradients of {sequences} sequences take {sequences * vector / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free: at most --sequences={fit} would fit"
        )


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


@contextlib.contextmanager
def proposing(kappa: float) -> Iterator[None]:
    """With reference.KAPPA set, unless 0."""
    before = reference.KAPPA
    reference.KAPPA = kappa or before
    try:
        yield
    finally:
        reference.KAPPA = before


class Subject:
    """The model whose gradients are measured, exact or by SUS."""

    def __init__(self, model: GPT, device: Device):
        if model.config.dropout > 0:
            raise UserError(f"the model has dropout={model.config.dropout}, which SUS does not support")
        self.model, self.device = model.to(device.device).train(), device
        self.parts = Parts(self.model)

    def gradient(
        self, x: Tensor, y: Tensor, method: tuple | None = None, seed: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient (P,) of the mean loss on x, y (1, T), exact or by method = (sampler, c, backend), and then
        sus_attention's stats of each layer, (L, 3) float64.
        """
        config, blocks = self.model.config, self.model.transformer.h
        config.attn_backward = "exact"
        if method:
            config.attn_backward = "sus"
            config.sus_sampler, config.sus_c, config.sus_backend = method
            for block in blocks:
                block.attn.attend.stats = torch.zeros(3, device=self.device.device)
        try:
            with self.device.autocast():
                _, loss = self.model(x, y, sus_seed=torch.tensor(seed) if method else None)
            gradient = self.parts.gradient(loss)
            return gradient, torch.stack([b.attn.attend.stats for b in blocks]).cpu().double() if method else None
        finally:
            config.attn_backward = "exact"
            for block in blocks:
                block.attn.attend.stats = None


def measure(cfg: VarianceConfig) -> dict:
    """Every figure: what `report` and `draw` show, and what --json writes."""
    cs, samplers = numbers("c", cfg.c, float, 0), choose_samplers(cfg.samplers)
    if cfg.kappa and not any(sampler in reference.THINNED for sampler in samplers):
        raise UserError(
            f"--kappa is for the samplers that thin: none of {', '.join(reference.THINNED)} is in --samplers"
        )
    device = resolve_device(cfg.device, cfg.dtype)
    model, dataset, tokenizer = load_model(cfg)
    config = model.config
    Ts = choose_lengths(cfg.T, config.block_size)
    texts = {}
    for T in Ts:
        corpus = load_corpus(DATA / dataset, T)
        # a corpus's vocabulary may be padded, so that it only counts where the tokenizer is not known
        if corpus.vocab_size > config.vocab_size if tokenizer is None else tokenizer != corpus.tokenizer_meta:
            raise UserError(f"dataset={dataset} is in other tokens ({corpus.tokenizer_meta['name']}) than the model's")
        texts[T] = windows(corpus, cfg.sequences)
    with proposing(cfg.kappa):
        backends = {
            (s, c): sus_backend(cfg.backend, device, config.n_embd // config.n_head, c, s) for s in samplers for c in cs
        }
        subject = Subject(model, device)
        check_memory(subject.parts, cfg.sequences, device)
        print(device.reason)
        for sampler in samplers:
            for backend, why in dict.fromkeys(backends[sampler, c] for c in cs):
                those = [f"{c:g}" for c in cs if backends[sampler, c] == (backend, why)]
                print(f"{sampler}, c = {', '.join(those)}: the {backend} backend ({why})", flush=True)

        methods = [(sampler, c, backend) for (sampler, c), (backend, _) in backends.items()]
        rows, exact, attention, estimates, product = [], [], [], [], [product_ms(device)]
        repeats = 3 if cfg.times else 0
        unit = {T: T * (T + 1000) for T in Ts}  # a step's time, roughly
        steps = cfg.sequences * (1 + len(methods) * cfg.draws) + len(methods) * repeats / subject.parts.L
        with progress_bar(steps * sum(unit.values())) as bar:
            for T in Ts:
                bar.set_description(f"T = {T:,}")
                x, y = (tokens.to(device.device) for tokens in texts[T][:2])
                of_T, of_exact = measure_at(T, x, y, subject, methods, cfg, lambda: bar.update(unit[T]))
                middle = x[len(x) // 2][None], y[len(y) // 2][None]
                inputs = capture(model, config.n_layer // 2, *middle, device, None)
                if repeats:
                    times = time_methods(methods, inputs, device, repeats)
                    for row, method in zip(of_T, methods):
                        row["forward_ms"], row["backward_ms"] = times[method]
                    of_exact["forward_ms"], of_exact["backward_ms"] = times["exact"]
                    bar.update(unit[T] * len(methods) * repeats / subject.parts.L)
                if T == Ts[0]:
                    estimates = [
                        {
                            "T": T,
                            "layer": config.n_layer // 2,
                            "sampler": sampler,
                            "c": c,
                            **check_estimate((sampler, c, backends[sampler, c][0]), inputs),
                        }
                        for sampler in samplers
                        for c in [typical(pick(of_T, sampler=sampler))["c"]]
                    ]
                attention.append(
                    {"T": T, **look_at_attention(subject, x[:: max(1, len(x) // LOOKED_AT)][:LOOKED_AT], cs)}
                )
                rows += of_T
                exact.append({"T": T, "windows": texts[T][2], **of_exact})
                product.append(product_ms(device))
    return {
        "benchmark": "grad_variance",
        "config": asdict(cfg),
        "environment": environment(device),
        "idle": idleness(product),
        "model": {
            "from": cfg.init_from if cfg.init_from != "resume" else Path(cfg.out_dir).name,
            "dataset": dataset,
            "parameters": subject.parts.P,
            "layers": config.n_layer,
            "heads": config.n_head,
        },
        "results": rows,
        "exact": exact,
        "attention": attention,
        "estimates": estimates,
        "check": judge(rows, subject.parts, cfg.sequences - 1),
        "fits": fits(rows),
    }


def measure_at(T: int, x: Tensor, y: Tensor, subject: Subject, methods, cfg, advance) -> tuple[list[dict], dict]:
    """A row of results for each method, and what the exact gradients are; x, y (n, T)."""
    parts, n = subject.parts, len(x)
    truth = torch.empty(n, parts.P, device=x.device)
    for s in range(n):
        truth[s], _ = subject.gradient(x[[s]], y[[s]])
        advance()
    mean = truth.mean(0)
    deviations = torch.stack([parts.squares(g - mean) for g in truth])  # (n, parts)
    square = truth.square().sum(1).double().mean().cpu()
    signs = torch.randint(2, (SIGNS, parts.P), generator=torch.Generator().manual_seed(cfg.seed), dtype=torch.int8)
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
            for i in range(cfg.draws):
                estimate, drawn = subject.gradient(x[[s]], y[[s]], method, fold_in(cfg.seed, s, i))
                off = estimate.sub_(truth[s])
                errors[s] += parts.squares(off) / cfg.draws
                products = [off[part] @ mean[part] for part in parts.directions.values()] + [
                    off @ sign.float() for sign in signs
                ]
                along[s] += torch.stack(products).cpu().double() / cfg.draws
                stats += drawn / (n * cfg.draws)
                advance()
        rho, error = relative_variance(errors, deviations)
        pairs = torch.stack([rho, error], 1)  # (parts, 2)
        kept, entries = stats[:, 0] / (parts.H * T), (T + 1) / 2
        rows.append(
            {
                "T": T,
                "sampler": method[0],
                "c": method[1],
                "backend": method[2],
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


def attention_by(method: tuple):
    sampler, c, backend = method
    return lambda q, k, v, seed=0, stats=None: sus_attention(
        q, k, v, c, seed=seed, sampler=sampler, backend=backend, stats=stats
    )


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def time_methods(methods: list[tuple], inputs, device: Device, repeats: int) -> dict:
    """{method or "exact": (forward ms, backward ms)} of one layer's attention."""
    return time_attention({"exact": exact_attention, **{m: attention_by(m) for m in methods}}, *inputs, device, repeats)


def check_estimate(method: tuple, inputs) -> dict:
    """The estimate in sus_attention's stats beside E|(dq, dk, dv) - exact|^2, of one layer's captured attention."""
    _, *truth = gradients(exact_attention, *inputs)
    estimate = measured = 0.0
    for seed in range(ESTIMATE_DRAWS):
        stats = torch.zeros(3, device=inputs[0].device)
        _, *drawn = gradients(attention_by(method), *inputs, seed=seed, stats=stats)
        estimate += stats[2].item() / ESTIMATE_DRAWS
        measured += sum((a.float() - b).square().sum().item() for a, b in zip(drawn, truth)) / ESTIMATE_DRAWS
    return {"estimate": estimate, "measured": measured, "ratio": estimate / measured if measured else math.nan}


@torch.no_grad()
def look_at_attention(subject: Subject, x: Tensor, cs: list[float]) -> dict:
    """How concentrated attention is on x (n, T). `heads`: (L, H) dicts; `toy`: for each c what the toy model and its
    general row predict for rho, up to a factor; `histogram`: entries and attention in each bin of log10 W.
    """
    seen = []
    attends = [block.attn.attend for block in subject.model.transformer.h]
    handles = [a.register_forward_hook(lambda _, args, out: seen.append(args[:2])) for a in attends]
    try:
        with subject.device.autocast():
            for tokens in x:
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


# -- what follows from it ---------------------------------------------------------------------------


def typical(rows: list[dict]) -> dict:
    """The row whose rho is nearest to 1 %, in logarithms: what the map shows, and where the estimate is checked."""
    return min(rows, key=lambda row: abs(math.log(max(float(row["rho"][0]), ROUNDING) / 0.01)))


def each(rows: list[dict], name: str) -> list:
    """The values that a column has, in their order, each once."""
    return list(dict.fromkeys(row[name] for row in rows))


def pick(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


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
        "heads; "
        f"{model['dataset']}, windows of validation + training text: {whose}\n"
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
            "measured "
            f"({e['sampler']}, T = {e['T']:,}, c = {float(e['c']):g}, {ESTIMATE_DRAWS} draws)"
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


# -- the picture ------------------------------------------------------------------------------------


def draw(data: dict):
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
    figure.suptitle(
        f"{model['from']} on {model['dataset']}: {model['parameters']:,} parameters, {data['config']['sequences']} "
        f"sequences, {data['config']['dtype']}",
        fontsize=9,
        color="dimgrey",
        x=0.01,
        ha="left",
    )
    return figure


def shades(count: int) -> list[tuple]:
    """Blues, from light to dark."""
    return [tuple(1 - (1 - channel) * (i + 2) / (count + 1) for channel in (0, 0.36, 0.6)) for i in range(count)]


def plot(ax, points: list[tuple], **style) -> None:
    """points: (x, (rho, its error)), drawn in %."""
    points = sorted(points)
    x, rho, error = [p[0] for p in points], [100 * p[1][0] for p in points], [100 * p[1][1] for p in points]
    below = [min(e, 0.9 * r) for r, e in zip(rho, error)]  # a logarithmic axis has no zero
    ax.errorbar(x, rho, (below, error), marker="o", markersize=4.5, capsize=2.5, linewidth=1.6, **style)


def finish(ax, ticks=(), legend: str = "", low: float = 1.12, **options) -> None:
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
    short = top < 30 * bottom
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
    ax.yaxis.set_minor_formatter(lambda value, _: f"{value:.6g}" if short and f"{value:e}"[0] in "235" else "")
    if ticks := sorted(ticks):
        shown = [t for i, t in enumerate(ticks) if i == 0 or t > 1.15 * ticks[i - 1]]
        ax.set_xticks(shown, [f"{t:g}" for t in shown])
        ax.set_xticks([], minor=True)
        ax.set_xlim(ticks[0] / low, ticks[-1] * low)
    else:
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
        left, right = ax.get_xlim()
        ax.xaxis.set_minor_formatter(
            lambda value, _: f"{value:.6g}" if f"{value:e}"[0] in "235" and right < 30 * left else ""
        )
    ax.legend(title=legend or None, fontsize=9, title_fontsize=9, **options)


def draw_over_c(ax, rows) -> None:
    sampler = leading(rows)
    ax.set(title=f"variance added over c, {sampler} draws", xlabel="c, the retention parameter", ylabel="rho, %")
    points = drawable(pick(rows, sampler=sampler))
    Ts = each(points, "T")
    for T, color in zip(Ts, shades(len(Ts))):
        plot(ax, [(p["c"], p["rho"]) for p in pick(points, T=T)], color=color, label=f"T = {T:,}")
    ticks = each(points, "c")
    if ticks:
        ax.plot(
            [25, 30], [1, 1], color=COLORS[1], linewidth=5, solid_capstyle="round", label="the paper's 1 %, T = 2,000"
        )
    finish(ax, {*ticks, 25, 30} if ticks else ())


def draw_over_T(ax, rows) -> None:
    sampler = leading(rows)
    ax.set(title=f"variance added over T, {sampler} draws", xlabel="T, context in tokens", ylabel="rho, %")
    points = drawable(pick(rows, sampler=sampler))
    cs, Ts = each(points, "c"), each(points, "T")
    for c, color in zip(cs, shades(len(cs))):
        plot(ax, [(p["T"], p["rho"]) for p in pick(points, c=c)], color=color, label=f"{c:g}")
    low = 1.12 if len(Ts) > 1 else 2
    finish(ax, Ts, "c", low, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_over_kept(ax, rows) -> None:
    T = rows[-1]["T"]
    ax.set(title=f"samplers by kept entries, T = {T:,}", xlabel="kept entries a row", ylabel="rho, %")
    for sampler, color in zip(each(rows, "sampler"), COLORS):
        points = [p for p in drawable(pick(rows, T=T, sampler=sampler)) if p["kept_per_row"] > 0]
        if points:
            plot(ax, [(p["kept_per_row"], p["rho"]) for p in points], color=color, label=sampler)
    finish(ax)


def draw_map(ax, rows) -> None:
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


def draw_weights(ax, attention) -> None:
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


def draw_toy(ax, data) -> None:
    rows = drawable(pick(data["results"], sampler=leading(data["results"])))
    ax.set(
        title=f"the toy model's prediction, {leading(data['results'])} draws",
        xlabel="c, the retention parameter",
        ylabel="rho, %",
    )
    factors = toy_factor(data, 1), toy_factor(data, 2)
    Ts = each(rows, "T")
    for T, color in zip(Ts, shades(len(Ts))):
        plot(ax, [(p["c"], p["rho"]) for p in pick(rows, T=T)], color=color, label=f"measured, T = {T:,}", linestyle="")
        lines = sorted(next(a["toy"] for a in data["attention"] if a["T"] == T), key=lambda line: float(line[0]))
        for column, dashes, name in ((1, "-", "rows of k equal weights"), (2, ":", "rows as they are")):
            curve = [
                (line[0], 100 * factors[column - 1] * line[column])
                for line in lines
                if factors[column - 1] and math.isfinite(float(line[0])) and line[column] > 0
            ]
            if curve:
                ax.plot(
                    *zip(*curve), color=color, linestyle=dashes, linewidth=1.4, label=f"{name}" if T == Ts[-1] else None
                )
    ticks = each(rows, "c")
    finish(ax, ticks, low=1.12 if len(ticks) > 1 else 2)


if __name__ == "__main__":
    run_main(main)
