"""A format for every expert: the program's choice against all others, damages at outputs, the command."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from calibration.__main__ import app
from calibration.measure import measure_errors
from calibration.plan import ExpertErrors, choose, choose_damage, choose_within, code_bits, record_size
from calibration.plan_command import Budget
from expertflow_quant.checkpoint.plan import Plan
from expertflow_quant.formats import ExpertFlowError, ExpertShape, Format, RecordLayout
from expertflow_quant.offload.synthetic_trace import RouteSizes, synthetic_trace
from expertflow_quant.samples import make_items

INT2, INT3, INT4, BF16 = (Format.parse(name) for name in ("int2-g32", "int3-g32", "int4-g32", "bf16"))
DAMAGES = st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))


def expert_of(number: int, damages: tuple[float, float, float], weights: int = 64) -> ExpertErrors:
    """Any damages for 4, 3, 2 bits, in no order."""
    return ExpertErrors(0, number, weights, 10, dict(zip((INT4, INT3, INT2), damages, strict=True)))


def all_choices(experts: list[ExpertErrors]) -> list[tuple[float, float]]:
    """(bits, damage) of every way to give formats."""
    ways = itertools.product(*(expert.damage.items() for expert in experts))
    return [
        (sum(code_bits(e, form) for e, (form, _) in zip(experts, way, strict=True)), sum(lost for _, lost in way))
        for way in ways
    ]


@settings(deadline=None, max_examples=60)
@given(st.lists(DAMAGES, min_size=1, max_size=5), st.integers(0, 10))
def test_the_least_damage_of_all_within_the_bits(damages, spare):
    experts = [expert_of(i, each, 64 * (1 + i % 2)) for i, each in enumerate(damages)]
    total = sum(expert.weights for expert in experts)
    bits = min(2 + spare / 5, 4.0)
    choice = choose(experts, bits)
    best = min(lost for used, lost in all_choices(experts) if used <= bits * total)
    assert choice.damage == pytest.approx(best, rel=2e-4, abs=1e-9)
    assert choice.average_bits <= bits * (1 + 1e-9)


@settings(deadline=None, max_examples=60)
@given(st.lists(DAMAGES, min_size=1, max_size=5), st.floats(0, 1))
def test_the_fewest_bits_of_all_at_a_damage(damages, share):
    experts = [expert_of(i, each) for i, each in enumerate(damages)]
    least = sum(min(each) for each in damages)
    allowed = least + share * (sum(max(each) for each in damages) - least) + 1e-6
    choice = choose_damage(experts, code_bits, allowed)
    best = min(used for used, lost in all_choices(experts) if lost <= allowed)
    assert choice.average_bits * 64 * len(experts) == pytest.approx(best)
    assert choice.damage <= allowed * (1 + 1e-5)


def test_a_budget_of_bytes_counts_whole_records():
    shape = ExpertShape(64, 32)
    size = record_size([shape], input_scale=True)
    experts = [ExpertErrors(0, i, 3 * 64 * 32, 1, {INT4: 0.0, INT2: 1.0 + i}) for i in range(3)]
    small, large = (RecordLayout(shape, form, True).nbytes for form in (INT2, INT4))
    assert size(experts[0], INT2) == small < large
    choice = choose_within(experts, size, small + 2 * large, "that many bytes")
    assert choice.formats == {(0, 0): INT2, (0, 1): INT4, (0, 2): INT4}
    assert choose_within(experts, size, small + 2 * large - 1, "").damage == 3.0
    with pytest.raises(ExpertFlowError, match="as few bytes cannot be reached"):
        choose_within(experts, size, 3 * small - 1, "as few bytes")


def test_a_rare_or_robust_expert_gives_its_bits_first():
    experts = [expert_of(0, (0, 0.001, 0.003)), expert_of(1, (0, 0.3, 0.8)), expert_of(2, (0, 0, 0))]
    assert choose(experts, 3.0).formats == {(0, 0): INT3, (0, 1): INT4, (0, 2): INT2}


def test_what_cannot_be_reached_is_refused():
    with pytest.raises(ExpertFlowError, match=r"1\.5 bits cannot be reached.*average 2"):
        choose([expert_of(0, (0, 0.1, 0.2))], 1.5)
    with pytest.raises(ExpertFlowError, match="0 experts"):
        choose([], 3.0)
    with pytest.raises(ExpertFlowError, match=r"damage of at most 0\.05 .* do 0\.1"):
        choose_damage([expert_of(0, (0.1, 0.2, 0.3))], code_bits, 0.05)
    with pytest.raises(ExpertFlowError, match="one budget, got bits and damage"):
        Budget(bits=3.0, damage="int4-g32")
    with pytest.raises(ExpertFlowError, match="int8-g32 was not measured"):
        Budget(damage="int8-g32").decide([expert_of(0, (0.1, 0.2, 0.3))], code_bits)


def test_a_formats_own_damage_is_kept_in_fewer_bits():
    experts = [expert_of(0, (0.1, 0.2, 0.2)), expert_of(1, (0.0, 0.2, 0.9))]
    choice = Budget(damage="int3-g32").decide(experts, code_bits)
    assert choice.damage <= 0.4
    assert choice.formats == {(0, 0): INT2, (0, 1): INT3}


def test_a_plan_is_read_back():
    choice = choose([expert_of(i, (0.0, 0.25 * i, 0.8 * i)) for i in range(4)], 3.0)
    plan = Plan.parse(choice.to_plan())
    assert {key: plan.format(*key) for key in choice.formats} == choice.formats


def test_damage_at_outputs_shrinks_with_every_bit_and_is_a_share(small_moe):
    samples = [{"messages": item.messages} for item in make_items("chart", "calibration", 2)]
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


def test_the_command_writes_a_plan_its_plot_and_the_sensitivity(small_moe, tmp_path, monkeypatch):
    plan, file = tmp_path / "plan.json", tmp_path / "sensitivity.json"
    command = ["plan", str(small_moe), "-o", str(plan), "--sensitivity", str(file), "--samples", "2"]
    outcome = CliRunner().invoke(app, [*command, "--average-bits", "2.5"])
    assert outcome.exit_code == 0, outcome.output
    formats = [Plan.load(plan).format(layer, expert) for layer in range(6) for expert in range(16)]
    assert sum(form.bits for form in formats) / 96 <= 2.5
    assert plan.with_suffix(".png").stat().st_size > 1000
    monkeypatch.setattr("calibration.plan_command.measure", None)  # measured once is enough
    outcome = CliRunner().invoke(app, [*command, "--bytes", "3MiB"], env={"COLUMNS": "300"})
    assert outcome.exit_code == 0, outcome.output
    decided = json.loads(plan.with_suffix(".decision.json").read_text())
    assert decided["record_bytes"] <= 3 << 20
    assert decided["damage"] <= decided["all_alike"]["int2-g32"]["damage"]
    assert decided["sensitivity"]["samples"]["count"] == 2
    outcome = CliRunner().invoke(app, [*command, "--bytes", "3MiB", "--damage", "1"], env={"COLUMNS": "300"})
    assert outcome.exit_code == 1
    assert "one budget" in outcome.output
    outcome = CliRunner().invoke(app, [*command, "--formats", "int2-g64,int4-g32"], env={"COLUMNS": "300"})
    assert "does not hold int2-g64" in outcome.output


@pytest.fixture(scope="module")
def joint(small_moe, tmp_path_factory):
    """``python -m calibration plan`` with traces, by a sensitivity that was measured before."""
    root = tmp_path_factory.mktemp("joint")
    measured = ["sensitivity", str(small_moe), "--out", str(root / "measured.json"), "--samples", "1", "--probes", "1"]
    assert CliRunner().invoke(app, measured).exit_code == 0

    def run(*options):
        given = ["--sensitivity", str(root / "measured.json"), "-o", str(root / "plan.json"), "--time-limit", "30"]
        return CliRunner().invoke(app, ["plan", str(small_moe), *given, *options], env={"COLUMNS": "300"})

    return run


def drawn(path, layers, experts, top_k):
    synthetic_trace(RouteSizes(layers, experts, top_k), steps=8, rows=2, prompt=1).save(path)
    return str(path)


@pytest.mark.parametrize("sizes", [(4, 16, 2), (6, 8, 2), (6, 32, 2), (6, 16, 4)])
def test_a_trace_of_another_model_is_refused(joint, tmp_path, sizes):
    own, other = drawn(tmp_path / "own.safetensors", 6, 16, 2), drawn(tmp_path / "other.safetensors", *sizes)
    for options in (["--trace", other], ["--trace", own, "--held-out", other]):
        outcome = joint(*options)
        assert outcome.exit_code == 1
        assert f"other.safetensors was recorded with {sizes[0]} layers of {sizes[1]} experts" in outcome.output
