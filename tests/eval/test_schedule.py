"""What batches touch is counted right, and the command compares orders on recorded traces."""

import json

import pytest
import torch
from typer.testing import CliRunner

from eval.__main__ import app
from eval.plots import save
from eval.schedule.at_work import Traffic, measure_at_work
from eval.schedule.measure import interval
from eval.schedule.plots import AT_WORK, at_work_figure
from eval.schedule.traffic import joined, known_paths, touched
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.path_model import PathModel, PathModelSizes
from expertflow_quant.offload.predict_paths import PathPredictor
from expertflow_quant.offload.trace import GENERATED, PROMPT_TEXT, RoutingTrace


def recorded(task, first, items=24, layers=2, experts=8, seed=0):
    """Items of one prompt token and one to three generated ones, all routed to two of four experts from ``first``."""
    draw = torch.Generator().manual_seed(seed)
    kind, item = [], []
    for number in range(items):
        tokens = 2 + int(torch.randint(0, 3, (1,), generator=draw))
        kind += [PROMPT_TEXT] + [GENERATED] * (tokens - 1)
        item += [number] * tokens
    routes = torch.stack([torch.randperm(4, generator=draw)[:2] + first for _ in range(len(kind) * layers)]).view(
        len(kind), layers, 2
    )
    return RoutingTrace.of([0] * len(kind), kind, item, routes, experts, [task] * items)


def small():
    """Two items of one layer and four experts: routes (0 1)(2 3) and (0 1), generated."""
    experts = torch.tensor([[[0, 1]], [[0, 1]], [[2, 3]], [[1, 2]], [[0, 1]]])
    return RoutingTrace.of([0] * 5, [0, 2, 2, 0, 2], [0, 0, 0, 1, 1], experts, 4, ["a", "b"])


def test_distinct_experts_are_counted_by_hand():
    found = touched(small(), [[0, 1]], [0.5])
    assert found.figures == {"whole_batch_step": 2, "batch": 4, "step": 2, "loads_per_token": 4 / 3, "steps": 2}
    assert (found.hit_rate["50%"], found.misses["50%"]) == (0.5, 2 / 3)
    apart = touched(small(), [[0], [1]], [0.5])
    assert apart.figures == {"whole_batch_step": 2, "batch": 3, "step": 2, "loads_per_token": 2, "steps": 3}


def test_known_paths_are_the_prompts_and_the_answers():
    paths = known_paths(small())
    assert paths["prompt"][1].nonzero()[:, 1].tolist() == [1, 2]
    assert paths["oracle"][0].all()
    assert paths["oracle"][1].nonzero()[:, 1].tolist() == [0, 1]
    assert paths["task"].flatten(1).all(1).tolist() == [False, True]


def test_traces_are_joined_without_items_that_generate_nothing():
    silent = RoutingTrace.of([0, 0], [0, 0], [0, 0], torch.tensor([[[0, 1]], [[2, 3]]]), 4, ["c"])
    both = joined([small(), silent, small()])
    assert both.tasks == ("a", "b", "a", "b")
    assert torch.equal(both.experts[5:], small().experts)
    with pytest.raises(ExpertFlowError, match="one and the same model"):
        joined([small(), recorded("a", 0)])


def test_an_interval_is_students():
    assert interval([1.0, 2.0, 3.0]) == pytest.approx({"mean": 2.0, "lower": 2 - 2.4843, "upper": 2 + 2.4843}, abs=1e-3)


def test_the_command_finds_that_grouping_halves_what_disjoint_tasks_touch(tmp_path):
    recorded("charts", 0).save(tmp_path / "a.safetensors")
    recorded("documents", 4, seed=1).save(tmp_path / "b.safetensors")
    out = tmp_path / "schedule.json"
    command = ["schedule", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--out", str(out)]
    outcome = CliRunner().invoke(app, [*command, "--rows", "6", "--seeds", "3", "--patience", "3"])
    assert outcome.exit_code == 0, outcome.output
    results = json.loads(out.read_text())
    assert out.with_suffix(".png").stat().st_size > 1000
    entries = {entry["paths"]: entry for entry in results["orders"]}
    assert set(entries) == {"arrival", "task", "words", "prompt", "oracle"}
    assert results["settings"]["items"] == {"charts": 24, "documents": 24}
    for name in ("task", "prompt", "oracle"):
        assert entries[name]["change"]["batch"]["mean"] < -0.2
        assert entries[name]["latest"] <= 3
    outcome = CliRunner().invoke(app, ["schedule", str(tmp_path / "no.safetensors"), "--out", str(out)])
    assert outcome.exit_code == 1
    assert "cannot read the trace" in outcome.output


def test_paths_by_words_and_by_a_predictor_that_read_the_prompt():
    trace = small()
    torch.manual_seed(0)
    predictor = PathPredictor(PathModel(PathModelSizes(tokens=4, layers=1, experts=4, width=16, inner=32)))
    paths = known_paths(trace, predictor)
    assert paths["words"].flatten(1).nonzero().tolist() == [[0, 0], [1, 0]]
    scores = predictor.scores_for(trace)
    for item, row in enumerate((0, 3)):
        assert sorted(scores[row, 0].topk(2).indices.tolist()) == paths["predicted"][item].nonzero()[:, 1].tolist()


def test_orders_at_work_answer_the_same_questions(small_int4, tmp_path):
    ticks = []
    found = measure_at_work(small_int4, Traffic(2, 2, 2, "50%"), [2], None, lambda: ticks.append(1))
    assert [(entry["paths"], entry["patience"]) for entry in found] == [("arrival", 0), ("words", 2)]
    assert len(ticks) == 4
    for entry in found:
        assert 2 <= entry["figures"]["distinct_experts"] <= 16
        assert 0 < entry["figures"]["hit_rate"] < 1
    assert found[1]["change"]["tokens_per_second"]["lower"] < found[1]["change"]["tokens_per_second"]["upper"]
    figure = at_work_figure(found, 2)
    assert [panel.get_title("left") for panel in figure.axes] == list(AT_WORK.values())
    save(figure, tmp_path / "at-work.png")
