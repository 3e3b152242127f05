"""Policies, predictors, fetching ahead and a plan's slots in the runtime: answers stay, counts are the simulator's."""

import json
import shutil

import pytest
import torch
from helpers import tiny

import expertflow_quant
from expertflow_quant import ExpertFlowError
from expertflow_quant.offload.budget import BudgetError
from expertflow_quant.offload.foresight import PassTokens, PathForesight
from expertflow_quant.offload.path_model import PathModel, PathModelSizes
from expertflow_quant.offload.policies.named import POLICIES, Usage, policy_maker
from expertflow_quant.offload.predict_paths import PathPredictor
from expertflow_quant.offload.simulator import Link, replay
from expertflow_quant.offload.slots import LayerRecords
from expertflow_quant.offload.slots_file import layer_classes, pools_bytes, read_slots
from expertflow_quant.offload.trace import requests
from expertflow_quant.runtime.caching import GUESSES, CacheOptions, has_predictor
from expertflow_quant.runtime.fast.probe import FastPathError
from expertflow_quant.runtime.recorder import recording

ASKED = [[{"role": "user", "content": text}] for text in ("What is a router?", "Two?", "And a third, longer question")]
SIZES = PathModelSizes(tokens=tiny.VOCABULARY, layers=2, experts=8, width=16, inner=32, encoder_layers=1)


def mixed(layer, expert):
    return ("int4-g16", "int2-g16", "int4-g16")[(layer + expert) % 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a predictor of its own, and beside it a trace of three answers."""
    root = tmp_path_factory.mktemp("cached")
    tiny.write_checkpoint(tiny.tiny_model("qwen3_moe"), root / "checkpoint", mixed)
    tiny.save_processor("qwen3_moe", root / "processor")
    for file in (root / "processor").iterdir():
        shutil.copy(file, root / "checkpoint")
    torch.manual_seed(3)
    PathPredictor(PathModel(SIZES)).save(root / "checkpoint")
    engine = expertflow_quant.load(root / "checkpoint")
    with recording(engine, ["text"] * len(ASKED)) as recorder:
        for question in ASKED:
            engine.generate([question], 8)
    recorder.trace().save(root / "usage.safetensors")
    return root


@pytest.fixture(scope="module")
def usage(folder):
    return folder / "usage.safetensors"


def answers(engine):
    batch = engine.generate(ASKED, 8)
    return [engine.generate([question], 8)[0].token_ids for question in ASKED] + [one.token_ids for one in batch]


SWITCHES = [
    *({"policy": name} for name in POLICIES),
    *({"predictor": name, "ahead": 1.5} for name in (*GUESSES, "next-gate", "paths", "auto")),
    {"policy": "lru", "predictor": "paths", "ahead": 4.0},
    {"predictor": "paths"},
]


@pytest.fixture(scope="module")
def wanted(folder):
    return answers(expertflow_quant.load(folder / "checkpoint"))


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_answers_are_the_same_however_experts_are_kept(folder, usage, wanted, switches):
    for given in (None, usage):
        if given is None and ("static" in switches.values() or "affinity" in switches.values()):
            continue
        engine = expertflow_quant.load(folder / "checkpoint", "40%", usage=given, **switches)
        assert answers(engine) == wanted
        assert engine.stats.misses
        assert bool(engine.stats.ahead_bytes) == bool(switches.get("ahead"))


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("ahead", [0.0, 1.5])
def test_hits_and_bytes_are_the_simulators_for_the_same_routes(folder, usage, name, ahead):
    """The trace was recorded of the same answers, so a replay must count what the runtime counted."""
    engine = expertflow_quant.load(
        folder / "checkpoint", "40%", policy=name, predictor="previous", ahead=ahead, usage=usage
    )
    cache, told = engine.model.expert_cache, []
    begin = cache.progress.begin_step
    cache.progress.begin_step = lambda scores: (told.append([list(row) for row in scores]), begin(scores))
    for question in ASKED:
        engine.generate([question], 8)
    trace = expertflow_quant.offload.trace.RoutingTrace.load(usage)
    layers, experts = engine.model.expert_store.layers, [8, 8]
    link = Link(max(1.0, ahead * max(max(layer.nbytes) for layer in layers)), 1.0)
    found = replay(
        list(requests(trace, "all")),
        layers,
        int(engine.expert_bytes * 0.4),
        lambda progress: policy_maker(name, progress, Usage.load(usage, experts))(),
        told,
        preload=True,
        link=link,
        ahead=bool(ahead),
    )
    assert engine.stats.layers == found.layers
    assert (engine.stats.bytes_moved, engine.stats.ahead_bytes) == (found.bytes_moved, found.fetched_ahead_bytes)


def test_a_pass_is_told_what_the_predictor_scores(folder, usage):
    """Step by step, with the prompts' states kept, it says what scoring the whole recorded answer says."""
    predictor = PathPredictor.load(folder / "checkpoint")
    trace = expertflow_quant.offload.trace.RoutingTrace.load(usage)
    scores = torch.sigmoid(predictor.scores_for(trace))
    foresight = PathForesight(predictor, [8, 8])
    for item in range(trace.items):
        for step in trace.steps(item):
            ids = trace.token_ids[step].long().unsqueeze(0)
            real, begins = torch.ones_like(ids, dtype=torch.bool), step.start == trace.rows(item).start
            if begins:  # as generate pads it
                ids = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], dim=1)
                real = torch.cat([torch.zeros(1, 3, dtype=torch.bool), real], dim=1)
            chances = foresight.before(PassTokens(ids, real, torch.zeros_like(real), begins))
            torch.testing.assert_close(torch.tensor(chances), 1 - (1 - scores[step]).prod(0), atol=1e-4, rtol=1e-4)


def test_a_prompt_begins_once(folder, usage, monkeypatch):
    """A predictor forgets what it has read where a prompt begins; each token after it is read behind the prompt."""
    told, before = [], PathForesight.before
    monkeypatch.setattr(PathForesight, "before", lambda self, tokens: (told.append(tokens), before(self, tokens))[1])
    engine = expertflow_quant.load(folder / "checkpoint", "40%", predictor="paths", fast=False)
    for prompt in ASKED[:2]:
        (answer,) = engine.generate([prompt], 4)
        steps = answer.completion_tokens - 1
        assert [tokens.begins for tokens in told] == [True] + [False] * steps
        assert [tokens.ids.shape[1] for tokens in told] == [answer.prompt_tokens] + [1] * steps
        told.clear()


def test_next_gate_names_what_the_next_router_chooses(folder):
    """With one layer's router in the next one's place, the guess is that layer's own choice."""
    engine = expertflow_quant.load(folder / "checkpoint", "40%", predictor="next-gate", ahead=1.0)
    routers = [layer.mlp.gate.weight for layer in engine.model.model.layers]
    routers[1].data.copy_(routers[0].data)
    seen, cache = [], engine.model.expert_cache
    after = cache.fetch_ahead
    cache.fetch_ahead = lambda experts: (seen.append((sorted(experts), [*cache.progress.scores])), after(experts))
    engine.generate([ASKED[0]], 1)
    (first, scores), _ = seen
    assert sorted(expert for expert, score in enumerate(scores[1]) if score > 0) == first


def test_what_is_not_known_is_refused_by_name(folder, usage, tmp_path):
    checkpoint = folder / "checkpoint"
    for message, switches in {
        "policy 'mru' is not known: use one of lru": {"policy": "mru"},
        "predictor 'oracle' is not known": {"predictor": "oracle"},
        "records ahead": {"ahead": -1.0},
        "'static' needs a recorded run": {"policy": "static"},
        "'affinity' needs a recorded run": {"predictor": "affinity", "ahead": 1.0},
        "no predictor that can be read": {"predictor": str(tmp_path), "ahead": 1.0},
    }.items():
        with pytest.raises(ExpertFlowError, match=message):
            expertflow_quant.load(checkpoint, "40%", **switches)
    with pytest.raises(FastPathError, match="plain path's"):
        expertflow_quant.load(checkpoint, "40%", fast=True, ahead=1.0)
    other = PathPredictor(PathModel(PathModelSizes(tokens=9, layers=3, experts=8, width=16, inner=32)))
    other.save(tmp_path)
    with pytest.raises(ExpertFlowError, match="3 layers of 8 experts"):
        expertflow_quant.load(checkpoint, "40%", predictor=str(tmp_path), ahead=1.0)
    with pytest.raises(ExpertFlowError, match="2 layers of 8"):
        Usage.load(usage, [4, 4])
    expertflow_quant.offload.trace.RoutingTrace.load(usage).of_items([]).save(tmp_path / "empty.safetensors")
    with pytest.raises(ExpertFlowError, match="has 0 steps, too few to learn use from"):
        Usage.load(tmp_path / "empty.safetensors", [8, 8])
    assert has_predictor(checkpoint)
    assert CacheOptions().policy == "predictive"


def test_a_plans_slots_are_the_caches(folder, wanted, tmp_path):
    store = expertflow_quant.load(folder / "checkpoint").model.expert_store
    sizes = [sorted(set(layer.nbytes)) for layer in store.layers]
    file = tmp_path / "plan.slots.json"
    pools = [
        [{"nbytes": small, "slots": 2}, {"nbytes": large, "slots": 4 - at}] for at, (small, large) in enumerate(sizes)
    ]
    file.write_text(json.dumps({"layers": [{"pools": layer} for layer in pools]}))
    engine = expertflow_quant.load(folder / "checkpoint", policy="lru", slots=file)
    classes = engine.model.expert_cache.classes
    assert [(size.layer, size.nbytes, size.slots) for size in classes] == [
        (at, pool["nbytes"], pool["slots"]) for at, layer in enumerate(pools) for pool in layer
    ]
    plan = read_slots(file, store.layers)
    assert engine.device_expert_bytes == pools_bytes(plan)
    assert answers(engine) == wanted
    with pytest.raises(BudgetError, match="the plan's slots take"):
        expertflow_quant.load(folder / "checkpoint", pools_bytes(plan) - 1, slots=file)


def test_slots_of_another_plan_are_refused_and_few_ones_raised(tmp_path):
    layers = [LayerRecords((100, 100, 200, 200), 2)]
    file = tmp_path / "slots.json"

    def plan(*pools):
        file.write_text(json.dumps({"layers": [{"pools": [{"nbytes": n, "slots": s} for n, s in pools]}]}))
        return read_slots(file, layers)

    assert plan((190, 0), (96, 9)) == (((100, 2), (200, 0)),)
    assert [size.slots for size in layer_classes(layers, plan((96, 0), (190, 1)), 600)] == [2, 2]
    with pytest.raises(ExpertFlowError, match="1 record sizes in layer 0"):
        plan((100, 2))
    file.write_text(json.dumps({"layers": [{"pools": []}] * 2}))
    with pytest.raises(ExpertFlowError, match="2 layers, the checkpoint has 1"):
        read_slots(file, layers)
    with pytest.raises(ExpertFlowError, match="no file of slots"):
        read_slots(tmp_path / "none.json", layers)


@pytest.mark.cuda
@pytest.mark.parametrize("predictor", ["previous", "next-gate", "paths"])
def test_on_a_gpu_records_fetched_beside_the_computation_change_nothing(folder, predictor):
    """Copies run on a stream of their own there: a slot must not be filled while it is read."""
    same = {"device": "cuda", "fast": False, "dtype": "float32"}
    expected = answers(expertflow_quant.load(folder / "checkpoint", "100%", **same))
    engine = expertflow_quant.load(folder / "checkpoint", "40%", predictor=predictor, ahead=2.0, **same)
    for _ in range(3):
        assert answers(engine) == expected
    assert engine.stats.ahead_bytes
