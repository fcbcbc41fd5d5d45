"""compare_runs.py: real sweeps of tiny models, its numbers against hand-made records, its picture from every shape of
record, its errors.
"""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import compare_runs
import output
import sweep
from compare_runs_report import draw, smooth, summary, table
from configurator import TrainConfig, UserError, load_config
from runs import Run, group, rank
from tiny import command, write_tiny_corpus
from training.record import Record, plain, read_record
from training_runs import PATIENCE, TINY, wait_for


def make_run(name="exact-1", val=(5.5, 2.0, 1.9), attn_backward="exact", seed=1, every=10, **config):
    config = {"attn_backward": attn_backward, "seed": seed, "sus_c": 25.0, "out_dir": name, "n_layer": 4} | config
    sus = {"sus/kept_per_row": 24.9, "attn/backward_ms": 20.0} if attn_backward == "sus" else {}
    lines = []
    for i, loss in enumerate(val):
        lines.append({"iter": every * i, "train/loss": loss + 0.01, "train/tok_per_sec": 1000.0 * (i + 1)})
        lines.append(
            {
                "iter": every * i,
                "val/loss": loss,
                "val/loss_by_position": {"0-63": loss + 1, "64-127": loss},
                "attn/forward_ms": 10.0,
                "attn/backward_ms": 30.0,
                "attn/exact_forward_ms": 10.0,
                "attn/exact_backward_ms": 30.0 + i,
            }
            | sus
        )
    return Run(name, config, lines)


def write(folder, run):
    rec = Record(
        folder,
        run.config,
        run_name=run.name,
        run_id=None,
        group="g",
        wandb_log=False,
        wandb_project="p",
        resume_iter=None,
    )
    for line in run.lines:
        rec.log(line)
    return str(folder)


def compare(*arguments, cwd):
    return subprocess.run(
        [sys.executable, ROOT / "experiments" / "compare_runs.py", *arguments], cwd=cwd, text=True, capture_output=True
    )


@pytest.fixture(autouse=True)
def close_figures():
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def main(tmp_path, monkeypatch):
    """main(*arguments): the command in this process, in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def main(*arguments):
        command(compare_runs, monkeypatch, *arguments)

    return main


LONG = "x" * 300  # more bytes than a file's name may have

# -- the sweep --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file of a tiny model on a tiny corpus."""
    folder = tmp_path_factory.mktemp("small")
    keys = TINY | dict(
        dataset=str(write_tiny_corpus(folder / "corpus", 50_000, 20_000)),
        n_layer=1,
        n_embd=16,
        block_size=32,
        batch_size=1,
        gradient_accumulation_steps=1,
        max_iters=200,
        lr_decay_iters=200,
        eval_interval=100,
        eval_iters=2,
        sus_backend="reference",
    )
    del keys["attn_backward"], keys["sus_c"]  # they are the sweep's
    (folder / "tiny.py").write_text("".join(f"{name} = {value!r}\n" for name, value in keys.items()))
    return folder / "tiny.py"


def made_sweep(config, folder, *modes, **changes):
    """Records as of finished runs of a sweep with seed 1."""
    keys = vars(compare_runs.load_config(compare_runs.TrainConfig, [str(config)], usage="")) | changes
    keys.pop("explicit", None)
    for name in modes:
        run = make_run(name, val=(5.5, 2.0, 1.9), every=100)
        backward = {"attn_backward": "exact"} if name.startswith("exact") else {"attn_backward": "sus", "sus_c": 4.0}
        run.config = keys | backward | {"seed": 1}
        write(folder / name, run)
        (folder / name / "ckpt.pt").write_bytes(b"not read, since newer than the record")


def test_an_interrupted_sweep_goes_on(config, tmp_path, main, capsys):
    """Ctrl-C reaches the process group: the run is saved, the same command finishes, and once more trains nothing."""
    pytest.importorskip("matplotlib")
    arguments = [str(config), "--sweep=exact,4", "--seeds=1", "--runs=runs", "--out=a.png"]
    record = tmp_path / "runs" / "exact-seed1" / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, ROOT / "experiments" / "compare_runs.py", *arguments],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wait_for(process, record, '"iter": 2,')
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "Traceback" not in err + out, err
    assert "stopped by SIGINT" in out and out.endswith(f"compare_runs.py {' '.join(arguments)}\n")
    stopped_at = read_record(record)[1][-1]["iter"]
    assert 2 <= stopped_at < 200 and f"exact-seed1 stops at iteration {stopped_at}" in out
    assert (tmp_path / "runs" / "exact-seed1" / "ckpt.pt").exists() and len(list((tmp_path / "runs").glob("*/"))) == 1

    main(*arguments)
    out = capsys.readouterr().out
    assert "2 runs in runs: 0 finished, 1 begun, 1 new" in out
    assert (
        f"exact-seed1 resumes at iteration {stopped_at} (1 of 2)" in out and "sus-c4-seed1 ends at iteration 200" in out
    )
    for name, backward in (("exact-seed1", "exact"), ("sus-c4-seed1", "sus")):
        header, lines = read_record(tmp_path / "runs" / name / "metrics.jsonl")
        assert [line["iter"] for line in lines if "train/loss" in line] == list(range(1, 201))
        assert header["run_name"] == name and header["config"]["attn_backward"] == backward
        assert "val loss" in (tmp_path / "runs" / name / "train.log").read_text()
    assert (tmp_path / "a.png").exists()
    table_of_groups = [line for line in out.splitlines() if line.startswith(("exact  ", "sus c=4  "))]
    assert len(table_of_groups) == 2

    def never(*_, **__):
        raise AssertionError("a run was started")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep.subprocess, "Popen", never)
        patch.setattr(compare_runs, "draw", lambda runs: None)  # that takes a second each time
        patch.setattr(compare_runs, "save_picture", lambda figure, path: None)
        main(*arguments)
        again = capsys.readouterr().out
        assert "2 finished, 0 begun, 0 new" in again and table_of_groups[1] in again
        main("runs", "--out=a.png")  # a folder stands for its runs
        assert table_of_groups[1] in capsys.readouterr().out
        with pytest.raises(
            UserError, match=r"runs/exact-seed1 has a run with n_embd=16, not 32: choose another --runs"
        ):
            main(*arguments, "--n_embd=32")
        with pytest.raises(AssertionError, match="a run was started"):
            main(*[a.replace("seeds=1", "seeds=1,2") for a in arguments])
        checkpoint = record.with_name("ckpt.pt")
        os.utime(checkpoint, (0, 0))  # older than the record, so it is read, and is the last one
        main(*arguments)
        state = torch.load(checkpoint, weights_only=True)
        torch.save({**state, "iter_num": 100}, checkpoint)  # killed before the last checkpoint
        os.utime(checkpoint, (0, 0))
        with pytest.raises(AssertionError, match="a run was started"):
            main(*arguments)
        assert "1 finished, 1 begun" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_notice_is_passed_on_to_the_run(config, tmp_path):
    """SIGUSR1 has a run saved, and both go on, also without anybody who reads what they say."""
    pytest.importorskip("matplotlib")
    arguments = [config, "--sweep=exact", "--seeds=1", "--runs=runs", "--out=a.png", "--eval_interval=100000"]
    folder = tmp_path / "runs" / "exact-seed1"
    process = subprocess.Popen(
        [sys.executable, ROOT / "experiments" / "compare_runs.py", *arguments, "--max_iters=100000"],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wait_for(process, folder / "metrics.jsonl", '"iter": 1,')
    process.stdout.close()
    process.send_signal(signal.SIGUSR1)
    deadline = time.time() + PATIENCE
    while not (folder / "ckpt.pt").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    iteration = read_record(folder / "metrics.jsonl")[1][-1]["iter"]
    wait_for(process, folder / "metrics.jsonl", f'"iter": {iteration + 5},')
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 130 and "Traceback" not in process.stderr.read()


def test_a_run_that_fails_is_one_clear_error(config, tmp_path, main, capsys):
    pytest.importorskip("matplotlib")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError) as error:
        main(config, "--sweep=4", "--seeds=1", "--block_size=1000000")
    first, *_, last = str(error.value).splitlines()
    assert first == "sus-c4-seed1 failed with exit status 1; out-sweep/sus-c4-seed1/train.log ends:"
    assert "too few for block_size" in last
    assert "too few" in (tmp_path / "out-sweep" / "sus-c4-seed1" / "train.log").read_text()
    assert signal.getsignal(signal.SIGINT) == handler and not list(tmp_path.glob("*.png"))


def test_the_order_and_the_names_of_a_sweep(config, tmp_path, monkeypatch):
    """All modes of a seed, then the next seed; c=auto is train.py's to refuse or to take."""
    monkeypatch.chdir(tmp_path)
    types = compare_runs.TrainConfig
    monkeypatch.setattr(compare_runs, "load_config", lambda cls, argv, usage: types())
    monkeypatch.setattr(
        sys, "argv", ["compare_runs.py", "a.py", "--sweep=exact,5.0,auto,inf", "--seeds=3,1", "--n_head=2"]
    )
    cfg = compare_runs.CompareConfig(sweep="exact,5.0,auto,inf", seeds="3,1")
    cfg.explicit = {"sweep", "seeds", "n_head"}
    runs = compare_runs.plan(cfg, ["a.py"])
    modes = ["exact", "sus-c5", "sus-cauto", "sus-cinf"]
    assert [run.name for run in runs] == [f"{mode}-seed{seed}" for seed in (3, 1) for mode in modes]
    assert runs[0].arguments == [
        "a.py",
        "--n_head=2",
        "--attn_backward=exact",
        "--seed=3",
        "--out_dir=out-sweep/exact-seed3",
        "--wandb_run_name=exact-seed3",
    ]
    assert runs[6].arguments[2:5] == ["--attn_backward=sus", "--sus_c=auto", "--seed=1"]


def test_what_makes_another_run(config, tmp_path, main):
    """What matters to SUS alone doesn't matter to exact; the names of the run and of its project never do."""
    made_sweep(
        config, tmp_path / "out-sweep", "exact-seed1", "sus-c4-seed1", sus_c=9.0, wandb_project="other", log_interval=3
    )
    main(config, "--sweep=exact,4", "--seeds=1", "--sus_sampler=tiles")
    with pytest.raises(UserError, match="sus-c4-seed1 has a run with sus_sampler=tiles, not poisson"):
        main(config, "--sweep=exact,4", "--seeds=1", "--sus_sampler=poisson")
    main(config, "--sweep=exact", "--seeds=1", "--sus_sampler=poisson")
    with pytest.raises(UserError, match="exact-seed1 has a run with max_iters=200, not 400"):
        main(config, "--sweep=exact", "--seeds=1", "--max_iters=400")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sweep=foo"], "--sweep=foo: 'foo' is not exact, lowrank, auto or a c"),
        (["--sweep=exact,0"], "'0' is not exact, lowrank, auto or a c"),
        (["--sweep=nan"], "'nan' is not exact, lowrank, auto or a c"),
        (["--sweep=5,5.0"], "'5.0' is not exact, lowrank, auto or a c"),
        (["--sweep="], "'' is not exact, lowrank, auto or a c"),
        (["--sweep=5", "--seeds=1,x"], "--seeds=1,x must be a list of integers"),
        (["--sweep=5", "--seeds=1,-2"], "integers"),
        (["--sweep=5", "--seeds=2,02"], "each once"),
        (["--sweep=5", "--seed=3"], "--seed is set by"),
        (["--sweep=5", "--out_dir=b"], "--out_dir is set by"),
        (["--sweep=5", "a"], "a is a folder"),
        (["--sweep=5", "none.py"], "'none.py': no such config file"),
        (["--sweep=5", "--dropout=0.1"], "sus does not support"),
        (["--sweep=5", "--eval_only=True"], "resumes by itself"),
        (["--sweep=5", "--init_from=resume"], "resumes by itself"),
        (["--sweep=5", "--out=nowhere/a.png"], "nowhere is no"),
        (["--sweep=5", f"--out={LONG}.png"], "File name too long"),
        (["--sweep=5", f"--runs={LONG}"], "File name too long"),
        (["--sweep=5", LONG], "no such config file"),
        (["a", "conf.py"], "conf.py is a config file"),
        (["a", "--n_head=4"], "--n_head is for training"),
        (["a", "--seeds=1"], "--seeds is for training"),
        (["a", "--sweeep=5"], "did you mean sweep"),
    ],
)
def test_mistakes_before_a_sweep(tmp_path, main, monkeypatch, arguments, message):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sweep.subprocess, "Popen", None)
    write(tmp_path / "a", make_run())
    with pytest.raises(UserError) as error:
        main(*arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_help_tells_all_keys(main, capsys):
    with pytest.raises(SystemExit):
        main("--help")
    out = capsys.readouterr().out
    assert all(f"--{name}=" in out for name in ("sweep", "seeds", "runs", "out", "max_iters"))


# -- the tables -------------------------------------------------------------------------------------


def test_table():
    runs = [make_run(), make_run("sus-1", (5.5, 1.8, 2.1), "sus", seed=7), Run("new", {}, [{"iter": 3}])]
    titles, exact, sus, new = table(runs)
    assert dict(zip(titles, exact)) == {
        "run": "exact-1",
        "backward": "exact",
        "c": "-",
        "seed": "1",
        "iterations": "20",
        "final val": "1.9000",
        "best val": "1.9000",
        "tok/s": "2,000",
        "exact bwd ms": "31.00",
        "own bwd ms": "-",
        "kept/row": "-",
    }
    assert sus == ["sus-1", "sus", "25", "7", "20", "2.1000", "1.8000", "2,000", "31.00", "20.00", "24.9"]
    assert new == ["new", "-", "-", "-", "3", *"------"]


def test_groups_differ_in_more_than_the_seed():
    """A resumed run has another init_from, and an exact run another sus_c: neither trains differently."""
    runs = [
        make_run("a", seed=1),
        make_run("b", seed=2, init_from="resume", sus_c=10.0, wandb_run_name="b"),
        make_run("c", attn_backward="sus"),
        make_run("d", attn_backward="sus", sus_c="inf"),
        make_run("e", attn_backward="sus", seed=3),
    ]
    assert {label: [run.name for run in members] for label, members in group(runs).items()} == {
        "exact": ["a", "b"],
        "sus c=25": ["c", "e"],
        "sus c=inf": ["d"],
    }
    labels = list(group([*runs, make_run("f", n_layer=6)]))
    assert labels == ["exact, n_layer=4", "sus c=25, n_layer=4", "sus c=inf, n_layer=4", "exact, n_layer=6"]


def test_lowrank_runs_are_groups_by_their_own_keys_alone():
    runs = [
        make_run("a", lowrank_degree=4),
        make_run("b", attn_backward="lowrank", lowrank_degree=2, sus_c=3.0),
        make_run("c", attn_backward="lowrank", lowrank_degree=4),
        make_run("d", attn_backward="sus", lowrank_degree=6),
    ]
    assert list(group(runs)) == ["exact", "lowrank, lowrank_degree=2", "lowrank, lowrank_degree=4", "sus c=25"]
    assert sorted(runs, key=rank) == [runs[0], runs[3], *runs[1:3]]
    assert dict(zip(*table(runs[1:2])))["own bwd ms"] == "30.00"


def groups_of(runs):
    """{label: {title: cell}} of the table of groups."""
    titles, *rows = summary(runs)[1]
    return {row[0]: dict(zip(titles, row)) for row in rows}


def test_groups():
    """At the last iteration which all have evaluated, 20, where the one run's later loss must not count."""
    runs = [
        make_run("s1", (5, 3, 2.06, 1.0), "sus", 1),
        make_run("s2", (5, 3, 2.10), "sus", 2),
        make_run("e1", (5, 3, 2.00), seed=1),
        make_run("e2", (5, 3, 2.03), seed=2),
    ]
    assert summary(runs)[0][1] == "validation loss at iteration 20, the last at which all were evaluated:"
    groups = groups_of(runs)
    # differences 0.06 and 0.07, so 0.065 and its error 0.005; the means' errors are half the distances
    assert groups["sus c=25"] | {"train time": "?"} == {
        "group": "sus c=25",
        "runs": "2",
        "val loss": "2.0800 ± 0.0200",
        "lowest..highest": "2.0600..2.1000",
        "from exact": "+0.0650 ± 0.0050",
        "train time": "?",
        "tok/s": "2,250",
        "exact bwd ms": "31.25",
        "own bwd ms": "20.00",
        "kept/row": "24.9",
    }
    assert groups["exact"]["val loss"] == "2.0150 ± 0.0150" and groups["exact"]["from exact"] == "-"
    assert groups["exact"]["own bwd ms"] == groups["exact"]["kept/row"] == groups["exact"]["train time"] == "-"


def test_distances_where_seeds_do_not_pair_up():
    runs = [
        make_run("e1", (2.0,), seed=1),
        make_run("e2", (2.2,), seed=2),
        make_run("e3", (9.0,), seed=3),
        make_run("a1", (2.1,), "sus", 1),
        make_run("a2", (2.4,), "sus", 2),  # pairs: +0.1 and +0.2
        make_run("b", (2.5,), "sus", 2, sus_c="auto"),
        make_run("c", (2.0,), "sus", 8, sus_c="inf"),
    ]
    assert [cells["from exact"] for cells in groups_of(runs).values()] == [
        "-",
        "+0.1500 ± 0.0500",
        "+0.3000",
        "-2.4000",
    ]
    assert [cells["from sus c=25"] for cells in groups_of(runs[3:]).values()] == ["-", "+0.1000", "-0.2500"]


def test_auto_has_its_median_c():
    runs = [make_run("e"), make_run("a", attn_backward="sus", sus_c="auto"), make_run("b", attn_backward="sus")]
    for c in (4.0, 7.0, 30.0):
        runs[1].lines.append({"iter": 20, "sus/c": c})
    runs[2].lines.append({"iter": 20, "sus/c": 25.0})
    assert [cells["median c"] for cells in groups_of(runs).values()] == ["-", "7.0", "-"]
    assert table(runs)[2][2] == "auto" and "median c" not in summary(runs[::2])[1][0]


def test_train_time():
    """Three steps of 10 s to iteration 3, logged once, then two of 20 s, of which the evaluation at 4 sees one."""
    run = make_run(val=())
    run.lines = [{"iter": 3, "train/dt": 10.0}, {"iter": 5, "train/dt": 20.0}]
    assert run.seconds([0, 3, 4, 5, 9]).tolist() == [0, 30, 50, 70, 70]
    for it in (0, 5):
        run.lines.append({"iter": it, "val/loss": 2.0})
    slow = Run(
        "slow",
        run.config | {"seed": 2},
        [line | {"train/dt": 3 * line.get("train/dt", 0)} if "train/dt" in line else line for line in run.lines],
    )
    other = Run("o", run.config | {"attn_backward": "sus"}, [{"iter": 5, "val/loss": 2.0, "train/dt": 1000.0}])
    assert [cells["train time"] for cells in groups_of([run, slow, other]).values()] == ["02:20", "1:23:20"]


def test_unfinished_runs_are_left_out_once_others_compare():
    done, sus = make_run("e1", max_iters=20), make_run("s1", attn_backward="sus", max_iters=20)
    begun = make_run("e2", (5.0,), seed=2, max_iters=20)
    assert "at iteration 20" in summary([done, sus, begun])[0][2]
    assert summary([done, sus, begun])[0][1] == "left out, since not finished: e2"
    assert groups_of([done, sus, begun])["exact"]["runs"] == "1"
    assert "at iteration 0" in summary([done, begun])[0][1] and groups_of([done, begun])["exact"]["runs"] == "2"


def test_a_run_without_an_evaluation_does_not_block_the_others():
    runs = [make_run("e"), make_run("s", attn_backward="sus"), Run("bare", {"attn_backward": "exact"}, BARE)]
    lines, rows = summary(runs)
    assert lines[1] == "left out, since not evaluated yet: bare" and "at iteration 20" in lines[2] and len(rows) == 3


def test_runs_that_were_validated_on_other_text(tmp_path, main, capsys):
    """So many evaluations of so many windows are the same windows, however they are put into batches."""
    pytest.importorskip("matplotlib")
    keys = dict(dataset="stdlib", windows="packed", block_size=64, eval_iters=8, batch_size=4)
    write(tmp_path / "a", make_run("a", **keys))
    write(tmp_path / "b", make_run("b", seed=2, **keys | dict(eval_iters=4, batch_size=8)))
    main("a", "b")
    assert "WARNING" not in capsys.readouterr().out
    write(tmp_path / "c", make_run("c", seed=3, **keys | dict(dataset="books", eval_iters=9)))
    main("a", "c")
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert warning.endswith("as the runs differ in dataset, eval_iters * batch_size")


def test_a_text_that_was_prepared_anew_is_another(tmp_path, main, capsys):
    """The folder's name is the same; the record's first line has the checksum."""
    pytest.importorskip("matplotlib")
    for name, seed, checksum in (("a", 1, "12"), ("b", 2, "12"), ("c", 3, "34")):
        write(tmp_path / name, make_run(name, seed=seed, dataset="mine"))
        header, *lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        header = json.dumps(json.loads(header) | {"val_sha256": checksum})
        (tmp_path / name / "metrics.jsonl").write_text("\n".join([header, *lines]) + "\n")
    main("a", "b")
    assert "WARNING" not in capsys.readouterr().out
    main("a", "b", "c")
    assert "WARNING: losses are of different validation, as the runs differ in val_sha256" in capsys.readouterr().out


def test_the_picture_is_there_before_the_tables(tmp_path, main, monkeypatch):
    """Whoever was to read these may have left."""
    pytest.importorskip("matplotlib")
    write(tmp_path / "a", make_run())

    def gone(rows):
        raise BrokenPipeError

    monkeypatch.setattr(compare_runs, "print_table", gone)
    with pytest.raises(BrokenPipeError):
        main("a", "--out=a.png")
    assert (tmp_path / "a.png").exists()


def test_groups_need_something_to_compare():
    assert summary([make_run()]) == ([], [])
    apart = make_run("b")
    apart.lines = [line | {"iter": line["iter"] + 1} for line in apart.lines]
    assert "no iteration" in summary([make_run(), apart])[0][1]
    assert summary([make_run(), make_run("b", val=())]) == (["", "left out, since not evaluated yet: b"], [])
    assert groups_of([make_run(), make_run("b", attn_backward="sus")])["exact"]["val loss"] == "1.9000"


def test_many_runs_get_the_groups_table_alone(tmp_path, main, capsys):
    pytest.importorskip("matplotlib")
    for i in range(8):
        write(tmp_path / "all" / f"r{i}", make_run(f"r{i}", attn_backward=("sus", "exact")[i % 2], seed=i))
    (tmp_path / "all" / "note").mkdir()
    write(tmp_path / "all" / "just-begun", make_run("x", val=()))
    main("all")
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "left out, since there are no lines yet: all/just-begun"
    assert [line[:2] for line in lines[1:9]] == ["r1", "r3", "r5", "r7", "r0", "r2", "r4", "r6"]  # exact first
    main("all", write(tmp_path / "one-more", make_run("r8", seed=9)))
    out = capsys.readouterr().out
    assert "r1" not in out and out.splitlines()[4].split()[:2] == ["exact", "5"]


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
    assert "exact-1" in result.stdout and "+0.0000" in result.stdout
    picture = (tmp_path / "new.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "new.png"]


BARE = [{"iter": i, "train/loss": 5.0 - i} for i in range(3)]


@pytest.mark.parametrize(
    "runs",
    [
        [make_run()],
        [make_run(f"{kind}-{i}", attn_backward=kind, seed=i) for i in range(4) for kind in ("exact", "sus")],
        [make_run(val=(5.5,))],
        [make_run(val=(2.0, 2.0, 2.0))],
        [make_run(val=(5.5, math.nan, 1.9)), make_run("b", val=(math.nan,))],
        [Run("bare", {"attn_backward": "exact"}, BARE)],
        [Run("bare", {"attn_backward": "exact"}, BARE), make_run()],
        [
            make_run("short"),
            Run(
                "long",
                make_run().config,
                [
                    {
                        "iter": 5,
                        "val/loss_by_position": {f"{2**i}-{2 ** (i + 1) - 1}": 3.0 - i / 10 for i in range(6, 17)},
                    }
                ],
            ),
        ],
    ],
    ids=["one", "eight", "one-evaluation", "flat", "nan-and-none", "no-evaluation", "mixed", "other-contexts"],
)
def test_a_picture_of_every_shape_of_record(tmp_path, recwarn, runs):
    pytest.importorskip("matplotlib")
    for run in runs:
        run.lines = [plain(line, nonfinite=lambda value: None) for line in run.lines]  # as they are in the file
    figure = draw(runs)
    output.save_picture(figure, tmp_path / "a.png")
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert [label.partition(":")[0] for label in labels] == [run.name for run in runs]
    assert all(math.isfinite(limit) for ax in figure.axes for limit in (*ax.get_xlim(), *ax.get_ylim()))
    assert not [str(warning.message) for warning in recwarn]
    assert (tmp_path / "a.png").stat().st_size > 10_000


def timed(*arguments, dt=0.1, **keys):
    run = make_run(*arguments, **keys)
    run.lines = [line | ({"train/dt": dt} if "train/loss" in line and line["iter"] else {}) for line in run.lines]
    return run


def many_runs(make=timed, modes=("exact", 5, 10, 25, 50, "auto"), seeds=(1, 2, 3)):
    return [
        make(
            f"{mode}-{seed}",
            (5.0, 2.5 + seed / 10, 2.0 + seed / 10 + (mode == 5)),
            seed=seed,
            dt=60.0,
            **({} if mode == "exact" else {"attn_backward": "sus", "sus_c": mode}),
        )
        for mode in modes
        for seed in seeds
    ]


@pytest.mark.parametrize(
    "runs",
    [
        many_runs(),
        many_runs(modes=("exact", *range(2, 12)), seeds=(1,)),
        many_runs(modes=(25,), seeds=range(9)),
        many_runs(make=lambda *arguments, dt, **keys: make_run(*arguments, **keys)),
        [*many_runs(), Run("x", {"attn_backward": "exact"}, BARE)],
        [Run(str(i), {"attn_backward": "exact", "seed": i}, BARE) for i in range(9)],
        many_runs(modes=("exact", 5), seeds=range(20)),
    ],
    ids=["18", "one-seed", "one-group", "no-times", "one-not-begun", "no-evaluation", "40"],
)
def test_a_picture_of_every_shape_of_many_runs(tmp_path, recwarn, runs):
    pytest.importorskip("matplotlib")
    figure = draw(runs)
    output.save_picture(figure, tmp_path / "a.png", dpi=60)
    assert all(math.isfinite(limit) for ax in figure.axes for limit in (*ax.get_xlim(), *ax.get_ylim()))
    assert not [str(warning.message) for warning in recwarn] and (tmp_path / "a.png").stat().st_size > 10_000


def test_groups_are_drawn_as_mean_band_and_dots():
    pytest.importorskip("matplotlib")
    loss, by_time, final, times = draw(many_runs()).axes
    assert loss.get_legend_handles_labels()[1] == [
        "exact: 2.2000",
        "sus c=5: 3.2000",
        "sus c=10: 2.2000",
        "sus c=25: 2.2000",
        "sus c=50: 2.2000",
        "sus c=auto: 2.2000",
    ]
    curve, band = loss.get_lines()[1], loss.collections[1].get_paths()[0].vertices
    assert curve.get_xdata().tolist() == [0, 10, 20] and curve.get_ydata().tolist() == pytest.approx([5, 2.7, 3.2])
    assert {round(y, 6) for x, y in band if x == 20} == {3.1, 3.3}
    assert by_time.get_lines()[0].get_xdata().tolist() == [0, 10, 20]  # minutes: 20 iterations of 60 s
    assert [dots.get_ydata().tolist() for dots in final.get_lines()[:2]] == [
        pytest.approx([2.1, 2.2, 2.3]),
        pytest.approx([3.1, 3.2, 3.3]),
    ]
    (band,) = final.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((2.1, 2.3))
    assert [label.get_text() for label in final.get_xticklabels()] == ["exact", "c=5", "c=10", "c=25", "c=50", "c=auto"]
    assert len(times.patches) == 12


def test_few_runs_have_the_time_axis_where_times_are_known():
    pytest.importorskip("matplotlib")
    axes = draw([timed("a", dt=60.0), timed("b", attn_backward="sus", dt=30.0)]).axes
    assert len(axes) == 4 and [line.get_xdata()[-1] for line in axes[1].get_lines()] == [20, 10]
    assert len(draw([timed("a"), make_run("b")]).axes) == 3 and len(draw([timed("a")]).axes) == 3


def test_times_are_shown_where_there_are_some():
    pytest.importorskip("matplotlib")
    right = draw([make_run(), make_run("s", attn_backward="sus")]).axes[2]
    assert [patch.get_height() for patch in right.patches] == [10, 30, 10, 20]  # forward, backward; exact, sus
    assert sorted(text.get_text() for text in right.texts) == ["10", "10", "20", "30"]
    bare = Run("bare", {"attn_backward": "exact"}, [{"iter": 1, "train/tok_per_sec": 500.0}])
    right = draw([bare]).axes[2]
    assert [patch.get_width() for patch in right.patches] == [500]


def test_equal_names_are_told_apart(tmp_path, main, capsys):
    pytest.importorskip("matplotlib")
    for seed, name in enumerate("abc"):
        write(tmp_path / name, make_run("mine", seed=seed))
    main("a", "b", "c")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines[1:4]] == ["mine (a)", "mine (b)", "mine (c)"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "which runs"),
        (["nowhere"], "nowhere/metrics.jsonl"),
        ([LONG], "File name too long"),
        (["empty"], "no lines yet"),
        (["text"], "not a record"),
        (["a", "--outt=b.png"], "did you mean out"),
        (["a", "--out", "b.png"], "--out"),
        (["a", "--out=b.jpgg"], "b.jpgg"),
        (["a", "--out=nowhere/b.png"], "nowhere is no folder"),
    ],
    ids=["none", "missing", "too-long", "empty", "foreign", "unknown-key", "no-equals", "format", "folder"],
)
def test_mistakes_get_one_clear_error(tmp_path, main, arguments, message):
    pytest.importorskip("matplotlib")
    write(tmp_path / "a", make_run())
    write(tmp_path / "empty", make_run(val=()))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "metrics.jsonl").write_text("text\n")
    with pytest.raises(UserError) as error:
        main(*arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty", "text"]


def test_a_mistake_is_one_line_and_exit_status_1(tmp_path):
    result = compare("nowhere", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.startswith("error: can't read") and result.stderr.count("\n") == 1


def test_missing_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install -r requirements-dev.txt"):
        draw([make_run()])


def test_a_sweep_over_a_fine_tuning_knows_its_runs(tmp_path):
    """Their record has the architecture of the base, which no key of the command gives."""

    def planned(*arguments):
        config = load_config(TrainConfig, ["--init_from=out-1k", "--learning_rate=0.001", *arguments], usage="")
        return sweep.Planned("a", tmp_path / "a", list(arguments), config)

    adopted = dataclasses.asdict(planned().config) | {"pos": "rope", "n_layer": 2}
    record = Record(
        tmp_path / "a",
        adopted,
        run_name="a",
        run_id=None,
        group="",
        wandb_log=False,
        wandb_project="",
        resume_iter=None,
    )
    record.log({"iter": 4, "val/loss": 2.0})
    record.finish()
    sweep.look(planned())
    sweep.look(planned("--n_layer=2"))
    for key, was in ("n_layer=3", 2), ("learning_rate=0.002", 0.001):
        with pytest.raises(UserError, match=f"has a run with {key.partition('=')[0]}={was}, not"):
            sweep.look(planned(f"--{key}"))


def test_a_run_and_its_copy_are_not_two_seeds(tmp_path, monkeypatch):
    """As cp -r makes one. Another seed, another key or another curve is another run."""
    a = write(tmp_path / "a", make_run(seed=1))
    copy = write(tmp_path / "b", make_run(seed=1, val=(5.5, 2.0)))  # and a copy that is older
    others = [
        write(tmp_path / name, make_run(**keys))
        for name, keys in (("c", dict(seed=2)), ("d", dict(n_layer=5)), ("e", dict(val=(5.5, 2.0, 1.8))))
    ]
    cfg = load_config(compare_runs.CompareConfig, [], usage="")
    with pytest.raises(UserError, match="b is the same run as .*a: give one of them"):
        compare_runs.read_all(cfg, [Path(a), Path(copy)])
    assert len(compare_runs.read_all(cfg, [Path(a), *map(Path, others)])) == 4


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_two_sweeps_in_one_folder(tmp_path):
    with sweep.own(tmp_path / "runs"):
        with pytest.raises(UserError, match="another sweep trains in --runs=.*runs just now"):
            with sweep.own(tmp_path / "runs"):
                pass
    with sweep.own(tmp_path / "runs"):
        pass
