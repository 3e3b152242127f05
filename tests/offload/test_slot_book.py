"""Who goes for whom: the rule of the device's cache in plain lists, and that it is the host's LRU."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertflow_quant.offload.policy import LRU
from expertflow_quant.offload.resolve import Move, SlotBook
from expertflow_quant.offload.slots import SlotTable

FREE = -1


def book(slots, experts, pool_of_slot=None, pool_of_expert=None):
    return SlotBook([FREE] * slots, [FREE] * slots, pool_of_slot or [0] * slots, pool_of_expert or [0] * experts)


def test_free_slots_first_then_the_oldest_then_the_first_slot():
    slots = book(3, 8)
    assert slots.resolve({5, 2}, 1).moves == [Move(2, 0, FREE), Move(5, 1, FREE)]
    assert slots.resolve({2}, 2).hits == [2]
    assert slots.resolve({7}, 3).moves == [Move(7, 2, FREE)]
    outcome = slots.resolve({0, 1, 2}, 4)
    assert (outcome.hits, outcome.misses) == ([2], [0, 1])
    assert outcome.moves == [Move(0, 1, 5), Move(1, 2, 7)]
    assert slots.resolve({3}, 5).moves == [Move(3, 0, 2)]


def test_more_experts_than_slots_leaves_the_rest_without():
    slots = book(2, 8)
    outcome = slots.resolve({1, 3, 5, 7}, 1)
    assert outcome.misses == [1, 3, 5, 7]
    assert outcome.moves == [Move(1, 0, FREE), Move(3, 1, FREE)]
    assert slots.resolve({1, 3, 5}, 2).moves == []


def test_a_record_goes_only_into_a_slot_of_its_size():
    slots = book(3, 4, pool_of_slot=[0, 1, 1], pool_of_expert=[0, 0, 1, 2])
    assert slots.resolve({0, 1, 2, 3}, 1).moves == [Move(0, 0, FREE), Move(2, 1, FREE)]
    assert slots.resolve({1}, 2).moves == [Move(1, 0, 0)]


def test_a_guess_never_takes_the_slot_of_what_this_step_used_a_request_does():
    slots = book(2, 8)
    slots.resolve({0, 1}, 1)
    slots.resolve({0}, 2)
    assert slots.resolve({4, 5}, 2, keep_current=True).moves == [Move(4, 1, 1)]
    assert slots.resolve({6}, 2, keep_current=True).moves == []
    assert slots.resolve({6}, 2).moves == [Move(6, 0, 0)]


@st.composite
def traces(draw, experts=10, most=6):
    slots = draw(st.integers(1, most))
    steps = draw(st.lists(st.sets(st.integers(0, experts - 1), min_size=1, max_size=slots), min_size=1, max_size=30))
    return slots, steps


@given(traces())
def test_it_is_the_hosts_lru_when_experts_of_one_step_age_in_the_order_of_their_slots(trace):
    """LRU orders what one step used by the order of the requests, the device by slot. With that order given to
    LRU, both evict the same experts into the same slots."""
    slots, steps = trace
    device, host = book(slots, 10), SlotTable(slots, LRU())
    for step, wanted in enumerate(steps, 1):
        outcome = device.resolve(wanted, step)
        in_use = {(0, expert) for expert in wanted}
        placed = [(expert, *host.place((0, expert), in_use)) for expert in outcome.hits + outcome.misses]
        assert [expert for expert, _, hit, _ in placed if hit] == outcome.hits
        assert [
            Move(expert, slot, FREE if evicted is None else evicted[1])
            for expert, slot, hit, evicted in placed
            if not hit
        ] == outcome.moves
        for expert in sorted(wanted, key=device.owner.index):
            host.place((0, expert), in_use)


@pytest.mark.parametrize("seed", range(5))
def test_with_one_expert_a_step_no_two_are_equally_old_and_hits_are_those_of_lru(seed):
    generator = random.Random(seed)
    device, host = book(4, 12), SlotTable(4, LRU())
    for step in range(1, 300):
        expert = min(11, int(generator.expovariate(0.25)))
        assert bool(device.resolve({expert}, step).hits) == host.place((0, expert), ())[1]
