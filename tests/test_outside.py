"""What happens to a run from outside: signals, readers that leave, other runs, other processes. Nothing costs it."""

import contextlib
import errno
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from configurator import TrainConfig, UserError
from data.corpus import Texts, write_corpus
from data.loader import Batch, TextChanged
from data.lock import locked
from data.tokenizer import tokenizer_from_meta
from training import checkpoint, parallel
from training.device import Device
from training.evaluation import evaluate
from training.parallel import Outlet, Processes, StopSignal, outlasting_readers
from training.record import read_record, relative
from training_runs import PATIENCE, ROOT, arguments, curve, finish, same, start, text, train_here, wait_for, weights

CPU = Device(torch.device("cpu"), torch.float32, "")
LONG = dict(max_iters=100_000, eval_interval=100_000)
posix = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")


def load(path, name="ckpt.pt"):
    return torch.load(path / name, weights_only=True)


@contextlib.contextmanager
def handlers_kept():
    before = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


# -- readers that leave ---------------------------------------------------------------------------------


@posix
def test_a_broken_pipe_is_a_wish_to_stop(corpus, tmp_path):
    """`| tee log` and Ctrl-C: tee dies of the same signal, then the handler and every print meet a broken pipe."""
    out_dir = tmp_path / "out"
    command = [sys.executable, ROOT / "train.py", *arguments(corpus, out_dir, **LONG)]
    reader, writer = os.pipe()
    process = subprocess.Popen(command, stdout=writer, stderr=writer, start_new_session=True)
    os.close(writer)
    wait_for(process, out_dir / "metrics.jsonl", '"iter": 2,')
    os.close(reader)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 128 + signal.SIGINT
    assert load(out_dir)["iter_num"] == read_record(out_dir / "metrics.jsonl")[1][-1]["iter"] >= 2


@posix
def test_a_reader_that_leaves_ends_the_run_after_a_checkpoint(corpus, tmp_path):
    process = start(corpus, tmp_path / "out", **LONG)
    wait_for(process, tmp_path / "out" / "metrics.jsonl", '"iter": 2,')
    process.stdout.close()
    assert process.wait(PATIENCE) == 128 + 13  # SIGPIPE
    assert load(tmp_path / "out")["iter_num"] >= 2
    assert process.stderr.read().startswith("stopped by SIGPIPE at iteration ")  # where it may still be read


@posix
def test_a_terminal_that_goes_does_not_end_a_disowned_run(corpus, tmp_path):
    """Its prints fail with EIO from then on; it trains to its end in silence."""
    out_dir = tmp_path / "out"
    command = [sys.executable, ROOT / "train.py", *arguments(corpus, out_dir, max_iters=200, eval_interval=100)]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    wait_for(process, out_dir / "metrics.jsonl", '"iter": 2,')
    os.close(ours)
    assert process.wait(PATIENCE) == 0
    assert load(out_dir)["iter_num"] == 200


def test_what_an_outlet_notes_and_drops(tmp_path):
    class Stream:
        def __init__(self, number):
            self.number, self.taken = number, []

        def write(self, text):
            if self.number:
                raise OSError(self.number, "made up")
            self.taken.append(text)

        flush = lambda self: self.write("")
        fileno = lambda self: os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY)

    for number, broken in ((errno.EPIPE, True), (errno.EIO, False), (errno.ENOSPC, False), (0, False)):
        stream = Stream(number)
        outlet = Outlet(stream)
        assert outlet.write("text") == 4 and outlet.flush() is None
        assert outlet.broken is broken and stream.taken == ([] if number else ["text", ""])
    with outlasting_readers() as outlets:
        assert [sys.stdout, sys.stderr] == outlets and sys.stdout.isatty() is False
    assert sys.stdout is not outlets[0]


@posix
def test_without_a_standard_output_a_run_trains(corpus, tmp_path):
    command = [sys.executable, ROOT / "train.py", *arguments(corpus, tmp_path / "out", max_iters=4)]
    shell = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *map(str, command)]
    assert subprocess.run(shell, timeout=PATIENCE).returncode == 0
    assert load(tmp_path / "out")["iter_num"] == 4


# -- signals --------------------------------------------------------------------------------------------


@posix
def test_which_signals_ask_for_what():
    with handlers_kept():
        stop = StopSignal(world=1)
        signal.raise_signal(signal.SIGUSR1)
        assert not stop.saves and not stop.agreed(CPU) and stop.saves
        stop.saves = False
        assert not stop.agreed(CPU) and not stop.saves
        signal.raise_signal(signal.SIGHUP)
        assert stop.agreed(CPU) and (stop.name, stop.status) == ("SIGHUP", 129)


@posix
def test_a_signal_that_was_ignored_stays_ignored():
    """As nohup has it of SIGHUP."""
    with handlers_kept():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = StopSignal(world=1)
        signal.raise_signal(signal.SIGHUP)
        assert not stop.agreed(CPU) and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@posix
def test_sigusr1_saves_and_the_run_goes_on(run, tmp_path, monkeypatch, capsys):
    real = train.train_step

    def step(cfg, *args):
        if args[5] == 2:
            signal.raise_signal(signal.SIGUSR1)
        if args[5] == 5:
            assert load(tmp_path / "out")["iter_num"] == 3
        return real(cfg, *args)

    monkeypatch.setattr(train, "train_step", step)
    with handlers_kept():
        assert run(eval_interval=100)[-1]["iter"] == 12
    assert "saved at iteration 3\n" in capsys.readouterr().out


@posix
def test_sigusr1_saves_during_an_evaluation(run, tmp_path, monkeypatch):
    real, batches = train.Corpus.val_batch, []

    def val_batch(self, starts):
        batches.append(len(starts))
        if len(batches) == 9:  # an evaluation has three of them, and one for the probe
            signal.raise_signal(signal.SIGUSR1)
        if len(batches) == 10:
            assert load(tmp_path / "out")["iter_num"] == 8 and load(tmp_path / "out")["evaluation_owed"]
        return real(self, starts)

    monkeypatch.setattr(train.Corpus, "val_batch", val_batch)
    with handlers_kept():
        assert run(always_save_checkpoint=False)[-1]["iter"] == 12 and batches[8:10] == [2, 2]


@posix
def test_an_interrupt_that_was_ignored_stays_ignored_after_another_signal():
    with handlers_kept():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop = StopSignal(world=1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed(CPU) and signal.getsignal(signal.SIGINT) == signal.SIG_IGN


# -- evaluations ----------------------------------------------------------------------------------------


def test_a_signal_cuts_an_evaluation_off_and_resume_makes_up_for_it(run, tmp_path, monkeypatch):
    """The checkpoint is there before the first batch, and owes the evaluation; the curve is that of a run without."""
    whole = run("whole")
    real, batches = train.evaluate, []

    def interrupted(model, corpus, *args):
        if len(batches) == 2:  # the third evaluation: of iteration 8
            assert load(tmp_path / "out")["iter_num"] == 8 and load(tmp_path / "out")["evaluation_owed"]
            signal.raise_signal(signal.SIGTERM)
        batches.append(1)
        return real(model, corpus, *args)

    with monkeypatch.context() as patch, handlers_kept():
        patch.setattr(train, "evaluate", interrupted)
        with pytest.raises(SystemExit) as exit_:
            run()
    assert exit_.value.code == 128 + signal.SIGTERM
    state = load(tmp_path / "out")
    assert state["iter_num"] == 8 and state["evaluation_owed"]
    assert curve(run(init_from="resume")) == curve(whole)
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("always", [True, False])
def test_too_little_memory_in_an_evaluation_costs_nothing(run, tmp_path, monkeypatch, always):
    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    whole = run("whole", always_save_checkpoint=always)
    with monkeypatch.context() as patch:
        real = train.evaluate
        patch.setattr(train, "evaluate", lambda m, c, *a: real(m, c, *a) if fails["not yet"] else no_memory())
        fails = {"not yet": True}
        step = train.train_step
        patch.setattr(
            train, "train_step", lambda *a: (fails.update({"not yet": a[6] != 7}), step(*a))[1]
        )  # in iteration 8
        with pytest.raises(torch.OutOfMemoryError):
            run(always_save_checkpoint=always)
    assert load(tmp_path / "out")["iter_num"] == 8 and load(tmp_path / "out")["evaluation_owed"]
    assert curve(run(init_from="resume", always_save_checkpoint=always)) == curve(whole)


def test_an_evaluation_owed_at_the_end_is_made(run, tmp_path, monkeypatch):
    whole = run("whole")
    real, evaluations = train.evaluate, []

    def interrupted(model, corpus, *args):
        evaluations.append(1)
        if len(evaluations) == 4:
            signal.raise_signal(signal.SIGINT)
        return real(model, corpus, *args)

    with monkeypatch.context() as patch, handlers_kept():
        patch.setattr(train, "evaluate", interrupted)
        with pytest.raises(SystemExit):
            run()
    assert load(tmp_path / "out")["evaluation_owed"]
    assert curve(run(init_from="resume")) == curve(whole) and not load(tmp_path / "out")["evaluation_owed"]


@pytest.mark.parametrize("what", ["train_step", "evaluate"])
def test_numbers_that_are_not_finite_take_no_checkpoint(run, tmp_path, monkeypatch, what):
    """What was saved before is the last that is worth something, and the message says so."""
    real, calls = getattr(train, what), []

    def ruined(*args):
        calls.append(1)
        if what == "train_step":
            return (math.nan, 1.0) if len(calls) == 7 else real(*args)
        return real(*args) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(train, what, ruined)
    with pytest.raises(UserError, match="loss .*is nan; .*ckpt.pt is from before"):
        run(keep_checkpoints=2)
    assert load(tmp_path / "out")["iter_num"] == 4
    assert sorted(p.name for p in (tmp_path / "out").glob("ckpt*")) == ["ckpt-4.pt", "ckpt.pt", "ckpt_best.pt"]


def test_a_first_checkpoint_whose_loss_is_not_finite_is_none(run, tmp_path, monkeypatch):
    real, calls = train.evaluate, []
    monkeypatch.setattr(train, "evaluate", lambda *a: real(*a) * (math.nan if calls.append(1) or calls[1:] else 1))
    with pytest.raises(UserError, match="validation loss at iteration 4 is nan. Try"):
        run()
    assert not list((tmp_path / "out").glob("*.pt*"))


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_put_back_after_one_error_only(tmp_path, monkeypatch, links):
    path = tmp_path / "ckpt.pt"
    if not links:
        monkeypatch.setattr(checkpoint.os, "link", lambda a, b: (_ for _ in ()).throw(OSError(1, "no links here")))
    for error, there in ((train.Diverged, "a"), (ValueError, "b"), (None, "b")):
        path.write_text("a")
        with contextlib.suppress(train.Diverged, ValueError), checkpoint.put_back(path, train.Diverged):
            (tmp_path / "new").write_text("b")
            os.replace(tmp_path / "new", path)
            if error:
                raise error("made up")
        assert path.read_text() == there and [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


@posix
def test_a_notice_before_the_first_step_is_none(corpus, tmp_path):
    """While text is prepared, a checkpoint is read, other processes are waited for."""
    process = start(corpus, tmp_path / "out", max_iters=2)
    deadline = time.time() + PATIENCE
    while not (int(open(f"/proc/{process.pid}/status").read().split("SigCgt:")[1].split()[0], 16) >> 9) & 1:
        assert process.poll() is None and time.time() < deadline
    process.send_signal(signal.SIGUSR1)
    finish(process)


def test_a_record_that_cannot_be_written_ends_the_run_after_a_checkpoint(run, tmp_path, monkeypatch, capsys):
    real = train.Record.log

    def log(self, metrics):
        if metrics["iter"] == 6:
            raise UserError("can't write metrics.jsonl: made up")
        real(self, metrics)

    monkeypatch.setattr(train.Record, "log", log)
    with pytest.raises(UserError, match="made up"):
        run(log_interval=1)
    assert load(tmp_path / "out")["iter_num"] == 6
    err = capsys.readouterr().err
    assert "stopped by an error at iteration 6, saved in" in err and "--init_from=resume --out_dir=" in err


def test_processes_with_fewer_windows_ask_as_often(monkeypatch):
    """evaluate asks all processes between batches: each must ask as often, or they wait for one another for ever."""
    asked = []

    class Corpus:
        block_size = 2
        val_batch = lambda self, starts: Batch(torch.zeros(len(starts), 2), torch.zeros(len(starts), 2))

    class Model(torch.nn.Module):
        forward = lambda self, x, y, documents, reduction: (None, torch.ones(len(x), 2))

    monkeypatch.setattr("training.evaluation.dist.all_reduce", lambda total: total.fill_(5.0))
    counts = []
    for rank in range(3):
        asked.clear()
        evaluate(Model(), Corpus(), list(range(5)), 1, CPU, rank, 3, lambda: asked.append(1))
        counts.append(len(asked))
    assert counts == [2, 2, 2]


# -- other runs, and other texts ------------------------------------------------------------------------


@posix
def test_two_runs_in_one_folder(run, tmp_path, monkeypatch):
    run(max_iters=4)
    before = (tmp_path / "out/ckpt.pt").read_bytes(), (tmp_path / "out/metrics.jsonl").read_bytes()
    monkeypatch.setattr(checkpoint, "load", lambda path: pytest.fail("the other run may be writing it"))
    with locked(tmp_path / "out", "taken"):
        for keys in ({}, {"init_from": "resume", "max_iters": 8}):
            with pytest.raises(UserError, match="another run writes to out_dir=.*out just now: choose another"):
                run(**keys)
    assert before == ((tmp_path / "out/ckpt.pt").read_bytes(), (tmp_path / "out/metrics.jsonl").read_bytes())
    monkeypatch.undo()
    assert run(init_from="resume", max_iters=8)[-1]["iter"] == 8


def test_a_text_that_is_written_over_ends_the_run_after_a_checkpoint(run, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    write_corpus(folder, Texts([("a", text(9000))], [("b", text(2000, 1))], {}), tokenizer_from_meta({"name": "byte"}))
    real = train.train_step

    def step(*args):
        path = folder / "train.bin"
        if args[6] == 4:
            path.write_bytes(path.read_bytes())  # the same: nothing has happened
        if args[6] == 6:
            path.write_bytes(bytes(path.stat().st_size))
        return real(*args)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(TextChanged, match="train.bin has changed since training began"):
        run(dataset=folder)
    assert load(tmp_path / "out")["iter_num"] == 6


@pytest.mark.parametrize("windows", ["packed", "document"])
def test_validation_without_long_documents_is_told(run, tmp_path, capsys, windows):
    """The loss of a context of 64 says nothing there of one of 64."""
    for size in (50, 90):
        texts = Texts([("a", text(9000))], [(str(n), text(size, n)) for n in range(40)], {})
        write_corpus(tmp_path / "mine", texts, tokenizer_from_meta({"name": "byte"}))
        run(dataset=tmp_path / "mine", windows=windows, max_iters=1)
        warned = "WARNING: no validation document has more than 64 tokens, the longest 51:" in capsys.readouterr().out
        assert warned == (size == 50)


def test_the_record_says_on_which_text(run, tmp_path):
    run(max_iters=2)
    header = read_record(tmp_path / "out/metrics.jsonl")[0]
    saved = load(tmp_path / "out")
    assert all(len(header[name]) == 64 and header[name] == saved[name] for name in ("train_sha256", "val_sha256"))


@pytest.mark.parametrize("word", ["Resume", "GPT2", "Scratch"])
def test_a_word_in_capitals_is_understood(run, word):
    with pytest.raises(UserError, match=f"init_from={word}: did you mean --init_from={word.lower()}"):
        run(init_from=word)


# -- checkpoints ----------------------------------------------------------------------------------------


def test_keep_checkpoints(run, tmp_path):
    run(keep_checkpoints=2)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.pt")) == [
        "ckpt-12.pt", "ckpt-8.pt", "ckpt.pt", "ckpt_best.pt"
    ]  # fmt: skip
    assert load(tmp_path / "out", "ckpt-8.pt")["iter_num"] == 8
    assert (tmp_path / "out/ckpt-12.pt").read_bytes() == (tmp_path / "out/ckpt.pt").read_bytes()
    run(max_iters=4, seed=2)  # without the key none are kept, and the earlier run's go with it
    assert not list((tmp_path / "out").glob("ckpt-*.pt"))
    assert len(list((tmp_path / "out/earlier-1").glob("ckpt-*.pt"))) == 2


def test_a_kept_checkpoint_is_a_file_of_its_own(run, tmp_path):
    """Going back by cp, which writes into ckpt.pt in place, changes none of them; and what is saved then is kept."""
    run(keep_checkpoints=1, max_iters=8)
    assert load(tmp_path / "out", "ckpt-8.pt")["iter_num"] == 8 and not (tmp_path / "out/ckpt-4.pt").exists()
    earlier = {**load(tmp_path / "out"), "iter_num": 4, "windows_consumed": 16}
    torch.save(earlier, tmp_path / "earlier.pt")
    shutil.copyfile(tmp_path / "earlier.pt", tmp_path / "out/ckpt.pt")
    assert load(tmp_path / "out", "ckpt-8.pt")["iter_num"] == 8
    run(init_from="resume", keep_checkpoints=1, max_iters=6)
    assert [path.name for path in checkpoint.kept(tmp_path / "out")] == ["ckpt-6.pt"]


def test_a_step_that_fails_costs_no_more_than_itself(run, tmp_path, monkeypatch):
    """For want of memory, say, or as another process has died. The error is told as it is."""
    real = train.train_step

    def step(*args):
        if args[6] == 6:
            raise FileNotFoundError(2, "No such file or directory")
        return real(*args)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(FileNotFoundError):
        run(eval_interval=100)
    assert load(tmp_path / "out")["iter_num"] == 6


def test_room_is_looked_at_before_training(run, tmp_path, monkeypatch):
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    with pytest.raises(UserError, match=r"has 2 MB left, and this run's checkpoints take 4 MB more: make room"):
        run(keep_checkpoints=5)
    assert not (tmp_path / "out/metrics.jsonl").exists()
    run(max_iters=2, eval_interval=2)
    saved = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.pt"))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=saved))
    with pytest.raises(UserError, match="make room"):  # the earlier run's are kept, and make none
        run(max_iters=2)
    run(init_from="resume", max_iters=4)  # here they are replaced


def test_the_size_that_room_is_looked_at_for_is_that_of_the_file(run, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(checkpoint, "check_room", lambda out_dir, size, keeps, resumes: sizes.append(size))
    run(max_iters=4)
    actual = (tmp_path / "out/ckpt.pt").stat().st_size
    assert 0.7 * actual < sizes[0] < 1.1 * actual  # the rest is names and numbers, much in a model as small as this


# -- resume means what it says ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
def test_resumed_with_another_batch_size_each_window_is_read_once(run, monkeypatch, batch_size):
    read = []
    real = train.Corpus.batch

    def batch(self, count, seed, first):
        read.extend(range(first, first + count))
        return real(self, count, seed, first)

    monkeypatch.setattr(train.Corpus, "batch", batch)
    run(max_iters=4)
    run(init_from="resume", max_iters=6, batch_size=batch_size)
    run(init_from="resume", max_iters=8, batch_size=3, gradient_accumulation_steps=1)
    assert read == list(range(4 * 4 + 2 * 2 * batch_size + 2 * 3))


@pytest.mark.parametrize("change", ["text", "windows", "seed"])
def test_resumed_on_other_windows_the_first_is_read_next(run, tmp_path, monkeypatch, change):
    run(max_iters=4)
    keys = {"windows": dict(windows="document"), "seed": dict(seed=9)}.get(change, {})
    if change == "text":
        other = [("a", text(20_000, seed=9))]
        write_corpus(tmp_path / "other", Texts(other, other, {}), tokenizer_from_meta({"name": "byte"}))
        keys = dict(dataset=tmp_path / "other")
    real, read = train.Corpus.batch, []
    monkeypatch.setattr(train.Corpus, "batch", lambda self, *args: (read.append(args[2]), real(self, *args))[1])
    run(init_from="resume", max_iters=6, **keys)
    run(init_from="resume", max_iters=8, **keys)
    assert read == [0, 2, 4, 6, 8, 10, 12, 14]


@pytest.mark.parametrize("change", ["text", "eval_iters", "windows", None])
def test_the_best_loss_is_forgotten_where_validation_is_another(run, tmp_path, capsys, change):
    run(max_iters=4)
    state = load(tmp_path / "out")
    torch.save({**state, "best_val_loss": 0.5}, tmp_path / "out/ckpt.pt")
    keys = {
        "eval_iters": dict(eval_iters=4),
        None: dict(eval_iters=6, batch_size=1),
        "windows": dict(windows="document"),
    }.get(change, {})
    if change == "text":
        other = [("a", text(20_000, seed=9))]
        write_corpus(tmp_path / "other", Texts(other, other, {}), tokenizer_from_meta({"name": "byte"}))
        keys = dict(dataset=tmp_path / "other")
    run(init_from="resume", max_iters=8, **keys)
    best, out = load(tmp_path / "out")["best_val_loss"], capsys.readouterr().out
    assert ("so the best loss begins anew" in out) == (change is not None)
    assert best == 0.5 if change is None else 1 < best < math.log(257)


def test_evaluating_needs_no_optimizer(run, tmp_path, capsys):
    run(max_iters=4)
    state = load(tmp_path / "out")
    del state["optimizer"]
    torch.save(state, tmp_path / "out/ckpt.pt")
    capsys.readouterr()
    before = (tmp_path / "out/metrics.jsonl").read_bytes()
    train_here(*arguments(state["config"]["dataset"], tmp_path / "out", init_from="resume", eval_only=True))
    assert "iter 4: val loss" in capsys.readouterr().out
    assert (tmp_path / "out/metrics.jsonl").read_bytes() == before


def test_masks_of_checkpoints_from_before_pytorch_2_are_dropped(run, tmp_path):
    gpt2_like = dict(pos="learned", norm="layernorm", attn_backward="exact", bias=True)
    run(max_iters=4, **gpt2_like)
    state = load(tmp_path / "out")
    for layer in range(2):
        name = f"transformer.h.{layer}.attn"
        state["model"] |= {f"{name}.bias": torch.ones(1, 1, 64, 64).tril(), f"{name}.masked_bias": torch.tensor(-1e4)}
    torch.save(state, tmp_path / "out/ckpt.pt")
    assert run(init_from="resume", max_iters=6, **gpt2_like)[-1]["iter"] == 6


# -- variables of torchrun ------------------------------------------------------------------------------


TORCHRUN_SETS = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="29500")


@pytest.mark.parametrize(
    "environment, want",
    [({}, (0, 1, None)), (dict(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0"), (0, 1, 0)), (TORCHRUN_SETS, (1, 2, 1))],
)
def test_complete_variables(monkeypatch, environment, want):
    set_variables(monkeypatch, environment)
    assert Processes.here() == Processes(*want)


@pytest.mark.parametrize(
    "environment, message",
    [
        (dict(RANK="1"), "RANK=1, which is impossible"),
        (dict(WORLD_SIZE="2"), "WORLD_SIZE=2, but no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (dict(WORLD_SIZE=""), "WORLD_SIZE='', which is no number"),
        (dict(RANK="abc"), "RANK='abc', which is no number"),
        (dict(RANK="-1"), "RANK='-1', which is no number"),
        (dict(WORLD_SIZE="0"), "WORLD_SIZE=0, which is impossible"),
        (dict(LOCAL_RANK="3"), "LOCAL_RANK=3, which is impossible"),
        ({**TORCHRUN_SETS, "RANK": "2"}, "RANK=2 WORLD_SIZE=2 .*, which is impossible"),
        ({**TORCHRUN_SETS, "MASTER_PORT": "http"}, "MASTER_PORT='http', which is no number"),
        ({**TORCHRUN_SETS, "MASTER_ADDR": ""}, "but no MASTER_ADDR"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_incomplete_or_impossible_variables(run, tmp_path, monkeypatch, environment, message):
    set_variables(monkeypatch, environment)
    with pytest.raises(UserError, match=f"the environment has .*{message}.*torchrun sets them all. For one process"):
        run()
    assert not (tmp_path / "out").exists()


def set_variables(monkeypatch, environment):
    for name in parallel.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_a_meeting_that_nobody_joins_says_for_whom_it_waits(monkeypatch, capsys):
    set_variables(monkeypatch, {**TORCHRUN_SETS, "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "0"})
    monkeypatch.setattr(parallel, "SILENCE", 0.1)

    def nobody(backend, timeout):
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # or nobody would hear a Ctrl-C
        time.sleep(0.5)
        raise torch.distributed.DistStoreError("Timed out after 1801 seconds waiting for clients\nmore")

    monkeypatch.setattr(parallel.dist, "init_process_group", nobody)
    with pytest.raises(UserError, match="the 2 processes did not meet at localhost:0 .Timed out.* start all of them"):
        Processes.here().join(TrainConfig(), CPU)
    assert capsys.readouterr().err == "process 0 waits for the other 1 of 2 at localhost:0\n"
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL


@pytest.mark.slow
def test_a_real_meeting_that_nobody_joins(corpus, tmp_path):
    """The wait goes on in torch's own code: what is said comes from another thread meanwhile."""
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {**os.environ, **TORCHRUN_SETS, "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": str(port)}
    command = [sys.executable, ROOT / "train.py", *arguments(corpus, tmp_path / "out")]
    process = subprocess.Popen(command, env=env, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    line = process.stderr.readline()
    process.kill()
    process.communicate()
    assert line == f"process 0 waits for the other 1 of 2 at localhost:{port}\n"


# -- small ones -----------------------------------------------------------------------------------------


def test_paths_between_which_no_way_leads(monkeypatch):
    def other_drive(path, start):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", other_drive)
    assert relative("a/b") == os.path.abspath("a/b")


@pytest.mark.parametrize(
    "out_dir, keys, message",
    [
        ("x" * 300, {}, "out_dir=.* can't be used: File name too long"),
        ("x" * 300, {"init_from": "resume"}, "no checkpoint at"),
        ("out", {"init_from": "x" * 300}, "init_from=x+ is none of"),
        ("out", {"dataset": "x" * 300}, "has no train.bin and no val.bin"),
    ],
    ids=["out_dir", "resume", "init_from", "dataset"],
)
def test_names_that_are_too_long(run, out_dir, keys, message):
    with pytest.raises(UserError, match=message):
        run(out_dir, **keys)


def test_finish_is_for_processes_that_end_well():
    with pytest.raises(AssertionError):
        finish(subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], text=True, stdout=-1, stderr=-1))
