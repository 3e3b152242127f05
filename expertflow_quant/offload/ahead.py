"""Which predicted experts are fetched before they are asked for, while a layer computes: over ids alone, so that the
simulator and the runtime choose the same ones.
"""

from collections.abc import Callable, Collection, Sequence

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.policy import Key, Progress
from expertflow_quant.offload.slots import LayerRecords

THRESHOLD = 0.1
"""A guess below this chance is not worth a copy."""

Offer = Callable[[int, int, Collection[Key]], bool]
"""(layer, expert, keys that keep their slots) -> whether the expert was fetched into a slot."""


class FetchAhead:
    """While a layer computes, the experts that ``progress`` expects of the layers after it with at least ``threshold``
    are fetched, nearest layer and highest score first, as many bytes as ``bytes_per_layer`` allows. What a layer leaves
    of that for a record under way counts for the next layer; what is fetched keeps its slot until the step ends."""

    def __init__(
        self,
        layers: Sequence[LayerRecords],
        progress: Progress,
        bytes_per_layer: float,
        threshold: float = THRESHOLD,
    ) -> None:
        if bytes_per_layer < 0:
            raise ExpertFlowError(f"{bytes_per_layer:g} bytes ahead of each layer: give none (0) or more")
        self._layers, self._progress = layers, progress
        self._bytes, self._threshold = bytes_per_layer, threshold
        self._credit, self._step = 0.0, -1
        self._fetched: set[Key] = set()
        self.moved = 0
        """Bytes fetched ahead so far."""

    def after(self, experts: Collection[int], offer: Offer) -> None:
        """The present layer has asked for ``experts`` and is about to compute."""
        now = self._progress
        if now.step != self._step:
            self._step, self._credit, self._fetched = now.step, 0.0, set()
        if now.scores is None or not self._bytes:
            return
        in_use = {(now.layer, expert) for expert in experts} | self._fetched
        self._credit = self._fetch(now.scores, self._credit + self._bytes, in_use, offer)

    def _fetch(self, scores: Sequence[Sequence[float]], credit: float, in_use: set[Key], offer: Offer) -> float:
        """Bytes left of ``credit`` for a record that is under way; what is not used is lost."""
        for layer in range(self._progress.layer + 1, len(self._layers)):
            likely = [(-score, expert) for expert, score in enumerate(scores[layer]) if score >= self._threshold]
            for _, expert in sorted(likely):
                nbytes = self._layers[layer].nbytes[expert]
                if nbytes > credit:
                    return credit
                if offer(layer, expert, in_use):
                    in_use.add((layer, expert))
                    self._fetched.add((layer, expert))
                    self.moved += nbytes
                    credit -= nbytes
        return 0.0
