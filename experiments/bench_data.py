"""How fast data are prepared and loaded, and how much memory that takes.

    python experiments/bench_data.py --input=FOLDER [--tokenizer=gpt2] [--copies=4] [--num_proc=2]

Preparation: data/text/prepare.py beside nanoGPT's way (the openwebtext script's: `datasets` maps documents to tokens in
processes, stores them, and copies them to a memory map in 1024 shards), on as many copies of the folder's text files,
in turns. It needs requirements-data.txt. Both must write the same tokens. Loading: the batches of train.py
config/long_ctx.py, beside its training steps, and the process's memory over 10,000 of them.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import TrainConfig, UserError, key, load_config, run_main
from data.loader import load_corpus
from data.reading import files_under, read_text
from data.text.prepare import prepare
from data.tokenizer import ENCODINGS, BytePairTokenizer, Tokenizer, tokenizer_from_meta
from measure import describe_machine, environment, idleness, product_ms, ratio, ratio_text, resident, spread
from output import print_table
from train import train_step
from training.device import resolve_device
from training.optimizer import new_optimizer
from training.start import DATA, new_model, prepare_stdlib

BATCHES = 10_000
VAL_FRACTION = 1e-6  # of a file: nanoGPT's script has no such share, and this is a character or two


@dataclass
class Config:
    input: str = key("", "folder of text files")
    tokenizer: str = key("gpt2", "one of tiktoken's with up to 65536 ids, as in nanoGPT", choices=ENCODINGS[:4])
    copies: int = key(4, "of the files: more text than there is", low=1)
    repeats: int = key(5, "rounds", low=1)
    num_proc: int = key(2, "our threads, nanoGPT's processes", low=1)


def nanogpt_way(paths: list[Path], tokenizer: BytePairTokenizer, num_proc: int, folder: Path) -> np.ndarray:
    """The ids of these files, uint16, through `datasets` and a memory map."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    encoding = tokenizer._encoding
    texts = load_dataset(
        "text", data_files=[str(path) for path in paths], sample_by="document", split="train", cache_dir=str(folder)
    )

    def encode(row):
        ids = [*encoding.encode_ordinary(row["text"]), encoding.eot_token]
        return {"ids": ids, "len": len(ids)}

    encoded = texts.map(encode, remove_columns=["text"], num_proc=num_proc)
    out = np.memmap(folder / "train.bin", np.uint16, "w+", shape=(int(np.sum(encoded["len"], dtype=np.uint64)),))
    shards, at = min(1024, len(encoded)), 0
    for i in range(shards):
        part = np.concatenate(encoded.shard(shards, i, contiguous=True).with_format("numpy")["ids"][:])
        out[at : at + len(part)] = part
        at += len(part)
    out.flush()
    return np.fromfile(folder / "train.bin", np.uint16)


def our_way(source: Path, tokenizer: Tokenizer, num_proc: int, folder: Path) -> np.ndarray:
    """The same, of the files in the folder `source`, by data/text/prepare.py."""
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(str(source), "corpus", tokenizer.name, VAL_FRACTION, num_proc=num_proc, data=folder)
    return np.fromfile(folder / "corpus/train.bin", np.uint16)


def measure_preparation(cfg: Config) -> tuple[dict[str, list[float]], float]:
    """Tokens a second of both, by round; and how many megabytes they prepare. UserError if they write other tokens."""
    tokenizer = tokenizer_from_meta({"name": cfg.tokenizer})
    rates = {"nanoGPT's": [], "ours": []}
    with tempfile.TemporaryDirectory() as work:
        source = Path(work, "text")
        source.mkdir()
        longest = 0
        for path in files_under(cfg.input):
            try:
                text = read_text(path)  # without the mark and the CR that `datasets` would keep
            except UserError as error:
                print(f"left out: {error}")
                continue
            longest = max(longest, len(text))
            for copy in range(cfg.copies):
                (source / f"{copy}-{path.name}").write_text(text, encoding="utf-8")
        if longest * VAL_FRACTION < 1:  # then there would be no validation text at all
            raise UserError(f"--input={cfg.input} is too little: one text must have {1 / VAL_FRACTION:,.0f} characters")
        paths = files_under(source)
        megabytes = sum(path.stat().st_size for path in paths) / 1e6
        for i in range(cfg.repeats + 1):
            counts = {}
            for name in sorted(rates, reverse=bool(i % 2)):
                folder = Path(work, f"{name}{i}")
                folder.mkdir()
                start = time.perf_counter()
                ids = (
                    nanogpt_way(paths, tokenizer, cfg.num_proc, folder)
                    if name != "ours"
                    else our_way(source, tokenizer, cfg.num_proc, folder)
                )
                if i:  # the first is the warm-up
                    rates[name].append(len(ids) / (time.perf_counter() - start))
                counts[name] = np.bincount(ids, minlength=tokenizer.n_vocab)
                shutil.rmtree(folder)
            # but for the end of each file, which is our validation text
            if np.abs(np.subtract(*counts.values())).sum() > 8 * len(paths):
                raise UserError("the two have written different tokens, so there are no figures")
    return rates, megabytes


def measure_loading() -> tuple[dict[str, float], dict[str, float], int, list[int]]:
    """Seconds of a batch, seconds of a training step, the batches of a step, and resident bytes before and after
    BATCHES batches.
    """
    train = load_config(TrainConfig, [str(ROOT / "config/long_ctx.py")], usage="")
    prepare_stdlib(train)
    corpus = load_corpus(DATA / train.dataset, train.block_size, train.windows)
    device = resolve_device(train.device, train.dtype)
    model = new_model(train, corpus.vocab_size).to(device.device)
    optimizer, scaler = new_optimizer(train, model, device)
    steps, micros = [], train.gradient_accumulation_steps
    for it in range(6):
        start = time.perf_counter()
        train_step(train, model, optimizer, scaler, corpus, device, it)
        steps.append(time.perf_counter() - start)
    memory, times = [], []
    for n in range(BATCHES + 100):
        if n in (100, BATCHES + 99):  # after the first of them has what it needs
            memory.append(resident("VmRSS"))
        start = time.perf_counter()
        corpus.batch(train.batch_size, train.seed, n * train.batch_size)
        times.append(time.perf_counter() - start)
    return spread(times), spread(steps[1:]), micros, memory


def main() -> None:
    cfg = load_config(Config, sys.argv[1:], usage=__doc__)
    if not os.path.isdir(cfg.input):
        raise UserError(f"--input={cfg.input}: give a folder of text files")
    device = resolve_device("cpu", "float32")
    product = [product_ms(device)]
    rates, megabytes = measure_preparation(cfg)
    product.append(product_ms(device))
    batch, step, micros, memory = measure_loading()
    product.append(product_ms(device))
    machine, idle = describe_machine({"environment": environment(device), "idle": idleness(product)})
    print(f"{machine}\n\npreparation of {megabytes:.1f} MB, {cfg.tokenizer}, {cfg.num_proc} threads or processes:\n")
    print_table(
        [
            ["", "tokens/s", "beside nanoGPT's"],
            *(
                [name, f"{spread(rate)['median']:,.0f}", ratio_text(ratio(rate, rates["nanoGPT's"]))]
                for name, rate in rates.items()
            ),
        ]
    )
    print(
        f"\nloading, config/long_ctx.py: a batch takes {1e3 * batch['median']:.3f} ms, a training step "
        f"{1e3 * step['median']:.0f} ms, of which the batches are {micros * batch['median'] / step['median']:.3%}\n"
        f"resident memory: {memory[0] / 2**20:.1f} MiB before, {memory[1] / 2**20:.1f} MiB after {BATCHES:,} "
        f"batches\n{idle}"
    )


if __name__ == "__main__":
    run_main(main)
