"""The experiment on the low-rank gradient: what it measures is what it says, and its mistakes are told."""

import functools
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))

import lowrank_error
import lowrank_error_report
import model as model_module
from configurator import UserError
from lowrank_attn import CHUNK, lowrank_attention, score_bound
from sus_attn import sus_attention
from test_grad_variance import corpus, run  # noqa: F401
from tiny import command


@pytest.fixture
def main(monkeypatch, capsys):
    def main(*arguments):
        monkeypatch.setattr(lowrank_error, "product_ms", lambda device: 1.0)
        # no kernel has to be compiled for it
        monkeypatch.setattr(lowrank_error, "sus_backend", lambda *_: ("reference", "asked for"))
        monkeypatch.setattr(lowrank_error, "sus_attention", functools.partial(sus_attention, backend="reference"))
        command(lowrank_error, monkeypatch, *arguments)
        return capsys.readouterr().out

    return main


def column(out, title, of):
    """The numbers under a title in the table whose titles start with `of`."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[: len(of)] == of)
    end = lines[start].index(title) + len(title)
    table = itertools.takewhile(lambda line: line and not line.startswith("in the time"), lines[start + 1 :])
    return [float(line[:end].split()[-1]) for line in table]


def test_spheres_reach_the_bound_and_do_not_pass_it():
    q, k, *_ = lowrank_error.on_spheres(500, 2, 1.5, 0)
    assert 0.99 * 1.5 < score_bound(q, k) <= 1.5 * (1 + 1e-12)


def test_errors_fall_with_the_degree_and_grow_with_the_bound(main):
    out = main("--parts=errors", "--D=3", "--T=100,300", "--degrees=2,4", "--bounds=0.5,2")
    paper, ours = (column(out, title, ["T", "bound"]) for title in ("paper", "operator"))
    assert paper[0] > paper[1] and paper[2] > paper[0] and all(0 < a < b for a, b in zip(ours, paper))


def test_the_paper_s_polynomial_is_put_into_the_model_and_taken_out_again():
    q, k, v, _ = lowrank_error.on_spheres(CHUNK, 3, 2.0, 0)
    with lowrank_error.polynomial_everywhere():
        inside = model_module.lowrank_attention(q, k, v, 2, approximate_forward=True)
    assert model_module.lowrank_attention is lowrank_attention
    assert not torch.allclose(inside, lowrank_attention(q, k, v, 2, approximate_forward=True))


def test_sides(main, run):  # noqa: F811
    """Windows of 32 tokens are within one chunk, where the low-rank gradient is exact."""
    out = main("--parts=sides", f"--out_dir={run}", "--sequences=3", "--degrees=2", "--c=0.5,4")
    exact, c_half, _, lowrank = column(out, "cosine", ["method", "fwd+bwd"])
    assert exact == lowrank == 1 > c_half
    exact, c_half, _, lowrank = column(out, "  error %", ["method", "fwd+bwd"])
    assert exact == 0 and lowrank < 1e-3 < c_half and "in the time of low-rank g=2: " in out


def test_a_whole_run(main, corpus, monkeypatch, tmp_path):  # noqa: F811
    """Memory is measured in this process, to be quick, and may then be anything."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(lowrank_error, "apart", lambda device, function, *arguments: function(*arguments))
    sizes = ["--T=32,300", "--long_T=32,64,300", "--degrees=2,4", "--bounds=0.5,1,2", "--D=2"]
    out = main(*sizes, f"--dataset={corpus}", "--device=cpu", f"--out={tmp_path / 'a.png'}")
    paper, ours = (column(out, title, ["T", "g", "paper"]) for title in ("paper", "operator"))
    assert len(paper) == 4 and paper[0] > paper[1] and all(0 < a <= b for a, b in zip(ours, paper))
    methods = ["exact", "SUS c=4", "low-rank g=2", "low-rank g=4", "low-rank g=2, forward too"]
    table = out[out.index("time (ms") : out.index("\nexponents in T of forward")].splitlines()[3:]
    assert [line.split()[0] for line in table[::5]] == ["32", "64", "300"]
    assert [" ".join(line.split()[1:-3]) for line in table] == 3 * methods
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--parts=all"], "'all' is none of errors, model, scaling, sides"),
        (["--parts=sides"], "needs a trained model: --out_dir=FOLDER"),
        (["--degrees=2,3"], "3 is odd"),
        (["--parts=errors", "--out=a.png"], "the picture needs --parts=errors,model,scaling"),
    ],
)
def test_mistakes(main, arguments, message):
    with pytest.raises(UserError, match=message):
        main(*arguments)


def test_the_picture_is_of_any_figures():
    pytest.importorskip("matplotlib")
    row = {"T": 9, "bound": 1.0, "degree": 2, "paper": 0.1, "ours": 0.0, "paper q, k": 0.1, "ours q, k": math.inf}
    times = {"T": 9, "name": "exact", "forward": 1.0, "backward": 0.0, "peak": None}
    figure = lowrank_error_report.draw({"errors": ([row], [row]), "model": [row], "scaling": [times]}, 1.0, 9, 3)
    assert len(figure.axes) == 4
