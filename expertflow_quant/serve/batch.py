"""Requests that are answered together: one call of the engine, each request's events to its own client."""

import time
from collections.abc import Callable, Sequence

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.serve.work import BatchEngine, Cancelled, Delta, Done, Event, Failed, Generation, Job


class Batch:
    """``jobs`` of one kind (line.py). ``end(job, event)`` is called as each ends; ``check`` raises when the server
    stops. ``open``: the jobs that have not ended."""

    def __init__(
        self,
        engine: BatchEngine,
        jobs: Sequence[Job],
        end: Callable[[Job, Event], None],
        check: Callable[[], None],
    ) -> None:
        self._engine, self._jobs, self._end, self._check = engine, jobs, end, check
        self._left = dict(enumerate(jobs))

    @property
    def open(self) -> list[Job]:
        return [*self._left.values()]

    def answer(self) -> list[Job]:
        """Answer all; those that must be answered alone, since together they were refused: one of them may not fit,
        and the others must not fail with it. Raises what the engine does half way."""
        drawn = self._jobs[0].sampling
        lengths = [job.sampling.max_new_tokens for job in self._jobs]
        try:
            answers = self._engine.stream_many(
                [job.messages for job in self._jobs],
                lengths,
                temperature=drawn.temperature,
                top_p=drawn.top_p,
                stop=drawn.stop,
            )
        except ExpertFlowError:
            return self.open
        try:
            for row, found in answers:
                self._check()
                if row in self._left:
                    self._tell(row, found)
                for gone in [row for row, job in self._left.items() if job.cancelled.is_set()]:
                    answers.drop(gone)
                    self._end(self._left.pop(gone), Failed(Cancelled("the client went away")))
        finally:
            answers.close()
        return self.open

    def _tell(self, row: int, found: str | Generation) -> None:
        job = self._left[row]
        if isinstance(found, str):
            job.first_token = job.first_token or time.monotonic()
            job.deliver(Delta(found))
        else:
            self._end(self._left.pop(row), done_of(found))


def done_of(result: Generation) -> Done:
    """The last event of an answer."""
    return Done(result.finish_reason, result.prompt_tokens, result.image_tokens, result.completion_tokens)
