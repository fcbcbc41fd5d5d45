"""What a run shares the machine with: its other processes (torchrun starts them), signals, readers of its output."""

import contextlib
import datetime
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, TextIO, cast

import torch
import torch.distributed as dist

from configurator import TrainConfig, UserError, drop_output
from training.device import Device

# -- processes ----------------------------------------------------------------------------------------

VARIABLES = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"  # torchrun sets them all
SILENCE = 10  # seconds of waiting for other processes, until it is said
PATIENCE = datetime.timedelta(minutes=30)  # of waiting for them, and of every collective


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    world: int  # how many there are
    local_rank: int | None  # among those of this machine; None without torchrun

    @classmethod
    def here(cls) -> "Processes":
        """By the environment that torchrun makes. UserError if it is incomplete, or no such environment can be."""
        given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        advice = f"Several processes need {', '.join(VARIABLES)}: torchrun sets them all. For one process unset them"

        def number(name: str, default: int) -> int:
            text = given.get(name, str(default))
            if not text.isascii() or not text.isdigit():
                raise UserError(f"the environment has {name}={text!r}, which is no number. {advice}")
            return int(text)

        rank, world, local_rank = number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0)
        number("MASTER_PORT", 0)
        shown = " ".join(f"{name}={given[name]}" for name in VARIABLES if name in given)
        if world < 1 or rank >= world or local_rank > rank:
            raise UserError(f"the environment has {shown}, which is impossible. {advice}")
        if world > 1 and (missing := [name for name in VARIABLES if not given.get(name)]):
            raise UserError(f"the environment has {shown}, but no {', '.join(missing)}. {advice}")
        return cls(rank, world, local_rank if "LOCAL_RANK" in given else None)

    @property
    def master(self) -> bool:
        """Whether it is the one that prints, records and saves."""
        return self.rank == 0

    def join(self, cfg: TrainConfig, device: Device) -> None:
        """Meet the other processes, if there are any. UserError if cfg.backend can't be had, or if they don't come."""
        if self.world == 1:
            return
        backend = ddp_backend(cfg, device)
        meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        text = f"process {self.rank} waits for the other {self.world - 1} of {self.world} at {meeting}"
        timer = threading.Timer(SILENCE, lambda: print(text, file=sys.stderr, flush=True))
        timer.daemon = True
        timer.start()
        interrupt = signal.getsignal(signal.SIGINT)
        if interrupt is not signal.SIG_IGN:  # torch's wait hears no handler of Python's
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            dist.init_process_group(backend, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:  # dist.DistError is a RuntimeError
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"the {self.world} processes did not meet at {meeting} ({reason}): start all of them, by torchrun, or "
                "unset WORLD_SIZE"
            ) from None
        finally:
            signal.signal(signal.SIGINT, interrupt)
            timer.cancel()

    def leave(self, status: int) -> None:
        """End the process with an exit status; a single process whose status is 0 goes on."""
        if self.world > 1:
            dist.destroy_process_group()
            # Freeing DDP, torch waits for gloo's threads with Python's lock in hand. They may be waiting for that lock.
            # So nothing is freed.
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()
            os._exit(status)
        if status:
            sys.exit(status)


def ddp_backend(cfg: TrainConfig, device: Device) -> str:
    if cfg.backend == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    if cfg.backend == "nccl" and device.type != "cuda":
        raise UserError(f"backend=nccl needs CUDA devices, not {device.type}: leave it out, or --backend=gloo")
    return cfg.backend


# -- output whose reader may leave --------------------------------------------------------------------


class Outlet:
    """A text stream that outlives its reader. What nobody can read any more is dropped.

    A broken pipe (EPIPE: of `| tee` or `| head`, say) is a wish to stop, and is noted in `broken`. A terminal that has
    gone (EIO) is none, nor is a full disk.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.broken = False

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except OSError as error:
            self._lost(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        self.broken = self.broken or error.errno == errno.EPIPE
        if error.errno in (errno.EPIPE, errno.EIO):  # for good
            with contextlib.suppress(OSError, ValueError):
                drop_output(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def outlasting_readers() -> Iterator[list[Outlet]]:
    """Within the block sys.stdout and sys.stderr are Outlets, which it yields."""
    before = sys.stdout, sys.stderr
    outlets = [Outlet(stream) for stream in before]
    sys.stdout, sys.stderr = (cast(TextIO, outlet) for outlet in outlets)
    try:
        yield outlets
    finally:
        for outlet in outlets:
            outlet.flush()
        sys.stdout, sys.stderr = before


# -- signals ------------------------------------------------------------------------------------------

ASK_TO_STOP = "SIGINT", "SIGTERM", "SIGHUP"  # Ctrl-C, a scheduler, a closed terminal; Windows lacks some
ASKS_TO_SAVE = "SIGUSR1"  # a scheduler's notice that the time is nearly up
SIGPIPE = 13  # Windows has no such signal; Python ignores it elsewhere


def expect_notices() -> None:
    """Until there is something to save, a notice to save is no reason to die."""
    number = getattr(signal, ASKS_TO_SAVE, None)
    if number is not None and signal.getsignal(number) == signal.SIG_DFL:
        signal.signal(number, lambda number, frame: None)


class StopSignal:
    """Signals ask for an end after the iteration that runs, or for a checkpoint; a second Ctrl-C ends at once.

    outlets: of `outlasting_readers`; a reader that left asks for an end too. A signal that was ignored when the run
    started (SIGHUP by nohup, SIGINT of a script's background job) stays ignored.
    """

    def __init__(self, world: int, outlets: list[Outlet] | None = None):
        self.number = 0  # of the signal that asks for an end
        self.saves = False  # whether a checkpoint is asked for; who saves it resets this
        self._asked_to_save = False
        self.world = world
        self.outlets = outlets or []
        self.hears_interrupts = signal.getsignal(signal.SIGINT) != signal.SIG_IGN
        for name in (*ASK_TO_STOP, ASKS_TO_SAVE):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == getattr(signal, ASKS_TO_SAVE, None):
            self._asked_to_save = True
            return
        if not self.number:
            with contextlib.suppress(OSError):  # os.write, since a handler may have interrupted a print
                os.write(2, b"\nstopping after what runs now ...\n")
        self.number = number
        # torchrun sends on a Ctrl-C that its processes got themselves: the second one is no wish.
        if self.world == 1 and self.hears_interrupts:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self, device: Device) -> bool:
        """Whether any process is to stop: all must leave the loop at the same iteration. `saves` is agreed on, too."""
        if not self.number and any(outlet.broken for outlet in self.outlets):
            self.number = SIGPIPE
        asked, self._asked_to_save = self._asked_to_save, False
        number, saves = self.number, int(asked)
        if self.world > 1:
            wishes = torch.tensor([number, saves], device=device.device)
            dist.all_reduce(wishes, dist.ReduceOp.MAX)
            number, saves = wishes.tolist()
            self.number = self.number or number  # a signal may have come since: it is for the next iteration
        self.saves = self.saves or saves > 0
        return number > 0

    @property
    def name(self) -> str:
        """The signal's; a reader of the output that left is SIGPIPE."""
        return "SIGPIPE" if self.number == SIGPIPE else signal.Signals(self.number).name

    @property
    def status(self) -> int:
        """The exit status of a process that a signal stopped, as a shell reports it; 0 where none came."""
        return 128 + self.number if self.number else 0
