"""The library's fast path as a system under test: an adapter that times a runner and leaves the rest to it."""

import time
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from eval.speed.bench import Bench
from eval.speed.systems import Clock, Counters, Setting, System, SystemSpec, Timing


class Runner(Protocol):
    """The fast path set up for one setting: its budget, rows, and room for prompt and new tokens.

    Calls queue work on the current stream of the device and need not wait for it. Routes replace what the routers
    choose; a runner of a captured graph copies them into the memory that the graph reads.
    """

    expert_bytes: int
    device_expert_bytes: int

    def prefill(self, tokens: Tensor, routes: Tensor) -> None:
        """``tokens [rows, prompt]``, ``routes [layers, rows * prompt, top_k]``: up to the next token of each row."""
        ...

    def step(self, routes: Tensor) -> None:
        """One decode step of all rows; ``routes [layers, rows, top_k]``."""
        ...

    def counters(self) -> Counters:
        """Since the last reset; waits for the device."""
        ...

    def reset_counters(self) -> None: ...
    def close(self) -> None: ...


MakeRunner = Callable[[Bench, Setting], Runner]


class FastSystem:
    """A System over runners that ``make`` builds, one for each setting."""

    def __init__(self, bench: Bench, make: MakeRunner) -> None:
        self._bench, self._make = bench, make
        self._runner: Runner | None = None
        self.layers = len(bench.layers)

    @property
    def expert_bytes(self) -> int:
        return self._now.expert_bytes

    @property
    def device_expert_bytes(self) -> int:
        return self._now.device_expert_bytes

    def prepare(self, setting: Setting) -> None:
        self.close()
        self._runner = self._make(self._bench, setting)

    def prefill(self, tokens: Tensor, routes: Tensor) -> float:
        clock = Clock(self._bench.device)
        self._now.prefill(tokens, routes)
        clock.mark()
        return sum(clock.seconds())

    def decode(self, routes: Tensor, limit_seconds: float) -> Timing:
        clock, begun = Clock(self._bench.device), time.perf_counter()
        for step, step_routes in enumerate(routes):
            self._now.step(step_routes)
            clock.mark()
            if step > 0 and time.perf_counter() - begun > limit_seconds:
                break
        return Timing(clock.seconds())

    def counters(self) -> Counters:
        return self._now.counters()

    def reset_counters(self) -> None:
        self._now.reset_counters()

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()
            self._runner = None
        self._bench.release()

    @property
    def _now(self) -> Runner:
        if self._runner is None:
            raise RuntimeError("prepare was not called")
        return self._runner


def fast_spec(
    make: MakeRunner, name: str = "ours", title: str = "ours, graph", looks_ahead: bool = False
) -> SystemSpec:
    """The fast path as a row of a run."""

    def build(bench: Bench) -> System:
        return FastSystem(bench, make)

    return SystemSpec(name, title, build, looks_ahead=looks_ahead, captured=True)
