"""The device's cache as a CPU runs it, what it counts and refuses, and that a captured step runs it on a GPU."""

import copy
from itertools import pairwise

import pytest
import torch
from helpers.resident import FORMATS, check_bytes, check_tables, routed, store_of
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.layer_slots import plan_layer_slots
from expertflow_quant.offload.resident import ResidentExperts
from expertflow_quant.offload.stats import LayerStats

ALIKE = [["int4-g16"] * 4] * 2
MIXED = [list((FORMATS * 2)[: 6 - layer]) for layer in range(2)]


def resident_of(formats, share=0.5, device="cpu", policy="lru"):
    store = store_of(formats, device)
    plan = plan_layer_slots(store.layers, max(1, int(store.nbytes * share)))
    return ResidentExperts(store, plan, device, policy)


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0, 1),
    st.booleans(),
    st.lists(
        st.tuples(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.lists(st.integers(0, 6), max_size=3)),
        min_size=1,
        max_size=8,
    ),
)
def test_slots_hold_their_owners_records_at_any_budget(share, preloaded, steps):
    resident = resident_of(MIXED, share)
    if preloaded:
        resident.preload()
    for used, guessed in steps:
        resident.begin_step()
        for layer in range(2):
            if guessed:
                resident.prefetch(layer, routed(guessed))
            resident.resolve(layer, routed(used))
            resident.fill(layer)
        check_tables(resident)
        check_bytes(resident)


def test_requests_are_distinct_experts_and_bytes_are_those_of_the_misses():
    resident = resident_of(ALIKE, 0.5)
    nbytes = resident.store.layers[0].nbytes[0]
    resident.begin_step()
    resident.resolve(0, routed([0, 1, 0, 1]))
    resident.begin_step()
    resident.resolve(0, routed([1, 2, 3, 4]))  # two slots: 3 is read from the host; 4 is no expert
    assert resident.stats.layers == (LayerStats(hits=1, misses=4), LayerStats())
    assert resident.stats.bytes_moved == 4 * nbytes
    assert resident.resident_experts() == [[1, 2], []]
    assert resident.addresses(0).tolist()[3] == resident.store.record(0, 3).data_ptr()
    resident.reset_stats()
    assert resident.stats.requests == 0
    assert resident.resident_experts() == [[1, 2], []]


def test_what_was_prefetched_is_a_hit_and_its_bytes_are_counted_apart():
    resident = resident_of(ALIKE, 0.5)
    nbytes = resident.store.layers[0].nbytes[0]
    resident.begin_step()
    resident.prefetch(1, routed([3, 2, 1]))
    assert (resident.stats.requests, resident.prefetched_bytes) == (0, 2 * nbytes)
    resident.resolve(1, routed([2, 0]))
    assert resident.stats.layers[1] == LayerStats(hits=1, misses=1)
    assert resident.stats.bytes_moved == 3 * nbytes
    assert resident.prefetched_bytes == 2 * nbytes


def test_preload_takes_the_first_experts_of_each_size_and_counts_nothing():
    resident = resident_of([["bf16", "int4-g16", "bf16", "int4-g16", "bf16", "int4-g16"]], 0.67)
    resident.begin_step()
    resident.resolve(0, routed([5, 4]))
    resident.reset_stats()
    resident.preload()
    assert [slots for _, slots in resident.plan[0]] == [2, 2]
    assert resident.resident_experts() == [[0, 1, 2, 3]]
    assert resident.stats.requests == 0
    check_tables(resident)
    check_bytes(resident)


def test_device_bytes_are_the_plans_and_slots_do_not_overlap():
    resident = resident_of(MIXED, 0.7)
    rooms = sorted(
        (room.data_ptr(), room.data_ptr() + room.numel())
        for layer, pools in enumerate(resident.plan)
        for room in (resident.slot_tensor(layer, slot) for slot in range(sum(count for _, count in pools)))
    )
    assert all(end <= start for (_, end), (start, _) in pairwise(rooms))
    assert resident.device_bytes == sum(end - start for start, end in rooms)
    assert resident.device_bytes <= int(resident.store.nbytes * 0.7)
    assert 0 < resident.table_bytes < 100_000


def test_a_copied_model_shares_the_slots():
    resident = resident_of(ALIKE)
    assert copy.deepcopy(resident) is resident


@pytest.mark.parametrize(
    "spoil", [lambda plan: plan[:1], lambda plan: (plan[0], ((256, 1),)), lambda plan: (plan[0], ((plan[0][0][0], 5),))]
)
def test_a_plan_of_another_model_is_refused(spoil):
    store = store_of(ALIKE)
    plan = plan_layer_slots(store.layers, store.nbytes)
    with pytest.raises(ExpertFlowError, match="plan the slots of this model"):
        ResidentExperts(store, spoil(plan), "cpu")


def test_a_gpu_cannot_read_records_that_are_not_pinned():
    store = store_of(ALIKE)
    with pytest.raises(ExpertFlowError, match="pin=True"):
        ResidentExperts(store, plan_layer_slots(store.layers, store.nbytes), "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("policy", ["lru", "lfu", "predictive"])
def test_a_captured_step_does_what_the_cpu_does(policy):
    ours, twin = (resident_of(MIXED, 0.5, device, policy) for device in ("cuda", "cpu"))
    ids = torch.zeros(4, 1, dtype=torch.int64, device="cuda")

    def step(resident, ids):
        resident.begin_step()
        for layer in range(2):
            resident.resolve(layer, ids)
            resident.fill(layer)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(ours, ids)
    side.synchronize()
    step(twin, ids.cpu())  # a use counts, whatever is preloaded after it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(ours, ids)
    ours.preload()
    twin.preload()
    ours.reset_stats()
    twin.reset_stats()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        routes = torch.randint(0, 7, (4, 1), generator=generator)
        ids.copy_(routes)
        graph.replay()
        step(twin, routes)
        assert torch.equal(ours.slot_of.cpu(), twin.slot_of)
        check_tables(ours)
        check_bytes(ours)
    assert ours.stats == twin.stats
