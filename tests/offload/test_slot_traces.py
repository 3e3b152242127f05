"""Random traces through the slot table, against a simulation that shares no code with it."""

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.policy import LRU
from expertflow_quant.offload.slots import ExpertTable, LayerRecords, SlotTable, minimum_bytes, plan_slots

SIZES = (256, 512, 768)


@st.composite
def models_and_traces(draw):
    """Layers with mixed sizes, a budget, and forward passes: (layer, distinct experts in any order)."""
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        nbytes = tuple(draw(st.lists(st.sampled_from(SIZES), min_size=2, max_size=8)))
        layers.append(LayerRecords(nbytes, draw(st.integers(1, len(nbytes)))))
    spare = sum(sum(layer.nbytes) for layer in layers) - minimum_bytes(layers)
    budget = minimum_bytes(layers) + draw(st.integers(0, spare))
    passes = draw(
        st.lists(
            st.integers(0, len(layers) - 1).flatmap(
                lambda layer: st.tuples(
                    st.just(layer),
                    st.lists(st.integers(0, len(layers[layer].nbytes) - 1), min_size=1, unique=True),
                )
            ),
            max_size=30,
        )
    )
    return layers, budget, passes


class Simulation:
    """Least recently used by the book: one ordered dictionary per size."""

    def __init__(self, capacities):
        self.capacities = capacities
        self.order = {size: OrderedDict() for size in capacities}

    def request(self, size, key, in_use):
        order = self.order[size]
        if key in order:
            order.move_to_end(key)
            return True, None
        evicted = None
        if len(order) == self.capacities[size]:
            evicted = next(old for old in order if old not in in_use)
            order.pop(evicted)
        order[key] = True
        return False, evicted


@given(models_and_traces())
def test_traces_keep_every_promise_and_agree_with_the_simulation(case):
    layers, budget, passes = case
    classes = plan_slots(layers, budget)
    table = ExpertTable(layers, classes, LRU)
    simulation = Simulation({size.nbytes: size.slots for size in classes})
    holder = {}  # (class, slot) -> expert
    for layer, experts in passes:
        resident_before = {expert for expert in experts if (layer, expert) in table}
        pieces = table.pieces(layer, experts)
        flat = [expert for piece in pieces for expert in piece]
        assert sorted(flat) == sorted(experts)
        assert set(flat[: len(resident_before)]) == resident_before
        for piece in pieces:
            in_use = {(layer, expert) for expert in piece}
            for expert in piece:
                key = (layer, expert)
                placement = table.place(key, in_use)
                size = classes[placement.size_class]
                assert size.nbytes == layers[layer].nbytes[expert]
                assert 0 <= placement.slot < size.slots
                assert (placement.hit, placement.evicted) == simulation.request(size.nbytes, key, in_use)
                place = (placement.size_class, placement.slot)
                if placement.hit:
                    assert holder[place] == key
                else:
                    assert holder.get(place) == placement.evicted
                    assert placement.evicted not in in_use
                holder[place] = key
            assert all((layer, expert) in table for expert in piece)
        assert len(set(holder.values())) == len(holder)
        assert {key for key in holder.values() if key in table} == set(holder.values())


def test_a_class_full_of_experts_in_use_is_refused_not_evicted():
    table = SlotTable(2, LRU())
    table.place((0, 0), ())
    table.place((0, 1), ())
    with pytest.raises(ExpertFlowError, match="all 2 slots"):
        table.place((0, 2), {(0, 0), (0, 1)})
    assert (0, 0) in table
    assert (0, 1) in table


def test_a_dropped_expert_frees_its_slot():
    table = SlotTable(1, LRU())
    table.place((0, 0), ())
    table.drop((0, 0))
    assert len(table) == 0
    assert table.place((0, 1), {(0, 0)}) == (0, False, None)


@pytest.mark.parametrize("key", [(-1, 0), (1, 0), (0, 3), (0, -1)])
def test_unknown_experts_are_refused(key):
    layers = [LayerRecords((256,) * 3, 1)]
    table = ExpertTable(layers, plan_slots(layers, 768), LRU)
    with pytest.raises(ExpertFlowError, match="not in this model"):
        table.place(key, ())
