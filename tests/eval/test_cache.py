"""Cache policies on recorded routes: the steps are the trace's, chances mean what they say, the command tells all."""

import json
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from eval.__main__ import app
from eval.cache.command import cache
from eval.cache.contenders import Case, contenders, fit_for, predictions
from eval.cache.fast_path import BOUND
from eval.cache.measure import bound, verdicts
from eval.cache.workload import WORKLOADS, Workload, affinity_scores, calibrated, joined, oracle_scores, recall
from eval.speed.trace_stats import lru_hit_rate
from eval.speed.traces import calibrate, synthetic
from expertflow_quant.offload.layer_policy import LAYER_POLICIES
from expertflow_quant.offload.policies.affinity import fit_affinity
from expertflow_quant.offload.simulator import Link, replay
from expertflow_quant.offload.slots import LayerRecords
from expertflow_quant.offload.synthetic_trace import RouteSizes
from expertflow_quant.offload.trace import GENERATED, PROMPT_TEXT, RoutingTrace, batched_requests

LAYERS, EXPERTS, TOP_K = 3, 8, 2
TRACES = Path(__file__).parents[2] / "calibration" / "traces"


def make_trace(seed, items=6, task="charts"):
    """Items that each keep to their own half of the experts, with prompts of 3 tokens and answers of 1 to 12."""
    generator = torch.Generator().manual_seed(seed)
    kind, item, experts = [], [], []
    for number in range(items):
        answer = int(torch.randint(1, 13, (), generator=generator))
        half = int(torch.randint(0, 2, (), generator=generator)) * EXPERTS // 2
        for place in range(3 + answer):
            kind.append(PROMPT_TEXT if place < 3 else GENERATED)
            item.append(number)
            drawn = [torch.randperm(EXPERTS // 2, generator=generator)[:TOP_K] + half for _ in range(LAYERS)]
            experts.append(torch.stack(drawn))
    ids = torch.randint(0, 20, (len(kind),), generator=generator)
    return RoutingTrace.of(ids, kind, item, torch.stack(experts), EXPERTS, [task] * items)


def case(rows=1, phase="decode"):
    return Case(Workload("some", rows, phase), make_trace(1, 20), Path("some.safetensors"), make_trace(2, 20))


@pytest.mark.parametrize("rows", [1, 4, 50])
@pytest.mark.parametrize("phase", ["decode", "all"])
def test_steps_and_requests_are_those_of_the_trace(rows, phase):
    trace = make_trace(0)
    workload = Workload("some", rows, phase)
    assert workload.requests(trace) == list(batched_requests(trace, rows, phase))
    ran = torch.cat(workload.steps(trace)).sort().values.tolist()
    assert ran == [row for row in range(len(trace)) if phase == "all" or trace.kind[row] == GENERATED]


def test_chances_of_a_step_join_those_of_its_tokens():
    trace = make_trace(0, items=2)
    chances = torch.zeros(len(trace), LAYERS, EXPERTS)
    first = (trace.kind == GENERATED).nonzero().flatten()[0]
    second = ((trace.kind == GENERATED) & (trace.item == 1)).nonzero().flatten()[0]
    chances[first, 1, 4], chances[second, 1, 4], chances[second, 2, 0] = 0.5, 0.5, 1.0
    step = Workload("two", 2, "decode").scores(trace, chances)[0]
    assert (step[1][4], step[2][0], step[0][0]) == (0.75, 1.0, 0.0)


def test_calibrated_scores_are_the_share_that_was_used():
    fit = make_trace(3, 40)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(len(fit), LAYERS, EXPERTS, generator=generator) + 10 * fit.paths()
    chances = calibrated(fit, scores)(torch.tensor([[-5.0, 0.3, 10.5, 99.0]]))
    assert chances[0].tolist() == pytest.approx([0, 0, 1, 1])
    noise = torch.rand(len(fit), LAYERS, EXPERTS, generator=generator)
    spread = calibrated(fit, noise)(torch.linspace(0, 1, 50))
    assert float(spread.mean()) == pytest.approx(TOP_K / EXPERTS, abs=0.05)


def test_affinity_knows_an_item_by_its_experts_and_the_oracle_everything():
    made = case()
    requests, fitted = made.workload.requests(made.trace), made.workload.requests(made.fit)
    scores = affinity_scores(requests, made.experts, fit_affinity(fitted, made.experts, forget=0.0))
    assert len(scores) == len(requests)
    assert recall(requests, scores, 4) > 0.85  # chance: a half; only the first token of an item is a surprise
    assert recall(requests, oracle_scores(requests, EXPERTS), TOP_K) == 1


def test_joined_predictions_agree_or_cancel_and_an_uncertain_one_changes_nothing():
    prior = [[0.2, 0.2, 0.2]]
    joint = joined([[[0.2, 0.5, 0.8]]], [[[0.6, 0.5, 0.2]]], prior)
    assert joint[0][0] == pytest.approx([0.6, 0.8, 0.8])


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("phase", ["decode", "all"])
def test_without_fetching_ahead_nobody_beats_the_bound(rows, phase):
    made = case(rows, phase)
    requests, fitted = made.workload.requests(made.trace), made.workload.requests(made.fit)
    records = [LayerRecords((1,) * EXPERTS, TOP_K)] * LAYERS
    best = bound(requests, records, 12)
    for one in contenders(made, requests, fitted, predictions(made, requests, fitted)):
        link = Link(1.0, 1.0)
        found = replay(requests, records, 12, one.make, one.scores, slots="layers", link=link, ahead=one.ahead)
        assert one.ahead or found.hits <= best
        assert found.hits + found.misses == sum(len(wanted) for step in requests for wanted in step)


def test_verdicts_take_the_worst_budget():
    curves = [
        {"policy": name, "predictor": None, "hit_rate": rates, "of_belady": of}
        for name, rates, of in [
            ("Belady", [0.9, 0.95], [1.0, 1.0]),
            ("LRU", [0.2, 0.6], [0.5, 0.7]),
            ("LFU, decayed", [0.3, 0.59], [0.8, 0.9]),
        ]
    ]
    assert verdicts(curves) == {"LFU, decayed": {"least_lead_over_lru": -1.0, "least_share_of_belady": 0.8}}


def test_a_trace_is_fitted_on_one_of_its_own_tasks():
    charts, documents = make_trace(0), make_trace(1, task="documents")
    assert fit_for(documents, [charts, documents]) is documents
    with pytest.raises(ValueError, match="of the tasks documents"):
        fit_for(documents, [charts])


@pytest.mark.parametrize("slots", ["shared", "layers"])
@pytest.mark.parametrize("task", ["charts", "documents"])
def test_on_the_shipped_models_routes_prediction_leads_lru_and_fetched_ahead_nears_belady(task, slots):
    shared = slots == "shared"
    made = Case(
        WORKLOADS[0],
        RoutingTrace.load(TRACES / f"{task}.safetensors"),
        TRACES / f"{task}.safetensors",
        RoutingTrace.load(TRACES / f"{task}-train.safetensors"),
    )
    requests, fitted = made.workload.requests(made.trace), made.workload.requests(made.fit)
    compared = contenders(made, requests, fitted, predictions(made, requests, fitted))
    chosen = {one.name: one for one in compared if one.predictor in (None, "affinity and token table")}
    records = [LayerRecords((1,) * made.trace.num_experts, made.trace.top_k)] * made.trace.layers
    for slots_in_all in (12, 24, 48):
        hits = {
            name: replay(
                requests, records, slots_in_all, one.make, one.scores, slots=slots, link=Link(1, 1), ahead=one.ahead
            ).hits
            for name, one in chosen.items()
        }
        best = hits["Belady"] if shared else bound(requests, records, slots_in_all)
        assert hits["LRU"] < hits["LFU, decayed"] < hits["predictive"] < best
        assert hits["predictive + ahead"] > 0.9 * best


def run(*arguments):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(cache)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_figures_and_a_plot(tmp_path):
    make_trace(0).save(tmp_path / "test.safetensors")
    make_trace(1).save(tmp_path / "fit.safetensors")
    out = tmp_path / "cache.json"
    asked = [tmp_path / "test.safetensors", "--fit", tmp_path / "fit.safetensors", "--out", out]
    done = run(*asked, "--budget", 0.25, "--budget", 0.5)
    assert done.exit_code == 0, done.output
    assert "Belady" in done.output
    results = json.loads(out.read_text())
    assert [each["workload"] for each in results["cases"]] == [workload.name for workload in WORKLOADS]
    decode = results["cases"][0]
    assert {(curve["slots"], len(curve["hit_rate"])) for curve in decode["curves"]} == {("shared", 2), ("layers", 2)}
    oracle = [curve for curve in decode["curves"] if curve["ahead"] and curve["predictor"] == "oracle"]
    assert all(min(curve["hit_rate"]) > 0.5 and min(curve["ahead_bytes_per_step"]) > 0 for curve in oracle)
    assert all(min(curve["of_belady"]) > 1 for curve in oracle)
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_the_fast_path_s_policies_are_judged_on_drawn_and_recorded_routes(tmp_path):
    make_trace(0, 20).save(tmp_path / "test.safetensors")
    make_trace(1, 20).save(tmp_path / "fit.safetensors")
    out = tmp_path / "device.json"
    asked = [tmp_path / "test.safetensors", "--fit", tmp_path / "fit.safetensors", "--out", out, "--fast-path"]
    done = run(*asked, "--drawn-sizes", "2x32x4", "--seed", 3, "--budget", 0.25, "--budget", 0.5)
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())
    cases = {case["routes"]: case["hit_rate"] for case in results["cases"]}
    assert len(cases) == 2 + len(WORKLOADS)
    for rates in cases.values():
        assert set(LAYER_POLICIES) <= set(rates)
        best = rates.get(BOUND, [1.0, 1.0])
        assert all(0 < rate <= most for name in LAYER_POLICIES for rate, most in zip(rates[name], best, strict=True))
    trace = synthetic(
        RouteSizes(2, 32, 4), steps=160, rows=8, prompt=512, stickiness=calibrate(RouteSizes(2, 32, 4)), seed=3
    )
    for rows in (1, 8):
        lru = [lru_hit_rate(trace.decode[:, :, :rows], 32, slots, skip=32) for slots in (8, 16)]
        assert cases[f"drawn, {rows} row(s), seed 3"]["lru"] == pytest.approx(lru, abs=0.01)
    lead = results["lead_over_lru_points"]["drawn"]["lfu"]
    drawn = [rates for name, rates in cases.items() if name.startswith("drawn")]
    points = [100 * (a - b) for rates in drawn for a, b in zip(rates["lfu"], rates["lru"], strict=True)]
    assert lead["least"] == pytest.approx(min(points), abs=0.01)
    assert lead["mean"] == pytest.approx(sum(points) / len(points), abs=0.01)
    assert out.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fast-path", "--drawn-sizes", "48x8"], "sizes of routes '48x8'"),
        (["--fast-path", "--drawn-sizes", "2x4x8"], "like 48x128x8"),
        (["--workload", "nothing"], "no workload of these names"),
        (["--link-records", "0"], "more than 0 bytes"),
        (["--budget", "0.0001"], "expert memory"),
        (["--budget", "nan"], "give shares of all experts"),
        (["--budget", "25"], "give shares of all experts"),
    ],
)
def test_what_cannot_be_run_is_refused_in_words(tmp_path, arguments, said):
    trace = tmp_path / "test.safetensors"
    make_trace(0).save(trace)
    done = run(trace, "--fit", trace, "--out", tmp_path / "cache.json", *arguments)
    assert done.exit_code == 1
    assert said in done.output


def test_every_switch_of_the_plain_path_gives_the_same_answers(small_int4, tmp_path):
    command = ["policies", str(small_int4), "--items", "1", "--out", str(tmp_path / "policies.json")]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    runs = json.loads((tmp_path / "policies.json").read_text())["runs"]
    assert Image.open(tmp_path / "policies.png").size[0] > 900
    assert all(run["same_answers"] for run in runs)
    assert {run["policy"] for run in runs} == {"lru", "scan", "lfu", "predictive"}
    assert {run["ahead"] for run in runs if run["ahead_bytes_per_token"]} == {1.0}
