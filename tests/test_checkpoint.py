"""Checkpoints: an exact round trip, every kind of bad file in one clear error, and no way to lose a good one."""

import errno
import os
import pickle
import signal
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from configurator import UserError
from training import checkpoint

ROOT = Path(__file__).resolve().parents[1]


def make_state(iter_num=7, steps=3):
    """A state as train.py saves it, after some steps of AdamW."""
    torch.manual_seed(iter_num)
    model = torch.nn.Linear(5, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95))
    for _ in range(steps):
        model(torch.randn(3, 5)).square().mean().backward()
        optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": {"n_layer": 4},
        "iter_num": iter_num,
        "best_val_loss": 1.25,
        "config": {"sus_c": float("inf"), "out_dir": "out"},
        "scaler": {"scale": 65536.0, "_growth_tracker": 3},
        "tokenizer": {"name": "byte"},
        "wandb_run_id": "a-1",
    }


def same(a, b):
    """Equal in value, type and dtype, to the bit, all the way down."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_round_trip_is_exact(tmp_path):
    state = make_state()
    checkpoint.save(tmp_path / "ckpt.pt", state)
    assert same(state, checkpoint.load(tmp_path / "ckpt.pt"))
    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_restored_optimizer_takes_the_same_steps(tmp_path):
    model = torch.nn.Linear(5, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    inputs = torch.randn(8, 3, 5)

    def train(model, optimizer, inputs):
        for x in inputs:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    train(model, optimizer, inputs[:4])
    checkpoint.save(
        tmp_path / "ckpt.pt", make_state() | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    )
    train(model, optimizer, inputs[4:])

    state = checkpoint.load(tmp_path / "ckpt.pt")
    resumed = torch.nn.Linear(5, 4)
    resumed.load_state_dict(state["model"])
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=0.5)  # the saved learning rate must win
    optimizer.load_state_dict(state["optimizer"])
    train(resumed, optimizer, inputs[4:])
    assert same(dict(model.state_dict()), dict(resumed.state_dict()))


@pytest.mark.parametrize(
    "value, name",
    [(np.float64(1.5), "float64"), (np.zeros(2), "ndarray"), (ROOT, "Path"), ({1, 2}, "set")],
    ids=lambda value: type(value).__name__,
)
def test_only_plain_data_is_saved(tmp_path, value, name):
    """numpy.float64 is a float to isinstance, but not to torch.load(weights_only=True)."""
    checkpoint.save(tmp_path / "ckpt.pt", make_state(iter_num=1))
    with pytest.raises(TypeError, match=rf"state\['config'\]\['a'\]\[1\], a .*{name}"):
        checkpoint.save(tmp_path / "ckpt.pt", make_state(iter_num=2) | {"config": {"a": [0, value]}})
    assert checkpoint.load(tmp_path / "ckpt.pt")["iter_num"] == 1


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_truncated(tmp_path, share):
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, make_state())
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(UserError, match="truncated") as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_every_flipped_byte_is_refused_or_harmless(tmp_path):
    """torch.load compares no checksums: a flipped bit came back as another weight, or as another weight's name.
    Only in the padding between the records may a flip pass, and do nothing.
    """
    path = tmp_path / "ckpt.pt"
    state = make_state()
    checkpoint.save(path, state)
    whole = path.read_bytes()
    refused = 0
    for at in range(0, len(whole), 61):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            assert same(state, checkpoint.load(path)), at
        except UserError:
            refused += 1
    assert refused > 30


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.txt", "not a checkpoint")


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path: path.write_text("learning_rate = 1e-3\n"), id="text"),
        pytest.param(lambda path: path.write_bytes(bytes(range(256)) * 40), id="bytes"),
        pytest.param(lambda path: path.write_bytes(bytes(4096)), id="zeros"),
        pytest.param(write_zip, id="zip"),
        pytest.param(lambda path: path.write_bytes(pickle.dumps({"vocab_size": 65})), id="pickle"),
        pytest.param(lambda path: path.write_bytes(pickle.dumps(Malicious())), id="pickle-runs-code"),
        pytest.param(lambda path: torch.save(Malicious(), path), id="torch-runs-code"),
        pytest.param(lambda path: torch.save(torch.nn.Linear(2, 2), path), id="whole-module"),
        pytest.param(lambda path: torch.save(torch.zeros(3), path), id="tensor"),
        pytest.param(lambda path: torch.save({"state_dict": {}}, path), id="other-keys"),
        pytest.param(lambda path: torch.save(dict.fromkeys(checkpoint.REQUIRED, "text"), path), id="other-types"),
        pytest.param(lambda path: path.mkdir(), id="folder"),
        pytest.param(lambda path: None, id="missing"),
    ],
)
def test_foreign_files_get_one_clear_error(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt.pt"
    write(path)
    with pytest.raises(UserError, match="checkpoint") as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("pwned").exists()


@pytest.mark.parametrize("name", checkpoint.REQUIRED)
def test_missing_key_is_named(tmp_path, name):
    state = make_state()
    del state[name]
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=rf": {name}$"):
        checkpoint.load(tmp_path / "ckpt.pt")


def test_full_disk_keeps_the_former_checkpoint(tmp_path, monkeypatch):
    """torch.save reports what a failing write() raised as a RuntimeError of its own: the cause must be found."""
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, make_state(iter_num=1))

    class FullDisk:
        def __init__(self, name, mode):
            self.file = open(name, mode)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if self.file.tell() + len(data) > 2000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

    monkeypatch.setattr(checkpoint, "open", FullDisk, raising=False)
    with pytest.raises(UserError, match="No space left on device.*intact"):
        checkpoint.save(path, make_state(iter_num=2))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["ckpt.pt"]
    assert same(checkpoint.load(path), make_state(iter_num=1))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failure_of_the_last_steps_keeps_the_former_checkpoint(tmp_path, monkeypatch, call):
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, make_state(iter_num=1))

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match="Input/output error"):
        checkpoint.save(path, make_state(iter_num=2))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["ckpt.pt"]
    assert checkpoint.load(path)["iter_num"] == 1


@pytest.mark.skipif(os.name != "posix", reason="folders are synced on POSIX only")
def test_order_of_the_syncs(tmp_path, monkeypatch):
    """A rename may reach the disk before the contents, unless these are synced first; itself it needs one too."""
    steps, replace = [], os.replace

    def fsync(descriptor):
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("replace"), replace(*paths)))
    checkpoint.save(tmp_path / "ckpt.pt", make_state())
    assert steps == ["file", "replace", "folder"]


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="No such file or directory"):
        checkpoint.save(tmp_path / "out" / "ckpt.pt", make_state())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_kill_during_a_save_keeps_the_former_checkpoint(tmp_path):
    """Killed with the new file half written aside; the next save then clears that up."""
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, make_state(iter_num=1))
    program = f"""
import os, signal, sys
from pathlib import Path
import torch
from training import checkpoint
sys.path.insert(0, "tests")
from test_checkpoint import make_state
def killed(descriptor):
    os.truncate(descriptor, 1000)
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = killed
checkpoint.save(Path({str(path)!r}), make_state(iter_num=2))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT)
    assert result.returncode == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt.pt.aside"]
    assert same(checkpoint.load(path), make_state(iter_num=1))
    checkpoint.save(path, make_state(iter_num=3))
    assert os.listdir(tmp_path) == ["ckpt.pt"]
    assert checkpoint.load(path)["iter_num"] == 3


def test_prefixes_of_wrapped_models_are_stripped(tmp_path):
    """nanoGPT saved compiled models with '_orig_mod.' before every name, and a tensor as its best loss."""
    plain = make_state()
    names = {"weight": "_orig_mod.module.weight", "bias": "module._orig_mod.bias"}
    wrapped = {names[name]: weight for name, weight in plain["model"].items()}
    torch.save(plain | {"model": wrapped, "best_val_loss": torch.tensor(1.25)}, tmp_path / "ckpt.pt")
    state = checkpoint.load(tmp_path / "ckpt.pt")
    assert same(state["model"], dict(plain["model"]))
    assert same(state["best_val_loss"], 1.25)


def test_an_adapter_checkpoint_says_whose_its_adapters_are(tmp_path):
    lora = {"rank": 4, "alpha": 8.0, "targets": "c_attn", "base": "gpt2", "fingerprint": "ab"}
    state = make_state() | {"model_args": {"block_size": 64}}
    checkpoint.save(tmp_path / "ckpt.pt", state | {"lora": lora})
    assert checkpoint.load(tmp_path / "ckpt.pt")["lora"] == lora
    several = [
        {"lora": wrong}
        for wrong in (
            [4],
            "c_attn",
            *({**lora, name: None} for name in lora),
            {k: v for k, v in lora.items() if k != "base"},
            {**lora, "rank": 0},
            {**lora, "alpha": float("nan")},
        )
    ]
    for wrong in (*several, {"lora": lora, "model_args": {}}):
        checkpoint.save(tmp_path / "ckpt.pt", state | wrong)
        with pytest.raises(
            UserError, match="ckpt.pt is no adapter checkpoint of train.py: missing or of the wrong type"
        ):
            checkpoint.load(tmp_path / "ckpt.pt")


def test_find(tmp_path):
    assert checkpoint.find(tmp_path) == checkpoint.find(str(tmp_path)) == tmp_path / "ckpt.pt"
    assert checkpoint.find(tmp_path / "ckpt_best.pt") == tmp_path / "ckpt_best.pt"
