"""Records: where the fields lie, that views share memory, and what pack and views refuse."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertflow_quant.formats import (
    BF16,
    FIELD_ALIGNMENT,
    RECORD_ALIGNMENT,
    ExpertFlowError,
    ExpertShape,
    Format,
    RecordLayout,
)

LAYOUT = RecordLayout(ExpertShape(hidden=32, intermediate=24), Format.parse("int4-g8"), input_scale=True)


@st.composite
def layouts(draw: st.DrawFn) -> RecordLayout:
    group = draw(st.sampled_from([0, 4, 8, 24]))
    unit = 24
    shape = ExpertShape(
        unit * draw(st.integers(1, 5)),
        unit * draw(st.integers(1, 5)),
        draw(st.booleans()),
        draw(st.booleans()),
    )
    bits = draw(st.sampled_from([2, 3, 4, 8, 16, "nf4"]))
    if bits == 16:
        return RecordLayout(shape, BF16)
    if bits == "nf4":
        return RecordLayout(shape, Format("nf", 4, group), draw(st.booleans()))
    return RecordLayout(shape, Format("int", bits, group, draw(st.booleans())), draw(st.booleans()))


def random_fields(layout: RecordLayout) -> dict[str, Tensor]:
    fields = {}
    for name, field in layout.fields.items():
        value = torch.randint(0, 256, field.shape, dtype=torch.uint8)
        fields[name] = value if field.dtype == torch.uint8 else value.to(field.dtype)
    return fields


@given(layouts())
def test_fields_are_aligned_in_order_and_without_slack(layout: RecordLayout) -> None:
    end = 0
    for field in layout.fields.values():
        assert field.offset % FIELD_ALIGNMENT == 0
        assert end <= field.offset < end + FIELD_ALIGNMENT
        end = field.offset + math.prod(field.shape) * field.dtype.itemsize
    assert layout.nbytes % RECORD_ALIGNMENT == 0
    assert end <= layout.nbytes < end + RECORD_ALIGNMENT


@given(layouts())
def test_pack_and_views_round_trip(layout: RecordLayout) -> None:
    fields = random_fields(layout)
    record = layout.pack(fields)
    views = layout.views(record)
    assert list(views) == list(layout.fields)
    assert all(torch.equal(views[name], fields[name]) for name in fields)
    assert torch.equal(record, layout.pack(dict(reversed(fields.items()))))


@given(layouts())
def test_fields_are_as_agreed(layout: RecordLayout) -> None:
    shape, format = layout.shape, layout.format
    rows = 2 * shape.intermediate if shape.has_gate else shape.intermediate
    expected = set()
    for name, (out, columns) in {
        "gate_up": (rows, shape.hidden),
        "down": (shape.hidden, shape.intermediate),
    }.items():
        if format.has_codes:
            groups = columns // (format.group_size or columns)
            assert layout.fields[f"{name}.codes"].shape == (out, columns * format.bits // 8)
            assert layout.fields[f"{name}.scales"].shape == (out, groups)
            assert layout.fields[f"{name}.scales"].dtype == torch.float16
            expected |= {f"{name}.codes", f"{name}.scales"} | (set() if format.symmetric else {f"{name}.zeros"})
        else:
            assert layout.fields[f"{name}.weight"].dtype == torch.bfloat16
            expected |= {f"{name}.weight"}
        expected |= {f"{name}.bias"} if shape.has_bias else set()
    expected |= {"gate_up.input_scale"} if layout.input_scale else set()
    assert set(layout.fields) == expected


def test_views_share_the_records_memory_also_inside_a_larger_buffer() -> None:
    buffer = torch.zeros(3 * LAYOUT.nbytes, dtype=torch.uint8)
    slot = buffer[LAYOUT.nbytes : 2 * LAYOUT.nbytes]
    fields = random_fields(LAYOUT)
    slot.copy_(LAYOUT.pack(fields))
    views = LAYOUT.views(slot)
    for name, field in LAYOUT.fields.items():
        assert views[name].data_ptr() == slot.data_ptr() + field.offset
        assert views[name].is_contiguous()
        assert torch.equal(views[name], fields[name])
    views["down.scales"].zero_()
    assert not torch.equal(slot, LAYOUT.pack(fields))
    assert not buffer[: LAYOUT.nbytes].any()
    assert not buffer[2 * LAYOUT.nbytes :].any()


def test_size_of_a_known_record() -> None:
    layout = RecordLayout(ExpertShape(256, 96), Format.parse("int4-g32"), input_scale=True)
    data = (192 * 128 + 192 * 8 * 2) + 256 * 2 + (256 * 48 + 256 * 3 * 2)
    assert layout.nbytes == 41984 == -(-data // 256) * 256


def test_layouts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ExpertFlowError, match=r"down of .*group size 32 does not divide 24"):
        RecordLayout(ExpertShape(32, 24), Format.parse("int4-g32"))
    with pytest.raises(ExpertFlowError, match="bf16 weights carry no input scale: set input_scale=False"):
        RecordLayout(ExpertShape(32, 24), BF16, input_scale=True)
    for hidden, intermediate in ((0, 24), (32, -1), (32.0, 24), (True, 24)):
        with pytest.raises(ExpertFlowError, match="must be a whole number of at least 1"):
            ExpertShape(hidden, intermediate)  # type: ignore[arg-type]


def test_pack_refuses_fields_that_do_not_fit() -> None:
    fields = random_fields(LAYOUT)
    with pytest.raises(ExpertFlowError, match=r"missing \['down.codes'\], unknown none"):
        LAYOUT.pack({name: value for name, value in fields.items() if name != "down.codes"})
    with pytest.raises(ExpertFlowError, match=r"missing none, unknown \['down.bias'\]"):
        LAYOUT.pack(fields | {"down.bias": torch.zeros(32)})
    with pytest.raises(ExpertFlowError, match=r"field down.scales is torch.float32 .*convert it"):
        LAYOUT.pack(fields | {"down.scales": fields["down.scales"].float()})
    with pytest.raises(ExpertFlowError, match=r"field down.scales .*\(3, 32\).* holds .*\(32, 3\)"):
        LAYOUT.pack(fields | {"down.scales": fields["down.scales"].T})


def test_views_refuse_what_is_not_a_record() -> None:
    buffer = torch.zeros(2 * LAYOUT.nbytes + 8, dtype=torch.uint8)
    for wrong in (
        buffer,
        buffer[: 2 * LAYOUT.nbytes : 2],
        buffer[: LAYOUT.nbytes].view(torch.int8),
        buffer[:0],
    ):
        with pytest.raises(ExpertFlowError, match=f"a record of int4-g8 is {LAYOUT.nbytes} uint8 in one piece"):
            LAYOUT.views(wrong)
    with pytest.raises(ExpertFlowError, match=r"starts at byte 8 .* multiple of 16"):
        LAYOUT.views(buffer[8 : 8 + LAYOUT.nbytes])
