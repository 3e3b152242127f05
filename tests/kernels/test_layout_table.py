"""The table that kernels read says what the layouts say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertflow_quant.formats import NF4_VALUES, ExpertFlowError, ExpertShape, Format, RecordLayout
from expertflow_quant.kernels.table import ABSENT, COLUMNS, VALUES, WIDTH, LayoutTable

SHAPE = ExpertShape(hidden=64, intermediate=32, has_bias=True)


def layout(name: str, input_scale: bool = False, shape: ExpertShape = SHAPE) -> RecordLayout:
    return RecordLayout(shape, Format.parse(name), input_scale)


def row(table: LayoutTable, index: int = 0) -> dict[str, int]:
    return dict(zip(COLUMNS, table.rows[index].tolist()))


@given(st.lists(st.sampled_from(["bf16", "int4-g8", "int4-g16-asym", "int2-channel", "int3-g8", "nf4-g8"]), min_size=1))
def test_each_expert_finds_its_own_layout(names: list[str]) -> None:
    table, row_of = LayoutTable.of([layout(name) for name in names], "cpu")
    assert [table.layouts[index].format.name for index in row_of.tolist()] == names
    assert len(table.layouts) == len(set(names))
    assert table.rows.shape == (len(set(names)), WIDTH)
    assert table.widths == {20 if name == "nf4-g8" else Format.parse(name).bits for name in names}
    assert table.has_zeros == any(name.endswith("asym") for name in names)


@pytest.mark.parametrize(
    ("name", "input_scale"),
    [("bf16", False), ("int4-g16", True), ("int8-g8-asym", True), ("int3-channel", False), ("nf4-g16", True)],
)
def test_offsets_are_those_of_the_records_fields(name: str, input_scale: bool) -> None:
    one = layout(name, input_scale)
    table = LayoutTable.of([one], "cpu")[0]
    numbers = row(table)
    assert numbers["bits"] == (20 if name == "nf4-g16" else one.format.bits)
    assert table.rows[0, VALUES:].view(torch.float32).tolist() == torch.tensor(NF4_VALUES).tolist()
    assert numbers["nbytes"] == one.nbytes
    named = {column.replace(".codes", ".weight") if name == "bf16" else column: column for column in COLUMNS}
    for field, column in named.items():
        if "." in field and not field.endswith("group_units"):
            assert numbers[column] == (one.fields[field].offset if field in one.fields else ABSENT), field
    assert table.has_input_scale == input_scale


def test_groups_are_counted_in_units_of_eight_columns() -> None:
    assert row(LayoutTable.of([layout("int4-g16")], "cpu")[0])["gate_up.group_units"] == 2
    whole = row(LayoutTable.of([layout("int4-channel")], "cpu")[0])
    assert (whole["gate_up.group_units"], whole["down.group_units"]) == (8, 4)


@pytest.mark.parametrize(("name", "zero"), [("bf16", 0), ("int2-g8", 2), ("int8-g8", 128), ("int4-g8-asym", ABSENT)])
def test_the_zero_of_symmetric_codes_is_in_the_table(name: str, zero: int) -> None:
    assert row(LayoutTable.of([layout(name)], "cpu")[0])["zero"] == zero


def test_tables_that_kernels_cannot_serve_are_refused() -> None:
    with pytest.raises(ExpertFlowError, match="one expert shape"):
        LayoutTable.of([], "cpu")
    with pytest.raises(ExpertFlowError, match="one expert shape"):
        LayoutTable.of([layout("int4-g8"), layout("int4-g8", shape=ExpertShape(64, 40))], "cpu")
    with pytest.raises(ExpertFlowError, match=r"int4-g4: .* multiple of 8"):
        LayoutTable.of([layout("int4-g4")], "cpu")
