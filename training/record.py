"""The record of a run: out_dir/metrics.jsonl, mirrored to wandb.

The file is the truth. Its first line holds the run's configuration, every further one what was logged at one iteration:

    {"config": {...}, "run_id": "sus-c25-ab12", "run_name": "sus-c25-ab12", "val_sha256": "9f86d0...", ...}
    {"iter": 250, "val/loss": 1.93, "val/loss_by_position": {"0-63": 2.4, "64-127": 2.1}}

Each line is written at once, so that a kill loses at most one. A resumed run first cuts off the lines after its
checkpoint: the file reads as if the run had never stopped.

wandb gets the same numbers, and may fail in any way without the run noticing. It never asks anything: logged in, it
goes online (if the server answers within INIT_TIMEOUT), else it writes to ./wandb, where `wandb leet` shows the curves
without an account or a network. Resuming goes on in the same run online, and makes a second folder offline.
"""

import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from configurator import UserError

INIT_TIMEOUT = 15  # seconds, to reach the server at the start
FINISH_TIMEOUT = 60  # seconds, to upload the rest at the end

say = tqdm.write  # print, but above a progress bar if there is one


class Record:
    """The record of one run. config: plain values, of the first line. run_id: of the run to go on with, from its
    checkpoint; None makes one from run_name. group: what wandb overlays by. resume_iter: the checkpoint's iteration,
    after which the lines are cut off; None starts a new file. evaluation_owed: so is that iteration's evaluation.
    checksums: of the text, for the first line. UserError if the file can't be read or written.
    """

    def __init__(
        self,
        out_dir: Path,
        config: dict,
        *,
        run_name: str,
        run_id: str | None,
        group: str,
        wandb_log: bool,
        wandb_project: str,
        resume_iter: int | None,
        evaluation_owed: bool = False,
        checksums: dict[str, str | None] | None = None,
    ):
        self.path = Path(out_dir) / "metrics.jsonl"
        self.run_id = run_id or make_id(run_name)
        config = plain(config, nonfinite=str)
        lines = []
        if resume_iter is not None and self.path.exists():
            lines = [line for line in read_record(self.path)[1] if line["iter"] <= resume_iter]
            if evaluation_owed:  # it will be made again
                lines = [line for line in lines if line["iter"] < resume_iter or "val/loss" not in line]
        self._rewrite([{"config": config, "run_id": self.run_id, "run_name": run_name, **(checksums or {})}, *lines])
        self.mirror, self.look = None, ""  # look: where wandb shows the curves
        if wandb_log:
            resume = "allow" if run_id else "never"
            self.mirror, self.look = start_wandb(
                project=wandb_project, name=run_name, id=self.run_id, group=group, config=config, resume=resume
            )

    def log(self, metrics: dict) -> None:
        """Add a line. metrics holds "iter", and numbers, None, or dicts of them ('a': {'b': 1} is 'a/b' in wandb)."""
        if "iter" not in metrics:
            raise ValueError(f"a line of the record needs its iter: {metrics}")
        metrics = plain(metrics, nonfinite=lambda value: None)  # JSON has neither nan nor inf
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"can't write {self.path}: {error.strerror}") from error
        if self.mirror is not None:
            try:
                self.mirror.log(flatten(metrics))
            except Exception as error:  # whatever it is, it's not worth a run
                self._drop_mirror(error)

    def finish(self) -> None:
        """Let wandb upload the rest, at most FINISH_TIMEOUT seconds. The file needs no end."""
        if self.mirror is not None:
            try:
                self.mirror.finish()
            except Exception as error:
                self._drop_mirror(error)

    def _drop_mirror(self, error: Exception) -> None:
        self.mirror = None
        say(f"wandb stopped ({reason(error)}); {self.path} goes on without it")
        try:
            import wandb

            wandb.teardown()  # or else it tries again at exit
        except Exception:
            pass  # it has been reported as broken

    def _rewrite(self, lines: list[dict]) -> None:
        aside = self.path.with_name(self.path.name + ".aside")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise UserError(f"can't write {self.path}: {error.strerror}") from error


def read_record(path: Path) -> tuple[dict, list[dict]]:
    """(first line, other lines) of a metrics.jsonl, which may still be growing: a torn last line is left out.
    UserError if it can't be read or isn't a record.
    """
    try:
        rows = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}; give the out_dir of a run") from error
    parsed = []
    for number, row in enumerate(rows, start=1):
        try:
            line = json.loads(row)
            if not isinstance(line, dict) or ("config" if number == 1 else "iter") not in line:
                raise ValueError
        except ValueError:
            if number == len(rows) > 1:
                break
            raise UserError(f"{path}, line {number}: not a record of train.py; move the file away") from None
        parsed.append(line)
    if not parsed:
        raise UserError(f"{path} is empty: not a record of train.py; move the file away")
    return parsed[0], parsed[1:]


def start_wandb(**run: Any) -> tuple[Any, str]:
    """(a started wandb run or None, how to look at it). Says in one line which. Neither raises, asks nor hangs."""
    # Where a network swallows what is sent, wandb's own error reports would hold up the exit by 20 s.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        from wandb import Settings, init, login, setup, teardown
    except Exception as error:  # not installed (then ./wandb may be what is imported), or broken
        say(f"wandb isn't to be had ({reason(error)}); the record is kept without it")
        return None, ""
    try:
        settings = Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
        )
        known = setup(settings).settings  # with those of the environment and of wandb's own files
        if known.mode == "disabled":
            say("wandb is disabled by its own settings (WANDB_MODE)")
            return None, ""
        folder = Path(known.wandb_dir)
        why = "WANDB_MODE"
        if known.mode == "online":
            try:
                if login(prompt=False, verify=False):  # looks for a key, doesn't use it
                    mirror = init(mode="online", settings=settings, **run)
                    use_iter_axis(mirror)
                    say(f"wandb is online: {mirror.url}")
                    return mirror, str(mirror.url)
                why = "not logged in"
            except Exception as error:
                why = reason(error)
                teardown()  # or else the id counts as in use
                setup(settings)
                if run["resume"] == "never":  # then this folder is the failed attempt's, and no earlier run's
                    for failed in folder.glob(f"run-*-{run['id']}"):
                        shutil.rmtree(failed, ignore_errors=True)
        mirror = init(mode="offline", settings=settings, **run)
        use_iter_axis(mirror)
        command = "wandb" if shutil.which("wandb") else relative(Path(sys.executable).with_name("wandb"))
        look = f"{command} leet {os.path.join('.', relative(folder))}"
        say(f"wandb is offline ({why}); to see the curves, also while they grow: {look}")
        return mirror, look
    except Exception as error:
        say(f"wandb doesn't start ({reason(error)}); the record is kept without it")
        return None, ""


def use_iter_axis(mirror: Any) -> None:
    mirror.define_metric("iter")
    mirror.define_metric("*", step_metric="iter")


def relative(path: str | Path, start: str | Path = os.curdir) -> str:
    """The path as seen from start; the absolute one where no way leads there, as between Windows's drives."""
    try:
        return os.path.relpath(path, start)
    except ValueError:
        return os.path.abspath(path)


def make_id(run_name: str) -> str:
    """run_name as a wandb id, with four random characters unless it ends in four already."""
    name = re.sub(r"[^\w.-]+", "-", run_name, flags=re.ASCII)[:64]
    return name if re.search(r"-[0-9a-f]{4}$", name) else f"{name}-{secrets.token_hex(2)}"


def plain(value: Any, nonfinite: Callable[[float], Any]) -> Any:
    """value with dicts, lists, Python scalars only: arrays of one number become it, nan and inf nonfinite(it)."""
    if isinstance(value, dict):
        return {str(name): plain(item, nonfinite) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, nonfinite) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return nonfinite(value) if isinstance(value, float) and not math.isfinite(value) else value


def flatten(metrics: dict, prefix: str = "") -> dict:
    """{'a': {'b': 1}, 'c': None} as {'a/b': 1}."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif value is not None:
            flat[prefix + name] = value
    return flat


def reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
