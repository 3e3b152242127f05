"""Belady's optimum: evict what is used again last. Needs the future, so it runs on recorded traces and is a bound.

L. A. Belady, A study of replacement algorithms for a virtual-storage computer, IBM Systems Journal 5 (2), 1966.
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Sequence

from expertflow_quant.offload.policy import Key, Progress, Ranked

Requests = Sequence[Sequence[Collection[int]]]
"""Steps; each is, layer by layer, the distinct experts it wants."""


class Future:
    """When each expert is used in ``requests``."""

    def __init__(self, requests: Requests) -> None:
        self._uses: dict[Key, list[int]] = defaultdict(list)
        for step, layers in enumerate(requests):
            for layer, experts in enumerate(layers):
                for expert in experts:
                    self._uses[layer, expert].append(step)

    def next_step(self, key: Key, earliest: int) -> float:
        """The first step from ``earliest`` on that uses ``key``; infinite if none does."""
        uses = self._uses.get(key, [])
        place = bisect_left(uses, earliest)
        return uses[place] if place < len(uses) else math.inf


class Belady(Ranked):
    """Evicts the expert whose next use in ``future``, which must be of the requests that are replayed, is last.

    No other choice of victims has more hits as long as what a layer wants at once fits into its slots, and every
    missing expert must have one.
    """

    candidates = None

    def __init__(self, progress: Progress, future: Future) -> None:
        super().__init__()
        self._progress, self._future = progress, future

    def rank(self, key: Key) -> float:
        now = self._progress
        step = self._future.next_step(key, now.step if now.to_come(key[0]) else now.step + 1)
        return -(step * len(now.experts) + key[0])


def most_hits(requests: Requests, layer: int, experts: Collection[int], slots: int) -> int:
    """The most requests for those ``experts`` of ``layer`` that ``slots`` of their own can hit, empty at first.

    A missing expert may do without a slot, and any expert may lose its slot as soon as it was used: a bound for every
    policy that fetches nothing before it is asked for.
    """
    future = Future([[step[layer]] for step in requests])
    held: set[int] = set()
    hits = 0
    for index, step in enumerate(requests):
        wanted = {expert for expert in step[layer] if expert in experts}
        hits += len(wanted & held)
        next_use = {expert: future.next_step((0, expert), index + 1) for expert in wanted | held}
        held = set(sorted(next_use, key=lambda expert: (next_use[expert], expert))[:slots])
    return hits
