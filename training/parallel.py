"""The processes of a run (torchrun starts them), and the signals that ask it to stop."""

import os
import signal
import sys
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist

from configurator import TrainConfig, UserError
from training.device import Device


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    world: int  # how many there are
    local_rank: int | None  # among those of this machine; None without torchrun

    @classmethod
    def here(cls) -> "Processes":
        """By the environment that torchrun makes."""
        local_rank = int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), local_rank)

    @property
    def master(self) -> bool:
        """Whether it is the one that prints, records and saves."""
        return self.rank == 0

    def join(self, cfg: TrainConfig, device: Device) -> None:
        """Meet the other processes, if there are any. UserError if cfg.backend can't be had."""
        if self.world > 1:
            dist.init_process_group(ddp_backend(cfg, device))

    def wait(self) -> None:
        """For all processes to be here."""
        if self.world > 1:
            dist.barrier()

    def leave(self, status: int) -> None:
        """End the process with an exit status; a single process whose status is 0 goes on."""
        if self.world > 1:
            dist.destroy_process_group()
            # Freeing DDP, torch waits for gloo's threads with Python's lock in hand. They may be waiting for that lock.
            # So nothing is freed.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        if status:
            sys.exit(status)


def ddp_backend(cfg: TrainConfig, device: Device) -> str:
    if cfg.backend == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    if cfg.backend == "nccl" and device.type != "cuda":
        raise UserError(f"backend=nccl needs CUDA devices, not {device.type}: leave it out, or --backend=gloo")
    return cfg.backend


class StopSignal:
    """SIGINT and SIGTERM ask for an end after the iteration that runs; a second Ctrl-C ends at once."""

    def __init__(self, world: int):
        self.number = 0
        self.world = world
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.number:  # os.write, since a handler may have interrupted a print
            os.write(2, b"\nstopping after what runs now, and saving ...\n")
        self.number = number
        if self.world == 1:  # torchrun sends on a Ctrl-C that its processes got themselves: the second one is no wish
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self, device: Device) -> bool:
        """Whether any process got a signal: all must leave the loop at the same iteration."""
        if self.world == 1:
            return self.number > 0
        seen = torch.tensor(self.number, device=device.device)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        self.number = self.number or int(seen)  # a signal may have come since: it is for the next iteration
        return int(seen) > 0

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    @property
    def status(self) -> int:
        """The exit status of a process that a signal stopped, as a shell reports it; 0 where none came."""
        return 128 + self.number if self.number else 0
