"""Checkpoints: one file each, whole or not there at all.

A checkpoint is a dict under nanoGPT's names (model, optimizer, model_args, iter_num, best_val_loss, config) plus
whatever else train.py keeps. It holds tensors, Python scalars and strings, and dicts, lists and tuples of them: nothing
that needs code to be read back. So load() can refuse to run any (weights_only=True), and a checkpoint from a stranger
is data.

Of a LoRA fine-tuning, model holds the adapters only, and `lora` says what they are and whose: rank, alpha and targets
(see add_adapters), the base (its file, as seen from the checkpoint's folder, or GPT-2's name) and the fingerprint of
its weights.

save() writes aside in the same folder, syncs to the disk, then renames onto the name: whenever the process or the
machine dies, the name holds either the former checkpoint or the new one. What it leaves aside then, FILE.aside, the
next save overwrites.
"""

import contextlib
import itertools
import math
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from configurator import UserError
from data.lock import owned

REQUIRED: dict[str, Any] = {
    "model": dict,
    "model_args": dict,
    "iter_num": int,
    "best_val_loss": (int, float, torch.Tensor),
    "config": dict,
}
LORA = {"rank": int, "alpha": float, "targets": str, "base": str, "fingerprint": str}


def save(path: Path, state: dict) -> None:
    """Put state at path, replacing the file there in one step. UserError if the disk is full or can't be written to;
    the file at path is then what it was. TypeError if state holds something else than the kinds of data named above.
    """
    _check_plain(state, "state")
    aside = path.with_name(path.name + ".aside")
    try:
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns an OSError into a RuntimeError, on its way out
        cause = _os_error(error)
        if cause is None:
            raise
        raise UserError(
            f"can't save {path}: {cause.strerror}; make room, or choose another --out_dir "
            "(a checkpoint saved there earlier is intact)"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def load(path: Path, map_location: str | torch.device = "cpu") -> dict:
    """The state saved at path, its tensors on map_location. Runs no code from the file. nanoGPT's checkpoints are read
    too, those of a compiled or DDP model under their plain names. UserError if the file is missing, truncated,
    damaged or something else.
    """
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long
        raise UserError(f"no checkpoint at {path}: train first, or give the --out_dir of a run")
    try:
        with zipfile.ZipFile(path) as archive:  # the format of torch.save, which doesn't compare checksums on loading
            if archive.testzip():
                raise zipfile.BadZipFile
        state = torch.load(path, map_location=map_location, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except Exception as error:  # a damaged file can fail at any point of the unpickler
        raise UserError(
            f"{path} is not a checkpoint, or a truncated or damaged one: copy another over it, such "
            "as ckpt_best.pt of the same run"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    wrong = [name for name, kind in REQUIRED.items() if not isinstance(state.get(name), kind)]
    if wrong:
        raise UserError(f"{path} is not a checkpoint of train.py: missing or of the wrong type: {', '.join(wrong)}")
    if lora := state.get("lora"):  # None: not of a LoRA fine-tuning
        wrong = [
            name for name, kind in LORA.items() if not (isinstance(lora, dict) and isinstance(lora.get(name), kind))
        ]
        wrong += [] if wrong else [name for name in ("rank", "alpha") if not 0 < lora[name] < math.inf]
        wrong += [] if isinstance(state["model_args"].get("block_size"), int) else ["block_size"]
        if wrong:
            raise UserError(
                f"{path} is no adapter checkpoint of train.py: missing or of the wrong type: {', '.join(wrong)}"
            )
    # torch.compile and DDP put these prefixes before the names of the weights
    weights = {re.sub(r"^(_orig_mod\.|module\.)+", "", name): weight for name, weight in state["model"].items()}
    state["model"] = {name: weight for name, weight in weights.items() if not _is_causal_mask(name, weight)}
    state["best_val_loss"] = float(state["best_val_loss"])  # a tensor in nanoGPT's
    return state


def _is_causal_mask(name: str, weight: torch.Tensor) -> bool:
    """Whether it is the buffer (1, 1, T, T) that GPTs kept in every layer before PyTorch 2, or its fill value."""
    return name.endswith(".attn.masked_bias") or (
        name.endswith(".attn.bias") and isinstance(weight, torch.Tensor) and weight.dim() == 4
    )


def find(path: str | Path) -> Path:
    """The checkpoint's file: path itself, or ckpt.pt where path is a run's folder."""
    return Path(path, "ckpt.pt") if os.path.isdir(path) else Path(path)


def restore_optimizer(saved: dict, path: Path, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """The optimizer's and the scaler's state from a checkpoint; weight decay and betas stay those of this run."""
    if "optimizer" not in saved:
        raise UserError(
            f"{path} has no optimizer's state to go on with: fine-tune it by --init_from={path.parent} and another "
            "out_dir"
        )
    hyperparameters = [{k: group[k] for k in ("weight_decay", "betas")} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(saved["optimizer"])
        if scaler.is_enabled() and saved.get("scaler"):
            scaler.load_state_dict(saved["scaler"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: its optimizer state does not fit this model: {error}") from None
    for group, mine in zip(optimizer.param_groups, hyperparameters):
        group.update(mine)


def own(out_dir: Path) -> contextlib.AbstractContextManager[None]:
    """The folder, made if it isn't there, is this run's alone. UserError if another run writes to it."""
    taken = f"another run writes to out_dir={out_dir} just now: choose another --out_dir"
    return owned(out_dir, taken, f"out_dir={out_dir} can't be used")


@contextlib.contextmanager
def put_back(path: Path, after: type[Exception]) -> Iterator[None]:
    """Where the block ends in that error, the file is again what it was before, or not there, as before."""
    former = path.with_name(path.name + ".former")
    former.unlink(missing_ok=True)  # of a run that was killed
    if path.exists():
        try:
            os.link(path, former)
        except OSError:  # a file system without links
            shutil.copyfile(path, former)
    try:
        yield
    except after:
        os.replace(former, path) if former.exists() else path.unlink(missing_ok=True)
        raise
    finally:
        former.unlink(missing_ok=True)


def keep_earlier_run(out_dir: Path) -> None:
    """A run from scratch moves what an earlier one left in out_dir into a subfolder, instead of overwriting it."""
    names = ("ckpt.pt", "ckpt_best.pt", "metrics.jsonl")
    files = [*(out_dir / name for name in names if (out_dir / name).exists()), *kept(out_dir)]
    if files:
        n = next(n for n in itertools.count(1) if not (out_dir / f"earlier-{n}").exists())
        (out_dir / f"earlier-{n}").mkdir()
        for f in files:
            f.rename(out_dir / f"earlier-{n}" / f.name)
        print(
            f"the earlier run in {out_dir} is kept in {out_dir / f'earlier-{n}'} (--init_from=resume goes on with a "
            "run)"
        )


def kept(out_dir: Path) -> list[Path]:
    """The checkpoints that keep_checkpoints keeps, in the order in which they were saved."""
    found = [path for path in out_dir.glob("ckpt-*.pt") if re.fullmatch(r"ckpt-\d+\.pt", path.name)]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, int(path.stem.partition("-")[2])))


def keep_latest(out_dir: Path, count: int) -> None:
    """Delete all but the last `count` that were saved, which need not have the highest iterations. UserError."""
    try:
        for path in kept(out_dir)[:-count]:
            path.unlink()
    except OSError as error:
        raise UserError(f"can't delete {path}: {error.strerror}; or set --keep_checkpoints=0") from error


def check_room(out_dir: Path, size: int, keeps: int, resumes: bool) -> None:
    """UserError if the disk hasn't room for the checkpoints of a run, of `size` bytes each, with `keeps` older ones."""
    files = [*(out_dir / name for name in ("ckpt.pt", "ckpt_best.pt") if (out_dir / name).exists()), *kept(out_dir)]
    there = sum(path.stat().st_size for path in files) if resumes else 0  # else they are kept elsewhere
    needed = (4 + keeps) * size - there  # the latest, the former, the best, and one that is written aside
    free = shutil.disk_usage(out_dir).free
    if needed > free:
        raise UserError(
            f"the disk of out_dir={out_dir} has {free / 1e6:,.0f} MB left, and this run's checkpoints take "
            f"{needed / 1e6:,.0f} MB more: make room, choose another --out_dir, or a lower --keep_checkpoints"
        )


def _check_plain(value: Any, where: str) -> None:
    """TypeError, naming the place, for what torch.load(weights_only=True) would refuse: better now than at resume."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_plain(name, f"a key of {where}")
            _check_plain(item, f"{where}[{name!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif not (isinstance(value, torch.Tensor) or type(value) in (int, float, bool, str, type(None))):
        raise TypeError(f"a checkpoint can't hold {where}, a {type(value).__name__}: make it a plain number or tensor")


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError which error is or came from, or None."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder outlast a power failure (on Windows a folder can't be opened, nor need be)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
