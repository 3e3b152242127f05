"""The device's cache with its kernels, over real bytes."""

from helpers.resident import FORMATS, check_bytes, check_tables, routed, store_of
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow_quant.offload.layer_slots import plan_layer_slots
from expertflow_quant.offload.resident import ResidentExperts

MODEL = [list((FORMATS * 2)[: 6 - layer]) for layer in range(2)]


@settings(max_examples=12, deadline=None)
@given(
    share=st.floats(0, 1),
    preloaded=st.booleans(),
    policy=st.sampled_from(["lru", "predictive"]),
    steps=st.lists(
        st.tuples(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.lists(st.integers(0, 6), max_size=3)),
        min_size=1,
        max_size=5,
    ),
)
def test_slots_hold_their_owners_records_at_any_budget(share, preloaded, policy, steps, device):
    store = store_of(MODEL, device)
    plan = plan_layer_slots(store.layers, max(1, int(store.nbytes * share)))
    resident = ResidentExperts(store, plan, device, policy)
    if preloaded:
        resident.preload()
        check_bytes(resident)
    for used, guessed in steps:
        resident.begin_step()
        for layer in range(2):
            if guessed:
                resident.prefetch(layer, routed(guessed, device))
            resident.resolve(layer, routed(used, device))
            resident.fill(layer)
        check_tables(resident)
        check_bytes(resident)
    requests = [sum(len({e for e in used if e < 6 - layer}) for used, _ in steps) for layer in range(2)]
    assert [each.requests for each in resident.stats.layers] == requests


def test_a_budget_for_all_never_misses(device):
    store = store_of(MODEL, device)
    resident = ResidentExperts(store, plan_layer_slots(store.layers, store.nbytes), device)
    assert not resident.all_resident(0)
    resident.preload()
    assert resident.all_resident(0)
    resident.resolve(0, routed([0, 3, 3, 9], device))
    resident.resolve(1, routed([4], device), count=False)
    resident.fill(0)
    assert (resident.stats.hits, resident.stats.misses, resident.stats.bytes_moved) == (2, 0, 0)
    check_tables(resident)
    check_bytes(resident)
