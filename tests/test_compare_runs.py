"""compare_runs.py: its numbers against hand-made records, its picture from every shape of record, its errors."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import compare_runs  # noqa: E402
from compare_runs import Run, gaps, group, smooth, table  # noqa: E402
from configurator import UserError  # noqa: E402
from record import Record, plain  # noqa: E402


def make_run(name="exact-1", val=(5.5, 2.0, 1.9), attn_backward="exact", seed=1, every=10, **config):
    config = {"attn_backward": attn_backward, "seed": seed, "sus_c": 25.0, "out_dir": name, "n_layer": 4} | config
    sus = {"sus/kept_per_row": 24.9, "attn/backward_ms": 20.0} if attn_backward == "sus" else {}
    lines = []
    for i, loss in enumerate(val):
        lines.append({"iter": every * i, "train/loss": loss + 0.01, "train/tok_per_sec": 1000.0 * (i + 1)})
        lines.append({"iter": every * i, "val/loss": loss, "val/loss_by_position": {"0-63": loss + 1, "64-127": loss},
                      "attn/forward_ms": 10.0, "attn/backward_ms": 30.0, "attn/exact_forward_ms": 10.0,
                      "attn/exact_backward_ms": 30.0 + i} | sus)
    return Run(name, config, lines)


def write(folder, run):
    rec = Record(folder, run.config, run_name=run.name, run_id=None, group="g", wandb_log=False, wandb_project="p",
                 resume_iter=None)
    for line in run.lines:
        rec.log(line)
    return str(folder)


def compare(*arguments, cwd):
    return subprocess.run([sys.executable, ROOT / "experiments" / "compare_runs.py", *arguments], cwd=cwd, text=True,
                          capture_output=True)


def test_table():
    runs = [make_run(), make_run("sus-1", (5.5, 1.8, 2.1), "sus", seed=7), Run("new", {}, [{"iter": 3}])]
    titles, exact, sus, new = table(runs)
    assert dict(zip(titles, exact)) == {
        "run": "exact-1", "backward": "exact", "c": "-", "seed": "1", "iterations": "20", "final val": "1.9000",
        "best val": "1.9000", "tok/s": "2,000", "exact bwd ms": "31.00", "sus bwd ms": "-", "kept/row": "-"}
    assert sus == ["sus-1", "sus", "25", "7", "20", "2.1000", "1.8000", "2,000", "31.00", "20.00", "24.9"]
    assert new == ["new", "-", "-", "-", "3", *"------"]


def test_groups_differ_in_more_than_the_seed():
    """A resumed run has another init_from, and an exact run another sus_c: neither trains differently."""
    runs = [make_run("a", seed=1), make_run("b", seed=2, init_from="resume", sus_c=10.0, wandb_run_name="b"),
            make_run("c", attn_backward="sus"), make_run("d", attn_backward="sus", sus_c="inf"),
            make_run("e", attn_backward="sus", seed=3)]
    assert {label: [run.name for run in members] for label, members in group(runs).items()} == {
        "exact": ["a", "b"], "sus c=25": ["c", "e"], "sus c=inf": ["d"]}
    labels = list(group([*runs, make_run("f", n_layer=6)]))
    assert labels == ["exact, n_layer=4", "sus c=25, n_layer=4", "sus c=inf, n_layer=4", "exact, n_layer=6"]


def test_gaps():
    """At the last iteration which all have evaluated, 20, where the one run's later loss must not count."""
    runs = [make_run("s1", (5, 3, 2.06, 1.0), "sus", 1), make_run("s2", (5, 3, 2.10), "sus", 2),
            make_run("e1", (5, 3, 2.00), seed=1), make_run("e2", (5, 3, 2.03), seed=2)]
    assert gaps(runs)[1:] == [
        "validation loss at iteration 20, the last at which all were evaluated:",
        "  sus c=25  2.0800, 0.0400 from lowest to highest of 2 runs",
        "  exact     2.0150, 0.0300 from lowest to highest of 2 runs",
        "  sus c=25 is +0.0650 from exact"]


def test_gaps_need_something_to_compare():
    assert gaps([make_run()]) == []
    assert "no iteration" in gaps([make_run(), make_run("b", val=())])[1]
    assert gaps([make_run(), make_run("b", attn_backward="sus")])[2].endswith("one run")


def test_smooth():
    assert smooth([1.0] * 50) == [1.0] * 50 and smooth([]) == [] and smooth([3.0, 1.0]) == [3.0, 1.0]
    noisy = [i + (-1) ** i for i in range(40)]
    assert max(abs(y - i) for i, y in list(enumerate(smooth(noisy)))[2:-2]) < 0.6
    assert len(smooth(noisy)) == 40


def test_whole_command(tmp_path):
    pytest.importorskip("matplotlib")
    folders = [write(tmp_path / "a", make_run()), write(tmp_path / "b", make_run("sus-1", attn_backward="sus"))]
    result = compare(*folders, "--out=new.png", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    assert "exact-1" in result.stdout and "sus c=25 is +0.0000 from exact" in result.stdout
    picture = (tmp_path / "new.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "new.png"]


BARE = [{"iter": i, "train/loss": 5.0 - i} for i in range(3)]


@pytest.mark.parametrize("runs", [
    [make_run()],
    [make_run(f"{kind}-{i}", attn_backward=kind, seed=i) for i in range(5) for kind in ("exact", "sus")],
    [make_run(val=(5.5,))],
    [make_run(val=(2.0, 2.0, 2.0))],
    [make_run(val=(5.5, math.nan, 1.9)), make_run("b", val=(math.nan,))],
    [Run("bare", {"attn_backward": "exact"}, BARE)],
    [Run("bare", {"attn_backward": "exact"}, BARE), make_run()],
    [make_run("short"), Run("long", make_run().config, [{"iter": 5, "val/loss_by_position": {
        f"{2**i}-{2 ** (i + 1) - 1}": 3.0 - i / 10 for i in range(6, 17)}}])],
], ids=["one", "ten", "one-evaluation", "flat", "nan-and-none", "no-evaluation", "mixed", "other-contexts"])
def test_a_picture_of_every_shape_of_record(tmp_path, recwarn, runs):
    pytest.importorskip("matplotlib")
    for run in runs:
        run.lines = [plain(line, nonfinite=lambda value: None) for line in run.lines]  # as they are in the file
    figure = compare_runs.draw(runs)
    compare_runs.save_picture(figure, tmp_path / "a.png")
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert [label.partition(":")[0] for label in labels] == [run.name for run in runs]
    assert all(math.isfinite(limit) for ax in figure.axes for limit in (*ax.get_xlim(), *ax.get_ylim()))
    assert not [str(warning.message) for warning in recwarn]
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_times_are_shown_where_there_are_some():
    pytest.importorskip("matplotlib")
    right = compare_runs.draw([make_run(), make_run("s", attn_backward="sus")]).axes[2]
    assert [patch.get_height() for patch in right.patches] == [10, 30, 10, 20]  # forward, backward; exact, sus
    assert sorted(text.get_text() for text in right.texts) == ["10", "10", "20", "30"]
    bare = Run("bare", {"attn_backward": "exact"}, [{"iter": 1, "train/tok_per_sec": 500.0}])
    right = compare_runs.draw([bare]).axes[2]
    assert [patch.get_width() for patch in right.patches] == [500]


def test_equal_names_are_told_apart(tmp_path):
    pytest.importorskip("matplotlib")
    for name in "abc":
        write(tmp_path / name, make_run("mine"))
    lines = compare("a", "b", "c", cwd=tmp_path).stdout.splitlines()
    assert [line.partition("  ")[0] for line in lines[1:4]] == ["mine (a)", "mine (b)", "mine (c)"]


@pytest.mark.parametrize("arguments, message", [
    ([], "which runs"), (["nowhere"], "nowhere/metrics.jsonl"), (["empty"], "no lines yet"), (["text"], "not a record"),
    (["a", "--outt=b.png"], "did you mean out"), (["a", "--out", "b.png"], "--out"),
    (["a", "--out=b.jpgg"], "b.jpgg"), (["a", "--out=nowhere/b.png"], "nowhere is no folder"),
], ids=["none", "missing", "empty", "foreign", "unknown-key", "no-equals", "format", "folder"])
def test_mistakes_get_one_clear_error(tmp_path, arguments, message):
    pytest.importorskip("matplotlib")
    write(tmp_path / "a", make_run())
    write(tmp_path / "empty", make_run(val=()))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "metrics.jsonl").write_text("text\n")
    result = compare(*arguments, cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty", "text"]


def test_missing_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install -r requirements-dev.txt"):
        compare_runs.draw([make_run()])
