"""Miss curves against caches that are played out, the planner's programs against all plans of tiny models."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow_quant.formats import ExpertFlowError, Format
from expertflow_quant.offload.miss_curves import measure_curves, replay_pools
from expertflow_quant.offload.planner import (
    ExpertCosts,
    PlanGoal,
    allot_slots,
    decide,
    record_bytes,
    replay_plan,
)
from expertflow_quant.offload.planner_bound import kept_choices
from expertflow_quant.offload.planner_choices import Allowance, Choices, candidate_slots
from expertflow_quant.offload.planner_program import solve_formats, solve_slots

INT2, INT3, INT4 = (Format.parse(name) for name in ("int2-g32", "int3-g32", "int4-g32"))

walks = st.lists(
    st.lists(st.sets(st.integers(0, 4), max_size=4).map(sorted), min_size=2, max_size=2), min_size=1, max_size=25
)


def played(steps, layer, members, slots):
    """Misses and residencies of each member, a list of the most recently used being kept step by step."""
    recent = sorted(members)
    misses, resting = dict.fromkeys(members, 0), dict.fromkeys(members, 0)
    for step in steps:
        resident = recent[:slots]
        for expert in resident:
            resting[expert] += 1
        asked = [expert for expert in step[layer] if expert in members]
        for expert in asked:
            misses[expert] += expert not in resident
            recent.remove(expert)
            recent.insert(0, expert)
    return misses, resting


@settings(deadline=None, max_examples=60)
@given(walks)
def test_curves_are_those_of_caches_that_are_played_out(steps):
    curves = measure_curves(steps, 5)
    for layer, slots in itertools.product(range(2), range(6)):
        misses, resting = played(steps, layer, set(range(5)), slots)
        for expert in range(5):
            assert round(float(curves.misses[layer, expert, slots]) * len(steps), 3) == misses[expert]
            assert round(float(curves.resident[layer, expert, slots]) * len(steps), 3) == resting[expert]


@settings(deadline=None, max_examples=60)
@given(walks, st.lists(st.integers(0, 2), min_size=10, max_size=10), st.integers(0, 3))
def test_pools_are_caches_of_their_own(steps, names, slots):
    pools = torch.tensor(names).view(2, 5)
    missed = replay_pools(steps, pools, torch.full((2, 5), slots))
    curves = measure_curves(steps, 5, pools)
    for layer in range(2):
        for name in set(pools[layer].tolist()):
            members = set((pools[layer] == name).nonzero().flatten().tolist())
            misses, _ = played(steps, layer, members, slots)
            for expert in members:
                assert round(float(missed[layer, expert]) * len(steps), 3) == misses[expert]
            at = min(slots, len(members))
            assert float(curves.of_pool(layer, members)[at]) * len(steps) == pytest.approx(sum(misses.values()))


def test_steps_that_cannot_be_replayed_are_refused():
    with pytest.raises(ExpertFlowError, match="0 steps"):
        measure_curves([], 4)
    with pytest.raises(ExpertFlowError, match="wants expert 7, a layer has 4"):
        measure_curves([[[7]]], 4)


def drawn_choices(seed, layers=2, experts=3, formats=2, slots=None):
    draw = torch.Generator().manual_seed(seed)
    slots = tuple(range(experts + 1)) if slots is None else slots
    use = torch.rand(layers, experts, generator=draw).double()
    share = torch.tensor([s / experts for s in slots]).double()
    noise = torch.rand(layers, experts, 1, generator=draw).double()
    resident = share.expand(layers, experts, -1) ** (0.5 + noise)
    falling = torch.rand(layers, experts, formats, generator=draw).double().sort(2, descending=True).values
    nbytes = torch.arange(2, 2 + formats).double() * 100 + torch.randint(0, 50, (layers, formats), generator=draw)
    return Choices(slots, falling * use[..., None], nbytes, resident, use[..., None] * (1 - resident), 0.002)


def every_plan(choices, allowance):
    """Values of all plans that keep the limits, by trying everything."""
    layers, experts, formats, candidates = choices.value.shape
    for flat in itertools.product(range(formats), repeat=layers * experts):
        chosen = [flat[layer * experts : (layer + 1) * experts] for layer in range(layers)]
        damage = sum(float(choices.damage[la, e, f]) for la, row in enumerate(chosen) for e, f in enumerate(row))
        records = sum(float(choices.nbytes[la, f]) for la, row in enumerate(chosen) for f in row)
        if allowance.most_damage is not None and damage > allowance.most_damage:
            continue
        if allowance.record_bytes is not None and records > allowance.record_bytes:
            continue
        for slots in itertools.product(range(candidates), repeat=layers):
            device, value = 0.0, 0.0
            for la, row in enumerate(chosen):
                held = [0.0] * formats
                for e, f in enumerate(row):
                    held[f] += float(choices.resident[la, e, slots[la]])
                    value += float(choices.damage[la, e, f]) + choices.damage_per_byte * float(
                        choices.misses[la, e, slots[la]] * choices.nbytes[la, f]
                    )
                device += sum(math.ceil(h - 1e-9) * float(choices.nbytes[la, f]) for f, h in enumerate(held))
            if device <= allowance.device_bytes:
                yield value


@pytest.mark.parametrize("seed", range(6))
def test_the_program_finds_the_best_of_all_plans(seed):
    choices = drawn_choices(seed)
    most = float(choices.damage.min(2).values.sum()) * 1.3 if seed % 2 else None
    records = int(choices.nbytes.mean() * 6) if seed % 3 == 1 else None
    allowance = Allowance(500 + 100 * seed, most, records)
    kept = kept_choices(choices, allowance, 10_000)
    found = solve_formats(choices, allowance, kept, gap=0.0, time_limit=30.0)
    values = list(every_plan(choices, allowance))
    if not values:
        assert found is None
        return
    assert found.value == pytest.approx(min(values))
    assert found.gap <= 1e-6
    assert kept.bound <= min(values) + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_weighing_few_choices_stays_within_the_gap_that_is_claimed(seed):
    choices = drawn_choices(seed, layers=4, experts=8, formats=3, slots=(0, 2, 4, 6, 8))
    allowance = Allowance(2500, None, int(choices.nbytes.mean() * 32))
    whole = solve_formats(choices, allowance, kept_choices(choices, allowance, 10_000), gap=1e-6, time_limit=30.0)
    kept = kept_choices(choices, allowance, 140)
    assert kept.mask.sum() < 160
    few = solve_formats(choices, allowance, kept, gap=1e-6, time_limit=30.0)
    assert kept.bound <= whole.value * (1 + 1e-6)
    assert whole.value * (1 - 1e-5) <= few.value
    assert few.value * (1 - few.gap) <= whole.value * (1 + 1e-6)
    assert few.value <= 1.1 * whole.value


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.lists(st.floats(0, 9), min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(1, 40), min_size=4, max_size=4),
    st.integers(1, 150),
)
def test_slots_miss_the_fewest_bytes(rows, sizes, budget):
    missed = [sorted(row, reverse=True) for row in rows]
    nbytes = sizes[: len(rows)]
    slots = solve_slots(nbytes, missed, budget)
    assert sum(n * size for n, size in zip(slots, nbytes, strict=True)) <= budget
    ways = itertools.product(*(range(len(row)) for row in missed))
    allowed = [way for way in ways if sum(n * size for n, size in zip(way, nbytes, strict=True)) <= budget]
    best = min(sum(row[n] for row, n in zip(missed, way, strict=True)) for way in allowed)
    assert sum(row[n] for row, n in zip(missed, slots, strict=True)) == pytest.approx(best, rel=1e-3, abs=1e-6)


def walk(seed, steps=120, layers=3, experts=8):
    """Experts of falling popularity, two at a time."""
    draw = torch.Generator().manual_seed(seed)
    popularity = 1.0 / torch.arange(1, experts + 1).float()
    wanted = torch.multinomial(popularity.expand(steps * layers, -1), 2, generator=draw).view(steps, layers, 2)
    return [[sorted(of_layer) for of_layer in step] for step in wanted.tolist()]


def costs_of(steps, layers=3, experts=8):
    used = measure_curves(steps, experts).used.double()
    damage = used[..., None] * torch.tensor([0.09, 0.02, 0.004]).double()
    return ExpertCosts((INT2, INT3, INT4), damage, torch.tensor([[120, 170, 220]] * layers))


def test_a_decision_keeps_its_limits_and_beats_uniform_formats():
    steps = walk(0)
    costs = costs_of(steps)
    uniform = torch.ones(3, 8, dtype=torch.int64)
    damage, records = float(costs.damage[..., 1].sum()), record_bytes(costs, uniform)
    goal = PlanGoal(1500, damage, records, damage_per_second=1.0, link_bytes_per_second=1e5)
    found = decide(costs, steps, goal)
    assert found.damage <= damage + 1e-9
    assert record_bytes(costs, found.chosen) <= records
    assert found.device_bytes <= 1500
    assert (found.misses, found.missed_bytes) == replay_plan(costs, found.chosen, found.pools, steps)
    even = replay_plan(costs, uniform, allot_slots(costs, uniform, steps, 1500), steps)[1]
    assert found.damage + goal.damage_per_byte * found.missed_bytes < damage + goal.damage_per_byte * even
    plan = found.to_plan()
    for layer, expert in itertools.product(range(3), range(8)):
        assert plan.format(layer, expert) == costs.formats[int(found.chosen[layer, expert])]
    for layer, pools in enumerate(found.pools):
        assert {nbytes for nbytes, _ in pools} == set(costs.nbytes[layer, found.chosen[layer]].tolist())


def test_link_time_that_is_dear_narrows_formats():
    steps = walk(1)
    costs = costs_of(steps)
    goals = [PlanGoal(1000, damage_per_second=worth, link_bytes_per_second=1e5) for worth in (0, 1e3)]
    cheap, dear = (decide(costs, steps, goal) for goal in goals)
    assert set(cheap.chosen.flatten().tolist()) == {2}
    assert dear.missed_bytes < cheap.missed_bytes
    assert dear.damage > cheap.damage


def test_what_cannot_be_planned_is_refused():
    steps = walk(2)
    costs = costs_of(steps)
    with pytest.raises(ExpertFlowError, match=r"damage at most 0\.001 \(least possible .*allow more damage"):
        decide(costs, steps, PlanGoal(1000, most_damage=0.001))
    with pytest.raises(ExpertFlowError, match="the trace has 2 layers, the damages have 3"):
        decide(costs, [step[:2] for step in steps], PlanGoal(1000))
    with pytest.raises(ExpertFlowError, match="must be above zero"):
        PlanGoal(0)
    for worth in (-1.0, math.inf, math.nan):
        with pytest.raises(ExpertFlowError, match=f"worth {worth:g} not below and finite"):
            PlanGoal(1000, damage_per_second=worth)
    with pytest.raises(ExpertFlowError, match="same layers"):
        ExpertCosts((INT2,), costs.damage, costs.nbytes)


def test_candidates_reach_from_none_to_all():
    assert candidate_slots(4) == (0, 1, 2, 3, 4)
    assert candidate_slots(128) == tuple(range(0, 129, 8))
