"""Recorded routes against the routers' own scores in one plain forward, and what is refused."""

import shutil

import pytest
import torch
from helpers import fast, tiny
from PIL import Image

import expertflow_quant
from expertflow_quant import Engine, ExpertFlowError
from expertflow_quant.models.seams import expert_modules, find_router
from expertflow_quant.offload.trace import GENERATED, PROMPT_IMAGE, PROMPT_TEXT, RoutingTrace
from expertflow_quant.runtime.recorder import recording

FAMILY = "qwen3_vl_moe"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A plain tiny model, and a bf16 checkpoint of it."""
    root = tmp_path_factory.mktemp("recorder")
    model = tiny.bf16_experts(tiny.tiny_model(FAMILY))
    for name in ("plain", "checkpoint", "processor"):
        (root / name).mkdir()
    model.save_pretrained(root / "plain")
    tiny.save_processor(FAMILY, root / "processor")
    shutil.rmtree(root / "checkpoint")
    tiny.write_checkpoint(model, root / "checkpoint", lambda layer, expert: "bf16")
    for file in (root / "processor").iterdir():
        shutil.copy(file, root / "plain")
        shutil.copy(file, root / "checkpoint")
    return root


@pytest.fixture(scope="module")
def engine(folders):
    return Engine.from_plain(folders / "plain")


def picture(seed=0):
    values = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def asked(text, image=None):
    parts = [{"type": "text", "text": text}]
    if image is not None:
        parts.insert(0, {"type": "image", "image": image})
    return [{"role": "user", "content": parts}]


CONVERSATIONS = [asked("What is shown?", picture(1)), asked("?"), asked("And here?", picture(2))]


def routes_of_one_forward(engine, conversation, answer, top_k=2):
    """(ids of prompt and answer, experts [T, L, K], weights [T, L, K]) as the routers' scores decide them."""
    inputs = dict(engine._encoder.encode([conversation], 1).inputs)
    fed = torch.tensor([answer[:-1]], dtype=torch.int64)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], fed], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(fed)], dim=1)
    model, seen = engine.model, []
    routers = [find_router(model, name) for name, _ in expert_modules(model)]
    hooks = [
        router.register_forward_pre_hook(
            lambda module, args: seen.append(args[0].reshape(-1, args[0].shape[-1]) @ module.weight.T)
        )
        for router in routers
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    chosen = [scores.softmax(-1).sort(-1, descending=True) for scores in seen]
    values = torch.stack([found.values[:, :top_k] for found in chosen], dim=1)
    ids = torch.stack([found.indices[:, :top_k] for found in chosen], dim=1)
    return inputs["input_ids"][0], ids, values / values.sum(-1, keepdim=True)


def test_recorded_routes_are_those_of_a_plain_forward(engine):
    wanted = [engine.generate([one], 6)[0].token_ids for one in CONVERSATIONS]
    with recording(engine, ["charts", "texts", "charts"]) as recorder:
        for conversation, answer in zip(CONVERSATIONS, wanted, strict=True):
            assert engine.generate([conversation], 6)[0].token_ids == answer
    trace = recorder.trace({"model": "tiny"})
    assert (trace.layers, trace.top_k, trace.num_experts) == (2, 2, 8)
    assert (trace.tasks, trace.meta) == (("charts", "texts", "charts"), {"model": "tiny"})
    for item, (conversation, answer) in enumerate(zip(CONVERSATIONS, wanted, strict=True)):
        rows = trace.rows(item)
        ids, experts, weights = routes_of_one_forward(engine, conversation, answer)
        assert trace.token_ids[rows].tolist() == ids.tolist()
        assert torch.equal(trace.experts[rows].long(), experts)
        assert torch.allclose(trace.weights[rows].float(), weights, atol=2e-3)
        assert (trace.weights[rows].diff(dim=-1) <= 0).all()  # top-k order


def test_images_texts_and_generated_tokens_are_told_apart(engine):
    with recording(engine, ["a", "b"]) as recorder:
        answers = engine.generate(CONVERSATIONS[:2], 5)
    trace = recorder.trace()
    for item, answer in enumerate(answers):
        kind = trace.kind[trace.rows(item)]
        counts = [int((kind == which).sum()) for which in (PROMPT_TEXT, PROMPT_IMAGE, GENERATED)]
        assert counts == [answer.prompt_tokens - answer.image_tokens, answer.image_tokens, 4]
        assert (kind[-4:] == GENERATED).all()
        assert trace.token_ids[trace.rows(item)][-4:].tolist() == list(answer.token_ids[:-1])
    is_image = trace.token_ids == tiny.IMAGE
    assert torch.equal(is_image & (trace.kind != GENERATED), trace.kind == PROMPT_IMAGE)
    assert (trace.kind == PROMPT_IMAGE).sum() == 16


def test_several_conversations_are_answered_and_recorded_one_after_the_other(engine):
    with recording(engine, "aba") as together:
        answers = engine.generate(CONVERSATIONS, 4)
    with recording(engine, "aba") as apart:
        assert [engine.generate([one], 4)[0].token_ids for one in CONVERSATIONS] == [one.token_ids for one in answers]
    one, other = together.trace(), apart.trace()
    assert torch.equal(one.experts, other.experts)
    assert torch.equal(one.weights, other.weights)
    assert torch.equal(one.item, other.item)


def test_a_checkpoint_s_experts_are_seen_at_any_budget(folders, engine, tmp_path):
    with recording(engine, "ab") as recorder:
        engine.generate(CONVERSATIONS[:2], 6)
    wanted = recorder.trace()
    for budget in ("100%", "50%"):
        ours = expertflow_quant.load(folders / "checkpoint", expert_memory=budget)
        with recording(ours, "ab") as recorder:
            ours.generate(CONVERSATIONS[:2], 6)
            assert ours.stats.requests == recorder_requests(recorder.trace())
        recorder.trace().save(tmp_path / "routes.safetensors")
        found = RoutingTrace.load(tmp_path / "routes.safetensors")
        assert torch.equal(found.token_ids, wanted.token_ids)
        assert torch.equal(found.experts, wanted.experts)


def recorder_requests(trace):
    """Distinct experts of every layer in every pass."""
    passes = [trace.experts[step] for item in range(trace.items) for step in trace.steps(item)]
    return sum(len(experts[:, layer].unique()) for experts in passes for layer in range(trace.layers))


def test_an_answer_of_one_token_leaves_its_prompt_alone(engine):
    with recording(engine, "a") as recorder:
        answer = engine.generate([CONVERSATIONS[1]], 1)[0]
    trace = recorder.trace()
    assert len(trace) == answer.prompt_tokens
    assert (trace.kind == PROMPT_TEXT).all()


def test_the_engine_is_as_before_when_the_recording_ends(engine):
    runner = engine.runner
    with recording(engine, "a"):
        assert engine.runner is not runner
        assert (engine.expert_bytes, engine.device_expert_bytes) == (runner.expert_bytes, runner.device_expert_bytes)
    assert engine.runner is runner
    with pytest.raises(ZeroDivisionError), recording(engine, "a"):
        print(1 / 0)
    assert engine.runner is runner
    assert not any(module._forward_pre_hooks for _, module in expert_modules(engine.model))
    assert len(engine.generate(CONVERSATIONS, 2)) == 3


def test_more_prompts_than_tasks_are_refused_before_they_are_answered(engine):
    with recording(engine, "a") as recorder:
        engine.generate([CONVERSATIONS[1]], 2)
        with pytest.raises(ExpertFlowError, match="all 1 tasks"):
            engine.generate([CONVERSATIONS[0]], 2)
    assert len(recorder.items) == 1


def test_batches_streams_and_empty_recordings_are_refused(engine):
    with recording(engine, "ab") as recorder:
        batch = engine._encoder.encode(CONVERSATIONS[:2], 2)
        with pytest.raises(ExpertFlowError, match="2 prompts at once"):
            engine._run([batch], sampling=None)
        with pytest.raises(ExpertFlowError, match=r"stream.*engine\.generate"):
            list(engine.stream(CONVERSATIONS[1], 2))
        with pytest.raises(ExpertFlowError, match="nothing was recorded"):
            recorder.trace()


def test_padding_is_refused(engine):
    with recording(engine, "a"):
        prompts = engine._encoder.encode([CONVERSATIONS[1]], 2)
        prompts.inputs["attention_mask"][0, 0] = 0
        with pytest.raises(ExpertFlowError, match="padding"):
            engine._run([prompts], sampling=None)


def test_the_fast_path_and_a_second_recorder_are_refused(folders, engine):
    quick = fast.load_fast(folders / "checkpoint")
    for taken, runner in ((quick, "FastRunner"), (engine, "RecordingRunner")):
        with (
            recording(engine, "a"),
            pytest.raises(ExpertFlowError, match=f"{runner} .*fast=False"),
            recording(taken, "a"),
        ):
            pass


def test_a_failed_answer_is_not_recorded(engine, monkeypatch):
    with recording(engine, "ab") as recorder:
        monkeypatch.setattr(engine.model, "generate", lambda **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate([CONVERSATIONS[1]], 2)
        monkeypatch.undo()
        engine.generate([CONVERSATIONS[1]], 2)
    assert recorder.trace().items == 1


def test_a_model_whose_layers_see_other_tokens_is_refused(engine, monkeypatch):
    generate = engine.model.generate

    def twice(**options):
        generate(**options)
        return generate(**options)

    monkeypatch.setattr(engine.model, "generate", twice)
    with recording(engine, "a"), pytest.raises(ExpertFlowError, match="skips tokens or layers"):
        engine.generate([CONVERSATIONS[1]], 2)


@pytest.mark.parametrize(
    ("index", "weights", "said"),
    [
        (torch.tensor([[0, 8]]), torch.ones(1, 2), "expert 8 of 8"),
        (torch.tensor([[0, 1]]), torch.ones(1, 8), r"\(1, 2\) and weights \(1, 8\)"),
    ],
)
def test_calls_that_do_not_say_each_token_s_experts_are_refused(engine, index, weights, said):
    with recording(engine, "a") as recorder, recorder.listening(), pytest.raises(ExpertFlowError, match=said):
        expert_modules(engine.model)[0][1](torch.zeros(1, 64), index, top_k_weights=weights)


def test_a_model_without_experts_is_refused(engine, monkeypatch):
    monkeypatch.setattr(engine, "model", torch.nn.Linear(2, 2))
    with pytest.raises(ExpertFlowError, match="Linear has no experts module"), recording(engine, "a"):
        pass


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_other_families_route_through_the_same_modules(family):
    model = tiny.tiny_model(family)
    engine = Engine(model, tiny.byte_tokenizer())
    with recording(engine, "a") as recorder:
        answer = engine.generate([asked("Which?")], 4)[0]
    trace = recorder.trace()
    assert (trace.layers, trace.top_k) == (len(expert_modules(model)), 2)
    assert len(trace) == answer.prompt_tokens + answer.completion_tokens - 1
