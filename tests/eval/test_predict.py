"""Scores of predictors against slow counts, and the command from trace files to results."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from eval.__main__ import app
from eval.predict.command import joined
from eval.predict.scores import Truth, interval, lru_residents, quality, truth_of
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.path_model import PathModel, PathModelSizes
from expertflow_quant.offload.policy import LRU
from expertflow_quant.offload.predict_paths import PathPredictor
from expertflow_quant.offload.sight import Sight, sight_path
from expertflow_quant.offload.trace import GENERATED, RoutingTrace

LAYERS, EXPERTS, TOP_K = 2, 8, 2


def routing(seed=0, items=3, tokens=9, task="charts"):
    generator = torch.Generator().manual_seed(seed)
    kinds = ([0, 1, 1, 1, 0] + [2] * (tokens - 5)) * items
    numbers = [item for item in range(items) for _ in range(tokens)]
    experts = torch.rand(len(kinds), LAYERS, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K]
    ids = torch.randint(0, 12, (len(kinds),), generator=generator)
    return RoutingTrace.of(ids, kinds, numbers, experts, EXPERTS, [task] * items)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), slots=st.integers(2, EXPERTS))
def test_lru_holds_what_the_policy_of_the_cache_holds(seed, slots):
    trace = routing(seed)
    resident = lru_residents(trace, slots)
    for layer in range(LAYERS):
        policy, held = LRU(), set()
        for row, wanted in enumerate(trace.experts[:, layer].tolist()):
            assert set(resident[row, layer].nonzero().flatten().tolist()) == held
            for expert in wanted:
                if expert not in held and len(held) == slots:
                    out = policy.victim({(layer, other) for other in wanted})
                    policy.removed(out)
                    held.remove(out[1])
                policy.used((layer, expert))
                held.add(expert)


def test_recall_and_precision_are_shares_of_used_and_of_named():
    trace = routing(1)
    scores = torch.rand(len(trace), LAYERS, EXPERTS, generator=torch.Generator().manual_seed(3))
    truth, slots = truth_of(trace, 0.25)
    found = quality(scores, truth)
    assert slots == 2
    for name, width in (("k", 2), ("1.5k", 3), ("2k", 4)):
        for kind, code in (("image", 1), ("generated", 2)):
            hits = named = used = 0
            for row in range(len(trace)):
                if int(trace.kind[row]) == code:
                    for layer in range(LAYERS):
                        guess = sorted(range(EXPERTS), key=lambda e, at=(row, layer): -scores[at][e])[:width]
                        hits += len(set(guess) & set(trace.experts[row, layer].tolist()))
                        named += width
                        used += TOP_K
            assert found["recall"][name][kind] == pytest.approx(hits / used, abs=1e-4)
            assert found["precision"][name][kind] == pytest.approx(hits / named, abs=1e-4)


def test_misses_count_generated_tokens_only_and_nothing_resident():
    trace = routing(2)
    truth, _ = truth_of(trace, 0.5)
    scores = torch.rand(len(trace), LAYERS, EXPERTS, generator=torch.Generator().manual_seed(4))
    found = quality(scores, truth)["misses"]
    missed = named = both = 0
    for row in range(len(trace)):
        if int(trace.kind[row]) != GENERATED:
            continue
        for layer in range(LAYERS):
            absent = [e for e in range(EXPERTS) if not truth.resident[row, layer, e]]
            guess = set(sorted(absent, key=lambda e, at=(row, layer): -scores[at][e])[:3])
            wanted = set(trace.experts[row, layer].tolist()) & set(absent)
            missed, named, both = missed + len(wanted), named + len(guess), both + len(guess & wanted)
    assert found["missed"] == missed
    assert found["1.5k"]["absent"]["recall"] == pytest.approx(both / missed, abs=1e-4)
    assert found["1.5k"]["absent"]["precision"] == pytest.approx(both / named, abs=1e-4)


def test_an_oracle_finds_all_and_a_full_cache_leaves_nothing():
    trace = routing(3)
    truth, _ = truth_of(trace, 0.25)
    oracle = quality(truth.paths.float(), truth)
    assert set(oracle["recall"]["k"].values()) == {1.0}
    assert oracle["recall_at_k_interval"]["all"] == [1.0, 1.0]
    assert oracle["misses"]["k"]["named"] == {
        "recall": 1.0, "precision": 1.0, "moved": oracle["misses"]["k"]["named"]["moved"]
    }  # fmt: skip
    full = Truth(trace, truth.paths, torch.ones_like(truth.paths))
    assert quality(truth.paths.float(), full)["misses"]["k"]["absent"]["recall"] is None


def test_interval_draws_whole_items():
    items = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    values = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    assert interval(values, items) == [0.0, 1.0]
    low, high = interval(torch.rand(400, generator=torch.Generator().manual_seed(0)), torch.arange(400))
    assert 0.44 < low < 0.5 < high < 0.56


def test_joined_keeps_items_apart():
    one, two = routing(0, 2), routing(1, 1, task="documents")
    both = joined([one, two])
    assert both.tasks == ("charts", "charts", "documents")
    assert torch.equal(both.of_task("documents").experts, two.experts)


def test_command_scores_across_tasks(tmp_path):
    for name, seed in (("charts", 0), ("documents", 1)):
        routing(seed, task=name).save(tmp_path / f"{name}.safetensors")
        routing(seed + 5, task=name).save(tmp_path / f"{name}-train.safetensors")
    trace = routing(0)
    Sight(trace.token_ids, EXPERTS, torch.zeros(len(trace), LAYERS, 2, 4, dtype=torch.uint8)).save(
        sight_path(tmp_path / "charts.safetensors")
    )
    model = PathModel(PathModelSizes(13, LAYERS, EXPERTS, width=8, inner=8, heads=2))
    PathPredictor(model, trained={"tasks": ["charts"]}).save(tmp_path / "learned")
    arguments = ["predict", *(str(tmp_path / f"{name}.safetensors") for name in ("charts", "documents"))]
    arguments += [
        part for name in ("charts", "documents") for part in ("--fit", str(tmp_path / f"{name}-train.safetensors"))
    ]
    arguments += ["--learned", str(tmp_path / "learned"), "--out", str(tmp_path / "predictors.json")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "predictors.json").read_text())
    assert set(results["predictors"]["frequency (charts)"]["on"]) == {"charts", "documents"}
    assert set(results["predictors"]["next gate, 1 ahead (charts)"]["on"]) == {"charts"}
    assert "encoder-decoder, ids (charts)" in results["predictors"]
    assert "previous token (charts + documents)" in results["predictors"]
    assert (tmp_path / "predictors.png").stat().st_size > 1000


def test_command_refuses_a_sight_of_another_trace(tmp_path):
    routing(0).save(tmp_path / "charts.safetensors")
    other = routing(1)
    Sight(other.token_ids, EXPERTS).save(sight_path(tmp_path / "charts.safetensors"))
    done = CliRunner().invoke(app, ["predict", str(tmp_path / "charts.safetensors"), "--out", str(tmp_path / "x.json")])
    assert done.exit_code == 1
    assert "another trace" in done.output.replace("\n", " ")


def test_nothing_to_score_is_an_error(tmp_path):
    from eval.predict.command import candidates

    with pytest.raises(ExpertFlowError, match="nothing to score"):
        candidates([], [])
