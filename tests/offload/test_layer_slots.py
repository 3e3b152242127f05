"""How many slots every layer gets for each of its record sizes."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertflow_quant.offload.budget import BudgetError
from expertflow_quant.offload.layer_slots import plan_layer_slots
from expertflow_quant.offload.slots import LayerRecords

SIZES = (256, 512, 768, 1792)


@st.composite
def models(draw):
    return [
        LayerRecords(tuple(draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=10))), 1)
        for _ in range(draw(st.integers(1, 4)))
    ]


def pools_of(layers, plan):
    """(bytes, slots, records) of every pool."""
    assert len(plan) == len(layers)
    for layer, pools in zip(layers, plan, strict=True):
        assert [nbytes for nbytes, _ in pools] == sorted(set(layer.nbytes))
        for nbytes, slots in pools:
            yield nbytes, slots, layer.nbytes.count(nbytes)


@given(models(), st.floats(0, 1.3))
def test_pools_fit_the_budget_have_their_share_and_leave_no_usable_room(layers, part):
    total = sum(sum(layer.nbytes) for layer in layers)
    budget = max(1, int(total * part))
    pools = list(pools_of(layers, plan_layer_slots(layers, budget)))
    left = budget - sum(nbytes * slots for nbytes, slots, _ in pools)
    assert left >= 0
    share = min(Fraction(budget, total), Fraction(1))
    for nbytes, slots, records in pools:
        assert int(share * records) <= slots <= records
        assert slots == records or nbytes > left
    if budget >= total:
        assert all(slots == records for _, slots, records in pools)


def test_what_is_left_goes_to_the_least_covered_pool_the_first_of_equals():
    layers = [LayerRecords((256,) * 4, 1), LayerRecords((256,) * 2, 1), LayerRecords((512,) * 4, 1)]
    # 3,584 bytes altogether. A third is 1 + 0 + 1 slots and 426 bytes: one more, and layer 1 has nothing yet.
    assert plan_layer_slots(layers, 1194) == (((256, 1),), ((256, 1),), ((512, 1),))
    # Without a share of their own the pools are equals; the largest record does not fit.
    assert plan_layer_slots(layers, 511) == (((256, 1),), ((256, 0),), ((512, 0),))


def test_mixed_sizes_of_a_layer_keep_their_proportion():
    layers = [LayerRecords((1024,) * 32 + (256,) * 64, 2)] * 3
    quarter = sum(sum(layer.nbytes) for layer in layers) // 4
    assert plan_layer_slots(layers, quarter) == (((256, 16), (1024, 8)),) * 3


@pytest.mark.parametrize("budget", [0, -1])
def test_nothing_is_no_budget(budget):
    with pytest.raises(BudgetError, match="give an amount above zero"):
        plan_layer_slots([LayerRecords((256,), 1)], budget)
