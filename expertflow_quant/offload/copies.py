"""How a record gets into its slot: at once, or on CUDA on a stream of its own while the computation goes on.

On CUDA a copy starts after everything that was already asked of the computation (its slot may still be read
there), and the computation waits for one copy at a time, so it goes on with the experts that are there while
others arrive.
"""

import itertools
import threading
import time
from typing import Protocol

import torch
from torch import Tensor

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
    """Copies from pinned memory on a side stream of ``device``; stalls are timed on the device by events, and
    counted once the device has passed them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copied: dict[Key, torch.cuda.Event] = {}
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._stalled = 0.0
        self._lock = threading.Lock()  # stalls are read from other threads

    def start(self, key: Key, slot: Tensor, record: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            slot.copy_(record, non_blocking=True)
            self._copied[key] = self._stream.record_event()

    def finish(self, key: Key) -> None:
        copied = self._copied.pop(key, None)
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
