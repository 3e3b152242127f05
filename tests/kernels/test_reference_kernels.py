"""The reference kernels against plain arithmetic on unpacked codes."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from expertflow_quant.formats import NF4_VALUES, ExpertFlowError, ExpertShape, Format, RecordLayout, pack_codes
from expertflow_quant.kernels import dequantize, expert_product, expert_weights

SHAPE = ExpertShape(hidden=32, intermediate=24, has_bias=True)
NAMES = [
    "int2-g8",
    "int3-g8",
    "int4-g8",
    "int8-g8",
    "int2-g8-asym",
    "int3-g8-asym",
    "int4-channel-asym",
    "int8-channel",
    "nf4-g8",
    "nf4-channel",
]


def silu_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def level(format: Format, code: int, zero: int) -> float:
    return NF4_VALUES[code] if format.kind == "nf" else code - zero


def random_parts(layout: RecordLayout, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fields for pack, and the weights they stand for, worked out value by value."""
    generator = torch.Generator().manual_seed(seed)
    bits = layout.format.bits
    fields: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, (rows, columns) in layout.shape.matrices.items():
        groups = layout.format.groups(columns)
        codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
        scales = torch.rand(rows, groups, generator=generator).half()
        zeros = torch.full((rows, groups), 1 << (bits - 1), dtype=torch.uint8)
        if not layout.format.symmetric:
            zeros = torch.randint(0, 1 << bits, (rows, groups), generator=generator, dtype=torch.uint8)
            fields[f"{name}.zeros"] = zeros
        fields |= {f"{name}.codes": pack_codes(codes, bits), f"{name}.scales": scales}
        per_group = columns // groups
        expected[name] = torch.tensor(
            [
                [
                    level(layout.format, int(codes[r, c]), int(zeros[r, c // per_group]))
                    * float(scales[r, c // per_group])
                    for c in range(columns)
                ]
                for r in range(rows)
            ]
        )
        fields[f"{name}.bias"] = torch.randn(rows, generator=generator).bfloat16()
    if layout.input_scale:
        fields["gate_up.input_scale"] = (torch.rand(layout.shape.hidden, generator=generator) + 0.5).half()
    return fields, expected


@pytest.mark.parametrize("name", NAMES)
def test_decoded_weights_are_code_minus_zero_times_scale(name: str) -> None:
    layout = RecordLayout(SHAPE, Format.parse(name))
    fields, expected = random_parts(layout)
    weights = expert_weights(layout.views(layout.pack(fields)), layout, torch.float32)
    assert torch.equal(weights.gate_up, expected["gate_up"])
    assert torch.equal(weights.down, expected["down"])
    assert weights.input_scale is None


@pytest.mark.parametrize("name", NAMES)
def test_narrow_dtypes_are_rounded_once_from_float32(name: str) -> None:
    layout = RecordLayout(SHAPE, Format.parse(name))
    fields, expected = random_parts(layout)
    for dtype in (torch.bfloat16, torch.float16):
        weights = expert_weights(layout.views(layout.pack(fields)), layout, dtype)
        assert torch.equal(weights.gate_up, expected["gate_up"].to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_product_scales_the_activation_and_adds_biases(name: str) -> None:
    layout = RecordLayout(SHAPE, Format.parse(name), input_scale=True)
    fields, expected = random_parts(layout)
    weights = expert_weights(layout.views(layout.pack(fields)), layout, torch.float32)
    hidden = torch.randn(5, SHAPE.hidden, generator=torch.Generator().manual_seed(1))
    inner = silu_gate(
        (hidden * fields["gate_up.input_scale"].float()) @ expected["gate_up"].T + fields["gate_up.bias"].float()
    )
    want = inner @ expected["down"].T + fields["down.bias"].float()
    torch.testing.assert_close(expert_product(hidden, weights, silu_gate), want, rtol=1e-5, atol=1e-3)


def test_bf16_record_holds_the_weights_themselves() -> None:
    shape = ExpertShape(hidden=10, intermediate=6, has_gate=False)
    layout = RecordLayout(shape, Format.parse("bf16"))
    up, down = torch.randn(6, 10).bfloat16(), torch.randn(10, 6).bfloat16()
    views = layout.views(layout.pack({"gate_up.weight": up, "down.weight": down}))
    weights = expert_weights(views, layout, torch.float32)
    hidden = torch.randn(3, 10)
    want = functional.relu(hidden @ up.float().T) @ down.float().T
    torch.testing.assert_close(expert_product(hidden, weights, functional.relu), want)


def test_decoding_leaves_the_record_as_it_was() -> None:
    for name in NAMES:
        layout = RecordLayout(SHAPE, Format.parse(name), input_scale=True)
        record = layout.pack(random_parts(layout)[0])
        before = record.clone()
        expert_weights(layout.views(record), layout, torch.float32)
        assert torch.equal(record, before)


def test_all_codes_of_every_width_decode() -> None:
    for bits in (2, 3, 4, 8):
        codes = torch.arange(1 << bits, dtype=torch.uint8).repeat(8).view(1, -1)
        scales = torch.ones(1, 1, dtype=torch.float16)
        got = dequantize(pack_codes(codes, bits), scales, None, Format("int", bits))
        assert torch.equal(got, codes.float() - (1 << (bits - 1)))


def test_another_hidden_dtype_is_refused() -> None:
    layout = RecordLayout(SHAPE, Format.parse("int4-g8"))
    weights = expert_weights(layout.views(layout.pack(random_parts(layout)[0])), layout, torch.float32)
    with pytest.raises(ExpertFlowError, match=r"bfloat16.*float32"):
        expert_product(torch.zeros(1, SHAPE.hidden, dtype=torch.bfloat16), weights, silu_gate)
