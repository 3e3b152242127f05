"""Which resident expert of a layer makes room, by name: policies that a device decides by without its host.

"lru" goes by the step of the last use alone. The others give every expert a worth, a float32 of zero or above, and
evict the least: "static" was told it, "lfu" and "predictive" count. Counts decay without a pass over all experts: kept
are an expert's rate as of its last use and the step of that use; its worth is the rate times ``decay[steps since]``.
Products and sums are rounded to float32 one by one, so host and device agree to the last bit.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.policy import Scores

FORGOTTEN = 16
"""Half-lives after which uses count no more."""

RECENT = 1.0
"""Worth that a use in this step or the last one adds while a guess chooses victims: who is wanted is not known yet."""


def single(value: float) -> float:
    """``value`` as float32."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


@dataclass(frozen=True)
class LayerPolicy:
    """``half_life``: steps in which a count halves, None for worth that never changes. ``gain``: how much less than its
    victim a missing expert may be worth; where it is worth less than that it gets no slot and is read from the host.
    ``ranked``: by worth; else by last use."""

    name: str
    ranked: bool = True
    half_life: float | None = None
    gain: float = inf

    @property
    def needs_shares(self) -> bool:
        return self.ranked and self.half_life is None

    @property
    def refuses(self) -> bool:
        """Whether a missing expert may get no slot although there is one that could be taken."""
        return self.gain < inf

    @property
    def use(self) -> float:
        """What a use adds to a rate: so much that a rate is the share of recent steps that used the expert."""
        return 0.0 if self.half_life is None else single(1 - 0.5 ** (1 / self.half_life))

    @property
    def decay(self) -> list[float]:
        """What is left of a rate after 0, 1, 2 ... steps; the last entry, 0, is of all later ones too."""
        if self.half_life is None:
            return [1.0]
        ages = range(int(FORGOTTEN * self.half_life))
        return [single(0.5 ** (age / self.half_life)) for age in ages] + [0.0]


LAYER_POLICIES = {
    policy.name: policy
    for policy in (
        LayerPolicy("lru", ranked=False),
        LayerPolicy("lfu", half_life=64.0),
        LayerPolicy("static", gain=0.0),
        LayerPolicy("predictive", half_life=128.0, gain=single(0.1)),
    )
}

BEST_LAYER_POLICY = "lfu"
"""Hits most at real sizes, and no less than "lru" on any trace (eval/results/device-policies.json)."""


def layer_policy(name: str) -> LayerPolicy:
    """The policy ``name``. Raises ExpertFlowError for one that is not known."""
    if name not in LAYER_POLICIES:
        raise ExpertFlowError(f"policy {name!r} is not known: use one of {', '.join(LAYER_POLICIES)}")
    return LAYER_POLICIES[name]


def refuse_without_usage(policy: LayerPolicy, usage: object | None) -> None:
    """Raises ExpertFlowError where ``policy`` needs a recorded run and ``usage`` is none."""
    if policy.needs_shares and usage is None:
        raise ExpertFlowError(
            f"policy {policy.name!r} needs a recorded run to learn from: give a trace of this model as usage "
            "(`python -m calibration trace`), or use another one"
        )


def first_worth(policy: LayerPolicy, experts: Sequence[int], shares: Scores | None) -> list[list[float]]:
    """Every expert's rate before the first step, float32 ``[layers][experts]``: the ``shares`` of a recorded run's
    steps that used it (``popularity``), or 0 where there are none or worth is nothing to the policy. Raises
    ExpertFlowError for a policy that needs shares and gets none, for shares of another model, and for one that is not
    from 0 to 1."""
    refuse_without_usage(policy, shares)
    if shares is None or not policy.ranked:
        return [[0.0] * count for count in experts]
    if [len(row) for row in shares] != list(experts):
        raise ExpertFlowError(
            f"shares of {[len(row) for row in shares]} experts by layer, the model has {list(experts)}: give the "
            "popularity of this model"
        )
    if not all(0 <= share <= 1 for row in shares for share in row):
        raise ExpertFlowError("a share of steps is below 0, above 1 or no number: give the popularity of this model")
    return [[single(share) for share in row] for row in shares]
