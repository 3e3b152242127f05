"""ExpertFlow's predictive, locality-aware cache as one number: what a slot's expert is worth from now on.

The published rules (arXiv 2410.17954, expert cache: slots in proportion to predicted demand, slots of layers that are
done serve later ones, mispredicted experts are demoted, needed but missing ones come first) follow from ranking experts
by the discounted time of their next use:
    layers still to come in this step     chance = what was predicted for the step
    layers that are done                  chance = the demand expected of later steps; the prediction counts no more
"""

from typing import Protocol

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.policies.frequency import UseRates
from expertflow_quant.offload.policy import Key, Progress, Ranked

DISCOUNT = 0.7


class Demand(Protocol):
    """What later steps are expected to use: UseRates (how often recent ones did), Affinity (what follows what)."""

    def rate(self, key: Key) -> float:
        """The chance, 0 to 1, that one of the next steps uses ``key``."""


class Predictive(Ranked):
    """Evicts the expert of least worth: the expected value of ``discount ** (steps to its next use)``.

    With d = the part of a step until the expert's layer runs (again), p its chance then and q its chance in every later
    step, worth = D**d * (p + (1 - p) * D * q / (1 - (1 - q) * D)). q is ``demand``'s rate (default: UseRates); p is
    the step's prediction where there is one and the layer is still to come, otherwise q.
    """

    def __init__(self, progress: Progress, demand: Demand | None = None, discount: float = DISCOUNT) -> None:
        super().__init__()
        if not 0 < discount < 1:
            raise ExpertFlowError(f"discount {discount} a step: give one between 0 and 1")
        self._progress, self._discount = progress, discount
        self._demand = demand or UseRates(progress)

    def rank(self, key: Key) -> float:
        now, discount, (layer, expert) = self._progress, self._discount, key
        later = self._demand.rate(key)
        to_come = now.to_come(layer)
        first = now.scores[layer][expert] if to_come and now.scores is not None else later
        wait = (layer - now.layer) / len(now.experts) + (0 if to_come else 1)
        rest = discount * later / (1 - (1 - later) * discount)
        return discount**wait * (first + (1 - first) * rest)
