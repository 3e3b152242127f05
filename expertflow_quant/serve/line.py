"""Who waits, and who is answered next and together: in order of arrival, or grouped by foretold paths."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertflow_quant.runtime.schedule import PATIENCE, Admission
from expertflow_quant.serve.work import ChatMessage, Job

_UNKNOWN = torch.zeros(1, 1, dtype=torch.bool)


@dataclass(frozen=True)
class Batching:
    """``rows`` requests at most are answered together; ``patience`` as in Line; ``foretell`` gives a conversation's
    path, None: order of arrival."""

    rows: int = 1
    patience: int = PATIENCE
    foretell: Callable[[Sequence[ChatMessage]], Tensor] | None = None


class Line:
    """Jobs that wait for a batch of ``rows``. Every batch has the job that waits longest; with it go jobs that can be
    answered in one call: same temperature, top_p and stop texts, and no seed, whose answers must not depend on company.

    ``patience``: batches of its kind that a job may be later than in order of arrival, in favour of jobs with paths
    like the first one's; 0 is order of arrival. Jobs without a path are never passed over. Not for several threads.
    """

    def __init__(self, rows: int = 1, patience: int = PATIENCE) -> None:
        self._rows, self._patience = rows, patience
        self._jobs: dict[int, Job] = {}
        self._queues: dict[Hashable, Admission] = {}
        self._added = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job) -> None:
        """``job`` arrives."""
        number, kind = self._added, self._kind(job)
        self._added += 1
        self._jobs[number] = job
        patience = self._patience if job.path is not None else 0
        queue = self._queues.setdefault(kind, Admission(self._rows if _mixes(job) else 1, patience))
        queue.add(number, _UNKNOWN if job.path is None else job.path)

    def remove(self, job: Job) -> bool:
        """Take ``job`` out; whether it waited."""
        number = next((number for number, each in self._jobs.items() if each is job), None)
        if number is None:
            return False
        kind = self._kind(job)
        del self._jobs[number]
        self._queues[kind].remove(number)
        self._forget(kind)
        return True

    def next(self) -> list[Job]:
        """The jobs to answer now, the longest-waiting one first among them by arrival; none where none waits."""
        if not self._jobs:
            return []
        kind = self._kind(next(iter(self._jobs.values())))
        chosen = [self._jobs.pop(number) for number in self._queues[kind].next_batch()]
        self._forget(kind)
        return chosen

    def clear(self) -> list[Job]:
        """Everybody who waited."""
        jobs = [*self._jobs.values()]
        self._jobs.clear()
        self._queues.clear()
        return jobs

    def _forget(self, kind: Hashable) -> None:
        if not len(self._queues[kind]):
            del self._queues[kind]

    @staticmethod
    def _kind(job: Job) -> Hashable:
        """Jobs of one kind can be answered together."""
        drawn = job.sampling
        if not _mixes(job):
            return id(job)
        shape = None if job.path is None else tuple(job.path.shape)
        return drawn.temperature, drawn.top_p, drawn.stop, shape


def _mixes(job: Job) -> bool:
    return job.sampling.seed is None or job.sampling.temperature == 0
