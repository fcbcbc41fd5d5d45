"""One process at a time in a folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from configurator import UserError

LOCK = "lock"  # the file in the folder


@contextlib.contextmanager
def owned(folder: Path, taken: str, unusable: str) -> Iterator[None]:
    """`locked`, of a folder that is made if it isn't there. UserError, with the text `unusable`, if it can't be.

    What is raised within the block passes as it is.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder, taken))
        except OSError as error:
            raise UserError(f"{unusable}: {error.strerror}") from error
        yield


@contextlib.contextmanager
def locked(folder: Path, taken: str) -> Iterator[None]:
    """No other process may be in here. The system frees it when this one ends, however it does.

    UserError, with the text `taken`, if another one is there. Where the file system has no locks nothing is held.
    """
    with open(folder / LOCK, "ab") as file:
        try:
            _take(file)
        except BlockingIOError:
            raise UserError(taken) from None
        except OSError:
            pass
        yield


def _take(file: BinaryIO) -> None:
    """Until it is closed. BlockingIOError: another process has it. OSError: it can't be locked."""
    try:
        import fcntl
    except ImportError:  # on Windows
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except PermissionError as error:
            raise BlockingIOError from error
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
