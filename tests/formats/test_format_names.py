"""Format: its names, what it refuses, and that every refusal says value, rule and remedy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertflow_quant.formats import BF16, INT_BITS, ExpertFlowError, Format

coded_formats = st.builds(
    Format,
    st.just("int"),
    st.sampled_from(INT_BITS),
    st.integers(min_value=0, max_value=4096),
    st.booleans(),
) | st.builds(Format, st.just("nf"), st.just(4), st.integers(min_value=0, max_value=4096))


@given(coded_formats)
def test_names_read_back(format: Format) -> None:
    assert Format.parse(format.name) == format


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("bf16", BF16),
        ("int4-g32", Format("int", 4, 32)),
        ("int3-g32-asym", Format("int", 3, 32, symmetric=False)),
        ("int8-channel", Format("int", 8)),
        ("nf4-g64", Format("nf", 4, 64)),
        ("nf4-channel", Format("nf", 4)),
    ],
)
def test_names_are_as_agreed(name: str, format: Format) -> None:
    assert Format.parse(name) == format
    assert format.name == str(format) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "int4",
        "int5-g32",
        "int16-g32",
        "INT4-g32",
        "int4-g0",
        "int4-g032",
        "int4-g32-sym",
        "bf16-g32",
        "nf4",
        "nf4-g64-asym",
        "nf3-g64",
        "int4-g32 ",
    ],
)
def test_unknown_names_list_what_is_known(text: str) -> None:
    with pytest.raises(ExpertFlowError) as error:
        Format.parse(text)
    assert repr(text) in str(error.value)
    for known in ("bf16", "int2|int3|int4|int8", "-channel", "-asym", "nf4-g64"):
        assert known in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (("fp8", 8), "'fp8'"),
        (("int", 5), "5"),
        (("int", 4.0), "4.0"),
        (("int", 4, -1), "-1"),
        (("int", 4, 32.0), "32.0"),
        (("int", 4, True), "True"),
        (("nf", 3, 64), "nf"),
        (("nf", 4, 64, False), "nf"),
        (("bf16", 8), "bf16"),
        (("bf16", 16, 32), "bf16"),
        (("bf16", 16, 0, False), "bf16"),
    ],
)
def test_combinations_that_do_not_exist_cannot_be_built(arguments: tuple[object, ...], value: str) -> None:
    with pytest.raises(ExpertFlowError, match=r"use|must") as error:
        Format(*arguments)  # type: ignore[arg-type]
    assert value in str(error.value)


def test_groups_per_row() -> None:
    assert Format.parse("int4-g32").groups(256) == 8
    assert Format.parse("int4-channel").groups(256) == 1
    assert Format.parse("int4-channel").columns_per_group(256) == 256
    assert Format.parse("nf4-g64").groups(256) == 4
    assert BF16.groups(256) == 0


def test_columns_that_cannot_be_grouped_name_the_sizes_that_can() -> None:
    with pytest.raises(
        ExpertFlowError,
        match="group size 64 does not divide 96 input columns: use g16 or g32 or int4-channel",
    ):
        Format.parse("int4-g64").validate_for(96)
    with pytest.raises(ExpertFlowError, match=r"nf4-g64: group size 64 does not divide 96 .* or nf4-channel"):
        Format.parse("nf4-g64").validate_for(96)
    with pytest.raises(ExpertFlowError, match="multiples of 8, got 12: use bf16"):
        Format.parse("int4-g4").validate_for(12)
    with pytest.raises(ExpertFlowError, match="0 input columns"):
        BF16.validate_for(0)
    BF16.validate_for(12)
