"""How many slots every record size gets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.budget import BudgetError, parse_budget
from expertflow_quant.offload.slots import LayerRecords, minimum_bytes, plan_slots

SIZES = (256, 512, 768, 1792)


@st.composite
def models(draw):
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        nbytes = tuple(draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=10)))
        layers.append(LayerRecords(nbytes, draw(st.integers(1, len(nbytes)))))
    return layers


def worst_token_counts(layers):
    """The most experts of each size that one token can meet in one layer, straight from the definition."""
    return {
        size: max(min(layer.top_k, layer.nbytes.count(size)) for layer in layers)
        for size in {nbytes for layer in layers for nbytes in layer.nbytes}
    }


@given(models(), st.floats(0, 1.3))
def test_slots_fit_the_budget_cover_a_token_and_leave_no_usable_room(layers, share):
    total = sum(sum(layer.nbytes) for layer in layers)
    minimum = minimum_bytes(layers)
    budget = minimum + int((total - minimum) * share)
    classes = plan_slots(layers, budget)
    needed = worst_token_counts(layers)
    assert [size.nbytes for size in classes] == sorted(needed)
    used = sum(size.nbytes * size.slots for size in classes)
    assert used <= budget
    for size in classes:
        assert size.minimum == needed[size.nbytes]
        assert size.minimum <= size.slots <= size.records
        assert size.slots == size.records or size.nbytes > budget - used
    if budget >= total:
        assert all(size.slots == size.records for size in classes)


@given(models())
def test_the_minimum_is_just_enough(layers):
    minimum = minimum_bytes(layers)
    assert all(size.slots == size.minimum for size in plan_slots(layers, minimum))
    with pytest.raises(BudgetError, match="raise --expert-memory to"):
        plan_slots(layers, minimum - 1)


def test_the_rest_goes_by_the_bytes_of_all_records():
    layers = [LayerRecords((1000,) * 30 + (250,) * 40, 2)] * 2
    small, large = plan_slots(layers, parse_budget("50%", 80_000))
    assert (small.slots, large.slots) == (40, 30)
    assert small.nbytes * small.slots + large.nbytes * large.slots == 40_000


def test_a_budget_that_is_too_small_names_value_rule_and_remedy():
    layers = [LayerRecords((2**19,) * 8, 2), LayerRecords((2**19,) * 8, 4)]
    with pytest.raises(BudgetError) as error:
        plan_slots(layers, 2**20)
    assert str(error.value) == (
        "expert memory 1.0 MiB holds 2 experts; layer 1 routes a token to 4 at once: "
        "raise --expert-memory to 2.0 MiB or use a smaller format"
    )


def test_with_several_sizes_the_error_says_why_the_sum_is_larger():
    layers = [LayerRecords((256, 256, 512, 512), 2)]
    with pytest.raises(BudgetError, match=r"each of 2 record sizes needs slots of its own.*1\.5 KiB"):
        plan_slots(layers, 1024)


@pytest.mark.parametrize(("nbytes", "top_k"), [((), 1), ((0, 256), 1), ((256,), 0), ((256,), 2)])
def test_layers_that_cannot_be_are_refused(nbytes, top_k):
    with pytest.raises(ExpertFlowError):
        LayerRecords(nbytes, top_k)
