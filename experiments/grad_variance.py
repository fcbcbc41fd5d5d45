"""What c costs: the variance that SUS adds to a model's gradient, beside the variance which that has anyway.

    python experiments/grad_variance.py --out_dir=out-long-ctx --json=variance.json --out=variance.png
    python experiments/grad_variance.py --init_from=models/smollm2 --dataset=NAME --T=1024 --c=4,8,16
    python experiments/grad_variance.py --from_json=variance.json --out=variance.png

    rho(c, T) = E|ghat_s - g_s|^2 / E|g_s - gbar|^2

over sequences s and draws of the mask. g_s is the exact gradient of one sequence's mean loss, ghat_s its SUS estimate.
It is measured for the whole model, each layer, each head (its rows of c_attn), and all that makes queries and keys. All
samplers and all c see the same sequences. Standard errors are the jackknife's, over sequences. docs/variance.md says
more.

It checks itself: ghat_s - g_s must be zero on average along many directions. Where it isn't, the exit status is 1.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import UserError, key, load_config, run_main
from data.loader import Batch, load_corpus
from exact_attn import exact_attention
from grad_variance_measure import Method, check_estimate, judge, look_at_attention, measure_at
from grad_variance_picture import draw
from grad_variance_report import fits, report, typical
from measure import free_memory, heading, numbers, product_ms, sus_backend
from model_gradients import Parts, Subject, load_model, windows
from output import check_picture, check_writable, deliver, pick, progress_bar, read_json
from sus_attn import BACKENDS, SAMPLERS
from sus_backends import reference
from training.device import Device, memory_errors, resolve_device
from training.probe import capture, time_attention
from training.record import plain
from training.start import DATA


@dataclass
class VarianceConfig:
    out_dir: str = key("out", "a run of train.py", section="What")
    init_from: str = key("resume", "resume: the checkpoint in out_dir; or a Hugging Face folder, or a name on the hub")
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


def main() -> None:
    cfg = load_config(VarianceConfig, sys.argv[1:], usage=__doc__)
    check_writable(cfg.json)
    if cfg.out:
        check_picture(cfg.out)
    with memory_errors("Give a smaller --T or fewer --sequences"):
        data = read_json(Path(cfg.from_json), "grad_variance") if cfg.from_json else plain(measure(cfg), nonfinite=str)
    deliver(data, report, cfg.json, draw, cfg.out, dpi=110)
    if not data["check"]["holds"]:
        raise UserError("the gradients measured here are NOT UNBIASED, see above")


# -- what is measured, and on what ------------------------------------------------------------------


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


def read_texts(dataset: str, Ts: list[int], count: int, vocab_size: int, tokenizer: dict | None) -> dict[int, tuple]:
    """{T: `count` windows of T tokens}. UserError unless they are in the model's tokens."""
    texts = {}
    for T in Ts:
        corpus = load_corpus(DATA / dataset, T)
        # a corpus's vocabulary may be padded, so that it only counts where the tokenizer is not known
        if corpus.vocab_size > vocab_size if tokenizer is None else tokenizer != corpus.tokenizer_meta:
            raise UserError(f"dataset={dataset} is in other tokens ({corpus.tokenizer_meta['name']}) than the model's")
        texts[T] = windows(corpus, count)
    return texts


def check_memory(parts: Parts, sequences: int, device: Device) -> None:
    """UserError where the exact gradients of all sequences do not fit; besides them a dozen such vectors are needed."""
    free, vector = free_memory(device), 4 * parts.P
    if free is not None and (fit := max(0, free // vector - 12)) < sequences:
        raise UserError(
            f"the gradients of {sequences} sequences take {sequences * vector / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free: at most --sequences={fit} would fit"
        )


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


def measure(cfg: VarianceConfig) -> dict:
    """Every figure: what `report` and `draw` show, and what --json writes."""
    cs, samplers = numbers("c", cfg.c, float, 0), choose_samplers(cfg.samplers)
    if cfg.kappa and not any(sampler in reference.THINNED for sampler in samplers):
        raise UserError(
            f"--kappa is for the samplers that thin: none of {', '.join(reference.THINNED)} is in --samplers"
        )
    device = resolve_device(cfg.device, cfg.dtype)
    model, dataset, tokenizer = load_model(cfg.out_dir, cfg.init_from, cfg.dataset)
    config = model.config
    Ts = choose_lengths(cfg.T, config.block_size)
    texts = read_texts(dataset, Ts, cfg.sequences, config.vocab_size, tokenizer)
    with proposing(cfg.kappa):
        D = config.D
        backends = {sampler: sus_backend(cfg.backend, device, D, sampler) for sampler in samplers}
        methods = [Method(sampler, c, backends[sampler][0]) for sampler in samplers for c in cs]
        subject = Subject(model, device)
        check_memory(subject.parts, cfg.sequences, device)
        print(device.reason)
        for sampler, (backend, why) in backends.items():
            print(f"{sampler}: the {backend} backend ({why})", flush=True)

        rows, exact, attention, estimates, product = [], [], [], [], [product_ms(device)]
        repeats = 3 if cfg.times else 0
        unit = {T: T * (T + 1000) for T in Ts}  # a step's time, roughly
        steps = cfg.sequences * (1 + len(methods) * cfg.draws) + len(methods) * repeats / subject.parts.L
        with progress_bar(steps * sum(unit.values())) as bar:
            for T in Ts:
                bar.set_description(f"T = {T:,}")
                x, y = (tokens.to(device.device) for tokens in texts[T][:2])
                advance = lambda steps=1: bar.update(unit[T] * steps)
                of_T, of_exact = measure_at(x, y, subject, methods, cfg.draws, cfg.seed, advance)
                middle = x[len(x) // 2][None], y[len(y) // 2][None]
                *inputs, _ = capture(model, config.n_layer // 2, Batch(*middle), device, None)
                if repeats:
                    functions = {"exact": exact_attention, **{method: method for method in methods}}
                    times = time_attention(functions, *inputs, device, repeats)
                    for row, method in zip(of_T, methods):
                        row["forward_ms"], row["backward_ms"] = times[method]
                    of_exact["forward_ms"], of_exact["backward_ms"] = times["exact"]
                    advance(len(methods) * repeats / subject.parts.L)
                if T == Ts[0]:
                    for sampler in samplers:
                        c = typical(pick(of_T, sampler=sampler))["c"]
                        found = check_estimate(Method(sampler, c, backends[sampler][0]), inputs)
                        estimates.append({"T": T, "layer": config.n_layer // 2, "sampler": sampler, "c": c, **found})
                attention.append({"T": T, **look_at_attention(subject, x, cs)})
                rows += of_T
                exact.append({"T": T, "windows": texts[T][2], **of_exact})
                product.append(product_ms(device))
    return heading("grad_variance", cfg, device, product) | {
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


if __name__ == "__main__":
    run_main(main)
