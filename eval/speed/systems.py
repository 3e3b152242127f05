"""What is compared: a system under test answers prompts on routes that it is given, and counts what it moved.

Systems are built one after the other, each once, and then set up anew for every setting.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from eval.speed.bench import Bench


@dataclass(frozen=True)
class Setting:
    """``resident``: expert memory as the user wrote it, of all experts in the run's format; ``budget_bytes``: what that
    is; ``batch`` rows of ``prompt`` tokens each, then ``new_tokens`` decode steps after ``warm`` uncounted ones."""

    resident: str
    budget_bytes: int
    batch: int
    prompt: int
    new_tokens: int
    warm: int


@dataclass(frozen=True)
class Counters:
    """Since the last reset. Hits and misses count distinct experts of a layer and step; both 0: not counted."""

    bytes_moved: int = 0
    hits: int = 0
    misses: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Hits among all, None where nothing was counted."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else None


@dataclass(frozen=True)
class Timing:
    """Decode steps one by one, in seconds; they follow each other without a gap."""

    steps: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(self.steps)


class System(Protocol):
    """A way of running the model. Everything may raise ExpertFlowError: then the setting counts as refused."""

    @property
    def expert_bytes(self) -> int:
        """All experts, in this system's format."""
        ...

    @property
    def device_expert_bytes(self) -> int:
        """What of the device is set aside for experts."""
        ...

    @property
    def layers(self) -> int:
        """How many of the model's layers it runs: the first ones of the run's, or all of those."""
        ...

    def prepare(self, setting: Setting) -> None:
        """Get ready for ``setting``: give back what the one before it took."""
        ...

    def prefill(self, tokens: Tensor, routes: Tensor) -> float:
        """Seconds until the next token of every row is known. ``tokens [rows, prompt]`` on the device, ``routes``
        int64 ``[layers, rows * prompt, top_k]``. Forgets earlier tokens, keeps resident what is resident."""
        ...

    def decode(self, routes: Tensor, limit_seconds: float) -> Timing:
        """One token more per row for every step of ``routes [steps, layers, rows, top_k]``; stops early, but not
        before the second step, once ``limit_seconds`` have passed."""
        ...

    def counters(self) -> Counters: ...
    def reset_counters(self) -> None: ...
    def close(self) -> None:
        """Give everything back."""
        ...


@dataclass(frozen=True)
class SystemSpec:
    """How a system is called, in files and in tables, and how it is built. ``any_budget``: it takes none, so one of a
    run's budgets is enough. ``looks_ahead``: only where not all experts are resident is there something to guess.
    ``captured``: its steps are few enough calls of the host that a profile of the device explains them."""

    name: str
    title: str
    build: Callable[["Bench"], System]
    any_budget: bool = False
    looks_ahead: bool = False
    captured: bool = False


class Clock:
    """Seconds between marks on a device: by events on a GPU, so that marking never waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self.start()

    def start(self) -> None:
        """Wait for the device, forget earlier marks and begin anew."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._marks, self._events = [], []
        self.mark()

    def mark(self) -> None:
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)

    def seconds(self) -> list[float]:
        """Between each mark and the next; waits for the device."""
        if self._device.type != "cuda":
            return [after - before for before, after in zip(self._marks, self._marks[1:])]
        self._events[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in zip(self._events, self._events[1:])]
