"""The device's policies on the host, for slots that belong to layers (pools.LayerPools): the same hits, one by one.

Policies for slots that all layers share are in named.py; there a rank must tell layers apart, too.
"""

from collections.abc import Callable, Collection

from expertflow_quant.offload.layer_policy import LayerPolicy, first_worth, layer_policy, single
from expertflow_quant.offload.policy import LRU, Key, Policy, Progress, Ranked, Scores


class LayerRates:
    """Every expert's worth under ``policy``, as the device has it. Time is counted in requests of the layer: what
    passes a layer's slots by, as the fast path's prompts do, ages nothing."""

    def __init__(self, progress: Progress, policy: LayerPolicy, shares: Scores | None = None) -> None:
        self._rate = first_worth(policy, progress.experts, shares)
        self._decay, self._use = policy.decay, policy.use
        self._asked_at = [[-1] * count for count in progress.experts]
        self._requests = [0] * len(progress.experts)
        progress.watch(self._asked)

    def worth(self, key: Key) -> float:
        layer, expert = key
        age = min(self._requests[layer] - self._asked_at[layer][expert], len(self._decay) - 1)
        return single(self._rate[layer][expert] * self._decay[age])

    def _asked(self, layer: int, experts: Collection[int]) -> None:
        self._requests[layer] += 1
        for expert in experts:
            self._rate[layer][expert] = single(self.worth((layer, expert)) + self._use)
            self._asked_at[layer][expert] = self._requests[layer]


class ByWorth(Ranked):
    """Evicts what is worth least, among equals what was used longest ago, if the missing expert and ``gain`` are worth
    more."""

    candidates = None

    def __init__(self, rates: LayerRates, gain: float) -> None:
        super().__init__()
        self._rates, self._gain = rates, gain

    def rank(self, key: Key) -> float:
        return self._rates.worth(key)

    def admits(self, key: Key, victim: Key) -> bool:
        return single(self.rank(key) + self._gain) > self.rank(victim)


def by_layer(name: str, shares: Scores | None = None) -> Callable[[Progress], Policy]:
    """What makes the policy ``name`` for each pool of a run, as ``simulator.replay`` takes it; see ``first_worth`` for
    ``shares``. Raises ExpertFlowError for an unknown name."""
    policy = layer_policy(name)
    rates: dict[Progress, LayerRates] = {}

    def make(progress: Progress) -> Policy:
        if not policy.ranked:
            return LRU()
        if progress not in rates:
            rates[progress] = LayerRates(progress, policy, shares)
        return ByWorth(rates[progress], policy.gain)

    return make
