"""A plan names a format for every expert, and says what is wrong with it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertflow_quant.checkpoint import CheckpointError, Plan
from expertflow_quant.formats import BF16, ExpertFlowError, ExpertShape, Format

INT2, INT4, INT8 = (Format.parse(name) for name in ("int2-g32", "int4-g32", "int8-g32"))
MIXED = {"default": "int4-g32", "layers": {"0": {"3": "int2-g32", "7": "bf16"}, "1": "int8-g32"}}


def test_the_documented_example() -> None:
    plan = Plan.parse(MIXED)
    assert [plan.format(0, expert) for expert in (0, 3, 7)] == [INT4, INT2, BF16]
    assert [plan.format(1, 0), plan.format(2, 3)] == [INT8, INT4]


@given(
    st.dictionaries(
        st.integers(0, 99),
        st.one_of(
            st.sampled_from([INT2, INT4, BF16]),
            st.dictionaries(st.integers(0, 200), st.sampled_from([INT2, INT8, BF16])),
        ),
    )
)
def test_json_and_back(layers: dict[int, Format | dict[int, Format]]) -> None:
    plan = Plan(INT4, layers)
    again = Plan.parse(json.loads(json.dumps(plan.to_json())))
    for layer in [*layers, 100]:
        for expert in range(0, 201, 20):
            assert again.format(layer, expert) == plan.format(layer, expert)
    assert again.to_json() == plan.to_json()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "keys"),
        ({"layers": {}}, "default"),
        ({"default": "int4-g32", "layer": {}}, "no other"),
        ({"default": "int5-g32"}, "int5-g32"),
        ({"default": 4}, "not a format"),
        ({"default": "int4-g32", "layers": []}, "layers"),
        ({"default": "int4-g32", "layers": {"-1": "bf16"}}, "'-1' is not an index"),
        ({"default": "int4-g32", "layers": {"01": "bf16"}}, "'01'"),
        ({"default": "int4-g32", "layers": {"0": {"x": "bf16"}}}, "layer 0: expert 'x'"),
        ({"default": "int4-g32", "layers": {"0": {"3": "int9"}}}, "layer 0, expert 3"),
        ({"default": "int4-g32", "layers": {"0": 3}}, "layer 0"),
    ],
)
def test_what_is_wrong_is_named(value: object, message: str) -> None:
    with pytest.raises(ExpertFlowError, match=message):
        Plan.parse(value)


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for text in ("{", '{"default": "int7"}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"plan\.json"):
            Plan.load(path)
    with pytest.raises(CheckpointError, match=r"gone\.json"):
        Plan.load(tmp_path / "gone.json")
    path.write_text(json.dumps(MIXED))
    assert Plan.load(path).to_json() == MIXED


def test_check_against_the_model() -> None:
    shapes = [(ExpertShape(64, 32), 8), (ExpertShape(64, 32), 8)]
    Plan.parse(MIXED).check(shapes)
    with pytest.raises(ExpertFlowError, match=r"MoE layer 2.*2 layers \(0 to 1\)"):
        Plan(INT4, {2: INT8}).check(shapes)
    with pytest.raises(ExpertFlowError, match=r"expert 8 of layer 1.*8 experts \(0 to 7\)"):
        Plan(INT4, {1: {8: INT8}}).check(shapes)
    with pytest.raises(ExpertFlowError, match="does not divide 32"):
        Plan.uniform("int4-g64").check(shapes)
    Plan(INT4, {0: Format.parse("int4-g16"), 1: Format.parse("int4-channel")}).check(shapes)
