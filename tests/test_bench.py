"""The benchmarks: what they print and keep, that they refuse wrong results, that a step is train.py's. No times."""

import contextlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import backprop
import bench_attention
import bench_attention_report
import bench_backprop
import bench_train
import contenders
import cost_model
import measure
import output
import picture_of_sus
from configurator import UserError
from contenders import Check, Contender
from model import GPT, GPTConfig
from sus_attn import sus_attention
from tiny import command, write_tiny_corpus
from training import checkpoint
from training.device import Device, memory_errors
from training.probe import take_turns, time_attention
from training.record import plain, read_record
from training.weights import model_args
from training_runs import TINY, train_here

CPU = Device(torch.device("cpu"), torch.float32, "")
FLASH = Contender("SDPA flash", "exact", "FLASH_ATTENTION")
SMALL = ["--device=cpu", "--H=2", "--D=16", "--repeats=2"]


def sus_at(*cs):
    return [Contender(f"SUS c={c:g}", "sus", "reference", c) for c in cs]


def cells(line: str) -> list[str]:
    """They stand two blanks or more apart."""
    return re.split(r"\s{2,}", line.strip())


def table_in(out: str) -> list[list[str]]:
    """The cells of the first table whose titles begin with T."""
    lines = itertools.dropwhile(lambda line: not line.startswith("T  "), out.splitlines())
    return [cells(line) for line in itertools.takewhile(str.strip, lines)]


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    """The machine isn't looked at: that takes a second each time. `figures` has done it."""
    for module in (bench_attention, bench_train):
        monkeypatch.setattr(module, "product_ms", lambda device: 10.0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_tiny_corpus(tmp_path_factory.mktemp("data") / "small", 50_000, 50_000)


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """A whole run: (its folder, what it printed)."""
    pytest.importorskip("matplotlib")
    folder, printed = tmp_path_factory.mktemp("bench"), io.StringIO()
    options = "--T=128,64", "--c=0.4,inf", "--memory=False", "--backend=reference", "--json=all.json", "--out=a.png"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        command(bench_attention, patch, *SMALL, *options)
    return folder, printed.getvalue()


# -- bench_attention.py: what it shows and keeps ----------------------------------------------------


def test_the_table(figures):
    _, out = figures
    titles, *rows = table_in(out)
    assert titles == cells(
        "T  c  exact fwd  exact bwd  SUS fwd  of it draw  SUS bwd  of it sparse  fwd ratio  bwd ratio  fwd+bwd ratio  "
        "kept/row  exact MiB  SUS MiB"
    )
    assert [row[:2] for row in rows] == [["64", "0.4"], ["64", "inf"], ["128", "0.4"], ["128", "inf"]]
    assert rows[0][5] == "in bwd" and ".." in rows[0][8]
    for text in (
        f"threads {torch.get_num_threads()}",
        f"torch {torch.__version__}",
        "SDPA flash",
        "SDPA math",
        "a matrix product took",
        "SUS c = 0.4, sampler tiles, by the reference backend (asked for)",
        "left out: FlexAttention at T = 64, 128: FlexAttention does not support backward on CPU",
        "Time grows as T to the power of: exact backward",
    ):
        assert text in out, text


def test_the_json_holds_every_figure(figures):
    folder, _ = figures
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "all.json"]
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((folder / "all.json").read_text())
    names = ["SDPA flash", "SDPA math", "SUS c=0.4", "SUS c=inf", "SUS undrawn"]
    assert sorted((row["T"], row["name"]) for row in data["results"]) == [
        (T, name) for T in (64, 128) for name in names
    ]
    assert all(len(row["forward_ms"]) == len(row["backward_ms"]) == 2 for row in data["results"])
    assert all(time > 0 for row in data["results"] for time in row["forward_ms"])
    sus = [row for row in data["results"] if row["kind"] == "sus"]
    assert [row["kept_per_row"] for row in sus if row["c"] == "inf"] == [32.5, 64.5] and all(
        5 < row["kept_per_row"] < 30 for row in sus if row["c"] == 0.4
    )
    assert data["inputs"] == {
        "from": "normal random numbers",
        "shape": [1, 2, "T", 16],
        "key_heads": 2,
        "dtype": "float32",
    }
    assert data["config"]["c"] == "0.4,inf" and {row["backend"] for row in sus} == {"reference"}
    assert len(data["idle"]["product_ms"]) == 3 and data["environment"]["threads"] == torch.get_num_threads()
    assert len(data["checks"]) >= 12 and all(check["value"] <= check["limit"] for check in data["checks"])
    for line in data["comparisons"]:
        for part in ("forward", "backward", "both"):
            assert line[part]["low"] <= line[part]["median"] <= line[part]["high"]
    assert {fit["name"] for fit in data["fits"]} == {
        f"{name} {part}" for name in ("exact", "SUS c=0.4", "SUS c=inf") for part in ("forward", "backward")
    }


def test_drawn_again_from_the_json(figures, monkeypatch, capsys, tmp_path):
    folder, out = figures
    command(bench_attention, monkeypatch, f"--from_json={folder / 'all.json'}", f"--out={tmp_path / 'again.svg'}")
    table = capsys.readouterr().out.partition("picture: ")[0]
    assert table and table in out
    assert "<svg" in (tmp_path / "again.svg").read_text()


def made_up(Ts=(1024, 4096), cs=(10.0, 25.0), draws=True):
    """Figures whose curves are known: exact's backward 3 (T/1024)^2 ms, SUS's c/10 (T/1024), its draw (T/1024)^1.5."""
    rows = []
    for T in Ts:
        s = T / 1024
        times = {
            "SDPA flash": ("exact", None, s**2, 3 * s**2),
            "SDPA math": ("exact", None, 5 * s**2, 5 * s**2),
            **{f"SUS c={c:g}": ("sus", c, 2 * s**2, min(c, 1e3) / 10 * s) for c in cs},
        }
        for name, (kind, c, forward, backward) in times.items():
            rows.append(
                {
                    "T": T,
                    "name": name,
                    "kind": kind,
                    "backend": "cpu",
                    "c": c,
                    "forward_ms": [forward, 2 * forward, 3 * forward],
                    "backward_ms": [backward, 2 * backward, 3 * backward],
                    "kept_per_row": 9.0,
                    "draw_ms": [s**1.5] * 3 if draws and kind == "sus" else None,
                    "peak_bytes": T * 2**20,
                    "saved_bytes": T * 2**10,
                }
            )
    return plain(
        {
            "benchmark": "bench_attention",
            "environment": {"device": "cpu: made up", "threads": 2},
            "results": rows,
            "left_out": [],
            "idle": measure.idleness([10.0, 12.0]),
            "checks": [],
            "config": {"sampler": "tiles"},
            "inputs": {"from": "nowhere", "shape": [1, 4, "T", 64], "key_heads": 2, "dtype": "float32"},
            "comparisons": bench_attention_report.compare(rows, list(Ts)),
            "fits": bench_attention_report.fits(rows),
        },
        nonfinite=str,
    )


def test_made_up_figures_give_their_exponents_and_ratios(capsys):
    data = made_up()
    assert {fit["name"]: round(fit["exponent"], 6) for fit in data["fits"]} == {
        "exact backward": 2,
        "exact forward": 2,
        **{
            f"SUS c={c} {part}": power
            for c in (10, 25)
            for part, power in (("backward", 1), ("forward", 2), ("draw", 1.5))
        },
    }
    line = next(line for line in data["comparisons"] if line["T"] == 4096 and line["c"] == 25)
    assert line["exact"] == "SDPA flash"  # the faster one
    assert [line[part]["median"] for part in ("forward", "backward", "both")] == pytest.approx([0.5, 4.8, 64 / 42])
    bench_attention_report.report(data)
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("4,096  25")).split()
    assert row[2:8] == ["32", "96", "64", "8", "20", "20"] and row[-3:] == ["9.0", "4,096", "4,096"]
    assert "2 key heads" in out and "WARNING: the machine was not idle" in out and "SDPA flash *" in out


@pytest.mark.parametrize(
    "data",
    [
        made_up(),
        made_up(Ts=(2048,)),
        made_up(cs=(25.0,)),
        made_up(cs=(math.inf,)),
        made_up(draws=False),
        made_up(Ts=(1000, 2048, 8192, 32768), cs=(5.0, 10.0, 25.0, 50.0, 100.0)),
    ],
    ids=["usual", "one-T", "one-c", "only-inf", "no-draw", "many"],
)
def test_a_picture_of_every_shape(tmp_path, recwarn, data):
    pytest.importorskip("matplotlib")
    figure = bench_attention_report.draw(data)
    output.save_picture(figure, tmp_path / "a.png", dpi=40)
    left, right = figure.axes
    Ts = sorted({row["T"] for row in data["results"]})
    assert {f"exact, T = {T:,}" for T in Ts} <= {text.get_text() for text in left.texts}
    if len(Ts) > 1:
        assert any("exact  $T^{\\,2.00}$" in text.get_text() for text in right.texts)
    assert all(math.isfinite(limit) for ax in figure.axes for limit in (*ax.get_xlim(), *ax.get_ylim()))
    heights = [sorted(text.xy[1] for text in ax.texts) for ax in figure.axes]
    assert all(b - a > 0.06 for places in heights for a, b in zip(places, places[1:]))  # no label on another
    assert not [str(warning.message) for warning in recwarn]


def test_wandb_gets_the_curves_over_c(monkeypatch):
    class Mirror:
        metrics, lines, finished = [], [], False

        def define_metric(self, *name, **step):
            self.metrics.append((name, step))

        def log(self, line):
            self.lines.append(line)

        def finish(self):
            self.finished = True

    mirror = Mirror()
    monkeypatch.setattr(bench_attention_report, "start_wandb", lambda **run: (mirror, ""))
    bench_attention_report.log_to_wandb(made_up(cs=(10.0, 25.0, math.inf)))
    assert (("*",), {"step_metric": "c"}) in mirror.metrics and mirror.finished
    assert [line["c"] for line in mirror.lines] == [10, 25]
    assert [line["T=4096/sus_backward_ms"] for line in mirror.lines] == [8, 20]
    assert [line["T=4096/exact_backward_ms"] for line in mirror.lines] == [96, 96]


# -- is it right? -----------------------------------------------------------------------------------


INPUTS = contenders.random_inputs(2, 256, 16, 0, CPU)


def wrong_gradient(factor, only_if):
    """sus_attention whose dk is multiplied by `factor` where only_if(c, T)."""

    def function(q, k, v, c, **options):
        if only_if(c, q.shape[2]):
            k = k * 1
            k.register_hook(lambda gradient: gradient * factor)
        return sus_attention(q, k, v, c, **options)

    return function


BROKEN = {
    "the forward": (lambda q, k, v, c, **o: 1.00001 * sus_attention(q, k, v, c, **o), "error of the forward"),
    "one element": (
        lambda q, k, v, c, **o: (
            sus_attention(q, k, v, c, **o) + 1e-3 * F.pad(torch.ones(1, 1), (0, q.shape[3] - 1, 0, q.shape[2] - 1))
        ),
        "error of the forward",
    ),
    "unwritten": (
        lambda q, k, v, c, **o: sus_attention(q, k, v, c, **o) + 0 * torch.empty(1),
        "error of the forward.* is nan",
    ),
    "at c = inf": (wrong_gradient(1.0001, lambda c, T: c == math.inf), "error of the dk at c = inf"),
    "biased": (wrong_gradient(1.2, lambda c, T: c < math.inf), "mean over 32 draws"),
    "NaN": (wrong_gradient(math.nan, lambda c, T: c < math.inf), "mean over 32 draws"),
    "long": (wrong_gradient(2.0, lambda c, T: T > 64), "one draw's gradient at T = 256"),
}


def run_check(monkeypatch, slice_, cs=(8.0,)):
    monkeypatch.setattr(contenders, "SLICE", slice_)
    check = Check()
    check.start(FLASH, sus_at(*cs), *INPUTS)
    exact = measure.gradients(FLASH, *INPUTS)
    for sus in sus_at(*cs):
        check.at(exact, measure.gradients(sus, *INPUTS, seed=0), sus.c, *INPUTS[:3])
    return check


@pytest.mark.parametrize("slice_", [64, 256])
def test_the_check_passes(monkeypatch, slice_):
    check = run_check(monkeypatch, slice_, (2.0, 8.0, 200.0))
    assert len(check.findings) == 4 + 3 * 4 and all(0 <= f["value"] <= f["limit"] for f in check.findings)


@pytest.mark.parametrize("broken", BROKEN)
def test_the_check_finds_a_broken_operator(monkeypatch, broken):
    function, message = BROKEN[broken]
    monkeypatch.setattr(contenders, "sus_attention", function)
    with pytest.raises(UserError, match=f"no figures: .*{message}"):
        run_check(monkeypatch, 64)


def test_no_figures_from_a_broken_operator(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(contenders, "sus_attention", BROKEN["the forward"][0])
    with pytest.raises(UserError, match="SUS is wrong here"):
        command(bench_attention, monkeypatch, *SMALL, "--T=32", "--backend=reference", f"--json={tmp_path / 'a.json'}")
    assert "exact" not in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_poisoned_memory_is_nan_and_then_not_any_more():
    with contenders.poisoned():
        assert torch.empty(3).isnan().all() and torch.empty_like(INPUTS[0]).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


# -- measuring --------------------------------------------------------------------------------------


def test_all_take_turns():
    calls = []

    def function(name):
        def run(q, k, v):
            calls.append(name)
            with torch.set_grad_enabled(name != "c"):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    times = list(take_turns({name: function(name) for name in "abc"}, *INPUTS, CPU, 3))
    assert "".join(calls) == "abccbaabc" and [(i, name) for i, name, *_ in times] == [
        (i, name) for i, names in enumerate(("abc", "cba", "abc")) for name in names
    ]
    assert all(forward > 0 and (backward > 0) == (name != "c") for _, name, forward, backward in times)
    assert set(time_attention({"a": function("a")}, *INPUTS, CPU)) == {"a"}


def test_ratios_are_of_the_same_round():
    """The machine was three times slower in the second round, for both."""
    assert measure.ratio([10, 30, 11], [5, 15, 4]) == {"median": 2, "low": 2, "high": 2.75}
    with pytest.raises(ValueError):
        measure.ratio([1, 2], [1])


def test_fit_power():
    assert measure.fit_power([1, 2, 4], [3, 12, 48]) == pytest.approx((2, 3))
    noisy = measure.fit_power([1024, 2048, 4096, 8192], [1.1, 1.9, 4.2, 7.8])
    assert noisy[0] == pytest.approx(0.962, abs=0.02)
    assert measure.fit_power([7], [1]) is None and measure.fit_power([1, 2], [-1, 1]) is None


def test_what_is_not_worth_measuring_is_left_out_by_name(monkeypatch):
    members = contenders.contenders(CPU, {10.0: "cpu", 30.0: "cpu"})
    assert [m.name for m in members] == [
        "SDPA flash",
        "SDPA math",
        "SUS c=10",
        "SUS c=30",
        "SUS undrawn",
        "FlexAttention",
        "reference c=10",
    ]
    running, reasons = bench_attention.choose(members, INPUTS, 1e-9, CPU)
    assert running[0].kind == "exact" and [m.kind for m in running[1:]] == ["sus", "sus", "undrawn"]
    assert {reason["name"] for reason in reasons} == {m.name for m in members} - {m.name for m in running}
    assert all(reason["T"] == 256 for reason in reasons) and "above --peer_seconds" in reasons[-1]["why"]
    monkeypatch.setattr(bench_attention, "free_memory", lambda device: 1000)
    running, reasons = bench_attention.choose(members, INPUTS, 60, CPU)
    assert "SDPA math" not in [m.name for m in running] and "reference c=10" in [m.name for m in running]
    assert reasons[0]["name"] == "SDPA math" and "GiB" in reasons[0]["why"]


def many_small_and_one_large():
    small = [torch.ones(4096) for _ in range(1024)]  # 16 MiB
    return len(small), torch.ones(8 << 20).sum()  # 32 MiB


def test_peak_memory():
    if measure.peak_of(lambda: None, CPU) is None:
        pytest.skip("this system does not tell")
    for _ in range(2):  # also where such memory was in use before
        assert 47 << 20 < measure.peak_of(many_small_and_one_large, CPU) < 56 << 20
    assert measure.peak_of(lambda: None, CPU) < 4 << 20


def test_memory_of_attention_in_a_fresh_process():
    shapes = [(1, 2, 512, 16)] * 4
    found = measure.in_child(bench_attention.memory_of, FLASH, shapes, CPU)
    # beyond q, k, v: the output, and the log-sum-exp of each row
    assert found["saved_bytes"] == 2 * 512 * 16 * 4 + 2 * 512 * 4
    assert found["peak_bytes"] is None or 4 * 2 * 512 * 16 * 4 <= found["peak_bytes"] < 8 << 20
    with pytest.raises(UserError, match="was killed"):
        measure.in_child(os._exit, 1)


@pytest.fixture
def trained(tmp_path, corpus):
    """A run's folder."""
    config = GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, pos="rope")
    state = {
        "model": GPT(config).state_dict(),
        "model_args": model_args(config),
        "iter_num": 1,
        "best_val_loss": 1.0,
        "config": {"dataset": str(corpus)},
    }
    checkpoint.save(tmp_path / "ckpt.pt", state)
    return tmp_path


def test_inputs_of_a_trained_model(trained, monkeypatch, capsys):
    common = [f"--inputs={trained}", "--device=cpu", "--c=4", "--repeats=1", "--memory=False", "--backend=reference"]
    command(bench_attention, monkeypatch, *common)
    out = capsys.readouterr().out
    assert f"q, k, v (1, 4, T, 8), 2 key heads, float32, {trained}" in out
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("64 ")] == [["64", "4"]]
    with pytest.raises(UserError, match="T=65 is above the 64 tokens"):
        command(bench_attention, monkeypatch, *common, "--T=65")
    with pytest.raises(UserError, match="--H and --inputs exclude each other"):
        command(bench_attention, monkeypatch, *common, "--H=4")


def test_a_picture_of_a_trained_model(trained, monkeypatch, capsys):
    """c is above the number of tiles, so that all is kept."""
    pytest.importorskip("matplotlib")
    command(picture_of_sus, monkeypatch, f"--out_dir={trained}", "--head=3", "--c=64", f"--out={trained / 'a.png'}")
    assert (
        "layer 1, head 3, c = 64: 32.5 of 32.5 entries a row kept, 100.00%; they hold 100.0%" in capsys.readouterr().out
    )
    assert (trained / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="2 layers of 4 heads"):
        command(picture_of_sus, monkeypatch, f"--out_dir={trained}", "--layer=2")


@pytest.mark.slow
def test_a_whole_run_as_a_user_starts_it(tmp_path):
    """With kernels, and with the memory, which is measured in processes of its own."""
    script = ROOT / "experiments" / "bench_attention.py"
    options = "--T=256", "--c=4", "--peer_seconds=0.001", "--json=a.json"
    result = subprocess.run([sys.executable, script, *SMALL, *options], cwd=tmp_path, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    rows = {row["kind"]: row for row in json.loads((tmp_path / "a.json").read_text())["results"]}
    peaks = [rows[kind]["peak_bytes"] for kind in ("exact", "sus")]
    assert peaks == [None, None] or min(peaks) > 4 * 2 * 256 * 16 * 4  # the output, dq, dk and dv
    assert rows["sus"]["backend"] == rows["undrawn"]["backend"] and rows["sus"]["saved_bytes"] > 0


# -- bench_train.py ---------------------------------------------------------------------------------


@pytest.fixture
def tiny(corpus):
    """Keys of bench_train.py, which sets block_size and attn_backward itself."""
    keys = TINY | dict(sus_c=4, sus_backend="reference", dataset=corpus, grad_clip=0.1)
    del keys["block_size"], keys["attn_backward"]
    return [f"--{name}={value}" for name, value in keys.items()]


def make_trainer(tiny, corpus, *arguments, T=64):
    cfg = bench_train.load_config(bench_train.BenchTrainConfig, [*tiny, *arguments], usage="")
    return bench_train.Trainer(cfg, T, CPU, bench_train.load_corpus(corpus, T))


@pytest.mark.parametrize("kind", ["exact", "sus"])
def test_a_step_is_that_of_train_py(tiny, corpus, tmp_path, monkeypatch, kind):
    """It is written out in both files: they must not drift apart."""
    keys = f"--attn_backward={kind}", "--block_size=64", "--max_iters=4", "--eval_iters=1", "--eval_interval=100"
    train_here(*tiny, *keys, f"--out_dir={tmp_path / 'out'}")
    lines = [line for line in read_record(tmp_path / "out" / "metrics.jsonl")[1] if "train/loss" in line]
    trainer = make_trainer(tiny, corpus)
    steps = [trainer.step(kind, it) for it in range(4)]
    assert [loss for loss, _ in steps] == [line["train/loss"] for line in lines]
    assert [norm for _, norm in steps] == [line["train/grad_norm"] for line in lines]
    final = checkpoint.load(tmp_path / "out" / "ckpt.pt")["model"]
    assert all(torch.equal(weight, final[name]) for name, weight in trainer.model.state_dict().items())


@pytest.fixture
def order(monkeypatch):
    """The steps that are timed: (T, kind, backprop, it, whether it is one that measures attention's share)."""
    steps, timed_step = [], bench_train.Trainer.timed_step

    def noting(self, kind, it, model=None):
        steps.append((self.cfg.block_size, kind, self.cfg.backprop, it, model is self.model))
        return timed_step(self, kind, it, model)

    monkeypatch.setattr(bench_train.Trainer, "timed_step", noting)
    return steps


def test_the_training_table(tiny, order, tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.py"
    config.write_text("block_size = 32\nattn_backward = 'exact'\n")  # of a config file, for train.py
    options = "--T=64,32", "--repeats=2", "--memory=False", f"--json={tmp_path / 'a.json'}"
    command(bench_train, monkeypatch, config, *tiny, *options)
    assert [step for step in order if not step[-1]] == [
        (T, kind, "autograd", it, False)
        for T in (32, 64)
        for it, kinds in enumerate((("exact", "sus"), ("sus", "exact"), ("exact", "sus")))
        for kind in kinds
    ]
    assert len([step for step in order if step[-1]]) == 2 * 2 * bench_train.SHARE_ROUNDS
    titles, *rows = table_in(capsys.readouterr().out)
    assert titles == cells(
        "T  exact tok/s  SUS tok/s  SUS / exact  exact ms  SUS ms  exact attention  SUS attention  exact MiB  SUS MiB"
    )
    assert [row[0] for row in rows] == ["32", "64"]
    data = json.loads((tmp_path / "a.json").read_text())
    assert [(row["T"], row["kind"]) for row in data["results"]] == [
        (32, "exact"),
        (32, "sus"),
        (64, "exact"),
        (64, "sus"),
    ]
    for row in data["results"]:
        assert row["tok_per_sec"] == pytest.approx([4 * row["T"] / (step / 1e3) for step in row["step_ms"]])
        assert len(row["step_ms"]) == 2 and all(0 < share < 1 for share in row["attention_share"])
    assert (
        data["benchmark"] == "bench_train" and data["config"]["n_embd"] == 32 and len(data["idle"]["product_ms"]) == 3
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_share_with_known_times(tiny, corpus, monkeypatch, checkpointing):
    """A clock that ticks at each look: every layer's forward (twice if repeated) and backward takes one tick."""
    trainer = make_trainer(tiny, corpus, f"--activation_checkpointing={checkpointing}")
    ticks = iter(range(10**6))
    monkeypatch.setattr(bench_train.time, "perf_counter", lambda: next(ticks))
    spans = 2 * 2 * (3 if checkpointing else 2)  # micro-batches, layers
    for kind in ("exact", "sus"):
        assert trainer.attention_share(kind, 0) == pytest.approx(spans / (2 * spans + 1))
        assert not trainer.model.transformer.h[0].attn.attend._forward_hooks


def test_training_refuses_a_broken_operator(tiny, corpus, monkeypatch):
    trainer = make_trainer(tiny, corpus)
    bench_train.check_forward(trainer)
    monkeypatch.setattr("model.sus_attention", lambda q, k, v, c, **options: 1.1 * sus_attention(q, k, v, c, **options))
    with pytest.raises(UserError, match="at T = 64 the loss with it is"):
        bench_train.check_forward(trainer)
    monkeypatch.setattr(
        "model.sus_attention", lambda q, k, v, c, **options: math.nan * sus_attention(q, k, v, c, **options)
    )
    with pytest.raises(UserError, match="no figures: its loss is nan"):
        trainer.timed_step("sus", 0)


def test_memory_of_training(tiny, corpus):
    trainer = make_trainer(tiny, corpus)
    found = bench_train.memory_of(trainer.cfg, "sus", 256, CPU, trainer.corpus)
    assert found is None or found > 4 * 4 * trainer.model.num_params()  # weights, gradients, two moments


# -- bench_backprop.py ------------------------------------------------------------------------------


def test_the_table_of_the_analytic_backward(tiny, order, tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.py"
    config.write_text("block_size = 32\nbackprop = 'analytic'\n")  # of a config file, for train.py
    options = "--T=64,32", "--repeats=2", "--memory=False", f"--json={tmp_path / 'a.json'}"
    command(bench_backprop, monkeypatch, config, *tiny, *options)
    steps = [("exact", "autograd"), ("exact", "analytic"), ("sus", "autograd"), ("sus", "analytic")]
    assert [step[:4] for step in order] == [
        (T, *step, it) for T in (32, 64) for it in range(3) for step in (steps[::-1] if it % 2 else steps)
    ]
    titles, *rows = table_in(capsys.readouterr().out)
    assert titles[:5] == ["T", "attention", "autograd ms", "analytic ms", "autograd / analytic"]
    assert [row[:2] for row in rows] == [["32", "exact"], ["32", "sus"], ["64", "exact"], ["64", "sus"]]
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["benchmark"] == "bench_backprop" and [len(row["step_ms"]) for row in data["results"]] == [2] * 8
    for row in data["results"]:
        if row["way"] == "analytic":
            assert row["loss_difference"] == 0 and 0 < row["difference"] <= row["worst_difference"] < 1e-5


def test_wrong_gradients_get_no_figures(tiny, corpus, monkeypatch):
    trainer = make_trainer(tiny, corpus)
    gelu_backward = backprop.gelu_backward
    monkeypatch.setattr(backprop, "gelu_backward", lambda x, dy: 1.01 * gelu_backward(x, dy))
    with pytest.raises(UserError, match="the exact gradients differ by"):
        bench_backprop.compare_gradients(trainer, "exact")


@pytest.mark.slow
def test_memory_of_the_analytic_backward(tiny, corpus, monkeypatch):
    """Where it can be measured, it is less than autograd's: here a sixth less, to a hundredth."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # or else glibc keeps what is freed, now more, now less of it
    autograd, analytic = (
        measure.in_child(
            bench_train.memory_of,
            make_trainer(tiny, corpus, f"--backprop={way}").cfg,
            "exact",
            1024,
            CPU,
            bench_train.load_corpus(corpus, 1024),
        )
        for way in bench_backprop.WAYS
    )
    assert autograd is None or analytic < 0.92 * autograd


# -- the others -------------------------------------------------------------------------------------


def test_the_cost_model_prints_a_line_for_each_length(monkeypatch, capsys):
    command(cost_model, monkeypatch, "--T=8192,32768", "--c=4")
    titles, *rows = table_in(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["8,192", "32,768"] and titles[-2:] == ["bwd ratio", "fwd+bwd ratio"]
    assert float(rows[0][-1]) < float(rows[1][-1])  # the longer, the more SUS gains


SCRIPTS = [path for path in sorted((ROOT / "experiments").glob("*.py")) if "run_main(main)" in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_runs_from_anywhere(tmp_path, script):
    """bench_train.py's mistake, below, is the quick one of them."""
    result = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, text=True, capture_output=True)
    assert result.returncode == 0 and f"experiments/{script.name}" in result.stdout and result.stderr == ""


# -- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, argument, message",
    [
        (bench_attention, "--T=2048;8192", "--T=2048;8192: write integers >= 16 with commas"),
        (bench_attention, "--T=8", ">= 16"),
        (bench_attention, "--T=", "write integers"),
        (bench_attention, "--c=0", "write numbers > 0"),
        (bench_attention, "--c=nan", "write numbers > 0"),
        (bench_attention, "--repeats=0", "repeats must be >= 1"),
        (bench_attention, "--backend=cuda", "backend must be one of"),
        (bench_attention, "--dtyp=float32", "did you mean dtype"),
        (bench_attention, "--json=nowhere/a.json", "can't write nowhere/a.json"),
        (bench_attention, "--out=.", "it is a folder"),
        (bench_attention, "--out=a.jpgg", "must end in .png"),
        (bench_attention, "--from_json=missing", "can't read missing"),
        (bench_attention, "--inputs=missing", "no checkpoint at missing"),
        (bench_attention, "--device=tpu", "tpu"),
        (bench_train, "--T=1", "integers >= 2"),
        (bench_train, "--block_size=64", "context lengths by --T"),
        (bench_train, "--attn_backward=exact", "both are measured"),
        (bench_train, "--init_from=gpt2", "only new weights"),
        (bench_train, "--backprop=analytic", "bench_backprop.py"),
        (bench_train, "--dropout=0.1", "dropout"),
        (bench_train, "--dataset=missing", "missing"),
        (bench_train, "--T=64,99999999", "too few for block_size=99999999"),
        (cost_model, "--D=32", "known for 64 and 128 only"),
        (bench_backprop, "--T=1", "integers >= 2"),
        (bench_backprop, "--backprop=autograd", "both are measured"),
        (bench_backprop, "--compile=True", "compile=True"),
        (bench_backprop, "--sus_c=auto", "give a number"),
        (bench_backprop, "--dropout=0.1", "dropout"),
    ],
    ids=lambda x: x if isinstance(x, str) and x.startswith("--") else "",
)
def test_mistakes_get_one_clear_error(module, argument, message, monkeypatch, tmp_path, corpus):
    monkeypatch.chdir(tmp_path)
    data = [f"--dataset={corpus}", "--device=cpu"] if module in (bench_train, bench_backprop) else []
    with pytest.raises(UserError) as error:
        command(module, monkeypatch, *data, argument)
    assert message in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_mistake_on_the_command_line(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "experiments" / "bench_train.py", "--T=x"], cwd=tmp_path, text=True, capture_output=True
    )
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: --T=x: write integers")


def test_foreign_json(tmp_path):
    for content in ("text", "[]", '{"benchmark": "train"}'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(UserError, match="is not what bench_attention.py wrote"):
            output.read_json(tmp_path / "a.json", "bench_attention")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "a.json").write_text("former")
    with pytest.raises(ValueError):
        output.write_json(tmp_path / "a.json", {"x": math.nan})
    with pytest.raises(UserError, match="can't write"):
        output.write_json(tmp_path / "nowhere" / "a.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "former"


def test_out_of_memory_is_one_line():
    with pytest.raises(UserError, match="smaller --T"), memory_errors("Give a smaller --T"):
        torch.empty(1 << 50)
    with pytest.raises(RuntimeError, match="other"), memory_errors(""):
        raise RuntimeError("other")


def test_help_lists_every_key(capsys, monkeypatch):
    for module, config in ((bench_attention, bench_attention.BenchConfig), (bench_train, bench_train.BenchTrainConfig)):
        with pytest.raises(SystemExit):
            command(module, monkeypatch, "--help")
        out = capsys.readouterr().out
        assert all(f"--{name}=" in out for name in config.__dataclass_fields__)


@pytest.mark.parametrize("T", [100, 128, 300, 1024])
def test_flex_attention_s_mask_is_causal(T):
    """Made of blocks: what torch makes holds T^2 entries meanwhile."""
    create_block_mask = pytest.importorskip("torch.nn.attention.flex_attention").create_block_mask
    ours = contenders.causal_blocks(T, torch.device("cpu"))
    theirs = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device="cpu")
    assert ours.shape == theirs.shape and torch.equal(ours.to_dense(), theirs.to_dense())
