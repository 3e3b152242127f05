"""The product for few tokens against its twin, in every format and mix of formats."""

import pytest
from helpers.few_products import MIXED, SHAPE, error, routed, run, twin
from helpers.records import Layer

from expertflow_quant.formats import ExpertShape

FORMATS = ["bf16"] + [
    f"int{bits}-{group}{suffix}"
    for bits in (2, 3, 4, 8)
    for group, suffix in (("g8", ""), ("g16", "-asym"), ("g32", ""), ("channel", ""), ("channel", "-asym"))
]
FORMATS += ["nf4-g8", "nf4-g32", "nf4-channel"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_equals_the_twin(name: str, device: str) -> None:
    layer = Layer.random(SHAPE, [name] * 3, device)
    inputs = routed(layer, tokens=2, top_k=2)
    assert error(run(layer, *inputs), twin(layer, *inputs)) < 2e-6


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("input_scale", [False, True])
def test_formats_are_mixed_in_one_launch(input_scale: bool, bias: bool, device: str) -> None:
    layer = Layer.random(ExpertShape(64, 48, has_bias=bias), MIXED, device, input_scale)
    inputs = routed(layer, tokens=5, top_k=3)
    assert error(run(layer, *inputs), twin(layer, *inputs)) < 2e-6


@pytest.mark.parametrize(
    "formats",
    [
        ["int4-g16"] * 3,
        ["int4-g16", "int4-g8", "int4-channel-asym"],
        ["nf4-g16"] * 3,
        ["nf4-g16", "nf4-channel", "nf4-g8"],
    ],
)
def test_one_width_with_input_scales_and_biases(formats: list[str], device: str) -> None:
    layer = Layer.random(ExpertShape(64, 48, has_bias=True), formats, device, input_scale=True)
    inputs = routed(layer, tokens=4, top_k=2)
    assert error(run(layer, *inputs), twin(layer, *inputs)) < 2e-6


def test_layers_where_only_some_records_have_an_input_scale(device: str) -> None:
    plain = Layer.random(SHAPE, ["int4-g16", "int4-g8-asym"], device)
    scaled = Layer.random(SHAPE, ["int4-g16", "int4-g8-asym"], device, input_scale=True)
    layer = Layer(plain.layouts + scaled.layouts, plain.records + scaled.records, device)
    inputs = routed(layer, tokens=3, top_k=3)
    assert error(run(layer, *inputs), twin(layer, *inputs)) < 2e-6
