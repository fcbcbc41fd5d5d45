"""train.py and sample.py as a user runs them: resume, signals, processes, mistakes, and the loss that SUS reaches."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import sample
import train
from configurator import TrainConfig, UserError
from data.corpus import Texts, write_corpus
from data.tokenizer import load_tokenizer, tokenizer_from_meta
from folders import LINES, tokenizer_folder
from model import GPT
from training import hugging_face, report
from training.optimizer import learning_rate
from training.parallel import StopSignal
from training.record import read_record
from training_runs import (
    PATIENCE,
    ROOT,
    TORCHRUN,
    arguments,
    curve,
    finish,
    same,
    start,
    text,
    train_here,
    wait_for,
    weights,
)

# -- the record and its numbers --------------------------------------------------------------------


def test_a_run_learns_and_records(run, tmp_path):
    lines = run(max_iters=30, lr_decay_iters=30, eval_interval=10)
    val = [line for line in lines if "val/loss" in line]
    steps = [line for line in lines if "train/loss" in line]
    assert [line["iter"] for line in val] == [0, 10, 20, 30] and [line["iter"] for line in steps] == list(range(1, 31))
    assert abs(val[0]["val/loss"] - math.log(257)) < 0.3 and val[-1]["val/loss"] < val[0]["val/loss"] - 1
    assert {"0-63"} == val[0]["val/loss_by_position"].keys()
    assert {"iter", "train/loss", "lr", "train/tok_per_sec", "train/dt", "train/mfu", "sus/c"} <= steps[0].keys()
    probe = {"attn/forward_ms", "attn/backward_ms", "attn/exact_forward_ms", "attn/exact_backward_ms"}
    assert all(line[name] > 0 for name in probe for line in val)
    assert all(0 < line["sus/kept_per_row"] <= 20 and line["sus/kept_fraction"] < 0.6 for line in val)
    state = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert state["iter_num"] == 30 and state["tokenizer"] == {"name": "byte"} and state["config"]["sus_c"] == 0.4
    best = torch.load(tmp_path / "out" / "ckpt_best.pt", weights_only=True)
    assert best["best_val_loss"] == min(line["val/loss"] for line in val)


def test_validation_is_the_same_for_every_run(run):
    """Same seed, so the same weights at iteration 0: exact and SUS see the same windows, without noise."""
    sus, exact = run("sus", max_iters=0), run("exact", max_iters=0, attn_backward="exact")
    assert sus[0]["val/loss"] == exact[0]["val/loss"]
    assert exact[0]["attn/forward_ms"] == exact[0]["attn/exact_forward_ms"] and "sus/kept_per_row" not in exact[0]


def test_evaluation_does_not_disturb_training(run):
    often, seldom = run("often", eval_interval=1), run("seldom", eval_interval=12)
    losses = lambda lines: [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses(often) == losses(seldom)


def test_infinite_c_follows_exact(run):
    a, b = run("a", sus_c="inf"), run("b", attn_backward="exact")
    for x, y in zip(a, b):
        if "train/loss" in x:
            assert abs(x["train/loss"] - y["train/loss"]) < 1e-4


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"attn_backward": "exact", "activation_checkpointing": True},
        *({"attn_backward": "exact", "dtype": d} for d in ("bfloat16", "float16")),
    ],
    ids=["sus", "exact-recomputed", "exact-bfloat16", "exact-float16"],
)
def test_the_analytic_backward_trains_as_autograd_does(run, capsys, keys):
    """The same weights at first, so the same bits of the first loss; then the same to what gradients' rounding makes of
    it.
    """
    a, b = run("autograd", **keys), run("analytic", backprop="analytic", **keys)
    assert "gradients without autograd" in capsys.readouterr().out
    assert a[0]["val/loss"] == b[0]["val/loss"] and a[1]["train/loss"] == b[1]["train/loss"]
    assert len(a) == len(b) == 16
    for x, y in zip(a, b):
        for name in {"train/loss", "val/loss", "train/grad_norm"} & x.keys():
            assert abs(x[name] - y[name]) < (2e-2 if "dtype" in keys else 2e-4) * max(1, x[name]), (x["iter"], name)


def test_the_analytic_backward_makes_no_graph(run, monkeypatch):
    """Autograd's engine runs for the probe at evaluations, never for a step."""
    steps = []
    train_step = train.train_step

    def step(*args):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", None)
            patch.setattr(torch.autograd, "grad", None)
            steps.append(train_step(*args))
        return steps[-1]

    monkeypatch.setattr(train, "train_step", step)
    run(backprop="analytic")
    assert len(steps) == 12


def test_lowrank_records_its_bound_and_follows_exact_where_that_is_small(run, capsys):
    keys = dict(block_size=160, batch_size=1, max_iters=6, eval_interval=3, qk_norm=True, qk_norm_scale=0.5)
    a, b = run("a", attn_backward="lowrank", lowrank_degree=4, **keys), run("b", attn_backward="exact", **keys)
    assert "low-rank backward, degree 4, 20,349 features a token; exact forward" in capsys.readouterr().out
    val = [line for line in a if "val/loss" in line]
    assert all(0 < line["lowrank/bound"] <= 1 and 0 < line["lowrank/worst_error"] < 0.02 for line in val)
    assert val[0]["attn/backward_ms"] != val[0]["attn/exact_backward_ms"] and "lowrank/bound" not in b[0]
    for x, y in zip(a, b):
        if "train/loss" in x:
            assert abs(x["train/loss"] - y["train/loss"]) < 1e-4


def test_lowrank_warns_once_where_the_polynomial_is_meaningless(run, capsys):
    keys = dict(attn_backward="lowrank", max_iters=4, eval_interval=2)
    run("a", **keys, qk_norm=True)
    out = capsys.readouterr().out
    assert (
        out.count("WARNING: at iteration 0 scores of attention reach")
        == 1
        == out.count("lowrank_degree=2 is off by more than 1000%")
    )
    run("b", **keys, qk_norm=True, qk_norm_scale=0.5)
    assert "WARNING: at iteration" not in capsys.readouterr().out


def test_lowrank_with_too_many_features_is_refused_at_once(run, tmp_path):
    with pytest.raises(
        UserError, match=r"lowrank_degree=10 means 13,037,895 features a token with heads of 16.*lower --lowrank_degree"
    ):
        run(attn_backward="lowrank", lowrank_degree=10)
    assert not (tmp_path / "out").exists()


def test_position_buckets():
    assert report.position_buckets(torch.arange(300.0)) == {
        "0-63": 31.5,
        "64-127": 95.5,
        "128-255": 191.5,
        "256-299": 277.5,
    }
    assert report.position_buckets(torch.zeros(10)) == {"0-9": 0.0}


def test_learning_rate():
    cfg = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=109)
    lr = [learning_rate(cfg, it) for it in range(200)]
    assert lr[0] == 0.1 and lr[8] == 0.9 and lr[9] == 1.0 and abs(lr[59] - 0.55) < 1e-12 and set(lr[109:]) == {0.1}
    same_point = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=5, lr_decay_iters=5)
    assert [learning_rate(same_point, it) for it in (4, 5, 6)] == [5 / 6, 0.1, 0.1]
    assert learning_rate(TrainConfig(decay_lr=False), 10**9) == 6e-4


# -- resume ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [{}, pytest.param({"attn_backward": "exact", "dropout": 0.2}, marks=pytest.mark.slow)],
    ids=["sus", "exact-with-dropout"],
)
def test_a_killed_run_resumes_bit_for_bit(run, corpus, tmp_path, keys):
    """kill -9 somewhere after the first checkpoint; the record and the weights must equal an uninterrupted run's."""
    keys = {**keys, "max_iters": 60, "lr_decay_iters": 60, "eval_interval": 10}
    a = run("whole", **keys)
    killed = start(corpus, tmp_path / "killed", **keys)
    wait_for(killed, tmp_path / "killed" / "metrics.jsonl", '"iter": 15')
    killed.kill()
    killed.wait()
    at = torch.load(tmp_path / "killed" / "ckpt.pt", weights_only=True)["iter_num"]
    assert 10 <= at < 60
    assert curve(a) == curve(run("killed", init_from="resume", **keys))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_leave(corpus, tmp_path, number):
    process = start(corpus, tmp_path / "out", max_iters=100_000, eval_interval=100_000)
    record = tmp_path / "out" / "metrics.jsonl"
    wait_for(process, record, '"iter": 2,')
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number and "Traceback" not in err
    assert "resume" in err
    state = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert state["iter_num"] == read_record(record)[1][-1]["iter"] >= 2


def test_a_second_ctrl_c_ends_at_once_but_not_under_torchrun():
    """Under torchrun the second SIGINT is torchrun's own, sent on while the process saves."""
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        stop = StopSignal(world=2)
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT
        StopSignal(world=1)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


def test_resume_in_two_parts_equals_one(run, tmp_path):
    whole = run("whole")
    run("parts", max_iters=4)
    parts = run("parts", init_from="resume")
    assert curve([l for l in parts if l["iter"] > 4]) == curve([l for l in whole if l["iter"] > 4])
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_resuming_a_finished_run_says_so_and_changes_nothing(run, tmp_path, capsys):
    run()
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    capsys.readouterr()
    run(init_from="resume")
    assert "is finished" in capsys.readouterr().out
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before


def test_resume_takes_keys_from_the_checkpoint_and_prints_changes(run, tmp_path, corpus, monkeypatch, capsys):
    run(max_iters=4)
    capsys.readouterr()
    argv = [f"--out_dir={tmp_path / 'out'}", "--init_from=resume", "--max_iters=6", "--sus_c=5"]
    train_here(*argv)
    out = capsys.readouterr().out
    assert "sus_c was 0.4, is now 5.0" in out and "max_iters was 4, is now 6" in out and "n_layer" not in out
    state = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert state["iter_num"] == 6 and state["config"]["batch_size"] == 2 and state["config"]["sus_c"] == 5


def test_resume_on_other_text_says_so(run, tmp_path, corpus, capsys):
    run(max_iters=2)
    run(max_iters=3, init_from="resume")
    assert "is not the one that the run began with" not in capsys.readouterr().out
    other = [("a", text(20_000, seed=9))]
    write_corpus(tmp_path / "other", Texts(other, other, {}), tokenizer_from_meta({"name": "byte"}))
    run(max_iters=4, init_from="resume", dataset=tmp_path / "other")
    assert (
        f"the training text in {tmp_path / 'other'} is not the one that the run began with" in capsys.readouterr().out
    )


def test_resume_applies_changed_hyperparameters(run, tmp_path):
    run(max_iters=4)
    run(init_from="resume", max_iters=6, weight_decay=0.5, beta2=0.9)
    groups = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0] and {g["betas"] for g in groups} == {(0.9, 0.9)}


def test_a_checkpoint_in_nanogpt_s_form_resumes(run, tmp_path):
    """Its model_args lack the keys that nanoGPT lacks, hold dropout, and its compiled weights have a prefix."""
    gpt2_like = dict(pos="learned", norm="layernorm", attn_backward="exact", bias=True)
    run(max_iters=4, **gpt2_like)
    path = tmp_path / "out" / "ckpt.pt"
    state = torch.load(path, weights_only=True)
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
    state["model_args"] = {**{k: state["model_args"][k] for k in names}, "dropout": 0.1}
    state["model"] = {f"_orig_mod.{k}": v for k, v in state["model"].items()}
    state["config"] = {k: v for k, v in state["config"].items() if k not in ("norm", "pos", "n_kv_head")}
    for name in ("tokenizer", "scaler", "wandb_run_id"):
        del state[name]
    torch.save(state, path)
    with pytest.raises(UserError, match="norm=rmsnorm conflicts with the checkpoint"):
        run(init_from="resume", **{**gpt2_like, "norm": "rmsnorm"})
    assert run(init_from="resume", max_iters=6, dropout=0.2, **gpt2_like)[-1]["iter"] == 6


def test_a_checkpoint_of_november_2026_loads_and_goes_on(corpus, tmp_path):
    """files/checkpoint-2026-11.pt was written by the version of then: what it computes is what it did."""
    path = tmp_path / "ckpt.pt"
    path.write_bytes((ROOT / "tests/files/checkpoint-2026-11.pt").read_bytes())
    model, tokenizer = sample.load_model(path)
    idx = torch.arange(2 * 33).view(2, 33) * 7 % 257
    assert tokenizer.name == "byte" and model(idx[:, :-1], idx[:, 1:])[1].item() == pytest.approx(5.6157522, abs=1e-5)
    train_here(f"--out_dir={tmp_path}", "--init_from=resume", f"--dataset={corpus}", "--max_iters=8")
    state = torch.load(path, weights_only=True)
    assert state["iter_num"] == 8 and state["config"]["n_embd"] == 16 and state["config"]["sus_c"] == 0.4


def test_a_new_run_keeps_the_earlier_one_aside(run, tmp_path, capsys):
    run(max_iters=4)
    first = (tmp_path / "out" / "ckpt.pt").read_bytes()
    run(max_iters=4, seed=2)
    assert (tmp_path / "out" / "earlier-1" / "ckpt.pt").read_bytes() == first
    assert (tmp_path / "out" / "earlier-1" / "metrics.jsonl").exists() and "earlier-1" in capsys.readouterr().out
    run(max_iters=4, seed=3)
    assert (tmp_path / "out" / "earlier-2" / "ckpt.pt").exists()


def test_always_save_checkpoint_off_keeps_the_best_until_the_end(run, tmp_path, monkeypatch):
    saved = []
    real = train.checkpoint.save
    monkeypatch.setattr(
        train.checkpoint, "save", lambda path, state: (saved.append((path.name, state["iter_num"])), real(path, state))
    )
    # a wild learning rate after a good start: validation gets worse
    run(always_save_checkpoint=False, decay_lr=False, learning_rate=0.3, grad_clip=0.0, max_iters=8, eval_interval=1)
    lines = [l for l in read_record(tmp_path / "out" / "metrics.jsonl")[1] if "val/loss" in l]
    best, expected = math.inf, []
    for line in lines:
        improved = line["val/loss"] < best
        best = min(best, line["val/loss"])
        if line["iter"] == 8:  # before its evaluation
            expected += [("ckpt.pt", 8)]
        if line["iter"] and improved:
            expected += [("ckpt_best.pt", line["iter"])]
        if line["iter"] and (improved or line["iter"] == 8):
            expected += [("ckpt.pt", line["iter"])]
    assert saved == expected and len({it for _, it in saved}) < 8


# -- the first command of a newcomer ------------------------------------------------------------------


def test_the_first_command_cut_short(tmp_path):
    """In a fresh copy, python train.py config/long_ctx.py makes its corpus, trains, and ends with a sample."""
    theirs = shutil.ignore_patterns(
        ".git", ".venv", "tests", "out*", "models", "wandb", "*.bin", "meta.json", "__pycache__"
    )
    shutil.copytree(ROOT, tmp_path / "fresh", ignore=theirs)
    shutil.copytree(ROOT / "sus_backends", tmp_path / "fresh/sus_backends", dirs_exist_ok=True)  # with compiled kernels
    command = [sys.executable, "train.py", "config/long_ctx.py", "--max_iters=2", "--eval_iters=1"]
    out, err = finish(subprocess.Popen(command, cwd=tmp_path / "fresh", text=True, stdout=-1, stderr=-1))
    for words in ("preparing data/stdlib", "SUS backward, c = 4", "iter 2: val loss", "--- a sample", "leet ./wandb"):
        assert words in out, (words, out, err)
    assert (tmp_path / "fresh/out-long-ctx/ckpt.pt").exists()


# -- several processes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {},
        pytest.param({"attn_backward": "exact", "dropout": 0.1}, marks=pytest.mark.slow),
        pytest.param({"backprop": "analytic"}, marks=pytest.mark.slow),
    ],
    ids=["sus", "exact-with-dropout", "analytic"],
)
def test_two_processes_follow_one(run, corpus, tmp_path, keys):
    """The same global micro-batches, seeds and draws: the same losses to rounding, wherever they are computed."""
    out, _ = finish(start(corpus, tmp_path / "two", *TORCHRUN, **keys))
    a, b = run("one", **keys), read_record(tmp_path / "two" / "metrics.jsonl")[1]
    assert len(a) == len(b) == 16
    for x, y in zip(a, b):
        assert x["iter"] == y["iter"]
        for name in {"train/loss", "val/loss", "train/grad_norm"} & x.keys():
            assert abs(x[name] - y[name]) < 2e-4 * max(1, x[name]), (x["iter"], name)
    assert out.count("iter 12: val loss") == 1  # only one process speaks


@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves(corpus, tmp_path):
    """The terminal sends SIGINT to torchrun and to its processes, and torchrun sends it to them once more."""
    process = start(corpus, tmp_path / "out", *TORCHRUN, max_iters=100_000, eval_interval=100_000)
    record = tmp_path / "out" / "metrics.jsonl"
    wait_for(process, record, '"iter": 2,')
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert "stopped by SIGINT" in err
    state = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert state["iter_num"] == read_record(record)[1][-1]["iter"] >= 2


# -- what SUS costs in loss ------------------------------------------------------------------------


@pytest.mark.slow
def test_sus_reaches_the_loss_of_exact_within_the_seed_to_seed_gap(run):
    """A tiny GPT, 200 steps: the mean over three seeds of each, compared by the spread between seeds."""
    keys = dict(max_iters=200, lr_decay_iters=200, eval_interval=200, eval_iters=24, log_interval=200, block_size=128)
    final = lambda **kw: run("out", **keys, **kw)[-1]["val/loss"]
    exact = torch.tensor([final(attn_backward="exact", seed=s) for s in (1, 2, 3)])
    sus = torch.tensor([final(sus_c=0.8, seed=s) for s in (1, 2, 3)])
    assert exact.mean() < 2.7  # they did learn
    seed_gap = exact.max() - exact.min()
    assert abs(sus.mean() - exact.mean()) < seed_gap


# -- GPT-2 -----------------------------------------------------------------------------------------


def test_init_from_gpt2(run, corpus, tmp_path, monkeypatch):
    """Fine-tuning, with a small random GPT-2 in place of the download."""
    transformers = pytest.importorskip("transformers", reason="transformers is a development requirement")
    small = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=128, vocab_size=257)
    )
    small.save_pretrained(tmp_path / "small")
    monkeypatch.setattr(hugging_face, "from_hub", lambda name: tmp_path / "small")
    with pytest.raises(UserError, match="is in tokens of the byte tokenizer"):
        run(init_from="gpt2", pos="learned", bias=True, block_size=64)
    bpe = tmp_path / "bpe"  # the bytes, declared to be GPT-2's tokens
    bpe.mkdir()
    for name in ("train.bin", "val.bin"):
        (bpe / name).write_bytes((corpus / name).read_bytes())
    run(
        init_from="gpt2",
        pos="learned",
        bias=True,
        block_size=64,
        max_iters=2,
        learning_rate=1e-12,
        min_lr=0,
        dataset=bpe,
    )
    state = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    torch.testing.assert_close(state["model"]["transformer.wte.weight"], small.transformer.wte.weight.detach())
    assert state["model_args"]["block_size"] == 64 and state["model"]["transformer.wpe.weight"].shape == (64, 32)
    with pytest.raises(UserError, match="n_layer=3 conflicts with gpt2"):
        run("other", init_from="gpt2", pos="learned", bias=True, n_layer=3)
    with pytest.raises(UserError, match="n_kv_head=1 conflicts with gpt2"):
        run("other", init_from="gpt2", pos="learned", bias=True, n_layer=2, n_kv_head=1, block_size=64)


# -- mistakes: one clear error, no traceback, nothing lost -------------------------------------------


MISTAKES = [
    (dict(sus_c=0), "sus_c must be > 0"),
    (dict(sus_cc=3), "unknown key 'sus_cc'; did you mean sus_c"),
    (dict(learning_rate="fast"), "learning_rate must be a number"),
    (dict(dropout=0.1), "attention dropout"),
    (dict(lowrank_degree=3), "lowrank_degree=3 must be even"),
    (dict(qk_norm_scale=0.5), "set --qk_norm=True"),
    (dict(init_from="resume"), "no checkpoint at .*ckpt.pt"),
    (dict(dataset="no_such_corpus"), "no train.bin and no val.bin"),
    (dict(block_size=10**6), "too few for block_size"),
    (dict(device="cuda:7"), "device 'cuda:7' can't be used"),
    (dict(sus_backend="fastest"), "sus_backend must be one of"),
    (dict(backprop="analytic", sus_c="auto"), "sus_c=auto .* not covered by backprop=analytic: give a number"),
    (dict(n_head=3), "n_embd=32 must be a multiple of n_head=3"),
    (
        dict(learning_rate=1e30, grad_clip=0.0, decay_lr=False),
        "(loss|norm).* is (nan|inf).*Try a lower --learning_rate",
    ),
]


@pytest.mark.parametrize("keys, message", MISTAKES, ids=[next(iter(k)) for k, _ in MISTAKES])
def test_mistakes(run, keys, message):
    with pytest.raises(UserError, match=message):
        run(**keys)


def test_a_mistake_is_one_line_and_exit_status_1(corpus, tmp_path):
    process = start(corpus, tmp_path / "out", init_from="resume")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and err.startswith("error: no checkpoint at ") and err.count("\n") == 1


def test_out_dir_that_is_a_file(run, tmp_path):
    (tmp_path / "out").write_text("not a folder")
    with pytest.raises(UserError, match="out_dir=.* can't be used"):
        run()


def test_conflicting_architecture_on_resume(run, tmp_path):
    run(max_iters=4)
    with pytest.raises(UserError, match="n_embd=64 conflicts with the checkpoint"):
        run(init_from="resume", n_embd=64)


def test_a_truncated_checkpoint_is_refused_and_the_best_one_still_loads(run, tmp_path):
    run(max_iters=4)
    path = tmp_path / "out" / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="truncated"):
        run(init_from="resume", max_iters=8)
    path.write_bytes((tmp_path / "out" / "ckpt_best.pt").read_bytes())
    assert run(init_from="resume", max_iters=8)[-1]["iter"] == 8


def test_nan_keeps_the_last_good_checkpoint(run, tmp_path, monkeypatch):
    run(max_iters=4)
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    with pytest.raises(UserError, match="ckpt.pt is from before"):
        run(init_from="resume", max_iters=50, learning_rate=1e30, decay_lr=False, grad_clip=0.0)
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before


def test_float16_whose_gradients_are_never_finite_stops(run, monkeypatch):
    real = torch.amp.GradScaler.unscale_

    def unscale(self, optimizer):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.fill_(math.nan)
        real(self, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", unscale)
    with pytest.raises(UserError, match="float16 gradient"):
        run(dtype="float16", max_iters=100, eval_interval=100)


def test_too_little_memory_is_one_line(corpus, tmp_path):
    process = start(corpus, tmp_path / "out", n_embd=2 * 10**9, n_head=2)  # an embedding of 2 TB
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and err.startswith("error: out of memory") and err.count("\n") == 1


def test_a_full_disk_loses_no_checkpoint(run, tmp_path, monkeypatch):
    run(max_iters=4)
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()

    def full_disk(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.checkpoint.os, "fsync", full_disk)
    with pytest.raises(UserError, match="No space left"):
        run(init_from="resume", max_iters=8)
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before


def test_tokens_out_of_range(run, corpus, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in ("train.bin", "val.bin", "meta.json"):
        (bad / name).write_bytes((corpus / name).read_bytes())
    meta = json.loads((bad / "meta.json").read_text())
    (bad / "meta.json").write_text(json.dumps({**meta, "vocab_size": 100}))
    with pytest.raises(UserError, match="vocabulary is 100"):
        run(dataset=bad)


# -- sample.py -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("trained") / "out"
    train_here(*arguments(corpus, out_dir, max_iters=30, lr_decay_iters=30, eval_interval=30))
    return out_dir


@pytest.fixture
def draw(trained, monkeypatch, capsys):
    def draw(*argv):
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={trained}", "--device=cpu", *argv])
        sample.main()
        return capsys.readouterr()

    return draw


def test_sample_prints_prompt_and_text(draw):
    out = draw("--start=def f(", "--num_samples=2", "--max_new_tokens=20", "--stop_at_eot=False").out
    parts = out.split("\n---------------\n")
    assert len(parts) == 3 and parts[2] == "" and all(p.startswith("def f(") for p in parts[:2])
    assert parts[0] != parts[1]
    assert out == draw("--start=def f(", "--num_samples=2", "--max_new_tokens=20", "--stop_at_eot=False").out
    assert out != draw("--start=def f(", "--num_samples=2", "--max_new_tokens=20", "--seed=2").out


def test_sample_is_utf8_whatever_bytes_are_drawn(draw):
    out = draw("--start=é", "--num_samples=3", "--max_new_tokens=100", "--temperature=3", "--top_k=0").out
    assert out.startswith("é") and out.encode("utf-8")


def test_a_run_with_the_tokenizer_of_a_folder(tmp_path, monkeypatch, capsys):
    """Neither training's sample, nor a resumed run, nor sample.py needs the folder; sample.py needs no corpus."""
    pytest.importorskip("transformers")
    tokenizer = load_tokenizer(str(tokenizer_folder(tmp_path / "model", "smollm2")))
    write_corpus(tmp_path / "tea", Texts([("a", "".join(LINES) * 9)], [("b", "".join(LINES))], {}), tokenizer)
    shutil.rmtree(tmp_path / "model")
    out_dir = tmp_path / "out"
    train_here(*arguments(tmp_path / "tea", out_dir, max_iters=4, attn_backward="exact"))
    shown = capsys.readouterr().out
    assert f"{tokenizer.name} tokenizer" in shown and "--- a sample: the first 48 tokens" in shown
    assert "The tea is hot, and the kettle sings" in shown
    train_here(f"--out_dir={out_dir}", "--init_from=resume", "--max_iters=6")
    assert torch.load(out_dir / "ckpt.pt", weights_only=True)["iter_num"] == 6
    shutil.rmtree(tmp_path / "tea")
    capsys.readouterr()
    options = "--start=tea 12", "--num_samples=1", "--max_new_tokens=9", "--device=cpu"
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={out_dir}", *options])
    sample.main()
    assert capsys.readouterr().out.startswith("tea 12")
    other = [("x", "other text " * 200)]
    write_corpus(tmp_path / "bytes", Texts(other, other, {}), tokenizer_from_meta({"name": "byte"}))
    with pytest.raises(UserError, match=f"tokens of the byte tokenizer, but the model's are {tokenizer.name}'s"):
        train_here(f"--out_dir={out_dir}", "--init_from=resume", f"--dataset={tmp_path / 'bytes'}", "--max_iters=8")


def test_sample_stops_at_end_of_text(draw, monkeypatch):
    monkeypatch.setattr(GPT, "generate", lambda self, *a, **k: iter([65, 256, 66]))
    assert draw("--start=x", "--num_samples=1").out == "xA\n---------------\n"


def test_sample_reads_prompts_from_files_longer_than_the_context(draw, tmp_path):
    (tmp_path / "prompt.txt").write_text("import os\n" * 50)
    seen = draw(f"--start=FILE:{tmp_path / 'prompt.txt'}", "--num_samples=1", "--max_new_tokens=5")
    assert seen.out.startswith("import os\n" * 50) and "reads the last 64" in seen.err


def test_sample_s_help_is_a_table_whatever_the_defaults(draw, capsys):
    with pytest.raises(SystemExit):
        draw("--help")
    assert "--start='\\n' " in capsys.readouterr().out


def test_sample_mistakes(draw, tmp_path, trained):
    with pytest.raises(UserError, match="can't read"):
        draw("--start=FILE:no-such-file.txt")
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        draw(f"--start=FILE:{tmp_path / 'latin1.txt'}")
    with pytest.raises(UserError, match="no checkpoint"):
        draw(f"--out_dir={tmp_path}")
    (tmp_path / "ckpt-8.pt").touch()
    with pytest.raises(UserError, match=r"no checkpoint at .*ckpt.pt; --ckpt=NAME takes another one there: ckpt-8.pt"):
        draw(f"--out_dir={tmp_path}")
    with pytest.raises(UserError, match="is a folder, and no config file; .* --out_dir="):
        draw(str(trained))
    with pytest.raises(UserError, match="temperature must be"):
        draw("--temperature=-1")
