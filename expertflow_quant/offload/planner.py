"""One format for every expert and the slots of every layer, decided together.

A narrower format does damage, but its record is cheaper to miss and more of them fit. Decided is, under limits of
bytes and damage,

    least   sum_le damage[l, e, f_le]  +  damage_per_second * sum_le misses_le(s_l) * bytes[l, f_le] / link

where f_le is the format of expert e of layer l, and s_l the slots of layer l as if all its experts shared them. Misses
and the share of steps in which an expert is resident are measured by replaying a trace (miss_curves.py). Slots fit one
record size only, so a layer has a pool for each of its formats, of at least as many slots as experts of that format
are resident on average: sum_l sum_f pool[l, f] * bytes[l, f] <= device bytes. With the formats decided, the pools'
slots are decided once more by the pools' own measured misses.

This is an integer program; how it is kept small and what its gap means: planner_bound.py.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertflow_quant.checkpoint.plan import Plan
from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.spec import Format
from expertflow_quant.offload.budget import format_bytes
from expertflow_quant.offload.layer_slots import Pools
from expertflow_quant.offload.miss_curves import MissCurves, measure_curves, replay_pools
from expertflow_quant.offload.planner_bound import kept_choices
from expertflow_quant.offload.planner_choices import Allowance, Choices, candidate_slots
from expertflow_quant.offload.planner_program import solve_formats, solve_slots
from expertflow_quant.offload.trace import Step

MOST_CHOICES = 12_000
"""(expert, format, slots) triples that the integer program weighs at most."""


@dataclass(frozen=True)
class ExpertCosts:
    """``damage`` float64 [L, E, F] of every expert in each of ``formats``; ``nbytes`` int64 [L, F], a record's. Raises
    ExpertFlowError unless they fit each other and are finite."""

    formats: tuple[Format, ...]
    damage: Tensor
    nbytes: Tensor

    def __post_init__(self) -> None:
        layers, _, formats = self.damage.shape
        if formats != len(self.formats) or self.nbytes.shape != (layers, formats) or not formats:
            raise ExpertFlowError(
                f"damage {tuple(self.damage.shape)} and record bytes {tuple(self.nbytes.shape)} must belong to the "
                f"same layers and to {len(self.formats)} formats, at least one"
            )
        if not bool(self.damage.isfinite().all()) or int(self.nbytes.min()) <= 0:
            raise ExpertFlowError("damages must be finite and record bytes above zero: measure the damages again")


@dataclass(frozen=True)
class PlanGoal:
    """Limits and weights. ``device_bytes`` bound the slots, ``most_damage`` the summed damage, ``record_bytes`` all
    experts' records together; None: no limit. ``damage_per_second``: the damage that a second of link time in a step is
    worth; ``link_bytes_per_second``: how fast misses arrive."""

    device_bytes: int
    most_damage: float | None = None
    record_bytes: int | None = None
    damage_per_second: float = 1.0
    link_bytes_per_second: float = 25e9

    def __post_init__(self) -> None:
        worth = self.damage_per_second
        if self.device_bytes <= 0 or self.link_bytes_per_second <= 0 or not 0 <= worth < math.inf:
            raise ExpertFlowError(
                f"device bytes {self.device_bytes} and link bytes {self.link_bytes_per_second:g} a second must be "
                f"above zero, and a second's worth {worth:g} not below and finite"
            )

    @property
    def damage_per_byte(self) -> float:
        return self.damage_per_second / self.link_bytes_per_second


@dataclass(frozen=True)
class PlanDecision:
    """``chosen`` int64 [L, E] indices into ``formats``; ``pools`` of every layer; what the model of the trace says of
    them: ``damage``, ``missed_bytes`` and ``misses`` in a step; and how surely it is the best: the program's objective
    ``value`` lies at most ``gap`` (a share of it) above the best possible, found in ``seconds``."""

    formats: tuple[Format, ...]
    chosen: Tensor
    pools: tuple[Pools, ...]
    damage: float
    misses: float
    missed_bytes: float
    value: float
    gap: float
    seconds: float

    @property
    def device_bytes(self) -> int:
        return sum(nbytes * slots for layer in self.pools for nbytes, slots in layer)

    def to_plan(self) -> Plan:
        """The formats as a plan; the most frequent is its default."""
        counts = self.chosen.flatten().bincount(minlength=len(self.formats))
        default = int(counts.argmax())
        layers: dict[int, dict[int, Format]] = {}
        for layer, experts in enumerate(self.chosen.tolist()):
            for expert, index in enumerate(experts):
                if index != default:
                    layers.setdefault(layer, {})[expert] = self.formats[index]
        return Plan(self.formats[default], layers)


def decide(
    costs: ExpertCosts, steps: Iterable[Step], goal: PlanGoal, *, gap: float = 5e-3, time_limit: float = 20.0
) -> PlanDecision:
    """The best plan for requests like ``steps``. The search ends at ``gap`` or after about ``time_limit`` seconds.
    Raises ExpertFlowError when no plan keeps the limits, or the steps and the costs have other layers."""
    started = time.perf_counter()
    replayed = list(steps)
    layers, experts, _ = costs.damage.shape
    curves = measure_curves(replayed, experts)
    _check_layers(curves, layers)
    choices = _choices(costs, curves, goal)
    allowance = Allowance(goal.device_bytes, goal.most_damage, goal.record_bytes)
    for most in (MOST_CHOICES, 4 * MOST_CHOICES):
        kept = kept_choices(choices, allowance, most)
        solution = solve_formats(choices, allowance, kept, gap=gap, time_limit=time_limit)
        if solution is not None or bool(kept.mask.all()):
            break
    if solution is None:
        raise ExpertFlowError(_impossible(costs, goal, time_limit))
    pools = allot_slots(costs, solution.chosen, replayed, goal.device_bytes)
    damage = float(costs.damage.gather(2, solution.chosen[..., None]).sum())
    misses, missed_bytes = replay_plan(costs, solution.chosen, pools, replayed)
    return PlanDecision(
        costs.formats,
        solution.chosen,
        pools,
        damage,
        misses,
        missed_bytes,
        solution.value,
        solution.gap,
        time.perf_counter() - started,
    )


def allot_slots(costs: ExpertCosts, chosen: Tensor, steps: Iterable[Step], device_bytes: int) -> tuple[Pools, ...]:
    """With formats ``chosen`` int64 [L, E], the pools within ``device_bytes`` that miss the fewest bytes of ``steps``.
    Every pool is replayed by itself, so nothing is estimated."""
    sizes = _sizes(costs, chosen)
    curves = measure_curves(steps, chosen.shape[1], sizes)
    members = [
        (layer, nbytes, (sizes[layer] == nbytes).nonzero().flatten().tolist())
        for layer in range(len(sizes))
        for nbytes in sorted(set(sizes[layer].tolist()))
    ]
    missed = [(curves.of_pool(layer, experts) * nbytes).tolist() for layer, nbytes, experts in members]
    slots = solve_slots([nbytes for _, nbytes, _ in members], missed, device_bytes)
    return tuple(
        tuple((nbytes, slots[i]) for i, (at, nbytes, _) in enumerate(members) if at == layer)
        for layer in range(len(sizes))
    )


def replay_plan(
    costs: ExpertCosts, chosen: Tensor, pools: Sequence[Pools], steps: Iterable[Step]
) -> tuple[float, float]:
    """(misses, missed bytes) in a step when ``steps`` run with formats ``chosen`` int64 [L, E] and these pools."""
    sizes = _sizes(costs, chosen)
    slots = torch.zeros_like(sizes)
    for layer, of_layer in enumerate(pools):
        for nbytes, count in of_layer:
            slots[layer][sizes[layer] == nbytes] = count
    missed = replay_pools(steps, sizes, slots).double()
    return float(missed.sum()), float((missed * sizes).sum())


def record_bytes(costs: ExpertCosts, chosen: Tensor) -> int:
    """Bytes of all records in formats ``chosen`` int64 [L, E]."""
    return int(_sizes(costs, chosen).sum())


def _sizes(costs: ExpertCosts, chosen: Tensor) -> Tensor:
    """int64 [L, E]: bytes of every expert's record."""
    return costs.nbytes.gather(1, chosen)


def _choices(costs: ExpertCosts, curves: MissCurves, goal: PlanGoal) -> Choices:
    slots = candidate_slots(costs.damage.shape[1])
    at = torch.tensor(slots)
    return Choices(
        slots=slots,
        damage=costs.damage.double(),
        nbytes=costs.nbytes.double(),
        resident=curves.resident[:, :, at].double(),
        misses=curves.misses[:, :, at].double(),
        damage_per_byte=goal.damage_per_byte,
    )


def _check_layers(curves: MissCurves, layers: int) -> None:
    if len(curves.misses) != layers:
        raise ExpertFlowError(
            f"the trace has {len(curves.misses)} layers, the damages have {layers}: give both of the same model"
        )


def _impossible(costs: ExpertCosts, goal: PlanGoal, time_limit: float) -> str:
    least = float(costs.damage.min(2).values.sum())
    experts = costs.damage.shape[1]
    smallest = int(costs.nbytes.min(1).values.sum()) * experts
    limits = [f"damage at most {goal.most_damage:g} (least possible {least:g})"] if goal.most_damage is not None else []
    if goal.record_bytes is not None:
        limits.append(f"records of at most {format_bytes(goal.record_bytes)} (smallest {format_bytes(smallest)})")
    return (
        f"no plan was found within {time_limit:g} s that keeps {' and '.join(limits) or 'its limits'}: "
        "allow more damage, more bytes or more time, or measure more formats"
    )
