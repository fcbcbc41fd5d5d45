"""The record: whole whatever happens to the process, the disk or wandb; and wandb itself, real, with no network."""

import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from configurator import UserError
from training.record import Record, flatten, make_id, read_record
from training_runs import PATIENCE

ROOT = Path(__file__).resolve().parents[1]


def make_record(out_dir, **changes):
    arguments = {
        "config": {"seed": 1, "sus_c": 25.0},
        "run_name": "sus-c25-ab12",
        "run_id": None,
        "group": "g",
        "wandb_log": False,
        "wandb_project": "nanosus",
        "resume_iter": None,
    }
    return Record(out_dir, **arguments | changes)


# -- the file ---------------------------------------------------------------------------------------


def test_a_line_is_in_the_file_as_soon_as_it_is_logged(tmp_path):
    rec = make_record(tmp_path / "new" / "out")
    rec.log({"iter": 0, "val/loss": 5.5, "val/loss_by_position": {"0-63": 6.0, "64-127": 5.0}})
    rec.log({"iter": 1, "train/loss": 0.1 + 0.2, "train/mfu": None})
    header, lines = read_record(tmp_path / "new" / "out" / "metrics.jsonl")
    assert header == {"config": {"seed": 1, "sus_c": 25.0}, "run_id": "sus-c25-ab12", "run_name": "sus-c25-ab12"}
    assert lines == [
        {"iter": 0, "val/loss": 5.5, "val/loss_by_position": {"0-63": 6.0, "64-127": 5.0}},
        {"iter": 1, "train/loss": 0.1 + 0.2, "train/mfu": None},
    ]


def test_every_line_is_strict_json(tmp_path):
    """Python's json writes NaN and Infinity, which other readers refuse; tensors and numpy scalars it doesn't write."""
    rec = make_record(tmp_path, config={"sus_c": math.inf})
    rec.log(
        {
            "iter": np.int64(3),
            "a": math.nan,
            "b": {"c": -math.inf},
            "d": torch.tensor(0.5),
            "e": np.float32("nan"),
            "f": torch.tensor(math.inf),
        }
    )

    def refuse(constant):
        raise AssertionError(constant)

    rows = [json.loads(row, parse_constant=refuse) for row in open(tmp_path / "metrics.jsonl")]
    assert rows[0]["config"] == {"sus_c": "inf"}
    assert rows[1] == {"iter": 3, "a": None, "b": {"c": None}, "d": 0.5, "e": None, "f": None}


def test_a_line_needs_its_iter(tmp_path):
    with pytest.raises(ValueError, match="iter"):
        make_record(tmp_path).log({"train/loss": 1.0})


def test_a_new_run_starts_a_new_file(tmp_path):
    make_record(tmp_path).log({"iter": 1})
    make_record(tmp_path, run_name="other")
    header, lines = read_record(tmp_path / "metrics.jsonl")
    assert header["run_name"] == "other" and lines == []


def test_resume_cuts_back_to_the_checkpoint(tmp_path):
    """Killed at iteration 7 in the middle of a line, with a checkpoint of 5: the file must go on as if from there."""
    whole = make_record(tmp_path / "whole")
    killed = make_record(tmp_path / "killed")
    for i in range(8):
        killed.log({"iter": i, "train/loss": 1 / (i + 3)})
    with open(killed.path, "a") as file:
        file.write('{"iter": 8, "train/lo')
    resumed = make_record(tmp_path / "killed", run_id=killed.run_id, resume_iter=5)
    for i in range(6, 9):
        resumed.log({"iter": i, "train/loss": 1 / (i + 3)})
    for i in range(9):
        whole.log({"iter": i, "train/loss": 1 / (i + 3)})
    assert killed.path.read_text() == whole.path.read_text()
    assert os.listdir(tmp_path / "killed") == ["metrics.jsonl"]


def test_resume_without_the_file_starts_one(tmp_path):
    """A checkpoint copied to another machine."""
    make_record(tmp_path, resume_iter=5).log({"iter": 6})
    assert read_record(tmp_path / "metrics.jsonl")[1] == [{"iter": 6}]


def test_failing_to_cut_leaves_the_file_whole(tmp_path, monkeypatch):
    rec = make_record(tmp_path)
    rec.log({"iter": 1})
    before = rec.path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="metrics.jsonl: No space left"):
        make_record(tmp_path, resume_iter=0)
    assert rec.path.read_bytes() == before and os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_a_clear_error(tmp_path):
    rec = make_record(tmp_path)
    rec.path = Path("/dev/full")
    with pytest.raises(UserError, match="/dev/full: No space left on device"):
        rec.log({"iter": 1})


HEADER = b'{"config": {}, "run_id": "a", "run_name": "a"}\n'


@pytest.mark.parametrize(
    "tail",
    [b'{"iter": 2, "a": 1', b'{"it', b"\0\0\0\0", b"\n\0", b"12"],
    ids=["in-a-number", "in-a-name", "zeros", "zeros-line", "number"],
)
def test_torn_last_line_is_left_out(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(HEADER + b'{"iter": 1}\n' + tail.lstrip(b"\n"))
    assert read_record(path)[1] == [{"iter": 1}]


@pytest.mark.parametrize(
    "content, match",
    [
        (None, "No such file"),
        (b"", "empty"),
        (b"hello\n", "line 1"),
        (b"\x80\x04\x95\n", "line 1"),
        (b"[1]\n", "line 1"),
        (b'{"iter": 1}\n', "line 1"),
        (HEADER + b'junk\n{"iter": 1}\n', "line 2"),
        (HEADER + b'{"a": 1}\n{"iter": 1}\n', "line 2"),
    ],
    ids=["missing", "empty", "text", "pickle", "list", "no-header", "junk-inside", "no-iter"],
)
def test_foreign_file_is_a_clear_error(tmp_path, content, match):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=match) as caught:
        read_record(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_resuming_on_a_foreign_file_leaves_it_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("my notes\n")
    with pytest.raises(UserError, match="not a record"):
        make_record(tmp_path, resume_iter=5)
    assert (tmp_path / "metrics.jsonl").read_text() == "my notes\n"


def test_ids():
    assert make_id("sus-c25-ab12") == "sus-c25-ab12"
    assert re.fullmatch(r"sus-c25-[0-9a-f]{4}", make_id("sus-c25"))
    assert re.fullmatch(r"a-b-c-[0-9a-f]{4}", make_id("a/b: c"))
    assert make_id("x") != make_id("x") or make_id("x") != make_id("x")
    assert len(make_id("x" * 500)) < 128


def test_flatten():
    assert flatten({"iter": 1, "a": {"b": 2, "c": {"d": 3}}, "e": None}) == {"iter": 1, "a/b": 2, "a/c/d": 3}


# -- wandb, faked -----------------------------------------------------------------------------------


class FakeWandb(types.ModuleType):
    """Enough of wandb to see what it's given. `fail` names the functions which raise; online may fail alone."""

    def __init__(self, folder, mode="online", logged_in=False, fail=()):
        super().__init__("wandb")
        self.mode, self.logged_in, self.fail = mode, logged_in, fail
        self.wandb_dir, self.url = str(folder / "wandb"), "https://wandb.example/run"
        self.settings, self.calls, self.logged, self.started, self.logins, self.metrics = self, [], [], {}, [], []

    def _call(self, name):
        self.calls.append(name)
        if name in self.fail:
            raise RuntimeError(f"{name} is broken\nand says so at length")

    def Settings(self, **settings):
        self._call("Settings")
        return settings

    def setup(self, settings):
        self._call("setup")
        return self

    def login(self, **arguments):
        self._call("login")
        self.logins.append(arguments)
        return self.logged_in

    def init(self, mode, **arguments):
        name = f"{'offline-' * (mode == 'offline')}run-20260101_120000-{arguments['id']}"
        (Path(self.wandb_dir) / name).mkdir(parents=True)
        self._call(f"init {mode}")
        self.started = arguments
        return self

    def define_metric(self, name, **axis):
        self._call("define_metric")
        self.metrics.append((name, axis))

    def log(self, metrics):
        self._call("log")
        self.logged.append(metrics)

    def finish(self):
        self._call("finish")

    def teardown(self):
        self._call("teardown")


@pytest.fixture
def use_fake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")

    def use(**arguments):
        fake = FakeWandb(tmp_path, **arguments)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return use


def test_offline_without_a_login(tmp_path, use_fake, capsys):
    fake = use_fake()
    rec = make_record(tmp_path, wandb_log=True)
    rec.log({"iter": 1, "val/loss_by_position": {"0-63": 2.0}, "train/mfu": None, "train/loss": math.nan})
    rec.finish()
    assert "init offline" in fake.calls and "init online" not in fake.calls
    assert fake.logins == [{"prompt": False, "verify": False}]
    settings = fake.started.pop("settings")
    assert settings["init_timeout"] == 15 and settings["finish_timeout"] > 0 and settings["finish_timeout_raises"]
    assert settings["silent"] and settings["console"] == "off"
    assert fake.metrics == [("iter", {}), ("*", {"step_metric": "iter"})]
    assert fake.started == {
        "project": "nanosus",
        "name": "sus-c25-ab12",
        "id": "sus-c25-ab12",
        "group": "g",
        "config": {"seed": 1, "sus_c": 25.0},
        "resume": "never",
    }
    assert fake.logged == [{"iter": 1, "val/loss_by_position/0-63": 2.0}]
    assert fake.calls[-1] == "finish"
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "offline (not logged in)" in out and "leet ./wandb" in out


def test_online_with_a_login(tmp_path, use_fake, capsys):
    fake = use_fake(logged_in=True)
    make_record(tmp_path, wandb_log=True, run_id="sus-c25-0000")
    assert "init online" in fake.calls and "init offline" not in fake.calls
    assert fake.started["id"] == "sus-c25-0000" and fake.started["resume"] == "allow"
    assert capsys.readouterr().out == "wandb is online: https://wandb.example/run\n"


@pytest.mark.parametrize("broken", ["init online", "login"])
def test_offline_when_online_fails(tmp_path, use_fake, capsys, broken):
    """Without the teardown wandb refuses the id as in use; its empty folder would show up in leet as a run."""
    earlier = tmp_path / "wandb" / "run-20260101_120000-another-run"
    earlier.mkdir(parents=True)
    fake = use_fake(logged_in=True, fail=[broken])
    rec = make_record(tmp_path, wandb_log=True)
    rec.log({"iter": 1})
    assert fake.calls.index("teardown") < fake.calls.index("init offline") and fake.logged == [{"iter": 1}]
    assert sorted(path.name for path in earlier.parent.iterdir()) == [
        "offline-run-20260101_120000-sus-c25-ab12",
        earlier.name,
    ]
    assert f"offline ({broken} is broken);" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_settings_of_wandb_are_honoured(tmp_path, use_fake, capsys, mode):
    fake = use_fake(mode=mode, logged_in=True)
    make_record(tmp_path, wandb_log=True).log({"iter": 1})
    assert [call for call in fake.calls if "init" in call] == (["init offline"] if mode == "offline" else [])
    assert mode in capsys.readouterr().out


@pytest.mark.parametrize(
    "broken", ["Settings", "setup", "init offline", "define_metric", "log", "finish", "log teardown"]
)
def test_broken_wandb_never_stops_a_run(tmp_path, use_fake, capsys, broken):
    names = broken.split() if broken == "log teardown" else [broken]
    fake = use_fake(fail=names)
    rec = make_record(tmp_path, wandb_log=True)
    for i in range(3):
        rec.log({"iter": i})
    rec.finish()
    out = capsys.readouterr().out
    assert f"({names[0]} is broken)" in out and out.count(" is broken") == 1
    assert fake.calls.count("log") == {"log": 1, "log teardown": 1, "finish": 3}.get(broken, 0)
    assert [line["iter"] for line in read_record(tmp_path / "metrics.jsonl")[1]] == [0, 1, 2]


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")], ids=["missing", "the-folder-./wandb"])
def test_no_wandb(tmp_path, monkeypatch, capsys, module):
    """Where wandb isn't installed, `import wandb` finds the folder of the offline runs, as a namespace package."""
    monkeypatch.setitem(sys.modules, "wandb", module)
    rec = make_record(tmp_path, wandb_log=True)
    rec.log({"iter": 1})
    rec.finish()
    out = capsys.readouterr().out
    assert out.startswith("wandb isn't to be had") and out.count("\n") == 1


def test_switched_off(tmp_path, use_fake, capsys):
    fake = use_fake()
    make_record(tmp_path, wandb_log=False).log({"iter": 1})
    assert fake.calls == [] and capsys.readouterr().out == ""


# -- wandb, real ------------------------------------------------------------------------------------

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from training import record
record.INIT_TIMEOUT = 2
rec = record.Record(Path("out"), {"sus_c": float("inf")}, run_name="exact-ab12", run_id=None, group="g",
                    wandb_log=True, wandb_project="nanosus", resume_iter=None)
for i in range(5):
    rec.log({"iter": 10 * i, "train/loss": 5 - i, "val/loss_by_position": {"0-63": 2.5}, "train/mfu": None})
rec.finish()
"""


@pytest.mark.parametrize("login", [False, True], ids=["not-logged-in", "server-out-of-reach"])
def test_real_wandb_offline(tmp_path, login):
    """No settings, no terminal, no network: the run ends in an offline folder, with one line printed, no question."""
    pytest.importorskip("wandb")
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | {"HOME": str(tmp_path)}
    if login:
        env |= {"WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": "http://127.0.0.1:9"}  # nothing listens there
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT)],
        cwd=tmp_path,
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.count("\n") == 1 and "wandb is offline (" in result.stdout
    assert ("(not logged in)" in result.stdout) == (not login)
    assert len(list(tmp_path.glob("wandb/*run-*/run-exact-ab12.wandb"))) == 1
    assert len(read_record(tmp_path / "out" / "metrics.jsonl")[1]) == 5

    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", "./wandb"]
    shown = json.loads(subprocess.run(inspect, cwd=tmp_path, env=env, capture_output=True, timeout=PATIENCE).stdout)
    assert shown["summary"]["iter"] == 40 and shown["summary"]["train/loss"] == 1, shown
    assert shown["summary"]["val/loss_by_position/0-63"] == 2.5 and shown["config"] == {"sus_c": "inf"}
