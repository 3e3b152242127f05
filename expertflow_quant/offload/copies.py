"""How a record gets into its slot: at once, or on CUDA on a stream of its own while the computation goes on.

On CUDA a copy starts after everything that was already asked of the computation (its slot may still be read
there), and the computation waits for one copy at a time, so it goes on with the experts that are there while
others arrive. Records that are not in pinned memory take a ring of pinned buffers (disk_ring.py).
"""

import itertools
import threading
import time
from concurrent.futures import Future, wait
from functools import cached_property
from typing import Protocol, cast

import torch
from torch import Tensor

from expertflow_quant.offload.disk_ring import DiskRing, Done, stream_upload
from expertflow_quant.offload.policy import Key

MANY_WAITS = 1024  # stalls are added up when so many are pending


class Copies(Protocol):
    """Starts copies and waits for them; keys name the records."""

    def start(self, key: Key, slot: Tensor, record: Tensor) -> None:
        """Begin to copy ``record`` into ``slot``, both uint8 ``[nbytes]``."""

    def finish(self, key: Key) -> None:
        """Let no later computation run before the copy of ``key``, if one is under way, is done."""

    def forget(self, key: Key) -> None:
        """``key`` lost its slot; nobody will wait for it."""

    def stall_seconds(self) -> float:
        """Time that the computation waited for copies since ``reset``."""

    def reset(self) -> None: ...


def make_copies(device: torch.device) -> Copies:
    """The way of copying for slots on ``device``."""
    return StreamCopies(device) if device.type == "cuda" else PlainCopies()


class PlainCopies:
    """Copies at once; the whole copy is a stall."""

    def __init__(self) -> None:
        self._stalled = 0.0

    def start(self, key: Key, slot: Tensor, record: Tensor) -> None:
        begun = time.perf_counter()
        slot.copy_(record)
        self._stalled += time.perf_counter() - begun

    def finish(self, key: Key) -> None:
        pass

    def forget(self, key: Key) -> None:
        pass

    def stall_seconds(self) -> float:
        return self._stalled

    def reset(self) -> None:
        self._stalled = 0.0


class StreamCopies:
    """Copies on a side stream of ``device``, from pinned memory at once and from other memory through a ring.

    Stalls are timed on the device by events, and counted once the device has passed them; the time that the host
    waits for a record to be read counts as a stall, too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copied: dict[Key, torch.cuda.Event] = {}
        self._read: dict[Key, Future[Done]] = {}
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._stalled = 0.0
        self._lock = threading.Lock()  # stalls are read from other threads

    @cached_property
    def _ring(self) -> DiskRing:
        """Made when the first record needs it: most stores are pinned throughout."""
        return DiskRing()

    def start(self, key: Key, slot: Tensor, record: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        if not record.is_pinned():
            self._read[key] = self._ring.send(record, slot, stream_upload(self._stream))
            return
        with torch.cuda.stream(self._stream):
            slot.copy_(record, non_blocking=True)
            self._copied[key] = self._stream.record_event()

    def finish(self, key: Key) -> None:
        copied = self._uploaded(key) if key in self._read else self._copied.pop(key, None)
        if copied is None:
            return
        compute = torch.cuda.current_stream(self._device)
        before, after = _timed_event(), _timed_event()
        before.record(compute)
        compute.wait_event(copied)
        after.record(compute)
        with self._lock:
            self._waits.append((before, after))
        if len(self._waits) >= MANY_WAITS:
            self.stall_seconds()

    def forget(self, key: Key) -> None:
        self._copied.pop(key, None)
        read = self._read.pop(key, None)
        # Its upload, still to be enqueued, would land in a slot that holds another record by then.
        if read is not None and not read.cancel():
            wait([read])

    def _uploaded(self, key: Key) -> torch.cuda.Event:
        """The mark behind the upload of ``key``. Raises what reading raised, again and again until forgotten."""
        begun = time.perf_counter()
        copied = cast(torch.cuda.Event, self._read[key].result())
        del self._read[key]
        with self._lock:
            self._stalled += time.perf_counter() - begun
        return copied

    def stall_seconds(self) -> float:
        with self._lock:
            passed = list(itertools.takewhile(lambda wait: _passed(wait[1]), self._waits))
            self._stalled += sum(before.elapsed_time(after) for before, after in passed) / 1000.0
            del self._waits[: len(passed)]
            return self._stalled

    def reset(self) -> None:
        with self._lock:
            self._waits.clear()
            self._stalled = 0.0


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _passed(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]
