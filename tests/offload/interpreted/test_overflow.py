"""Room for experts without a slot: the kernel and its twin deal it out alike, and the records arrive."""

import pytest
import torch
from helpers.resident import FORMATS, check_bytes, check_tables, routed, store_of
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.kernels import record_at
from expertflow_quant.offload.layer_slots import plan_layer_slots
from expertflow_quant.offload.overflow import OverflowRoom, may_overflow, overflow_reference
from expertflow_quant.offload.resident import ResidentExperts
from expertflow_quant.offload.slots import LayerRecords

EXPERTS = [list((FORMATS * 3)[: 9 - layer]) for layer in range(2)]


def made(share, places, device):
    store = store_of(EXPERTS, device)
    budget = int(sum(sum(layer.nbytes) for layer in store.layers) * share)
    resident = ResidentExperts(store, plan_layer_slots(store.layers, max(1, budget)), device)
    resident.preload()
    largest = max(max(layer.nbytes) for layer in store.layers)
    room = torch.zeros(places, largest, dtype=torch.uint8, device=device)
    return resident, room, OverflowRoom(room, max(len(layer.nbytes) for layer in store.layers))


def read(address, nbytes, resident, room, device):
    """The bytes at an address, whoever owns it."""
    first = room.data_ptr()
    if first <= address < first + room.numel():
        start = address - first
        return room.view(-1)[start : start + nbytes].cpu()
    if device == "cpu":
        return record_at(address, nbytes).clone()
    slots = [
        resident.slot_tensor(layer, slot)
        for layer, pools in enumerate(resident.plan)
        for slot in range(sum(count for _, count in pools))
    ]
    found = next((slot for slot in slots if slot.data_ptr() == address), None)
    return found.cpu() if found is not None else record_at(address, nbytes).clone()  # pinned: the host's own address


@settings(max_examples=25, deadline=None)
@given(
    share=st.floats(0, 1),
    places=st.integers(1, 9),
    sequence=st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 11), min_size=1, max_size=9)), max_size=5),
)
def test_every_expert_that_is_wanted_is_where_it_is_said_to_be(share, places, sequence, device):
    resident, room, overflow = made(share, places, device)
    twin = OverflowRoom(room, 9)
    for layer, experts in sequence:
        ids = routed(experts, device)
        resident.begin_step()
        resident.resolve(layer, ids)
        resident.fill(layer)
        addresses = overflow.bring(resident.layer(layer), ids).tolist()
        overflow_reference(twin, resident.layer(layer), ids)
        count = int(twin.todo_count)
        assert int(overflow.todo_count) == count <= places
        for name in ("todo_src", "todo_dst", "todo_nbytes"):
            assert torch.equal(getattr(overflow, name)[:count].cpu(), getattr(twin, name)[:count].cpu()), name
        assert addresses == twin.address[: len(addresses)].tolist()
        nbytes = resident.store.layers[layer].nbytes
        for expert in {each for each in experts if each < len(nbytes)}:
            got = read(addresses[expert], nbytes[expert], resident, room, device)
            assert torch.equal(got, resident.store.record(layer, expert))
        check_tables(resident)
        check_bytes(resident)


def test_who_finds_no_room_is_read_from_the_host(device):
    resident, room, overflow = made(0, 2, device)
    ids = routed([5, 1, 7], device)
    resident.begin_step()
    resident.resolve(0, ids)
    addresses = overflow.bring(resident.layer(0), ids).tolist()
    first, width = room.data_ptr(), room.shape[1]
    assert [addresses[1], addresses[5]] == [first, first + width]
    assert addresses[7] == resident.store.record(0, 7).data_ptr()
    assert addresses[0] == resident.store.record(0, 0).data_ptr()
    assert resident.stats.misses == 3


@pytest.mark.parametrize(
    ("pools", "rows", "may"),
    [
        (((256, 2), (512, 2)), 1, False),
        (((256, 2), (512, 1)), 1, True),
        (((256, 3), (512, 3)), 2, True),
        (((256, 4), (512, 4)), 2, False),
        (((256, 4), (512, 3)), 9, True),
    ],
)
def test_when_slots_may_not_suffice(pools, rows, may):
    assert may_overflow(LayerRecords((256,) * 4 + (512,) * 4, 2), pools, rows) is may


def test_room_that_cannot_be_is_refused(device):
    with pytest.raises(ExpertFlowError, match=r"overflow room \(2, 100\).*multiples of 256"):
        OverflowRoom(torch.zeros(2, 100, dtype=torch.uint8, device=device), 4)
    with pytest.raises(ExpertFlowError, match="contiguous"):
        OverflowRoom(torch.zeros(2, 512, dtype=torch.uint8, device=device)[:, :256], 4)
