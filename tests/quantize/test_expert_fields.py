"""From matrices to a record and back to the same weights, bit for bit."""

import pytest
import torch

from expertflow_quant.formats import BF16, INT_BITS, ExpertFlowError, ExpertShape, Format, RecordLayout
from expertflow_quant.kernels import expert_weights
from expertflow_quant.quantize import expert_fields, quantize_rtn

SHAPE = ExpertShape(hidden=32, intermediate=24)
UP = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
DOWN = torch.randn(32, 24, generator=torch.Generator().manual_seed(1))
FORMATS = [
    Format("int", bits, group, symmetric) for bits in INT_BITS for group in (8, 0) for symmetric in (True, False)
]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_decoded_record_equals_the_quantizers_own_weights(format: Format) -> None:
    layout = RecordLayout(SHAPE, format, input_scale=True)
    up, down = quantize_rtn(UP, format), quantize_rtn(DOWN, format)
    record = layout.pack(expert_fields(layout, up, down, input_scale=torch.full((32,), 0.5)))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weights = expert_weights(layout.views(record), layout, dtype)
        assert torch.equal(weights.gate_up, up.dequantize(dtype))
        assert torch.equal(weights.down, down.dequantize(dtype))
    assert weights.input_scale is not None
    assert weights.input_scale.tolist() == [0.5] * 32


def test_bf16_and_biases() -> None:
    layout = RecordLayout(ExpertShape(32, 24, has_bias=True), BF16)
    bias = torch.arange(48.0), torch.arange(32.0)
    record = layout.pack(expert_fields(layout, UP, DOWN, gate_up_bias=bias[0], down_bias=bias[1]))
    weights = expert_weights(layout.views(record), layout, torch.bfloat16)
    assert torch.equal(weights.gate_up, UP.bfloat16())
    assert weights.down_bias is not None
    assert torch.equal(weights.down_bias, bias[1].bfloat16())


def test_parts_of_another_format_are_refused() -> None:
    layout = RecordLayout(SHAPE, Format.parse("int4-g8"))
    up, down = quantize_rtn(UP, layout.format), quantize_rtn(DOWN, layout.format)
    with pytest.raises(ExpertFlowError, match="gate_up is a tensor, but this record is int4-g8: quantize it first"):
        expert_fields(layout, UP, down)
    with pytest.raises(ExpertFlowError, match="down is int2-g8, but this record is int4-g8"):
        expert_fields(layout, up, quantize_rtn(DOWN, Format.parse("int2-g8")))
    with pytest.raises(ExpertFlowError, match=r"gate_up.input_scale is given, but this record lacks it"):
        expert_fields(layout, up, down, input_scale=torch.ones(32))
    with pytest.raises(ExpertFlowError, match=r"gate_up.input_scale is missing, but this record has it"):
        expert_fields(RecordLayout(SHAPE, layout.format, input_scale=True), up, down)
    with pytest.raises(ExpertFlowError, match=r"gate_up.input_scale \(32,\) holds 32 values that are NaN"):
        expert_fields(RecordLayout(SHAPE, layout.format, True), up, down, input_scale=torch.full((32,), 1e6))
