"""One engine, one worker thread: requests wait in a bounded line and are answered one by one, or some together.

A request takes a place before its images are decoded and holds it until its answer has ended, so at most
``max_queue`` + ``rows`` requests have pictures in memory. A cancelled request gives its place back at once while it
waits, and within one token while it is answered. Requests that are answered together begin together: who comes while
they are answered waits for the next batch.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import cast

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.runtime.schedule import PATIENCE
from expertflow_quant.serve.batch import Batch, done_of
from expertflow_quant.serve.line import Line
from expertflow_quant.serve.work import AnswerEngine, BatchEngine, Cancelled, Delta, Done, Event, Failed, Job, Stopped

log = logging.getLogger(__name__)


class QueueFull(ExpertFlowError):
    """No place is free; ``retry_after`` seconds are about one answer's time."""

    def __init__(self, max_queue: int, retry_after: int, rows: int = 1) -> None:
        answered = "one request is" if rows == 1 else f"{rows} requests are"
        super().__init__(
            f"{answered} answered and {max_queue} wait, as many as --max-queue allows: "
            f"try again in {retry_after} s or raise --max-queue"
        )
        self.retry_after = retry_after


class RequestQueue:
    """Between ``start()`` and ``stop()`` it answers what is submitted, up to ``rows`` requests together, chosen with
    ``patience`` (line.py). ``on_batch(requests, distinct experts)`` hears of every batch. Safe to call from any
    thread. An engine that answers several together is a BatchEngine."""

    def __init__(
        self,
        engine: AnswerEngine,
        max_queue: int,
        rows: int = 1,
        patience: int = PATIENCE,
        on_batch: Callable[[int, float | None], None] | None = None,
    ) -> None:
        self._engine = engine
        self._max_queue, self._rows, self._on_batch = max_queue, rows, on_batch
        self._line = Line(rows, patience)
        self._running = 0
        self._places = 0
        self._usual_seconds = 1.0
        self._changed = threading.Condition()
        self._stopped = False
        self._worker = threading.Thread(target=self._work, name="expertflow-worker", daemon=True)

    @property
    def waiting(self) -> int:
        return len(self._line)

    @property
    def running(self) -> int:
        return self._running

    @property
    def alive(self) -> bool:
        return self._worker.is_alive() and not self._stopped

    def start(self) -> None:
        self._worker.start()

    def stop(self, patience: float = 10.0) -> None:
        """Cancel what waits and what runs, and wait up to ``patience`` seconds for the worker to end."""
        with self._changed:
            self._stopped = True
            dropped = self._line.clear()
            self._changed.notify_all()
        for job in dropped:
            self._end(job, Failed(Stopped("the server stopped")))
        if self._worker.is_alive():
            self._worker.join(patience)

    def take_place(self) -> None:
        """Hold a place; ``submit`` or ``give_back`` must follow. Raises QueueFull."""
        with self._changed:
            if self._places >= self._max_queue + self._rows:
                raise QueueFull(self._max_queue, min(60, max(1, math.ceil(self._usual_seconds))), self._rows)
            self._places += 1

    def give_back(self) -> None:
        with self._changed:
            self._places -= 1

    def submit(self, job: Job) -> None:
        """Put ``job`` into the place that was taken for it; the place comes back when the job ends."""
        with self._changed:
            stopped = self._stopped
            if not stopped:
                self._line.add(job)
                self._changed.notify()
        if stopped:
            self._end(job, Failed(Stopped("the server stopped")))

    def cancel(self, job: Job) -> None:
        """End ``job`` early; nothing happens when it has ended already."""
        job.cancelled.set()
        with self._changed:
            waited = self._line.remove(job)
        if waited:
            self._end(job, Failed(Cancelled("the client went away")))

    def _work(self) -> None:
        while jobs := self._next():
            started = time.monotonic()
            if len(jobs) == 1:
                ended = [(jobs[0], self._outcome(jobs[0]))]
            else:
                ended = self._together(jobs)
            with self._changed:
                self._running = 0
                self._usual_seconds += 0.3 * (time.monotonic() - started - self._usual_seconds)
            if self._on_batch is not None:
                self._on_batch(len(jobs), getattr(self._engine, "distinct_experts", None))
            for job, event in ended:
                self._end(job, event)

    def _next(self) -> list[Job]:
        with self._changed:
            self._changed.wait_for(lambda: len(self._line) or self._stopped)
            jobs = [] if self._stopped else self._line.next()
            self._running = len(jobs)
            return jobs

    def _together(self, jobs: Sequence[Job]) -> list[tuple[Job, Event]]:
        """Answer ``jobs`` in one call; those that did not end on the way, with how they end."""
        batch = Batch(cast(BatchEngine, self._engine), jobs, self._end, self._check_open)
        try:
            refused = batch.answer()
        except Exception as error:
            if not isinstance(error, Stopped | ExpertFlowError):
                log.exception("answers failed")
            return [(job, Failed(error)) for job in batch.open]
        return [(job, self._outcome(job)) for job in refused]

    def _check_open(self) -> None:
        if self._stopped:
            raise Stopped("the server stopped")

    def _outcome(self, job: Job) -> Event:
        try:
            return self._answer(job)
        except Exception as error:
            if not isinstance(error, Cancelled | Stopped | ExpertFlowError):
                log.exception("an answer failed")
            return Failed(error)

    def _answer(self, job: Job) -> Done:
        pieces = self._engine.stream(job.messages, **asdict(job.sampling))
        try:
            for piece in pieces:
                self._check_wanted(job)
                job.first_token = job.first_token or time.monotonic()
                job.deliver(Delta(piece))
        finally:
            pieces.close()
        result = pieces.last
        if result is None:
            raise RuntimeError("the engine ended a stream without a result")
        return done_of(result)

    def _check_wanted(self, job: Job) -> None:
        self._check_open()
        if job.cancelled.is_set():
            raise Cancelled("the client went away")

    def _end(self, job: Job, event: Event) -> None:
        self.give_back()
        job.deliver(event)
