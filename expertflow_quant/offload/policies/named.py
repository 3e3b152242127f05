"""Policies and guesses by name, as ``load`` and ``serve`` take them, with what each needs besides the run itself.

What measured best (eval/results/cache.json, one pool for all layers, as on the plain path): "predictive" hits most of
the policies that need no recorded run, at every budget; a recorded run adds up to 5 points. "lru" is the worst.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.policies.affinity import FORGET, Affinity, fit_affinity
from expertflow_quant.offload.policies.frequency import LFU, Popular, UseRates, popularity
from expertflow_quant.offload.policies.predictive import Demand, Predictive
from expertflow_quant.offload.policies.scan import ScanResistant
from expertflow_quant.offload.policy import LRU, Policy, Progress
from expertflow_quant.offload.trace import RoutingTrace, Step, requests

POLICIES = {
    "lru": "least recently used",
    "scan": "least recently used, but prompts refresh nothing",
    "lfu": "least frequently used, forgetting slowly",
    "static": "most used in a recorded run; needs --usage",
    "predictive": "worth of the next use, by recent use or a recorded run",
}
BEST_POLICY = "predictive"
GUESSES = {
    "frequency": "how often recent steps used each expert",
    "previous": "what the last tokens used",
    "affinity": "what followed in a recorded run; needs --usage",
}
MOST_RELATED = 1024
"""Experts of all layers up to which an affinity table is fitted: it has the square of that many weights."""
_PREVIOUS = 1.0


class Usage:
    """What a recorded run tells policies and guesses; fitted when first needed."""

    def __init__(self, steps: Sequence[Step], experts: Sequence[int]) -> None:
        self._steps, self._experts = steps, tuple(experts)
        self.shares = popularity(steps, experts)

    @classmethod
    def load(cls, path: Path | str, experts: Sequence[int]) -> "Usage":
        """From a trace file. Raises ExpertFlowError unless it is of a model with these ``experts`` in each layer, and
        of enough steps to learn from."""
        steps = list(requests(RoutingTrace.load_of(path, experts), "all"))
        if len(steps) < 2:
            raise ExpertFlowError(f"{path} has {len(steps)} steps, too few to learn use from: record more items")
        return cls(steps, experts)

    def demand(self, progress: Progress, forget: float) -> Demand:
        """What later steps are expected to use, the next one alone with ``forget`` 0."""
        if sum(self._experts) > MOST_RELATED:
            return UseRates(progress, prior=self.shares)
        return Affinity(progress, fit_affinity(self._steps, self._experts, forget))


def policy_maker(name: str, progress: Progress, usage: Usage | None = None) -> Callable[[], Policy]:
    """What makes the policy ``name`` for each pool of slots. Raises ExpertFlowError for an unknown name, and for one
    that needs a ``usage``."""
    if name == "static" and usage is None:
        raise _needs_usage("policy", name)
    if name == "predictive":
        demand = UseRates(progress) if usage is None else usage.demand(progress, FORGET)
        return lambda: Predictive(progress, demand)
    makers: dict[str, Callable[[], Policy]] = {
        "lru": LRU,
        "scan": lambda: ScanResistant(progress),
        "lfu": lambda: LFU(progress),
        "static": lambda: Popular(usage.shares if usage is not None else []),
    }
    return makers[known("policy", name, POLICIES)]


def guess_demand(name: str, progress: Progress, usage: Usage | None = None) -> Demand:
    """The chances of a step's experts by one of GUESSES. Raises ExpertFlowError like ``policy_maker``."""
    if known("predictor", name, GUESSES) == "affinity":
        if usage is None:
            raise _needs_usage("predictor", name)
        return usage.demand(progress, 0.0)
    prior = None if usage is None else usage.shares
    return UseRates(progress, prior=prior) if name == "frequency" else UseRates(progress, _PREVIOUS)


def known(what: str, name: str, names: Sequence[str] | dict[str, str]) -> str:
    """``name``, if it is one of ``names``; ExpertFlowError otherwise."""
    if name not in names:
        raise ExpertFlowError(f"{what} {name!r} is not known: use one of {', '.join(names)}")
    return name


def _needs_usage(what: str, name: str) -> ExpertFlowError:
    return ExpertFlowError(
        f"{what} {name!r} needs a recorded run to learn from: give a trace of this model with --usage "
        "(`python -m calibration trace`), or use another one"
    )
