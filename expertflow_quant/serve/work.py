"""One request as the worker sees it: the messages, how to sample, and where its events go."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

ChatMessage = dict[str, Any]
"""{"role": str, "content": str | [{"type": "text", "text": str} | {"type": "image", "image": PIL.Image}]}"""


class Generation(Protocol):
    """What the server reads of the engine's result."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def image_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def finish_reason(self) -> str: ...


class AnswerStream(Protocol):
    """Pieces of an answer, one a token; ``close`` ends it early, ``last`` is what came until then."""

    @property
    def last(self) -> Generation | None: ...
    def __iter__(self) -> Iterator[str]: ...
    def close(self) -> None: ...


class BatchAnswers(Protocol):
    """Events of answers computed together: (row, piece) and, once for each row, (row, its answer)."""

    def __iter__(self) -> Iterator[tuple[int, Any]]: ...
    def drop(self, row: int) -> None: ...
    def close(self) -> None: ...


class CacheStats(Protocol):
    """Counts since the engine was loaded."""

    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def bytes_moved(self) -> int: ...
    @property
    def stall_seconds(self) -> float: ...


class AnswerEngine(Protocol):
    """What the server needs of ``expertflow_quant.runtime.engine.Engine``; tests bring a small fake."""

    @property
    def stats(self) -> CacheStats: ...
    def stream(
        self,
        messages: Sequence[ChatMessage],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        stop: Sequence[str],
    ) -> AnswerStream: ...


class BatchEngine(AnswerEngine, Protocol):
    """What it needs beside that where several requests are answered together."""

    @property
    def distinct_experts(self) -> float | None: ...
    def stream_many(
        self,
        conversations: Sequence[Sequence[ChatMessage]],
        max_new_tokens: Sequence[int],
        *,
        temperature: float,
        top_p: float,
        stop: Sequence[str],
    ) -> BatchAnswers: ...


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn; temperature 0 is greedy. ``stop``: texts that end it and are no part of it."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Delta:
    """Text to send now."""

    text: str


@dataclass(frozen=True)
class Done:
    """The answer is complete; token counts as the engine made them."""

    finish_reason: str
    prompt_tokens: int
    image_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Failed:
    """No answer: ``error`` says why. A cancelled request ends so too."""

    error: Exception


class Cancelled(Exception):
    """The client went away."""


class Stopped(Exception):
    """The server ended before the answer did."""


Event = Delta | Done | Failed


@dataclass(eq=False)
class Job:
    """A request on its way. ``deliver`` takes its events and may be called from the worker's thread; ``path`` is what
    was foretold of it."""

    messages: Sequence[ChatMessage]
    sampling: Sampling
    deliver: Callable[[Event], None]
    born: float = field(default_factory=time.monotonic)
    path: Any = None
    first_token: float | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
