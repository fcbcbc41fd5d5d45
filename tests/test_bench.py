"""The benchmarks: what they print and keep, that they refuse wrong results, that a step is train.py's. No times."""

import contextlib
import functools
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
import bench_data
import bench_train
import capture_attention
import contenders
import cost_model
import measure
import output
import picture_of_sus
import tile_sizes
from configurator import UserError
from contenders import Check, Contender
from model import GPT, GPTConfig
from sample import load_model
from sus_attn import sus_attention
from tiny import command, write_tiny_corpus
from training import checkpoint
from training.device import Device, memory_errors
from training.probe import take_turns, time_attention
from training.record import plain, read_record
from training.weights import model_args
from training_runs import TINY, text, train_here

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
    for part in (
        f"threads {torch.get_num_threads()}",
        f"torch {torch.__version__}",
        "SDPA flash",
        "SDPA math",
        "a matrix product took",
        "SUS c = 0.4, inf, sampler tiles, by the reference backend (asked for)",
        "left out: FlexAttention at T = 64, 128: FlexAttention does not support backward on CPU",
        "Time grows as T to the power of: exact backward",
    ):
        assert part in out, part


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
        "sight": {"documents": 0, "window": 0},
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
            "comparisons": bench_attention_report.compare(rows),
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
        check.at(exact, measure.gradients(sus, *INPUTS, seed=0), sus, *INPUTS[:3])
    return check


@pytest.mark.parametrize("slice_", [64, 256])
def test_the_check_passes(monkeypatch, slice_):
    check = run_check(monkeypatch, slice_, (2.0, 8.0, 200.0))
    assert len(check.findings) == 4 + 3 * 4 and all(0 <= f["value"] <= f["limit"] for f in check.findings)


@pytest.mark.parametrize("T, c", [(16, 1.0), (128, 4.0), (192, 4.0)])
def test_the_check_passes_where_cuts_are_rare(T, c):
    """In a few rows with a tile or two, some cuts are so improbable that none of the draws has them."""
    inputs, check = contenders.random_inputs(4, T, 64, 1, CPU), Check()
    check.start(FLASH, sus_at(c), *inputs)
    assert len(check.findings) == 6


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
    assert "above --peer_seconds" in reasons[-1]["why"]
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
    make_inputs = functools.partial(contenders.random_inputs, 2, 512, 16, 0, CPU)
    found = measure.in_child(bench_attention.memory_of, FLASH, make_inputs, CPU)
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
        "tokenizer": {"name": "byte"},
    }
    checkpoint.save(tmp_path / "ckpt.pt", state)
    return tmp_path


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


@pytest.mark.parametrize("sight", ["documents=50", "window=20"])
def test_documents_and_windows(sight, monkeypatch, capsys):
    """All contenders attend to the same keys: what is shown has been checked. Entries are counted among those seen."""
    options = f"--{sight}", "--T=130", "--c=1,inf", "--memory=False", "--backend=reference"
    command(bench_attention, monkeypatch, *SMALL, *options)
    out = capsys.readouterr().out
    assert f", {sight.replace('=', ' of ')} tokens; tiles draws" in out
    assert ("SUS c=1 by document" in out) == sight.startswith("documents")
    seen = {"documents=50": (2 * 50 * 51 / 2 + 30 * 31 / 2) / 130, "window=20": (130 * 20 - 19 * 20 / 2) / 130}[sight]
    assert abs(float(table_in(out)[2][11]) - seen) < 0.1


def test_contenders_see_the_same(monkeypatch):
    q, k, v, _ = contenders.random_inputs(4, 130, 16, 1, CPU)
    for sight in (contenders.Sight(documents=50), contenders.Sight(window=20)):
        members = contenders.contenders(CPU, {math.inf: "cpu"}, sight=sight)
        outs = {m.name: m(q, k, v) for m in members if m.how != "flex"}
        for name, out in outs.items():
            torch.testing.assert_close(out, outs["SDPA math"], rtol=1e-4, atol=1e-5, msg=name)


# -- capture_attention.py, and bench_attention.py --inputs ------------------------------------------


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(text(2000))
    return path


def hugging_face(folder, kind, **keys):
    """A folder with a small random model of transformers, whose tokens are bytes."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    size = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    sizes = size | dict(vocab_size=256, intermediate_size=48, max_position_embeddings=96, initializer_range=0.2)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes | keys)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return hugging_face(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def gpt2_like(tmp_path_factory):
    """With dropout, which is to be off, learned positions, biases, and no grouped-query attention."""
    return hugging_face(tmp_path_factory.mktemp("gpt2"), "gpt2", resid_pdrop=0.3, attn_pdrop=0.3)


def capture(monkeypatch, model, book, *options):
    command(capture_attention, monkeypatch, model, f"--text={book}", "--T=64", "--device=cpu", *options)


def own_attention(loss_of, output_layer):
    """The output of a layer's attention (T, H * D), which is what its output layer gets, and the loss's gradient of
    that, by autograd alone.
    """
    seen = []
    handle = output_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    (gradient,) = torch.autograd.grad(loss_of(), seen)
    handle.remove()
    return seen[0][0].detach(), gradient[0]


def check_captured(layer, output, gradient):
    """The captured q, k, v give that output by plain attention, and the captured gradient is that gradient."""
    q, k, v, grad_out = (layer[name] for name in ("q", "k", "v", "grad_out"))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.get("scale"), enable_gqa=True)
    for own, theirs in ((out, output), (grad_out, gradient)):
        torch.testing.assert_close(own[0].transpose(0, 1).flatten(1), theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max())
    assert gradient.abs().max() > 0 and all(x.is_contiguous() and x.dtype == torch.float32 for x in (q, k, v, grad_out))


@pytest.fixture(scope="module")
def granite(tmp_path_factory):
    """With a scale of its own."""
    return hugging_face(tmp_path_factory.mktemp("granite"), "granite", attention_multiplier=0.25)


OUTPUT_LAYERS = {
    "llama": lambda model, i: model.model.layers[i].self_attn.o_proj,
    "granite": lambda model, i: model.model.layers[i].self_attn.o_proj,
    "gpt2_like": lambda model, i: model.transformer.h[i].attn.c_proj,
}


@pytest.mark.parametrize("kind", OUTPUT_LAYERS)
def test_what_is_captured_of_a_hugging_face_model_is_its_own(kind, request, book, monkeypatch, tmp_path, capsys):
    folder = request.getfixturevalue(kind)
    capture(monkeypatch, folder, book, "--layers=2,0", "--start=100", f"--out={tmp_path / 'a.pt'}")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    assert f"a.pt: layers 0, 2 of {folder}, q (1, 4, 64, 8), k and v (1, " in capsys.readouterr().out
    model = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(folder)
    tokens = list(book.read_bytes()[100:165])
    letters = sorted(pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    place = {" ": "\u0120", "\n": "\u010a"}  # as ByteLevel writes them
    ids = torch.tensor([[letters.index(place.get(chr(byte), chr(byte))) for byte in tokens]])
    loss = lambda: F.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:])
    origin = dict(model=str(folder), text=str(book), start=100, T=64, layers=[0, 2], dtype="float32")
    assert saved["origin"] == origin | {"loss": pytest.approx(loss().item())} and list(saved["layers"]) == [0, 2]
    for i, layer in saved["layers"].items():
        check_captured(layer, *own_attention(loss, OUTPUT_LAYERS[kind](model, i)))
        assert ("scale" in layer) == (kind == "granite")


def test_what_is_captured_of_a_model_of_ours_is_its_own(trained, book, monkeypatch, tmp_path):
    capture(monkeypatch, trained, book, "--layers=0,1", "--start=100", f"--out={tmp_path / 'a.pt'}")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    model, _ = load_model(trained / "ckpt.pt")
    ids = torch.tensor([list(book.read_bytes()[100:165])])
    loss = lambda: model(ids[:, :-1], ids[:, 1:])[1]
    assert saved["origin"]["loss"] == pytest.approx(loss().item()) and list(saved["layers"]) == [0, 1]
    for i, layer in saved["layers"].items():
        check_captured(layer, *own_attention(loss, model.transformer.h[i].attn.c_proj))


def test_rho_and_times_of_a_model_of_others(llama, book, monkeypatch, tmp_path, capsys):
    """At c = inf there is no noise; a step's parts are those of exact attention and the rest."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    capture(monkeypatch, llama, book, "--layers=0,1", "--out=in.pt")
    options = f"--text={book}", "--T=64", "--pages=2", "--inputs=in.pt", "--repeats=2"
    draws = "--draws=64:inf,64:0.3,poisson:inf,poisson:3"
    command(tile_sizes, monkeypatch, str(llama), *options, draws, "--json=a.json", "--out=a.png")
    out = capsys.readouterr().out
    rows = {(row["tile"], row["c"]): row for row in json.loads((tmp_path / "a.json").read_text())["rho"]}
    for tile in ("64", "poisson"):
        assert rows[tile, "inf"]["rho"] < 1e-9 and rows[tile, "inf"]["kept"] == 32.5
    for draw in (("64", 0.3), ("poisson", 3.0)):
        assert 1e-4 < rows[draw]["rho"] and 1e-4 < rows[draw]["rho_qk"] and 0 < rows[draw]["kept"] < 32.5
    table = [cells(line) for line in out.splitlines() if line.startswith(("exact", "64 ", "poisson"))]
    assert [row[:2] for row in table[1:]] == [["64", "inf"], ["64", "0.3"], ["poisson", "inf"], ["poisson", "3"]]
    assert table[1][-1] == table[1][-2]  # without noise a step costs what it takes
    command(tile_sizes, monkeypatch, "--from_json=a.json")
    again = capsys.readouterr().out
    assert len(again.splitlines()) == 2 + len(table) and again in out


@pytest.mark.slow
def test_tiles_of_another_size(tmp_path):
    """A copy of the backend is exact at c = inf, too, and keeps tiles of its own size."""
    q, k, v, grad_out = contenders.random_inputs(2, 200, 16, 1, CPU)
    backends = {tile: tile_sizes.with_tile(tile, str(tmp_path)) for tile in ("16", "64")}

    def run(tile, c):
        """dq, dk, dv, stats"""
        stats = torch.zeros(3)
        return *measure.gradients(tile_sizes.drawn((tile, c), backends, 1, stats), q, k, v, grad_out)[1:], stats

    for ours, theirs in zip(run("16", math.inf)[:3], run("64", math.inf)[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    tiles = backends["16"].forward(q, k, v, 0.25, True, 2.0, 2.0, torch.tensor(1), None)[2]
    assert 3 < tiles.max() <= 12 and 0 < run("16", 2.0)[3][0] < run("64", 2.0)[3][0]


@pytest.mark.parametrize("kind", ["llama", "trained"])
def test_a_captured_file_is_benchmarked_layer_by_layer(kind, request, book, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    folder = request.getfixturevalue(kind)
    capture(monkeypatch, folder, book, "--layers=0,1", "--out=in.pt")
    options = "--inputs=in.pt", "--device=cpu", "--repeats=3", "--memory=False", "--backend=reference"
    command(bench_attention, monkeypatch, *options, "--c=0.4,1", "--T=64", "--json=a.json", "--out=a.png")
    out = capsys.readouterr().out
    titles, *rows = table_in(out)
    assert titles[:4] == ["T", "layer", "c", "exact fwd"]
    assert [row[:3] for row in rows] == [["64", layer, c] for layer in ("0", "1", "median") for c in ("0.4", "1")]
    assert f"q, k, v (1, 4, T, 8), 2 key heads, float32, layers 0, 1 of {folder} on {book}" in out
    assert "left out: FlexAttention at layer 0, 1: " in out and "to the power" not in out
    data = json.loads((tmp_path / "a.json").read_text())
    assert {check["what"].partition(":")[0] for check in data["checks"]} == {"layer 0", "layer 1"}
    command(bench_attention, monkeypatch, "--from_json=a.json", "--out=again.png")
    assert capsys.readouterr().out.partition("picture: ")[0] in out
    for conflict, own in ("--T=128", "T = 64"), ("--H=2", "H = 4"), ("--D=16", "D = 8"):
        with pytest.raises(UserError, match=f"{conflict}, but in.pt has {own}: leave"):
            command(bench_attention, monkeypatch, *options, conflict)


def test_one_captured_layer_has_no_median(llama, book, monkeypatch, tmp_path, capsys):
    """The middle one, where none is chosen."""
    capture(monkeypatch, llama, book, f"--out={tmp_path / 'a.pt'}")
    options = f"--inputs={tmp_path / 'a.pt'}", "--c=1", "--repeats=1", "--memory=False", "--backend=reference"
    command(bench_attention, monkeypatch, "--device=cpu", *options)
    assert [row[:3] for row in table_in(capsys.readouterr().out)[1:]] == [["64", "1", "1"]]


def test_the_median_of_layers(capsys):
    """Exact's times grow with the layer, SUS's don't; one peer was left out in one layer."""
    rows = []
    for layer, factor in ((2, 1.0), (10, 2.0), (24, 4.0)):
        for row in made_up(Ts=(1024,), cs=(10.0,))["results"]:
            grown = factor if row["kind"] == "exact" else 1.0
            times = {part: [grown * time for time in row[part]] for part in ("forward_ms", "backward_ms")}
            rows.append(row | times | {"layer": layer, "kept_per_row": factor})
    rows = [row for row in rows if (row["name"], row["layer"]) != ("SDPA math", 10)]
    medians = bench_attention_report.over_layers(rows)
    assert [(row["name"], row["layer"], row["kept_per_row"]) for row in medians] == [
        ("SDPA flash", "median", 2.0),
        ("SUS c=10", "median", 2.0),
    ]
    lines = bench_attention_report.compare(rows + medians)
    assert bench_attention_report.overall(lines) == lines[-1:]
    # exact's backward takes 3 ms times the round and the layer's factor, SUS's 1 ms times the round
    assert lines[-1]["layer"] == "median" and lines[-1]["backward"] == {"median": 6, "low": 3, "high": 12}
    assert bench_attention_report.over_layers(made_up()["results"]) == []


def test_a_scale_of_the_model_s_own(monkeypatch, tmp_path):
    """Contenders know 1 / sqrt(D) alone: the queries take the rest of it."""
    q, k, v, grad_out = INPUTS
    layer = {"q": q, "k": k, "v": v, "grad_out": grad_out, "scale": 0.7}
    torch.save({"origin": {"model": "a", "text": "b"}, "layers": {5: layer}}, tmp_path / "a.pt")
    mine = contenders.captured_layer(tmp_path / "a.pt", 5, CPU)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)
    torch.testing.assert_close(FLASH(*mine[:3]), expected)


@pytest.mark.parametrize(
    "content",
    [
        b"text",
        {"model": {}},
        {"origin": {}, "layers": {}},
        {"origin": {}, "layers": {0: {"q": INPUTS[0], "k": INPUTS[0], "v": INPUTS[0]}}},
        {"origin": {}, "layers": {0: dict(q=INPUTS[0], k=INPUTS[0], v=INPUTS[0], grad_out=INPUTS[0][0])}},
        {"origin": {}, "layers": {0: dict(q=INPUTS[0], k=INPUTS[0][..., :8], v=INPUTS[0], grad_out=INPUTS[0])}},
    ],
    ids=["no-file-of-torch", "a-checkpoint", "no-layers", "no-gradient", "shape-of-gradient", "shape-of-k"],
)
def test_another_file_is_no_captured_one(content, tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match="a.pt is not what capture_attention.py wrote"):
        command(bench_attention, monkeypatch, f"--inputs={path}")
    with pytest.raises(UserError, match="can't read"):
        command(bench_attention, monkeypatch, f"--inputs={tmp_path}")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--T=8"], "T must be >= 16"),
        (["--T=97"], "--T=97 is above the 96 tokens that the model reads"),
        (["--start=1936"], "has 2,000 tokens, and the page, with the token behind it, takes 65 from 1,936 on"),
        (["--layers=3"], "--layers=3: the model has 3 layers, and they count from 0"),
        (["--layers=a"], "--layers=a: write integers >= 0"),
        (["--text=missing"], "can't read missing"),
        (["--out=nowhere/a.pt"], "can't write nowhere/a.pt"),
        (["another"], "give one model and one text"),
        (["--text="], "give one model and one text"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_mistakes_of_capturing(options, message, llama, book, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        capture(monkeypatch, llama, book, *options)
    assert message in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_models_that_can_t_be_captured(trained, book, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkpoint at missing"):
        capture(monkeypatch, "missing", book)
    with pytest.raises(UserError, match="--T=65 is above the 64 tokens"):
        capture(monkeypatch, trained, book, "--T=65")
    window = hugging_face(tmp_path / "window", "mistral", sliding_window=32)
    with pytest.raises(UserError, match="the attention of MistralAttention is not plain causal attention"):
        capture(monkeypatch, window, book)
    capped = hugging_face(tmp_path / "capped", "gemma2", head_dim=8, sliding_window=4096)
    with pytest.raises(UserError, match="the attention of Gemma2Attention is not plain"):
        capture(monkeypatch, capped, book)
    scaled = hugging_face(tmp_path / "scaled", "granite", logits_scaling=8.0)
    with pytest.raises(UserError, match="are not its last layer's states times its head"):
        capture(monkeypatch, scaled, book)
    (window / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"transformers can't read .*window"):
        capture(monkeypatch, window, book)
    assert not (tmp_path / "attention.pt").exists()


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


@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
def test_attention_share_with_known_times(tiny, corpus, monkeypatch, checkpointing):
    """A clock that ticks at each look: every layer's forward (twice if repeated) and backward takes one tick."""
    trainer = make_trainer(tiny, corpus, f"--activation_checkpointing={checkpointing}")
    ticks = iter(range(10**6))
    monkeypatch.setattr(bench_train.time, "perf_counter", lambda: next(ticks))
    spans = 2 * 2 * (3 if checkpointing == "full" else 2)  # micro-batches, layers
    for kind in ("exact", "sus"):
        assert trainer.attention_share(kind, 0) == pytest.approx(spans / (2 * spans + 1))
        assert not trainer.model.transformer.h[0].attn.attend._forward_hooks


def test_the_table_of_modes(tiny, tmp_path, monkeypatch, capsys):
    options = "--T=64", "--repeats=1", "--layers=2", "--modes=none,full", f"--json={tmp_path / 'a.json'}"
    command(bench_train, monkeypatch, *tiny, *options)
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    assert [(row["layers"], row["mode"], row["kind"]) for row in results] == [
        (2, mode, kind) for mode in ("none", "full") for kind in ("exact", "sus")
    ]
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line[:1].isdigit() and " 64 " in line]
    assert [(row[0], row[2]) for row in table] == [("2", "none"), ("2", "full")]
    plain = [row for row in results if row["kind"] == "sus"]
    (a,), (b,) = (row["step_ms"] for row in plain)
    assert f"{b / a:.2f}" in table[1]
    with pytest.raises(UserError, match="--modes must be some of none,attention,full"):
        command(bench_train, monkeypatch, *tiny, "--T=64", "--modes=none,all")


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
    """Where it can be measured, it is less than autograd's: here 0.81 to 0.83 of it, in six runs."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # or else glibc keeps what is freed, now more, now less of it
    autograd, analytic = (
        measure.in_child(
            bench_train.memory_of,
            make_trainer(tiny, corpus, f"--backprop={way}").cfg,
            "exact",
            2048,
            CPU,
            bench_train.load_corpus(corpus, 2048),
        )
        for way in bench_backprop.WAYS
    )
    assert autograd is None or analytic < 0.9 * autograd


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
        (bench_attention, f"--json={'x' * 300}", "File name too long"),
        (bench_attention, f"--out={'x' * 248}.png", "File name too long"),  # what is written aside has a longer one
        (bench_attention, "--out=.", "it is a folder"),
        (bench_attention, "--out=a.jpgg", "must end in .png"),
        (bench_attention, "--from_json=missing", "can't read missing"),
        (bench_attention, "--inputs=missing", "can't read missing"),
        (bench_attention, "--device=tpu", "tpu"),
        (bench_train, "--T=1", "integers >= 2"),
        (bench_train, "--block_size=64", "context lengths by --T"),
        (bench_train, "--attn_backward=exact", "both are measured"),
        (bench_train, "--init_from=resume", "no run is gone on with"),
        (bench_train, "--backprop=analytic", "bench_backprop.py"),
        (bench_train, "--dropout=0.1", "dropout"),
        (bench_train, "--dataset=missing", "missing"),
        (bench_train, "--T=64,99999999", "too few for block_size=99999999"),
        (bench_data, f"--input={'x' * 300}", "give a folder of text files"),
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


def test_texts_too_short_for_bench_data(tmp_path, monkeypatch, gpt2):
    (tmp_path / "a.txt").write_text("text " * 100)
    with pytest.raises(UserError, match="is too little: one text must have 1,000,000 characters"):
        command(bench_data, monkeypatch, f"--input={tmp_path}")


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
    ours = contenders.flex_blocks(T, torch.device("cpu"))
    theirs = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device="cpu")
    assert ours.shape == theirs.shape and torch.equal(ours.to_dense(), theirs.to_dense())
