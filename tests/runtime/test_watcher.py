"""What a predictor may see of a model: later routers on present states and image embeddings, against plain forwards."""

import pytest
import torch
from helpers import tiny
from PIL import Image

from expertflow_quant import Engine, ExpertFlowError
from expertflow_quant.models.seams import expert_modules, find_router
from expertflow_quant.offload.sight import STEP, Basis
from expertflow_quant.offload.trace import PROMPT_IMAGE
from expertflow_quant.runtime.recorder import recording
from expertflow_quant.runtime.watcher import watching

FAMILY = "qwen3_vl_moe"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watcher")
    tiny.bf16_experts(tiny.tiny_model(FAMILY)).save_pretrained(folder)
    tiny.save_processor(FAMILY, folder)
    return Engine.from_plain(folder)


def asked(text, seed=None):
    parts = [{"type": "text", "text": text}]
    if seed is not None:
        values = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        parts.insert(0, {"type": "image", "image": Image.fromarray(values.numpy())})
    return [{"role": "user", "content": parts}]


CONVERSATIONS = [asked("What is shown?", 1), asked("?"), asked("And here?", 2)]


def watched(engine, **options):
    with recording(engine, ["charts"] * len(CONVERSATIONS)) as recorder, watching(engine, **options) as watcher:
        for conversation in CONVERSATIONS:
            engine.generate([conversation], 5)
    return recorder.trace(), watcher


def test_later_routers_see_what_the_present_router_sees(engine):
    inputs = []
    model = engine.model
    routers = [find_router(model, name) for name, _ in expert_modules(model)]
    note = routers[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
    trace, watcher = watched(engine, distances=2, width=3)
    note.remove()
    ahead = watcher.sight(trace).ahead
    expected = routers[1](torch.cat(inputs))[0].topk(3, dim=-1).indices
    assert ahead.shape == (len(trace), 2, 2, 3)
    assert torch.equal(ahead[:, 0, 0].long(), expected)
    assert (ahead[:, 0, 1] == trace.num_experts).all()
    assert (ahead[:, 1] == trace.num_experts).all()


def test_a_routers_bias_counts(tmp_path):
    model = tiny.bf16_experts(tiny.tiny_model("gpt_oss"))
    for name, _ in expert_modules(model):
        torch.nn.init.normal_(find_router(model, name).bias, std=2.0)
    model.save_pretrained(tmp_path)
    tiny.save_processor("gpt_oss", tmp_path)
    inputs, engine = [], Engine.from_plain(tmp_path)
    first, second = (find_router(engine.model, name) for name, _ in expert_modules(engine.model))
    first.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
    with recording(engine, ["text"]) as recorder, watching(engine, 1, 2) as watcher:
        engine.generate([asked("What is a router?")], 4)
    ahead = watcher.sight(recorder.trace()).ahead[:, 0, 0].long()
    assert torch.equal(ahead, torch.cat([second(seen)[-1] for seen in inputs]))


def test_pictures_are_the_image_tokens_input_embeddings(engine):
    trace, watcher = watched(engine)
    width = engine.model.get_input_embeddings().weight.shape[1]
    basis = Basis(torch.zeros(width), torch.randn(width, 4, generator=torch.Generator().manual_seed(0)) / width)
    sight = watcher.sight(trace, basis)
    expected = []
    for conversation in (CONVERSATIONS[0], CONVERSATIONS[2]):
        inputs = engine._encoder.encode([conversation], 1).inputs
        with torch.no_grad():
            images = engine.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        expected.append(torch.cat(list(images.pooler_output)))
    wanted = basis(torch.cat(expected))
    assert len(wanted) == int((trace.kind == PROMPT_IMAGE).sum())
    assert (sight.pictures - wanted).abs().max() <= 0.5 / STEP + 1e-2
    assert torch.equal(sight.check(trace).token_ids, trace.token_ids)


def test_watching_ends_with_its_block_and_wants_the_same_answers(engine):
    trace, watcher = watched(engine)
    seen = len(watcher.embeddings)
    engine.generate([asked("?")], 2)
    assert len(watcher.embeddings) == seen
    with pytest.raises(ExpertFlowError, match="record and watch the same answers"):
        watcher.sight(trace.of_items([0]))
