"""Formats and slots decided together from measured damages and recorded traces, beside plans that see less.

Everything is held against one reference: every expert in the same format, slots in equal shares. The joint plan may
take no more bytes of records than the reference, in all and on the device, and do no more than a given share of its
damage; within that, the reference's damage and its link time weigh as the user says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from calibration.plan import Choice, ExpertErrors, choose
from expertflow_quant.formats import ExpertFlowError, ExpertShape, Format, RecordLayout
from expertflow_quant.offload.layer_slots import Pools, plan_layer_slots
from expertflow_quant.offload.planner import (
    ExpertCosts,
    PlanDecision,
    PlanGoal,
    allot_slots,
    decide,
    record_bytes,
    replay_plan,
)
from expertflow_quant.offload.slots import LayerRecords
from expertflow_quant.offload.trace import Step


@dataclass(frozen=True)
class Weighing:
    """``uniform``: the reference's format. ``device_bytes`` for slots. ``link_weight``: what the reference's link time
    is worth, in units of the reference's damage; ``damage_share`` of the reference's damage is allowed;
    ``link_bytes_per_second``."""

    uniform: Format
    device_bytes: int
    link_weight: float = 1.0
    damage_share: float = 1.0
    link_bytes_per_second: float = 25e9
    time_limit: float = 20.0


@dataclass(frozen=True)
class PlanFigures:
    """A plan as it is compared: damage, bytes of all records and of the slots, misses and missed bytes in a step."""

    name: str
    damage: float
    record_bytes: int
    device_bytes: int
    misses: float
    missed_bytes: float


def expert_costs(
    errors: Sequence[ExpertErrors], shapes: Sequence[ExpertShape], formats: Sequence[Format], input_scale: bool = False
) -> ExpertCosts:
    """The measured damages as the planner takes them, with the bytes of each format's record; ``input_scale``: as AWQ
    writes it. Raises ExpertFlowError when layers have different numbers of experts."""
    by_layer: list[list[ExpertErrors]] = [[] for _ in shapes]
    for expert in sorted(errors, key=lambda found: (found.layer, found.expert)):
        by_layer[expert.layer].append(expert)
    if len({len(layer) for layer in by_layer}) != 1:
        counts = [len(layer) for layer in by_layer]
        raise ExpertFlowError(f"layers of {counts} experts: a joint plan needs the same number in each; plan by bits")
    damage = [[[expert.damage[form] for form in formats] for expert in layer] for layer in by_layer]
    nbytes = [
        [RecordLayout(shape, form, input_scale and form.has_codes).nbytes for form in formats] for shape in shapes
    ]
    return ExpertCosts(tuple(formats), torch.tensor(damage, dtype=torch.float64), torch.tensor(nbytes))


def reference_bytes(costs: ExpertCosts, form: Format) -> int:
    """Bytes of all records in one format."""
    return record_bytes(costs, _alike(costs, form))


def decide_jointly(costs: ExpertCosts, steps: Sequence[Step], top_k: int, weighing: Weighing) -> PlanDecision:
    """The joint plan for requests like ``steps``."""
    alike = _alike(costs, weighing.uniform)
    reference = _even("", costs, alike, steps, top_k, weighing.device_bytes)
    seconds = reference.missed_bytes / weighing.link_bytes_per_second
    goal = PlanGoal(
        weighing.device_bytes,
        most_damage=weighing.damage_share * reference.damage,
        record_bytes=reference.record_bytes,
        damage_per_second=weighing.link_weight * reference.damage / seconds if seconds else 0.0,
        link_bytes_per_second=weighing.link_bytes_per_second,
    )
    return decide(costs, steps, goal, time_limit=weighing.time_limit)


def compare(
    errors: Sequence[ExpertErrors],
    costs: ExpertCosts,
    decision: PlanDecision,
    planned_on: Sequence[Step],
    judged_on: Sequence[Step],
    top_k: int,
    weighing: Weighing,
) -> list[PlanFigures]:
    """The joint plan beside others of no more record bytes and no more device bytes, all decided on ``planned_on`` and
    replayed on ``judged_on``: the same format for all; formats by damage alone; formats by use alone, where an expert's
    damage is taken to be its share of the requests times the mean of the format. Theirs are slots in equal shares;
    "uniform, slots planned" has the reference's formats and the planner's slots."""
    bits, device = float(weighing.uniform.bits), weighing.device_bytes
    alike = _alike(costs, weighing.uniform)
    by_damage = _indices(costs, choose(errors, bits))
    by_use = _indices(costs, choose(_by_use(errors, costs, planned_on), bits))
    found = [
        _even(f"uniform {weighing.uniform.name}", costs, alike, judged_on, top_k, device),
        _even("frequency only", costs, by_use, judged_on, top_k, device),
        _even("sensitivity only", costs, by_damage, judged_on, top_k, device),
    ]
    planned = allot_slots(costs, alike, planned_on, device)
    found.append(_figures("uniform, slots planned", costs, alike, planned, judged_on))
    planned = allot_slots(costs, by_damage, planned_on, device)
    found.append(_figures("sensitivity, slots planned", costs, by_damage, planned, judged_on))
    found.append(_figures("joint", costs, decision.chosen, decision.pools, judged_on))
    return found


def slots_json(decision: PlanDecision) -> list[dict[str, Any]]:
    """Of every layer its pools: record bytes and slots."""
    return [{"pools": [{"nbytes": size, "slots": slots} for size, slots in layer]} for layer in decision.pools]


def _alike(costs: ExpertCosts, form: Format) -> Tensor:
    if form not in costs.formats:
        names = ", ".join(str(known) for known in costs.formats)
        raise ExpertFlowError(f"the reference format {form} is not one of {names}: name one of them")
    return torch.full(costs.damage.shape[:2], costs.formats.index(form), dtype=torch.int64)


def _indices(costs: ExpertCosts, choice: Choice) -> Tensor:
    chosen = torch.zeros(costs.damage.shape[:2], dtype=torch.int64)
    for (layer, expert), form in choice.formats.items():
        chosen[layer, expert] = costs.formats.index(form)
    return chosen


def _by_use(errors: Sequence[ExpertErrors], costs: ExpertCosts, steps: Sequence[Step]) -> list[ExpertErrors]:
    uses: dict[tuple[int, int], int] = {}
    for step in steps:
        for layer, experts in enumerate(step):
            for expert in experts:
                uses[layer, expert] = uses.get((layer, expert), 0) + 1
    mean: Mapping[Format, float] = dict(zip(costs.formats, costs.damage.mean((0, 1)).tolist(), strict=True))
    return [
        replace(e, damage={form: uses.get((e.layer, e.expert), 0) * lost for form, lost in mean.items()})
        for e in errors
    ]


def _even(
    name: str, costs: ExpertCosts, chosen: Tensor, steps: Sequence[Step], top_k: int, device_bytes: int
) -> PlanFigures:
    """With the slots that the runtime gives without a plan."""
    sizes = costs.nbytes.gather(1, chosen).tolist()
    pools = plan_layer_slots([LayerRecords(tuple(layer), top_k) for layer in sizes], device_bytes)
    return _figures(name, costs, chosen, pools, steps)


def _figures(
    name: str, costs: ExpertCosts, chosen: Tensor, pools: Sequence[Pools], steps: Sequence[Step]
) -> PlanFigures:
    misses, missed_bytes = replay_plan(costs, chosen, pools, steps)
    damage = float(costs.damage.gather(2, chosen[..., None]).sum())
    held = sum(nbytes * slots for layer in pools for nbytes, slots in layer)
    return PlanFigures(name, damage, record_bytes(costs, chosen), held, misses, missed_bytes)
