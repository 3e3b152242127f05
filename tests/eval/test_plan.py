"""A format for every expert: the greedy choice against all others, the measured errors, the command."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from calibration.__main__ import app
from calibration.measure import measure_errors
from calibration.plan import ExpertErrors, choose, errors_from_json, errors_to_json
from expertflow_quant.checkpoint.plan import Plan
from expertflow_quant.formats import ExpertFlowError, Format
from expertflow_quant.samples import make_items

INT2, INT3, INT4, BF16 = (Format.parse(name) for name in ("int2-g32", "int3-g32", "int4-g32", "bf16"))


def convex(expert: int, small: float, large: float) -> ExpertErrors:
    """Damages 0, a, a + b for 4, 3, 2 bits, with b >= a: each bit less hurts more."""
    low, high = sorted((small, large))
    return ExpertErrors(0, expert, 64, 10, {INT4: 0.0, INT3: low, INT2: low + high})


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5), st.integers(0, 10))
def test_greedy_choice_is_the_best_of_all(pairs, spare):
    experts = [convex(i, *pair) for i, pair in enumerate(pairs)]
    total_bits = min(2 * len(experts) + spare, 4 * len(experts))
    choice = choose(experts, total_bits / len(experts))
    options = [[(form.bits, damage) for form, damage in e.damage.items()] for e in experts]
    allowed = [ways for ways in itertools.product(*options) if sum(bits for bits, _ in ways) <= total_bits]
    best = min(sum(damage for _, damage in ways) for ways in allowed)
    assert choice.damage == pytest.approx(best)
    assert choice.average_bits <= total_bits / len(experts)


def test_a_rare_or_robust_expert_gives_its_bits_first():
    experts = [convex(0, 0.001, 0.002), convex(1, 0.3, 0.5), convex(2, 0.0, 0.0)]
    assert choose(experts, 3.0).formats == {(0, 0): INT3, (0, 1): INT4, (0, 2): INT2}


def test_large_experts_count_by_their_weights():
    large = ExpertErrors(0, 0, 300, 1, {INT4: 0.0, INT2: 0.1})
    small = ExpertErrors(0, 1, 100, 1, {INT4: 0.0, INT2: 0.05})
    choice = choose([large, small], 2.5)
    assert choice.formats == {(0, 0): INT2, (0, 1): INT4}
    assert choice.average_bits == 2.5


def test_a_target_below_every_format_is_refused():
    with pytest.raises(ExpertFlowError, match=r"1\.5 bits cannot be reached.*average 2"):
        choose([convex(0, 0.1, 0.2)], 1.5)
    with pytest.raises(ExpertFlowError, match="0 experts"):
        choose([], 3.0)


def test_plan_and_errors_files_are_read_back():
    experts = [convex(i, 0.25 * i, 0.5 * i) for i in range(4)]
    choice = choose(experts, 3.0)
    plan = Plan.parse(choice.to_plan())
    assert {key: plan.format(*key) for key in choice.formats} == choice.formats
    assert errors_from_json(json.loads(json.dumps(errors_to_json({"items": 1}, experts)))) == experts
    with pytest.raises(ExpertFlowError, match="measure again"):
        errors_from_json({"layers": [{"experts": [{"tokens": 1}]}]})


def test_damage_shrinks_with_every_bit_and_is_a_share(small_moe):
    samples = [{"messages": item.messages} for item in make_items("chart", "calibration", 4)]
    done = []
    errors = measure_errors(small_moe, samples, [INT2, INT3, INT4, BF16], lambda *at: done.append(at))
    assert done == [(layer, 6) for layer in range(1, 7)]
    assert len(errors) == 6 * 16
    for layer in range(6):
        of_layer = [e for e in errors if e.layer == layer]
        assert sum(e.tokens for e in of_layer) == sum(e.tokens for e in errors if e.layer == 0)
        sums = [sum(e.damage[form] for e in of_layer) for form in (INT2, INT3, INT4, BF16)]
        assert 1.5 > sums[0] > 2 * sums[1] > 4 * sums[2] > 0 == sums[3]
    assert all(e.damage[INT2] == 0 for e in errors if not e.tokens)


def test_the_command_writes_a_plan_and_keeps_the_errors(small_moe, tmp_path, monkeypatch):
    plan, errors = tmp_path / "plan.json", tmp_path / "errors.json"
    command = ["plan", str(small_moe), "-o", str(plan), "--errors", str(errors), "--samples", "4"]
    outcome = CliRunner().invoke(app, [*command, "--average-bits", "2.5"])
    assert outcome.exit_code == 0, outcome.output
    formats = [Plan.load(plan).format(layer, expert) for layer in range(6) for expert in range(16)]
    assert sum(form.bits for form in formats) / 96 == pytest.approx(2.5)
    monkeypatch.setattr("calibration.__main__.measure_errors", None)  # measured once is enough
    outcome = CliRunner().invoke(app, [*command, "--average-bits", "3"], env={"COLUMNS": "300"})
    assert "3.00 bits on average" in outcome.output
    outcome = CliRunner().invoke(app, [*command[:-1], "3"], env={"COLUMNS": "300"})
    assert outcome.exit_code == 1
    assert "delete it to measure again" in outcome.output
    outcome = CliRunner().invoke(app, [*command, "--scales", "mean"], env={"COLUMNS": "300"})
    assert "use absmax or mse" in outcome.output
