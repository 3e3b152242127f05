"""A format for every expert: the least damage that an average number of bits allows.

Measuring is slow and deciding is quick, so a file lies between them (``--errors``)::

    {"model": ..., "formats": [...], ..., "layers": [{"experts": [
        {"tokens": 812, "weights": 73728, "damage": {"int2-g32": 0.013, "int3-g32": 0.0029, ...}}, ...]},
        ...]}

``damage`` of an expert in a format is its share of the layer's output that rounding to that format destroys
(``calibration.measure``): a rarely chosen expert does little damage, and damages of all layers can be added.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from expertflow_quant.formats import ExpertFlowError, Format


@dataclass(frozen=True)
class ExpertErrors:
    """What one expert loses in each format; ``weights`` counts its weights, ``tokens`` the tokens routed to
    it."""

    layer: int
    expert: int
    weights: int
    tokens: int
    damage: Mapping[Format, float]

    def __post_init__(self) -> None:
        if not self.damage or self.weights <= 0:
            raise ExpertFlowError(
                f"expert {self.expert} of layer {self.layer} has {len(self.damage)} measured formats and "
                f"{self.weights} weights: both must be above zero; measure again"
            )

    @property
    def widths(self) -> list[Format]:
        """The measured formats, widest first."""
        return sorted(self.damage, key=lambda form: -form.bits)


@dataclass
class Choice:
    """A format for every expert: (layer, expert) -> format; with the damage and the average bits per
    weight."""

    formats: dict[tuple[int, int], Format] = field(default_factory=dict)
    damage: float = 0.0
    average_bits: float = 0.0

    def to_plan(self) -> dict[str, Any]:
        """The plan file that ``expertflow-quant quantize --plan`` reads: the most frequent format is the
        default."""
        used = sorted({form.name for form in self.formats.values()})
        default = max(used, key=lambda name: sum(form.name == name for form in self.formats.values()))
        layers: dict[str, dict[str, str]] = {}
        for (layer, expert), form in sorted(self.formats.items()):
            if form.name != default:
                layers.setdefault(str(layer), {})[str(expert)] = form.name
        return {"default": default, "layers": layers}


def choose(experts: Sequence[ExpertErrors], average_bits: float) -> Choice:
    """Begin with every expert at its widest and narrow, one at a time, where a saved bit costs the least
    damage.

    Bits are those of the codes, averaged over all weights. Greedy: optimal where every expert's damage is
    convex in its bits, which rounding nearly always is. Raises ExpertFlowError when even the narrowest
    formats are too wide.
    """
    total = sum(expert.weights for expert in experts)
    narrowest = sum(expert.weights * expert.widths[-1].bits for expert in experts) / max(total, 1)
    if not experts or average_bits < narrowest:
        raise ExpertFlowError(
            f"an average of {average_bits:g} bits cannot be reached: the narrowest measured formats of "
            f"{len(experts)} experts average {narrowest:g}; measure a narrower format or allow more bits"
        )
    at = {(expert.layer, expert.expert): 0 for expert in experts}
    bits = float(sum(expert.weights * expert.widths[0].bits for expert in experts))
    steps = [step for expert in experts if (step := _cheapest_step(expert, 0))]
    heapq.heapify(steps)
    by_key = {(expert.layer, expert.expert): expert for expert in experts}
    while bits > average_bits * total:
        _, key, target = heapq.heappop(steps)
        expert = by_key[key]
        bits -= expert.weights * (expert.widths[at[key]].bits - expert.widths[target].bits)
        at[key] = target
        if step := _cheapest_step(expert, target):
            heapq.heappush(steps, step)
    formats = {key: by_key[key].widths[at[key]] for key in sorted(at)}
    damage = sum(by_key[key].damage[form] for key, form in formats.items())
    return Choice(formats, damage, bits / total)


def _cheapest_step(expert: ExpertErrors, at: int) -> tuple[float, tuple[int, int], int] | None:
    """(damage per bit saved, expert, index of the narrower format) of the best next step; None at the
    narrowest."""
    here = expert.widths[at]
    steps = [
        (
            (expert.damage[form] - expert.damage[here]) / ((here.bits - form.bits) * expert.weights),
            (expert.layer, expert.expert),
            index,
        )
        for index, form in enumerate(expert.widths)
        if index > at
    ]
    return min(steps, default=None)


def errors_to_json(head: Mapping[str, Any], experts: Sequence[ExpertErrors]) -> dict[str, Any]:
    """The errors file: ``head`` says how it was made."""
    layers: dict[int, list[dict[str, Any]]] = {}
    for expert in sorted(experts, key=lambda e: (e.layer, e.expert)):
        damage = {form.name: float(f"{value:.6g}") for form, value in sorted(expert.damage.items(), key=str)}
        layers.setdefault(expert.layer, []).append(
            {"tokens": expert.tokens, "weights": expert.weights, "damage": damage}
        )
    return {**head, "layers": [{"experts": layers[layer]} for layer in sorted(layers)]}


def errors_from_json(value: Mapping[str, Any]) -> list[ExpertErrors]:
    """Read an errors file back. Raises ExpertFlowError when it is not one."""
    try:
        return [
            ExpertErrors(
                layer,
                expert,
                int(entry["weights"]),
                int(entry["tokens"]),
                {Format.parse(name): float(damage) for name, damage in entry["damage"].items()},
            )
            for layer, row in enumerate(value["layers"])
            for expert, entry in enumerate(row["experts"])
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ExpertFlowError(
            f"this is no file of measured errors ({type(error).__name__}: {error}): delete it, measure again"
        ) from error
