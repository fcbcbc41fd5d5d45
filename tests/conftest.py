"""What all tests share: their environment, and fixtures of several files."""

import os
import signal
import sys
from pathlib import Path

import pytest

# Processes of tests stand side by side on the cores. Threads that spin while they wait for a core would slow them all.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Nothing in the tests may reach for a network or a login.
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():  # then Triton's kernels run interpreted; it asks at its first import, by whomever
    os.environ["TRITON_INTERPRET"] = "1"
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a script's background job: then so it would be in the runs
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture
def poisoned():
    """What isn't written shows: every new buffer holds NaN, or a huge int."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills them
    assert torch.empty(3).isnan().all() and torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The folder of a small corpus of bytes: 300 kB in three documents for training, 80 kB in one for validation."""
    from data.corpus import Texts, write_corpus
    from data.tokenizer import tokenizer_from_meta
    from training_runs import text

    folder = tmp_path_factory.mktemp("data") / "small"
    train = [(name, text(100_000, seed)) for seed, name in enumerate("abc")]
    write_corpus(folder, Texts(train, [("d", text(80_000, 3))], {}), tokenizer_from_meta({"name": "byte"}))
    return folder


@pytest.fixture
def run(corpus, tmp_path):
    """run(out_dir, **keys): train in this process; the lines of the record."""
    from training.record import read_record
    from training_runs import arguments, train_here

    def run(out_dir="out", **keys):
        train_here(*arguments(corpus, tmp_path / out_dir, **keys))
        return read_record(tmp_path / out_dir / "metrics.jsonl")[1]

    return run


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's tokenizer, where its files are at hand."""
    from configurator import UserError
    from data.tokenizer import tokenizer_from_meta

    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("GPT-2's BPE needs its files: set TIKTOKEN_CACHE_DIR")
    try:
        return tokenizer_from_meta({"name": "gpt2"})
    except UserError as error:
        pytest.skip(f"GPT-2's BPE doesn't load: {error}")
