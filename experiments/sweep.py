"""Trains runs one after the other: each in a child process and a folder of its own, to be stopped and gone on with.

compare_runs.py plans them; `look` finds out what is in a run's folder already, `train_all` trains what is missing.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from configurator import TrainConfig, UserError
from data.lock import owned
from output import progress_bar
from runs import UNRELATED, Run, matters
from training.record import plain, read_record

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass
class Planned:
    name: str
    folder: Path
    arguments: list[str]  # of train.py
    config: TrainConfig  # which these give
    state: str = "new"  # or "begun", with a checkpoint to resume from, or "finished"
    it: int = 0


def look(run: Planned) -> Planned:
    """Set its state and it by what is in its folder. UserError if that was trained differently."""
    record, ckpt = run.folder / "metrics.jsonl", run.folder / "ckpt.pt"
    if not os.path.exists(record):  # then a checkpoint is of no use here; train.py moves it aside
        return run
    header, lines = read_record(record)
    config = plain(dataclasses.asdict(run.config), nonfinite=str)
    asked_for = (
        config.keys() if run.config.init_from == "scratch" else run.config.explicit
    )  # else the base has the architecture
    for name in (asked_for & header["config"].keys()) - (UNRELATED - {"seed"}):
        was = header["config"][name]
        if was != config[name] and matters(name, config):
            raise UserError(f"{run.folder} has a run with {name}={was}, not {config[name]}: choose another --runs")
    at_end = Run(run.name, config, lines).is_finished
    # The last checkpoint is newer than the record, unless train.py was killed just before, or the files were copied.
    if at_end and ckpt.exists() and ckpt.stat().st_mtime_ns <= record.stat().st_mtime_ns:
        from training.checkpoint import load  # with torch, which takes seconds

        at_end = load(ckpt)["iter_num"] >= run.config.max_iters
    run.state = "finished" if at_end else "begun" if ckpt.exists() else "new"
    run.it = lines[-1]["iter"] if lines and run.state != "new" else 0
    return run


def own(folder: Path) -> contextlib.AbstractContextManager[None]:
    """The folder of the runs, made if it isn't there, is this sweep's alone. UserError if another one trains in it."""
    taken = f"another sweep trains in --runs={folder} just now: choose another, or wait for its end"
    return owned(folder, taken, f"--runs={folder} can't be used")


def train_all(planned: list[Planned]) -> None:
    """Train what isn't finished. A signal has the run saved, and ends the program; SIGUSR1 has it saved only, and where
    a reader of the output leaves, or the terminal, all goes on. UserError if a run fails.
    """
    from training.parallel import outlasting_readers  # with torch, which takes seconds

    counts = ", ".join(f"{[run.state for run in planned].count(s)} {s}" for s in ("finished", "begun", "new"))
    print(f"{len(planned)} runs in {planned[0].folder.parent}: {counts}", flush=True)
    signals, notices = [], []
    hangup = [n for n in signal.Signals if n.name == "SIGHUP" and signal.getsignal(n) == signal.SIG_DFL]  # else nohup's
    caught = [signal.SIGINT, signal.SIGTERM, *hangup]
    handlers = {number: signal.signal(number, lambda n, frame: signals.append(signal.Signals(n))) for number in caught}
    for number in [n for n in signal.Signals if n.name == "SIGUSR1" and signal.getsignal(n) == signal.SIG_DFL]:
        handlers[number] = signal.signal(number, lambda n, frame: notices.append(n))
    try:
        with outlasting_readers(), progress_bar(sum(run.config.max_iters for run in planned)) as bar:
            bar.n = bar.initial = sum(run.it for run in planned)
            for run in planned:
                if run.state != "finished" and not signals:
                    train_one(run, bar, signals, notices, f"({planned.index(run) + 1} of {len(planned)})")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if signals:
        print(f"stopped by {signals[0].name}; the same command goes on:\n    {shlex.join(['python', *sys.argv])}")
        sys.exit(130)


def train_one(run: Planned, bar: tqdm, signals: list[int], notices: list[int], count: str) -> None:
    """Train it in a child process, the bar following its record. A signal has it saved, a second ends it at once; those
    in notices are passed on, as wishes to save and go on.
    """
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't make {run.folder}: {error.strerror}; choose another --runs") from error
    record, log = run.folder / "metrics.jsonl", run.folder / "train.log"
    resume = ["--init_from=resume"] if run.state == "begun" else []
    others, begun_at, passed_on = bar.n - run.it, run.it, 0
    text = f"{'resumes' if resume else 'starts'} at iteration {run.it}"
    bar.set_description_str(f"{run.name} {text}")
    if bar.disable:
        print(f"{run.name} {text} {count}", flush=True)
    with open(log, "ab") as file:
        begin, started = file.tell(), time.time()
        # In a session of its own, or a terminal's Ctrl-C would reach it too, and ours would be its second one.
        child = subprocess.Popen(
            [sys.executable, ROOT / "train.py", *run.arguments, *resume],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        for tick in itertools.count():
            ended = child.poll() is not None  # asked before the record is read, which is complete then
            if (ended or tick % 10 == 0) and record.exists() and record.stat().st_mtime > started:
                for line in read_record(record)[1][-1:]:
                    run.it = max(run.it, line["iter"])
                    text = f"loss {line.get('val/loss') or line.get('train/loss', math.nan):.4f}"
                bar.n = others + run.it
            if ended:
                break
            for _ in signals[passed_on:]:
                child.send_signal(signal.SIGINT if passed_on else signal.SIGTERM)  # train.py's second one is SIGINT
                passed_on += 1
            while notices and run.it > begun_at:  # earlier train.py might not expect it, and die of it
                child.send_signal(notices.pop())
            if tick % 10 == 0:
                bar.set_description_str(f"{run.name} {'stops' if passed_on else text}")  # and refresh
            time.sleep(0.1)
    finally:  # whatever happens, no process is left behind
        child.terminate()
        child.wait()
    stopped = passed_on and abs(child.returncode) % 128 in (signal.SIGINT, signal.SIGTERM)
    if child.returncode and not stopped:
        end = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()[-8:]
        raise UserError("\n    ".join([f"{run.name} failed with exit status {child.returncode}; {log} ends:", *end]))
    if bar.disable:
        print(f"{run.name} {'stops' if stopped else 'ends'} at iteration {run.it}, {text}", flush=True)
