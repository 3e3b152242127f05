"""The device's policies: worth is what it says, victims are those of a brute force, and what is refused is named."""

import pytest
import torch
from helpers.resident import routed, store_of
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.layer_policy import LAYER_POLICIES, layer_policy, single
from expertflow_quant.offload.layer_slots import plan_layer_slots
from expertflow_quant.offload.policies.by_layer import LayerRates, by_layer
from expertflow_quant.offload.policy import Progress
from expertflow_quant.offload.resident import ResidentExperts
from expertflow_quant.offload.resolve import Move, SlotBook
from expertflow_quant.offload.simulator import replay
from expertflow_quant.offload.slots import LayerRecords
from expertflow_quant.offload.synthetic_trace import RouteSizes, synthetic_trace
from expertflow_quant.offload.trace import requests

FREE = -1
STEPS = st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=4), min_size=1, max_size=40)


@given(st.floats(0, 2**100, width=32), st.floats(0, 2**100, width=32))
def test_single_rounds_as_tensors_do(a, b):
    left, right = torch.tensor(a), torch.tensor(b)
    assert single(a + b) == float(left + right)
    assert single(a * b) == float(left * right) or a * b > 3e38
    assert (left.view(torch.int32) < right.view(torch.int32)) == (a < b)  # why bits can be sorted


def test_float32_overflow_is_out_of_reach():
    """A rate is below 1 however often an expert is used, so worth and gain stay small."""
    for policy in LAYER_POLICIES.values():
        rate, left = 0.0, policy.decay[:2][-1]
        for _ in range(5000):
            rate = single(single(rate * left) + policy.use)
        assert rate <= 1.0001


@settings(deadline=None)
@given(STEPS, st.sampled_from(["lfu", "predictive"]))
def test_worth_is_the_decayed_share_of_steps(steps, name):
    policy = layer_policy(name)
    progress = Progress([8])
    rates = LayerRates(progress, policy)
    for wanted in steps:
        progress.begin_step()
        progress.begin_layer(0, wanted)
    keep = 0.5 ** (1 / policy.half_life)
    for expert in range(8):
        ages = [age for age, wanted in enumerate(reversed(steps)) if expert in wanted]
        assert rates.worth((0, expert)) == pytest.approx(sum((1 - keep) * keep**age for age in ages), rel=1e-4)


def test_what_was_used_sixteen_half_lives_ago_counts_no_more():
    progress = Progress([4])
    rates = LayerRates(progress, layer_policy("lfu"))
    for step in range(1026):
        progress.begin_step()
        progress.begin_layer(0, [0] if step == 0 else [1])
        assert (rates.worth((0, 0)) == 0) == (step >= 1024)


def book(slots, experts):
    return SlotBook([FREE] * slots, [FREE] * slots, [0] * slots, [0] * experts)


def test_least_worth_goes_first_then_the_oldest_and_misses_come_by_their_worth():
    slots = book(3, 8)
    worth = [0.5, 0.1, 0.1, 0.9, 0.2, 0.3, 0.0, 0.0]
    assert slots.resolve({0, 1}, 1, worth=worth).moves == [Move(0, 0, FREE), Move(1, 1, FREE)]
    assert slots.resolve({2}, 2, worth=worth).moves == [Move(2, 2, FREE)]
    assert slots.resolve({4, 5}, 3, worth=worth).moves == [Move(5, 1, 1), Move(4, 2, 2)]
    assert slots.resolve({6, 7}, 4, worth=worth).moves == [Move(6, 2, 4), Move(7, 1, 5)]


def test_what_is_worth_far_less_than_its_victim_gets_no_slot():
    slots = book(2, 4)
    worth = [0.5, 0.4, 0.35, 0.0]
    slots.resolve({0, 1}, 1, worth=worth, gain=0.1)
    assert slots.resolve({3}, 2, worth=worth, gain=0.1).moves == []
    assert slots.resolve({2, 3}, 3, worth=worth, gain=0.1).moves == [Move(2, 1, 1)]
    assert slots.resolve({3}, 4, keep_current=True, worth=worth, gain=0.1).moves == [Move(3, 0, 0)]


def test_a_guess_spares_what_this_step_or_the_last_one_used_however_little_it_is_worth():
    slots = book(3, 6)
    worth = [0.8, 0.1, 0.2, 0.0, 0.0, 0.0]
    slots.resolve({0}, 1, worth=worth)
    slots.resolve({1}, 4, worth=worth)
    slots.resolve({2}, 5, worth=worth)
    assert slots.resolve({3}, 5, keep_current=True, worth=worth).moves == [Move(3, 0, 0)]
    assert slots.resolve({4, 5}, 5, keep_current=True, worth=worth).moves == [Move(4, 1, 1)]


@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(1, 7))
def test_no_victim_was_used_more_by_a_count_of_all_that_happened(steps, slots):
    """The counts of ``lfu`` taken anew from the whole past, in doubles: a victim has the least of all that could go."""
    store = store_of([["bf16"] * 8])
    nbytes = store.layers[0].nbytes[0]
    resident = ResidentExperts(store, plan_layer_slots(store.layers, nbytes * slots), "cpu", "lfu")
    keep, past = 0.5 ** (1 / 64), []
    for wanted in steps:
        past.append(wanted)
        before = set(resident.resident_experts()[0])
        resident.begin_step()
        resident.resolve(0, routed(sorted(wanted)))
        after = set(resident.resident_experts()[0])
        counts = [sum(keep**age for age, used in enumerate(reversed(past)) if e in used) for e in range(8)]
        stayed, gone = (before & after) - wanted, before - after
        assert not gone & wanted
        assert all(counts[out] <= counts[other] * (1 + 1e-5) for out in gone for other in stayed)
        assert len(after) == min(slots, len(before | wanted))


def test_on_sticky_routes_of_an_uneven_model_counts_beat_the_last_use_and_refusing_alone_does_not():
    trace = synthetic_trace(RouteSizes(2, 64, 6), steps=200, rows=1, prompt=0, stickiness=0.55)
    steps, layers = list(requests(trace, "decode")), [LayerRecords((1,) * 64, 6)] * 2
    hits = {
        name: replay(steps, layers, 2 * 16, by_layer(name), slots="layers", preload=True).hit_rate
        for name in ("lru", "lfu", "predictive")
    }
    assert hits["lfu"] > hits["lru"] + 0.02
    assert hits["predictive"] > hits["lru"] + 0.02


def test_preload_takes_the_popular_and_static_keeps_them():
    store = store_of([["bf16"] * 6])
    nbytes = store.layers[0].nbytes[0]
    shares = [[0.1, 0.6, 0.2, 0.9, 0.0, 0.5]]
    resident = ResidentExperts(store, plan_layer_slots(store.layers, 2 * nbytes), "cpu", "static", shares)
    resident.preload()
    assert resident.resident_experts() == [[1, 3]]
    for step in range(20):
        resident.begin_step()
        resident.resolve(0, routed([step % 6]))
    assert resident.resident_experts() == [[1, 3]]
    assert resident.refuses


@pytest.mark.parametrize(
    ("name", "shares", "said"),
    [
        ("fifo", None, "policy 'fifo' is not known: use one of lru, lfu, static, predictive"),
        ("static", None, "needs a recorded run"),
        ("static", [[0.5] * 3], "give the popularity of this model"),
        ("lfu", [[0.5] * 5 + [1.5]], "above 1"),
        ("lfu", [[0.5] * 5 + [float("nan")]], "no number"),
    ],
)
def test_policies_that_cannot_be_are_refused(name, shares, said):
    store = store_of([["bf16"] * 6])
    plan = plan_layer_slots(store.layers, store.nbytes)
    with pytest.raises(ExpertFlowError, match=said):
        ResidentExperts(store, plan, "cpu", name, shares)
