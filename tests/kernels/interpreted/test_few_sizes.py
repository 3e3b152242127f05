"""The product for few tokens against its twin, at drawn sizes and tiles: minutes in the interpreter, so on its own."""

from helpers.few_products import routed, run, twin
from helpers.records import Layer
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow_quant.formats import ExpertShape
from expertflow_quant.kernels.few import Tile


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_sizes_and_tiles_of_all_kinds(data: st.DataObject, device: str) -> None:
    eights = st.integers(1, 9)
    shape = ExpertShape(8 * data.draw(eights), 8 * data.draw(eights), has_bias=data.draw(st.booleans()))
    names = st.sampled_from(
        ["int2-g8", "int3-channel-asym", "int4-g8", "int4-channel", "int8-g8-asym", "bf16", "nf4-g8"]
    )
    layer = Layer.random(shape, data.draw(st.lists(names, min_size=1, max_size=3)), device, data.draw(st.booleans()))
    inputs = routed(layer, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 99)))
    tile = Tile(data.draw(st.sampled_from([2, 8, 16])), data.draw(st.sampled_from([2, 4, 64])), warps=4, unroll=2)
    got, want = run(layer, *inputs, up_tile=tile, down_tile=tile), twin(layer, *inputs)
    assert float((got - want).norm()) <= 1e-5 * float(want.norm())
