"""Which waiting requests are answered together: those whose predicted paths are alike, and nobody waits long.

The token scheduler of ExpertFlow (arXiv 2410.17954), at admission: once a batch runs it keeps its requests, so that no
keys and values are moved. Paths are alike by 1 - Hamming distance / (layers x experts); waiting requests are grouped by
balanced k-medoids: random medoids, each request to its most similar one, the surplus of a full group to those that are
short, in each group the request most similar to all others becomes the medoid, until nothing changes or 30 rounds are
over. Of several random starts the groups most similar to their medoids are taken.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError

ROUNDS = 30
STARTS = 4
WORD_PLACES = 4096
PATIENCE = 4
"""Batches that a request may be admitted later than in order of arrival."""


def prompt_path(experts: Tensor, num_experts: int, last: int = 1, width: int | None = None) -> Tensor:
    """bool [L, E]: the path that an answer is expected to take, once its prompt has run through ``experts``, integers
    [T, L, K]: in each layer the ``width`` experts (default: K) that its ``last`` tokens used most, the whole prompt
    deciding between equals. For answers of a few tokens the prompt's last token foretold best.
    """
    if experts.ndim != 3 or not experts.numel():
        raise ExpertFlowError(f"experts {tuple(experts.shape)} of a prompt must be [tokens, layers, top_k], none empty")
    tokens, layers, top_k = experts.shape
    uses = torch.zeros(tokens, layers, num_experts).scatter_(2, experts.long(), 1.0)
    liking = uses[-last:].sum(0) + uses.mean(0) / 2
    path = torch.zeros(layers, num_experts, dtype=torch.bool)
    return path.scatter_(1, liking.topk(min(width or top_k, num_experts), 1).indices, True)


def predicted_path(logits: Tensor, top_k: int, last: int = 8) -> Tensor:
    """bool [L, E]: the same from a path predictor's ``logits`` [T, L, E] of a prompt's tokens, without running it: in
    each layer the ``top_k`` experts that its ``last`` tokens are likeliest to use."""
    chances = torch.sigmoid(logits[-last:].float()).mean(0)
    path = torch.zeros(chances.shape, dtype=torch.bool)
    return path.scatter_(1, chances.topk(min(top_k, chances.shape[1]), 1).indices, True)


def word_path(token_ids: Tensor, places: int = WORD_PLACES) -> Tensor:
    """bool [1, places]: which words a prompt has, by ``token_ids`` modulo ``places``: where nothing foretells its path,
    prompts of like words are taken to have like ones."""
    path = torch.zeros(1, places, dtype=torch.bool)
    path[0, token_ids.long() % places] = True
    return path


def path_similarity(paths: Tensor) -> Tensor:
    """float32 [n, n] of bool ``paths`` [n, L, E]: 1 - Hamming distance / (L E)."""
    if paths.ndim != 3 or paths.dtype != torch.bool or not paths.numel():
        raise ExpertFlowError(
            f"paths are {paths.dtype} {tuple(paths.shape)}, they must be bool [requests, layers, experts], none empty"
        )
    flat = paths.flatten(1).float()
    size = flat.sum(1)
    return 1 - (size[:, None] + size[None, :] - 2 * flat @ flat.T) / flat.shape[1]


def balanced_groups(
    similarity: Tensor, sizes: Sequence[int], *, seed: int = 0, rounds: int = ROUNDS, starts: int = STARTS
) -> list[list[int]]:
    """Groups of ``sizes`` of the requests 0 .. n - 1, ascending within each, by float ``similarity`` [n, n].

    Raises ExpertFlowError unless the sizes are above zero and sum to n.
    """
    if sum(sizes) != len(similarity) or min(sizes, default=0) < 1:
        raise ExpertFlowError(
            f"groups of {list(sizes)} requests must each have one and together hold all {len(similarity)} of them"
        )
    generator = torch.Generator().manual_seed(seed)
    best: list[list[int]] = []
    best_total = -torch.inf
    for _ in range(starts):
        groups, total = _cluster(similarity, sizes, rounds, generator)
        if total > best_total:
            best, best_total = groups, total
    return best


@dataclass(frozen=True)
class _Waiting:
    key: int
    arrival: int
    path: Tensor


class Admission:
    """Chooses the next batch of ``rows`` among those who wait.

    ``patience``: a request is admitted at most so many batches later than it would be in order of arrival, where the
    same batches are filled from the front of the queue; 0 admits in that order. The ``patience + 1`` batches at the
    front of the queue are grouped, and the group that the longest-waiting request is in is admitted.
    """

    def __init__(self, rows: int, patience: int = PATIENCE, seed: int = 0) -> None:
        if rows < 1 or patience < 0:
            raise ExpertFlowError(f"rows {rows} must be at least 1 and patience {patience} at least 0 batches")
        self._rows = rows
        self._patience = patience
        self._seed = seed
        self._waiting: list[_Waiting] = []
        self._arrivals = 0
        self._batches = 0
        self._sent = 0
        self._sent_by: deque[int] = deque(maxlen=max(patience, 1))

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: int, path: Tensor) -> None:
        """Request ``key`` arrives, with its predicted path, bool [L, E]."""
        self._waiting.append(_Waiting(key, self._arrivals, path))
        self._arrivals += 1

    def remove(self, key: int) -> None:
        """Request ``key``, which waits, is no longer there; those behind it move up."""
        place = next(place for place, request in enumerate(self._waiting) if request.key == key)
        behind = [replace(request, arrival=request.arrival - 1) for request in self._waiting[place + 1 :]]
        self._waiting[place:] = behind
        self._arrivals -= 1

    def next_batch(self) -> list[int]:
        """The keys to answer now, in order of arrival: ``rows`` of them, or all where fewer wait."""
        chosen = self._choose()
        taken = {self._waiting[place].arrival for place in chosen}
        keys = [request.key for request in self._waiting if request.arrival in taken]
        self._waiting = [request for request in self._waiting if request.arrival not in taken]
        self._batches += 1
        self._sent += len(keys)
        self._sent_by.append(self._sent)
        return keys

    def _choose(self) -> list[int]:
        """Places in the queue."""
        count = min(self._rows, len(self._waiting))
        window = self._waiting[: self._rows * (self._patience + 1)]
        if len(window) <= count or not self._patience:
            return list(range(count))
        similarity = path_similarity(torch.stack([request.path for request in window]))
        sizes = [count] * (len(window) // count) + [len(window) % count] * bool(len(window) % count)
        groups = balanced_groups(similarity, sizes, seed=self._seed + self._batches)
        group = next(group for group in groups if 0 in group)
        due = [place for place, request in enumerate(window) if self._is_due(request)]
        return _filled(similarity, due, group, count)

    def _is_due(self, request: _Waiting) -> bool:
        """Whether this is the last batch that keeps the promise: ``patience`` batches ago, in order of arrival, this
        request would have been admitted."""
        return self._batches >= self._patience and request.arrival < self._sent_by[0]


def admission_order(paths: Tensor, rows: int, patience: int = PATIENCE, seed: int = 0) -> list[list[int]]:
    """Batches of requests 0 .. n - 1 that all wait, in order of arrival, with bool ``paths`` [n, L, E]."""
    queue = Admission(rows, patience, seed)
    for key, path in enumerate(paths):
        queue.add(key, path)
    batches = []
    while len(queue):
        batches.append(queue.next_batch())
    return batches


def _filled(similarity: Tensor, due: list[int], group: list[int], count: int) -> list[int]:
    """``count`` places: those that are due, then the members of ``group`` and then others, the most similar to what is
    chosen first."""
    chosen = [*due] or [0]
    members = set(group)
    others = [place for place in range(len(similarity)) if place not in chosen]
    liking = similarity[:, chosen].mean(1)
    others.sort(key=lambda place: (place not in members, -float(liking[place]), place))
    return [*chosen, *others[: count - len(chosen)]]


def _cluster(
    similarity: Tensor, sizes: Sequence[int], rounds: int, generator: torch.Generator
) -> tuple[list[list[int]], float]:
    """One random start: groups, and the summed similarity to their medoids."""
    medoids = torch.randperm(len(similarity), generator=generator)[: len(sizes)]
    groups: list[list[int]] = []
    for _ in range(rounds):
        groups = _assign(similarity[:, medoids], sizes)
        renewed = torch.tensor([group[int(similarity[group][:, group].sum(1).argmax())] for group in groups])
        if torch.equal(renewed, medoids):
            break
        medoids = renewed
    total = sum(float(similarity[group, medoid].sum()) for group, medoid in zip(groups, medoids.tolist(), strict=True))
    return groups, total


def _assign(liking: Tensor, sizes: Sequence[int]) -> list[list[int]]:
    """Everyone to the most similar medoid; of a group too large its least similar go to the groups that are short."""
    nearest = liking.argmax(1)
    groups: list[list[int]] = []
    surplus: list[int] = []
    for group, size in enumerate(sizes):
        members = (nearest == group).nonzero().flatten()
        order = liking[members, group].argsort(descending=True, stable=True)
        ranked = members[order].tolist()
        groups.append(ranked[:size])
        surplus += ranked[size:]
    for request in surplus:
        short = [group for group, size in enumerate(sizes) if len(groups[group]) < size]
        groups[max(short, key=lambda group: float(liking[request, group]))].append(request)
    return [sorted(group) for group in groups]
