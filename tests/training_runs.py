"""Small runs of train.py, in this process or as one of their own, and what is looked at of them."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import train

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
PATIENCE = 600  # seconds until a process counts as hanging: generous, as the machine may be busy

TINY = dict(
    n_layer=2,
    n_head=2,
    n_embd=32,
    block_size=64,
    batch_size=2,
    gradient_accumulation_steps=2,
    pos="rope",
    max_iters=12,
    eval_interval=4,
    eval_iters=3,
    learning_rate=3e-3,
    warmup_iters=3,
    lr_decay_iters=12,
    min_lr=3e-4,
    attn_backward="sus",
    sus_c=0.4,
    wandb_log=False,
    device="cpu",
    dtype="float32",
)


def text(characters, seed=0):
    """A made-up source file, the same on every machine: words of a small language, in lines of code and of prose."""
    rng = random.Random(seed)
    syllables = "ba de fi lo mu ra se ti vo na ke su".split()
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(150)]
    weights = [1 / (rank + 2) for rank in range(len(words))]  # Zipf's law
    lines, length = [], 0
    while length < characters:
        name, *some = rng.choices(words, weights, k=rng.randint(3, 9))
        line = [f"def {name}({', '.join(some)}):", f"    return {' + '.join([name, *some])}", f"# {' '.join(some)}."]
        lines.append(rng.choice(line))
        length += len(lines[-1]) + 1
    return "\n".join(lines)[:characters]


def arguments(corpus, out_dir, **keys):
    return [f"--{k}={v}" for k, v in {**TINY, "dataset": corpus, "out_dir": out_dir, **keys}.items()]


def train_here(*argv):
    """train.main() with these arguments; signals are then handled as before."""
    before = sys.argv, [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    sys.argv = ["train.py", *map(str, argv)]
    try:
        train.main()
    finally:
        sys.argv = before[0]
        for number, handler in before[1]:
            signal.signal(number, handler)


def start(corpus, out_dir, *prefix, **keys):
    """The same as a process of its own, in a process group of its own."""
    command = [sys.executable, *prefix, ROOT / "train.py", *arguments(corpus, out_dir, **keys)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(process):
    """(stdout, stderr) of a process that is to end well."""
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return out, err


def wait_for(process, record, text):
    """Until the record of a process that runs has the text."""
    deadline = time.time() + PATIENCE
    while not (record.exists() and text in record.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.005)


def curve(lines):
    """What must repeat exactly: losses, learning rates and gradient norms by iteration, but no times."""
    exact = ("iter", "train/loss", "val/loss", "val/loss_by_position", "lr", "train/grad_norm", "sus/kept_per_row")
    return [{k: v for k, v in line.items() if k in exact} for line in lines]


def weights(path):
    return torch.load(path / "ckpt.pt", weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
