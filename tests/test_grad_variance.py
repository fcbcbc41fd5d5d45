"""What c costs: rho against brute force, the self-check against a biased estimator, tables and pictures
of any figures.
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import grad_variance
import grad_variance_measure
import grad_variance_picture
import grad_variance_report
import model as model_module
import model_gradients
import output
from configurator import UserError, load_config, run_main
from data.loader import load_corpus
from grad_variance import VarianceConfig
from grad_variance_measure import Method, relative_variance, student_limit
from model import GPT, GPTConfig
from model_gradients import Parts, Subject
from sus_attn import fold_in, sus_attention
from sus_backends import reference
from tiny import command, write_tiny_corpus
from training import checkpoint
from training.device import Device
from training.record import plain
from training.weights import model_args

CPU = Device(torch.device("cpu"), torch.float32, "")
L, H, K, D, C = 2, 4, 2, 8, 32


@pytest.fixture(autouse=True)
def soon_over(monkeypatch):
    monkeypatch.setattr(grad_variance, "product_ms", lambda device: 1.0)
    monkeypatch.setattr(grad_variance_measure, "ESTIMATE_DRAWS", 4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_tiny_corpus(tmp_path_factory.mktemp("data") / "small", 4000, 600)


def tiny_model(**keys):
    torch.manual_seed(0)
    keys = dict(block_size=32, vocab_size=257, n_layer=L, n_head=H, n_kv_head=K, n_embd=C, pos="rope") | keys
    model = GPT(GPTConfig(**keys))
    for block in model.transformer.h:  # attention that isn't even
        block.attn.c_attn.weight.data *= 8
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    """A run's folder."""
    return save_run(tmp_path_factory.mktemp("run"), corpus, {})


def save_run(folder, corpus, config):
    model = tiny_model()
    config = {"dataset": str(corpus), **config}
    state = {
        "model": model.state_dict(),
        "model_args": model_args(model.config),
        "iter_num": 1,
        "best_val_loss": 1.0,
        "config": config,
        "tokenizer": {"name": "byte"},
    }
    checkpoint.save(folder / "ckpt.pt", state)
    return folder


def arguments(run, *more):
    return [f"--out_dir={run}", "--device=cpu", "--times=False", "--T=32", "--backend=reference", *map(str, more)]


def measure(run, *more):
    return grad_variance.measure(load_config(VarianceConfig, arguments(run, *more), usage=""))


# -- rho --------------------------------------------------------------------------------------------


def brute_force(model, corpus, n, draws, seed, **sus):
    """{part: (rho, error)} with nothing but loops: parts are "all", (layer,), and (layer, head)."""

    def gradient(x, y, sus_seed=None):
        model.zero_grad()
        model(x, y, sus_seed=None if sus_seed is None else torch.tensor(sus_seed))[1].backward()
        named = {name: p.grad.double().clone() for name, p in model.named_parameters()}
        found = {"all": list(named.values())}
        for layer in range(L):
            prefix = f"transformer.h.{layer}."
            found[layer,] = [g for name, g in named.items() if name.startswith(prefix)]
            for h in range(H):
                kv = h // (H // K)
                starts = (h * D, (H + kv) * D, (H + K + kv) * D)
                found[layer, h] = [
                    named[f"{prefix}attn.c_attn.{name}"][i : i + D] for name in ("weight", "bias") for i in starts
                ]
        c_attn = [
            named[f"transformer.h.{layer}.attn.c_attn.{name}"] for layer in range(L) for name in ("weight", "bias")
        ]
        found["queries and keys"] = [g[: (H + K) * D] for g in c_attn]
        return {part: torch.cat([g.flatten() for g in gs]) for part, gs in found.items()}

    model.train()
    loaded = load_corpus(corpus, 32)
    x, y, _ = loaded.val_batch(loaded.val_windows(n))
    exact = [gradient(x[[s]], y[[s]]) for s in range(n)]
    for name, value in sus.items():
        setattr(model.config, name, value)
    drawn = [[gradient(x[[s]], y[[s]], fold_in(seed, s, i)) for i in range(draws)] for s in range(n)]

    def rho(part, members):
        g = [exact[s][part] for s in members]
        errors = [sum((d[part] - exact[s][part]).square().sum() for d in drawn[s]) / draws for s in members]
        others = [(sum(g) - own) / (len(g) - 1) for own in g]
        return (sum(errors) / sum(own @ own - own @ other for own, other in zip(g, others))).item()

    result = {}
    for part in exact[0]:
        left_out = torch.tensor([rho(part, [t for t in range(n) if t != s]) for s in range(n)])
        result[part] = rho(part, range(n)), ((n - 1) * left_out.var(correction=0)).sqrt().item()
    return result


def test_rho_is_that_of_brute_force(run, corpus):
    data = measure(run, "--c=3", "--samplers=poisson", "--sequences=6", "--draws=2", "--seed=5")
    (row,) = data["results"]
    truth = brute_force(tiny_model(), corpus, 6, 2, 5, attn_backward="sus", sus_c=3.0, sus_sampler="poisson")
    assert 0.001 < truth["all"][0] < 10
    assert row["rho"] == pytest.approx(truth["all"], rel=1e-4)
    assert row["queries_and_keys"] == pytest.approx(truth["queries and keys"], rel=1e-4)
    for layer in range(L):
        assert row["layers"][layer] == pytest.approx(truth[layer,], rel=1e-4)
        for h in range(H):
            assert row["heads"][layer][h] == pytest.approx(truth[layer, h], rel=1e-4)


def test_all_kept_adds_nothing(run):
    data = measure(run, "--c=4,inf", "--samplers=systematic,weighted", "--sequences=4")
    by_c = {(row["sampler"], row["c"]): row for row in data["results"]}
    for sampler in ("systematic", "weighted"):
        row = by_c[sampler, math.inf]
        assert 0 <= row["rho"][0] < 1e-9 < by_c[sampler, 4]["rho"][0]
        assert row["kept_per_row"] == 16.5 and row["cut"] == 0
        assert 0 < by_c[sampler, 4]["kept_per_row"] <= 4 and 0.7 < by_c[sampler, 4]["cut"] < 1
    assert data["check"]["holds"]


def test_jackknife_by_hand():
    """g = 0, 1, 5: their mean is 2, their variance 7. Without the first it is 8, without the second 12.5, the third
    0.5.
    """
    errors, deviations = torch.tensor([[1.0], [2], [3]]).double(), torch.tensor([[4.0], [1], [9]]).double()
    rho, error = relative_variance(errors, deviations)
    left_out = [2.5 / 8, 2 / 12.5, 1.5 / 0.5]
    mean = sum(left_out) / 3
    assert rho.item() == pytest.approx(2 / 7)
    assert error.item() == pytest.approx(math.sqrt(2 / 3 * sum((x - mean) ** 2 for x in left_out)))
    nothing = relative_variance(0 * errors, 0 * deviations)
    assert [x.item() for x in nothing] == [0, 0]


def test_student_limit_against_tables():
    for p, degrees, limit in ((0.05, 31, 2.0395), (0.001, 10, 4.587), (0.001, 3, 12.924), (0.01, 1000, 2.5808)):
        assert student_limit(p, degrees) == pytest.approx(limit, rel=1e-3)


def test_estimate_is_that_of_poisson_draws(run, monkeypatch):
    monkeypatch.setattr(grad_variance_measure, "ESTIMATE_DRAWS", 64)
    data = measure(run, "--c=4,20", "--samplers=poisson", "--sequences=4")
    (line,) = data["estimates"]
    assert line["c"] == 20 and line["layer"] == 1 and 0.8 < line["ratio"] < 1.25


# -- is it unbiased? --------------------------------------------------------------------------------


def biased(factor):
    """sus_attention whose dk is multiplied."""

    def function(q, k, v, *args, **options):
        k = k * 1
        k.register_hook(lambda gradient: gradient * factor)
        return sus_attention(q, k, v, *args, **options)

    return function


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_the_self_check(run, monkeypatch, capsys, tmp_path, factor):
    monkeypatch.setattr(model_module, "sus_attention", biased(factor))
    argv = [*arguments(run, "--c=20", "--samplers=systematic", "--sequences=16"), f"--json={tmp_path / 'a.json'}"]
    if factor == 1:
        command(grad_variance, monkeypatch, *argv)
        assert "no bias found: the largest |z| of 16" in capsys.readouterr().out
        return
    monkeypatch.setattr(sys, "argv", ["grad_variance.py", *argv])
    with pytest.raises(SystemExit) as exit:
        run_main(grad_variance.main)
    out, err = capsys.readouterr()
    assert exit.value.code == 1 and "NOT UNBIASED" in err and "*** NOT UNBIASED ***: the largest |z|" in out
    assert json.loads((tmp_path / "a.json").read_text())["check"]["holds"] is False  # all was written before


def test_unbiased_draws_in_general(run):
    samplers = "poisson,systematic,weighted,rows,values,rows+values"
    data = measure(run, "--c=2", f"--samplers={samplers}", "--sequences=12", "--kappa=3")
    assert [row["sampler"] for row in data["results"]] == samplers.split(",") and data["check"]["count"] == 6 * (
        L + 3 * L + 8
    )
    assert data["check"]["holds"] and reference.KAPPA == 2.0


@pytest.mark.parametrize("sampler, c", [("weighted", 2), ("tiles", 0.3)])
def test_kappa_is_that_of_the_proposals(run, sampler, c):
    rows = [
        measure(run, f"--c={c}", f"--samplers={sampler}", "--sequences=4", f"--kappa={k}")["results"][0]
        for k in (0, 2, 8)
    ]
    assert rows[0]["rho"] == rows[1]["rho"] != rows[2]["rho"]


# -- what it looks at -------------------------------------------------------------------------------


def test_even_attention():
    model = tiny_model()
    for block in model.transformer.h:
        block.attn.c_attn.weight.data[: H * D] = 0  # no query: all scores are 0
    x = torch.arange(64).view(2, 32)
    found = grad_variance_measure.look_at_attention(Subject(model, CPU), x, [4.0, math.inf])
    k = torch.arange(1, 33.0)
    for head in (head for layer in found["heads"] for head in layer):
        assert head["entropy"] == pytest.approx(16) and head["effective"] == pytest.approx(16)
        assert head["first"] == pytest.approx((1 / k).mean()) and head["distance"] == pytest.approx((k.mean() - 1) / 2)
    expected = (1 / 4 - 1 / k).clamp(min=0).mean()
    assert found["toy"][0] == [4, pytest.approx(expected), pytest.approx(expected)] and found["toy"][1] == [
        math.inf,
        0,
        0,
    ]
    entries, mass = found["histogram"]
    assert sum(entries) == pytest.approx(1) and sum(mass) == pytest.approx(1)
    assert sum(entries[:-10]) == 0 and mass[-1] > entries[-1] > 0  # no weight is below 1/32


def test_windows_are_of_validation_text_first(corpus):
    loaded = load_corpus(corpus, 32)
    room = (loaded.val_tokens - 1) // 32
    x, y, taken = model_gradients.windows(loaded, room)
    assert taken == {"val": room, "train": 0} and torch.equal(x, loaded.val_batch(loaded.val_windows(room))[0])
    x, y, taken = model_gradients.windows(loaded, room + 50)
    assert taken == {"val": room, "train": 50} and torch.equal(x[:, 1:], y[:, :-1]) and x.shape == (room + 50, 32)
    assert len({tuple(row.tolist()) for row in x}) == room + 50
    assert torch.equal(x[-1:], loaded.read("train", [[(loaded.train_tokens - 33, 32)]])[0])  # spread up to the end
    with pytest.raises(UserError, match="give fewer --sequences"):
        model_gradients.windows(loaded, 10_000)


def test_the_model_is_left_as_it_was(run, monkeypatch, tmp_path):
    """Ctrl-C in the midst of it: no file, no stats left behind, the proposals' factor back."""
    subjects, squares = [], Parts.squares

    def interrupted(self, x):
        subjects.append(x)
        if len(subjects) == 15:
            raise KeyboardInterrupt
        return squares(self, x)

    monkeypatch.setattr(Parts, "squares", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command(
            grad_variance,
            monkeypatch,
            *arguments(run, "--c=2", "--sequences=4", "--kappa=4"),
            f"--json={tmp_path / 'a.json'}",
            f"--out={tmp_path / 'a.png'}",
        )
    assert not list(tmp_path.iterdir()) and reference.KAPPA == 2.0
    subject = Subject(tiny_model(), CPU)
    x = torch.arange(32)[None]
    subject.gradient(x, x, **Method("poisson", 2.0, "reference").keys)
    assert subject.model.config.attn_backward == "exact"
    assert all(block.attn.attend.stats is None for block in subject.model.transformer.h)


# -- tables and pictures ----------------------------------------------------------------------------


def made_up(Ts=(512, 2048), cs=(5.0, 25.0, 100.0), samplers=("poisson", "systematic"), size=1.0, layers=2, heads=4):
    """Figures whose curves are known: poisson's rho is c^-1.5, kept c^0.75; the others' rho is half, kept twice."""
    rows = []
    for T in Ts:
        for sampler in samplers:
            for c in cs:
                half = 1 if sampler == "poisson" else 0.5
                rho = [size * half * c**-1.5, 0.1 * size * c**-1.5]
                rows.append(
                    {
                        "T": T,
                        "sampler": sampler,
                        "c": c,
                        "backend": "cpu",
                        "kept_per_row": min(c, 200) ** 0.75 / half,
                        "cut": 0.9,
                        "rho": rho,
                        "layers": [rho] * layers,
                        "heads": [[rho] * heads] * layers,
                        "queries_and_keys": rho,
                        "layers_kept": [1.0] * layers,
                        "layers_cut": [0.9] * layers,
                        "layers_added": [1.0] * layers,
                        "dropped": 0.0,
                        "z": [1.0],
                        "forward_ms": 1.0,
                        "backward_ms": 2.0,
                    }
                )
    head = {"entropy": 9.0, "effective": 5.0, "first": 0.1, "distance": 77.0}
    toy = [[c, max(0, 1 / c - 0.02), max(0, 1 / c - 0.005)] for c in cs]
    bins = [[1 / grad_variance_measure.BINS] * grad_variance_measure.BINS] * 2
    return plain(
        {
            "benchmark": "grad_variance",
            "config": {"sequences": 32, "dtype": "float32", "times": True},
            "environment": {"device": "cpu: made up", "threads": 2},
            "idle": {"product_ms": [10.0, 10.1], "drift": 0.01, "idle": True},
            "model": {"from": "nowhere", "dataset": "made up", "parameters": 1000, "layers": layers, "heads": heads},
            "results": rows,
            "exact": [
                {
                    "T": T,
                    "windows": {"val": 30, "train": 2},
                    "variance": 1.0,
                    "layers_variance": [1.0] * layers,
                    "square": 2.0,
                    "forward_ms": 3.0,
                    "backward_ms": 7.0,
                }
                for T in Ts
            ],
            "attention": [{"T": T, "heads": [[head] * heads] * layers, "toy": toy, "histogram": bins} for T in Ts],
            "estimates": [
                {"T": Ts[0], "layer": 1, "sampler": s, "c": cs[0], "estimate": 1.0, "measured": 0.8, "ratio": 1.25}
                for s in samplers
            ],
            "check": {"largest": 2.0, "count": 100, "limit": 5.0, "holds": True, "place": "T = 512"},
            "fits": grad_variance_report.fits(rows),
        },
        nonfinite=str,
    )


def test_the_tables(capsys, monkeypatch, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(made_up()))
    command(grad_variance, monkeypatch, f"--from_json={tmp_path / 'a.json'}")
    out = capsys.readouterr().out
    cells = [line.split() for line in out.splitlines()]
    # at c = 25 systematic keeps 2 * 25^0.75 a row and has a rho of 0.5 * 25^-1.5: twice poisson's at as many kept
    assert ["512", "systematic", "25", "22.4", "90.00", "0.4", "0.08", "0.4", "0.50", "2.00", "1", "2"] in cells
    assert ["512", "poisson", "5", "3.3", "90.00", "8.94", "0.89", "8.94", "1.00", "1.00", "1", "2"] in cells
    assert [row[9] for row in cells if row[:3] == ["512", "systematic", "100"]] == ["-"]  # poisson never kept so many
    assert ["2,048", "poisson", "-1.50", "-2.00"] in cells and ["0", "3", "9.0", "5.0", "10.0", "77"] in cells
    assert "1.250 x the measured (systematic" in out and "no bias found: the largest |z| of 100 is 2.00 <= 5.00" in out
    assert "3 + 7 ms at T = 512" in out and "30 + 2" in out


SHAPES = {
    "usual": made_up(),
    "one-T": made_up(Ts=(512,)),
    "one-c": made_up(cs=(25.0,)),
    "one-of-each": made_up(Ts=(100,), cs=(25.0,), samplers=("weighted",)),
    "rho-0": made_up(size=0.0),
    "inf": made_up(cs=(5.0, math.inf)),
    "only-inf": made_up(cs=(math.inf,), size=0.0),
    "toy-of-0": made_up(cs=(300.0, 400.0)),
    "many": made_up(
        Ts=(512, 1024, 2048, 4096),
        cs=(5.0, 10.0, 20.0, 25.0, 30.0, 50.0, 100.0),
        samplers=grad_variance.SAMPLERS,
        layers=12,
        heads=12,
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_picture_and_a_table_of_every_shape(tmp_path, recwarn, capsys, shape):
    pytest.importorskip("matplotlib")
    data = json.loads(json.dumps(SHAPES[shape], allow_nan=False))
    grad_variance_report.report(data)
    assert len(capsys.readouterr().out.splitlines()) > 10
    figure = grad_variance_picture.draw(data)
    output.save_picture(figure, tmp_path / "a.png", dpi=40)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == 6 and all(
        math.isfinite(x) for ax in figure.axes for x in (*ax.get_xlim(), *ax.get_ylim())
    )
    empty = [text.get_text() for ax in figure.axes for text in ax.texts].count("no variance was added")
    assert empty == (4 if shape in ("rho-0", "only-inf") else 0)
    assert not [str(warning.message) for warning in recwarn]


def test_a_whole_run(run, monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    argv = [
        *arguments(run, "--c=2,8", "--sequences=4", "--T=16,32", "--samplers=poisson,systematic", "--times=True"),
        f"--json={tmp_path / 'a.json'}",
    ]
    command(grad_variance, monkeypatch, *argv)
    out = capsys.readouterr().out
    assert "poisson: the reference backend (asked for)" in out and f"every figure: {tmp_path / 'a.json'}" in out
    command(grad_variance, monkeypatch, f"--from_json={tmp_path / 'a.json'}", f"--out={tmp_path / 'a.svg'}")
    again = capsys.readouterr().out.partition("picture:")[0]
    assert again and again in out and "<svg" in (tmp_path / "a.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.svg"]
    data = json.loads((tmp_path / "a.json").read_text())
    assert [(r["T"], r["sampler"], r["c"]) for r in data["results"]] == [
        (T, sampler, c) for T in (16, 32) for sampler in ("poisson", "systematic") for c in (2, 8)
    ]
    assert all(r["forward_ms"] > 0 and r["backward_ms"] > 0 and r["dropped"] == 0 for r in data["results"])


# -- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--T=32,64", "T=64 is above the 32 tokens"),
        ("--T=x", "write integers >= 8"),
        ("--c=0", "write numbers > 0"),
        ("--samplers=poisson,nosuch", "'nosuch' is none of tiles, weighted"),
        ("--samplers=", "'' is none of"),
        ("--kappa=2", "--kappa is for the samplers that thin"),
        ("--sequences=100000", "give fewer --sequences"),
        ("--backend=triton", "backend='triton' can't be had"),
        ("--dataset=nosuch", "has no train.bin"),
        ("--out_dir=nosuch", "no checkpoint at nosuch"),
        ("--init_from=gpt2", "needs --dataset=NAME"),
        ("--json=nosuch/a.json", "can't write nosuch/a.json"),
        ("--out=a.gif", "must end in .png"),
        ("--from_json=nosuch.json", "can't read nosuch.json"),
        (f"--from_json={__file__}", "is not what grad_variance.py wrote"),
    ],
)
def test_mistakes(run, monkeypatch, argument, message):
    def never(*args):
        raise AssertionError("it began")

    monkeypatch.setattr(Subject, "gradient", never)
    with pytest.raises(UserError, match=message):
        command(grad_variance, monkeypatch, *arguments(run, "--samplers=poisson", argument))


def named(model):
    """load_named of any name, as of that model in GPT-2's tokens."""
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    saved = {"model": weights, "model_args": model_args(model.config), "tokenizer": {"name": "gpt2"}, "config": {}}
    return lambda name: (saved, Path(name))


def test_what_does_not_fit(run, corpus, monkeypatch, tmp_path):
    parameters = sum(p.numel() for p in tiny_model().parameters())
    monkeypatch.setattr(grad_variance, "free_memory", lambda device: 4 * parameters * 22)
    with pytest.raises(UserError, match="at most --sequences=10 would fit"):
        measure(run, "--sequences=11")
    assert measure(run, "--sequences=10", "--c=2", "--samplers=poisson")["results"]
    with pytest.raises(UserError, match="dropout=0.2"):
        measure(save_run(tmp_path, corpus, {"dropout": 0.2}))
    with pytest.raises(UserError, match="dropout=0.1"):
        Subject(tiny_model(dropout=0.1), CPU)
    monkeypatch.setattr(model_gradients, "load_named", named(tiny_model(vocab_size=50257)))
    with pytest.raises(UserError, match=r"is in other tokens \(byte\)"):
        measure(run, "--init_from=gpt2", f"--dataset={corpus}")


def test_gpt2_on_a_corpus_of_nanogpt(run, monkeypatch, tmp_path):
    """Such a corpus has no meta.json; its vocabulary counts as padded, and is then larger than GPT-2's."""
    for split in ("train", "val"):
        ids = torch.randint(50257, (200,), generator=torch.Generator().manual_seed(0))
        (tmp_path / f"{split}.bin").write_bytes(ids.to(torch.uint16).numpy().tobytes())
    model = tiny_model(vocab_size=50257, pos="learned", n_kv_head=0)
    monkeypatch.setattr(model_gradients, "load_named", named(model))
    data = measure(run, "--init_from=gpt2", f"--dataset={tmp_path}", "--c=4", "--samplers=poisson", "--sequences=8")
    assert data["exact"][0]["windows"] == {"val": 6, "train": 2} and data["model"]["from"] == "gpt2"
    assert data["results"][0]["rho"][0] > 0
