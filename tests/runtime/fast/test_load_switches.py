"""What load is told of looking ahead and of slots reaches the fast path."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import fast
from helpers.fast import CONVERSATIONS, tokens

import expertflow_quant
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.budget import BudgetError
from expertflow_quant.offload.layer_policy import BEST_LAYER_POLICY, layer_policy
from expertflow_quant.offload.path_model import PathModel, PathModelSizes
from expertflow_quant.offload.predict_paths import PathPredictor
from expertflow_quant.runtime.fast.build import FastOptions
from expertflow_quant.runtime.fast.probe import FastPathError

OPTIONS = FastOptions(rows=2, room=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return fast.checkpoint(tmp_path_factory.mktemp("switches") / "model", "qwen3_moe", lambda layer, expert: "int4-g16")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    layers = expertflow_quant.load(folder).model.expert_store.layers
    sizes = PathModelSizes(tokens=99, layers=len(layers), experts=len(layers[0].nbytes), width=16, inner=16, heads=2)
    where = tmp_path_factory.mktemp("predictor")
    PathPredictor(PathModel(sizes), None, {}).save(where)
    return where


def load(folder, memory="60%", **switches):
    return expertflow_quant.load(folder, memory, fast=True, options=OPTIONS, **switches)


def test_a_predictor_is_looked_ahead_by(folder, trained):
    wanted = tokens(load(folder), CONVERSATIONS[:2], 4)
    for predictor, kind in (("off", None), ("auto", None), ("next-gate", "guess"), (str(trained), "foretold")):
        engine = load(folder, predictor=predictor)
        ahead = engine.runner.graphs._passes[1]._ahead
        found = None if ahead is None else "guess" if ahead.foretold is None else "foretold"
        assert found == kind, predictor
        assert tokens(engine, CONVERSATIONS[:2], 4) == wanted


def test_the_checkpoints_own_predictor_is_the_default(folder, trained):
    own = [folder / file.name for file in trained.iterdir()]
    try:
        for file in trained.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        assert load(folder).runner.graphs.foretold is not None
        assert load(folder, predictor="paths").runner.graphs.foretold is not None
        assert load(folder, predictor="off").runner.graphs.foretold is None
        chosen = expertflow_quant.load(folder, "60%", fast=True, options=replace(OPTIONS, look_ahead="next-gate"))
        assert chosen.runner.graphs.foretold is None
    finally:
        for file in own:
            file.unlink()


def test_what_the_fast_path_has_not_is_refused_by_name(folder):
    for switches, said in (
        ({"predictor": "frequency"}, "predictor 'frequency' is the plain path's"),
        ({"predictor": "paths"}, "holds no trained predictor"),
        ({"policy": "lfu", "ahead": 1.0}, "ahead 1.0: the plain path's"),
    ):
        with pytest.raises(FastPathError, match=said):
            load(folder, **switches)
    with pytest.raises(ExpertFlowError, match="policy 'scan' is not known: use one of lru, lfu"):
        load(folder, policy="scan")
    with pytest.raises(ExpertFlowError, match="predictor 'nowhere' is not known"):
        load(folder, predictor="nowhere")


def test_slots_of_a_plan_are_the_layers(folder, tmp_path):
    store = expertflow_quant.load(folder).model.expert_store
    nbytes = store.layers[0].nbytes[0]
    file = tmp_path / "plan.slots.json"

    def write(*slots):
        file.write_text(json.dumps({"layers": [{"pools": [{"nbytes": nbytes, "slots": count}]} for count in slots]}))

    write(1, 4)
    engine = load(folder, slots=file)
    assert engine.runner.resident.plan == (((nbytes, 1),), ((nbytes, 4),))
    assert tokens(engine, CONVERSATIONS[:2], 4) == tokens(load(folder), CONVERSATIONS[:2], 4)
    write(8, 8)
    with pytest.raises(BudgetError, match=r"expert memory has .* for slots: raise --expert-memory"):
        load(folder, slots=file)


@pytest.mark.parametrize("memory", ["100%", "200KiB"])
def test_what_a_plan_leaves_out_is_staged_where_all_would_fit(memory, folder, tmp_path):
    store = expertflow_quant.load(folder).model.expert_store
    file, nbytes = tmp_path / "plan.slots.json", store.layers[0].nbytes[0]
    file.write_text(json.dumps({"layers": [{"pools": [{"nbytes": nbytes, "slots": count}]} for count in (1, 5)]}))
    engine = load(folder, memory, slots=file)
    assert engine.runner.ring.slot_bytes == nbytes
    assert engine.device_expert_bytes <= max(store.nbytes, 200 * 1024)
    assert tokens(engine, CONVERSATIONS[:2], 4) == tokens(load(folder), CONVERSATIONS[:2], 4)
    assert engine.stats.misses > 0
    file.write_text(json.dumps({"layers": [{"pools": [{"nbytes": nbytes, "slots": 8}]}] * 2}))
    assert load(folder, memory, slots=file).device_expert_bytes <= store.nbytes + 256


@pytest.mark.parametrize("policy", [None, "lru", "predictive"])
def test_a_policy_is_the_controllers(folder, policy):
    engine = load(folder, "40%", policy=policy)
    assert engine.runner.resident.policy == layer_policy(policy or BEST_LAYER_POLICY)
    assert tokens(engine, CONVERSATIONS[:1], 4) == tokens(load(folder), CONVERSATIONS[:1], 4)
