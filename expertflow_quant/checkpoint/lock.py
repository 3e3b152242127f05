"""One run at a time for a checkpoint folder: a lock on the folder itself, which ends with the process that holds it."""

import os
import sys
from pathlib import Path

from expertflow_quant.checkpoint.errors import CheckpointError, ResumeError

if sys.platform != "win32":
    import fcntl

_held: dict[tuple[int, int], tuple[int, int]] = {}
"""(device, inode) of each folder held -> (descriptor, holders in this process)."""


def hold(folder: Path) -> tuple[int, int]:
    """Make ``folder`` if it is not there and keep other processes from writing it; ``release`` what this returns.

    A process may hold a folder several times. Where folders cannot be locked (Windows, some network file systems)
    nothing is kept from anybody. Raises ResumeError where another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state = folder.stat()
        key = state.st_dev, state.st_ino
        if key in _held:
            descriptor, holders = _held[key]
            _held[key] = descriptor, holders + 1
            return key
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(
            f"cannot write to {folder}: {error.strerror or error}: choose a folder that can be written"
        ) from error
    try:
        if sys.platform != "win32":
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ResumeError(
            f"another run is writing {folder} at this moment: wait for it, stop it, or choose another folder"
        ) from error
    except OSError:
        pass
    _held[key] = descriptor, 1
    return key


def release(key: tuple[int, int]) -> None:
    """Let go of a folder once; the last holder in this process unlocks it."""
    descriptor, holders = _held.pop(key, (-1, 0))
    if holders > 1:
        _held[key] = descriptor, holders - 1
    elif holders:
        os.close(descriptor)
