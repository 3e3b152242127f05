"""One engine, one worker thread: requests wait in a bounded first-in, first-out queue.

A request takes a place before its images are decoded and holds it until its answer has ended, so at most
``max_queue`` + 1 requests have pictures in memory. A cancelled request gives its place back at once while it
waits, and within one token while it is answered.
"""

import logging
import math
import threading
import time
from collections import deque
from dataclasses import asdict

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.serve.work import AnswerEngine, Cancelled, Delta, Done, Event, Failed, Job, Stopped

log = logging.getLogger(__name__)


class QueueFull(ExpertFlowError):
    """No place is free; ``retry_after`` seconds are about one answer's time."""

    def __init__(self, max_queue: int, retry_after: int) -> None:
        super().__init__(
            f"one request is answered and {max_queue} wait, as many as --max-queue allows: "
            f"try again in {retry_after} s or raise --max-queue"
        )
        self.retry_after = retry_after


class RequestQueue:
    """Between ``start()`` and ``stop()`` it answers what is submitted. Safe to call from any thread."""

    def __init__(self, engine: AnswerEngine, max_queue: int) -> None:
        self._engine = engine
        self._max_queue = max_queue
        self._jobs: deque[Job] = deque()
        self._running: Job | None = None
        self._places = 0
        self._usual_seconds = 1.0
        self._changed = threading.Condition()
        self._stopped = False
        self._worker = threading.Thread(target=self._work, name="expertflow-worker", daemon=True)

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    @property
    def running(self) -> int:
        return int(self._running is not None)

    @property
    def alive(self) -> bool:
        return self._worker.is_alive() and not self._stopped

    def start(self) -> None:
        self._worker.start()

    def stop(self, patience: float = 10.0) -> None:
        """Cancel what waits and what runs, and wait up to ``patience`` seconds for the worker to end."""
        with self._changed:
            self._stopped = True
            dropped = [*self._jobs]
            self._jobs.clear()
            self._changed.notify_all()
        for job in dropped:
            self._end(job, Failed(Stopped("the server stopped")))
        if self._worker.is_alive():
            self._worker.join(patience)

    def take_place(self) -> None:
        """Hold a place; ``submit`` or ``give_back`` must follow. Raises QueueFull."""
        with self._changed:
            if self._places > self._max_queue:
                raise QueueFull(self._max_queue, min(60, max(1, math.ceil(self._usual_seconds))))
            self._places += 1

    def give_back(self) -> None:
        with self._changed:
            self._places -= 1

    def submit(self, job: Job) -> None:
        """Put ``job`` into the place that was taken for it; the place comes back when the job ends."""
        with self._changed:
            stopped = self._stopped
            if not stopped:
                self._jobs.append(job)
                self._changed.notify()
        if stopped:
            self._end(job, Failed(Stopped("the server stopped")))

    def cancel(self, job: Job) -> None:
        """End ``job`` early; nothing happens when it has ended already."""
        job.cancelled.set()
        with self._changed:
            waited = job in self._jobs
            if waited:
                self._jobs.remove(job)
        if waited:
            self._end(job, Failed(Cancelled("the client went away")))

    def _work(self) -> None:
        while (job := self._next()) is not None:
            started = time.monotonic()
            event = self._outcome(job)
            with self._changed:
                self._running = None
                self._usual_seconds += 0.3 * (time.monotonic() - started - self._usual_seconds)
            self._end(job, event)

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._stopped)
            if self._stopped:
                return None
            self._running = self._jobs.popleft()
            return self._running

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
        return Done(result.finish_reason, result.prompt_tokens, result.image_tokens, result.completion_tokens)

    def _check_wanted(self, job: Job) -> None:
        if self._stopped:
            raise Stopped("the server stopped")
        if job.cancelled.is_set():
            raise Cancelled("the client went away")

    def _end(self, job: Job, event: Event) -> None:
        self.give_back()
        job.deliver(event)
