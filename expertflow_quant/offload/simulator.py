"""Recorded requests through any policy, predictions and budget, without a model or a device: hits, bytes, time.

The slots are those of the runtime (pools.py), so the hits are exactly the runtime's for the same requests.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Literal

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.ahead import THRESHOLD, FetchAhead
from expertflow_quant.offload.policy import Policy, Progress, Scores
from expertflow_quant.offload.pools import Arrangement, LayerPools, SharedPools
from expertflow_quant.offload.slots import LayerRecords
from expertflow_quant.offload.stats import LayerStats

Slots = Literal["shared", "layers"]
"""``shared``: ExpertCache's pools over all layers. ``layers``: ResidentExperts' pools of each layer."""


@dataclass(frozen=True)
class Link:
    """What moves records: its rate, and how long a layer computes while it is free to fetch ahead."""

    bytes_per_second: float
    layer_seconds: float

    def __post_init__(self) -> None:
        if self.bytes_per_second <= 0 or self.layer_seconds < 0:
            raise ExpertFlowError(f"{self}: a link must move more than 0 bytes a second, a layer take no negative time")

    @property
    def bytes_ahead(self) -> float:
        """Bytes that move while one layer computes."""
        return self.bytes_per_second * self.layer_seconds


@dataclass(frozen=True)
class Replay:
    """What a run would have counted. A request is one distinct expert of one layer and step; it hits if it is resident
    when it is asked for. ``fetched_ahead_bytes`` moved beside the computation, used or not. ``seconds`` by the link, 0
    without one: every layer takes ``layer_seconds`` and waits for the bytes of its misses at the link's rate.
    """

    layers: tuple[LayerStats, ...]
    missed_bytes: int
    fetched_ahead_bytes: int
    steps: int
    seconds: float

    @property
    def hits(self) -> int:
        return sum(layer.hits for layer in self.layers)

    @property
    def misses(self) -> int:
        return sum(layer.misses for layer in self.layers)

    @property
    def hit_rate(self) -> float:
        """Share of requests that hit, 0 to 1; 1 when nothing was asked for."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 1.0

    @property
    def bytes_moved(self) -> int:
        return self.missed_bytes + self.fetched_ahead_bytes


def replay(
    requests: Iterable[Sequence[Collection[int]]],
    layers: Sequence[LayerRecords],
    budget_bytes: int,
    make_policy: Callable[[Progress], Policy],
    predictions: Iterable[Scores | None] | None = None,
    streamed: Iterable[bool] | None = None,
    *,
    slots: Slots = "shared",
    preload: bool = False,
    link: Link | None = None,
    ahead: bool = False,
    threshold: float = THRESHOLD,
) -> Replay:
    """Run ``requests`` (steps; of every layer the distinct experts wanted) through empty slots worth ``budget_bytes``.

    ``make_policy`` gives a policy for every pool of slots. ``predictions``: for each step what is known of it before
    it runs. ``streamed``: whether each step is one of the fast path's prefills, which uses what is resident, reads the
    rest past the slots and leaves no trace in them. ``ahead``: while a layer computes, experts that are predicted with
    at least ``threshold`` are fetched for the layers after it, nearest layer and highest score first, as many bytes as
    ``link`` moves meanwhile, if the policy finds them worth a slot. Raises BudgetError as the runtime does, and
    ExpertFlowError for requests of another model.
    """
    if ahead and (link is None or predictions is None):
        raise ExpertFlowError("fetching ahead needs predictions, and a link to say how much it moves meanwhile")
    progress = Progress([len(layer.nbytes) for layer in layers])

    def policy() -> Policy:
        return make_policy(progress)

    arrangement: Arrangement
    arrangement = (SharedPools if slots == "shared" else LayerPools)(layers, budget_bytes, policy)
    if preload:
        arrangement.preload()
    bytes_ahead = link.bytes_ahead if link is not None and ahead else 0.0
    run = _Run(layers, progress, arrangement, FetchAhead(layers, progress, bytes_ahead, threshold))
    known, passing = chain(predictions or (), repeat(None)), chain(streamed or (), repeat(False))
    for step, scores, is_streamed in zip(requests, known, passing, strict=False):
        run.step(step, scores, is_streamed)
    return run.result(link)


class _Run:
    def __init__(
        self, layers: Sequence[LayerRecords], progress: Progress, arrangement: Arrangement, ahead: FetchAhead
    ) -> None:
        self._layers, self._progress, self._arrangement, self._ahead = layers, progress, arrangement, ahead
        self._hits, self._misses = [0] * len(layers), [0] * len(layers)
        self._missed = 0

    def step(self, wanted: Sequence[Collection[int]], scores: Scores | None, streamed: bool) -> None:
        if len(wanted) != len(self._layers):
            raise ExpertFlowError(f"a step of {len(wanted)} layers, the model has {len(self._layers)}: record it again")
        self._progress.begin_step(scores)
        for layer, experts in enumerate(wanted):
            if streamed:
                self._count(layer, experts, self._arrangement.missing(layer, experts))
                continue
            self._progress.begin_layer(layer, experts)
            self._count(layer, experts, self._arrangement.request(layer, experts))
            self._ahead.after(experts, self._arrangement.offer)

    def _count(self, layer: int, experts: Collection[int], missing: Sequence[int]) -> None:
        self._misses[layer] += len(missing)
        self._hits[layer] += len(experts) - len(missing)
        self._missed += sum(self._layers[layer].nbytes[expert] for expert in missing)

    def result(self, link: Link | None) -> Replay:
        steps = self._progress.step + 1
        seconds = 0.0
        if link is not None:
            seconds = steps * len(self._layers) * link.layer_seconds + self._missed / link.bytes_per_second
        layers = tuple(LayerStats(*counts) for counts in zip(self._hits, self._misses, strict=True))
        return Replay(layers, self._missed, self._ahead.moved, steps, seconds)
