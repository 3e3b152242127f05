"""The engine on a tiny vision-language checkpoint: answers, streams, counts, refusals."""

import shutil
import threading
import time

import pytest
import torch
import transformers
from helpers import tiny
from PIL import Image

import expertflow_quant
from expertflow_quant import Engine, ExpertFlowError
from expertflow_quant.checkpoint.errors import CheckpointError
from expertflow_quant.offload.budget import BudgetError
from expertflow_quant.runtime.prompts import PromptError


def mixed(layer, expert):
    return ("int4-g16", "int2-g16", "int4-g16")[(layer + expert) % 3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A plain tiny model, and a mixed checkpoint of it."""
    root = tmp_path_factory.mktemp("engine")
    model = tiny.tiny_model("qwen3_vl_moe")
    model.save_pretrained(root / "plain")
    tiny.save_processor("qwen3_vl_moe", root / "plain")
    tiny.write_checkpoint(model, root / "checkpoint", mixed)
    tiny.save_processor("qwen3_vl_moe", root / "checkpoint.processor")
    for file in (root / "checkpoint.processor").iterdir():
        shutil.copy(file, root / "checkpoint")
    return root


@pytest.fixture(scope="module")
def engine(folders):
    return expertflow_quant.load(folders / "checkpoint", expert_memory="50%")


def picture(seed=0):
    values = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def asked(text="How many?", image=None):
    parts = [{"type": "text", "text": text}]
    if image is not None:
        parts.insert(0, {"type": "image", "image": image})
    return [{"role": "user", "content": parts}]


CONVERSATIONS = [
    asked("What is shown here, in a word?", picture(1)),
    asked("?"),
    [{"role": "system", "content": "Be brief."}, *asked("And here?", picture(2))],
]


def test_usage_is_counted(engine):
    first, second, third = engine.generate(CONVERSATIONS, 5)
    assert (first.image_tokens, second.image_tokens, third.image_tokens) == (16, 0, 16)
    assert second.prompt_tokens == len("user\n?\nassistant\n") + 3
    assert first.prompt_tokens == 16 + len("user\nWhat is shown here, in a word?\nassistant\n") + 3 + 2
    assert [one.completion_tokens for one in (first, second, third)] == [5, 5, 5]
    assert {len(one.token_ids) for one in (first, second, third)} == {5}
    assert first.finish_reason == "length"
    assert first.seconds > 0


def test_the_image_matters(engine):
    answers = engine.generate([asked("x", picture(seed)) for seed in range(4)], 8)
    assert len({answer.token_ids for answer in answers}) > 1


def test_budgets_give_the_same_tokens(folders, engine):
    wanted = [answer.token_ids for answer in engine.generate(CONVERSATIONS, 12)]
    full = expertflow_quant.load(folders / "checkpoint")
    assert full.device_expert_bytes == full.expert_bytes
    assert [answer.token_ids for answer in full.generate(CONVERSATIONS, 12)] == wanted
    assert (full.stats.misses, full.stats.hit_rate) == (0, 1.0)
    least = full.model.expert_cache.minimum_bytes
    small = expertflow_quant.load(folders / "checkpoint", expert_memory=least)
    assert small.device_expert_bytes == least
    assert [answer.token_ids for answer in small.generate(CONVERSATIONS, 12)] == wanted
    assert small.stats.misses > 0
    assert small.stats.bytes_moved > 0
    assert small.stats.stall_seconds > 0
    small.reset_stats()
    assert small.stats.requests == 0


def test_a_stream_says_what_generate_says(engine):
    wanted = engine.generate([CONVERSATIONS[0]], 10)[0]
    stream = engine.stream(CONVERSATIONS[0], 10)
    pieces = list(stream)
    assert "".join(pieces) == wanted.text
    assert stream.last is engine.last
    assert stream.last.token_ids == wanted.token_ids
    assert (stream.last.prompt_tokens, stream.last.image_tokens) == (wanted.prompt_tokens, 16)
    assert list(stream) == []
    assert not stream_threads()


def stream_threads():
    return [thread for thread in threading.enumerate() if thread.name == "expertflow-stream"]


def test_closing_a_stream_ends_the_generation(engine):
    stream = engine.stream(CONVERSATIONS[1], 100)
    for _ in range(3):
        next(stream)
    stream.close()
    assert not stream_threads()
    assert stream.last.completion_tokens == 3
    assert stream.last.token_ids == engine.generate([CONVERSATIONS[1]], 3)[0].token_ids
    assert engine.last is stream.last
    assert list(stream) == []
    stream.close()


def test_a_dropped_stream_ends_by_itself(engine):
    stream = engine.stream(CONVERSATIONS[1], 100)
    next(stream)
    del stream
    deadline = time.monotonic() + 10
    while stream_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not stream_threads()


def test_a_stream_closed_while_it_waits_for_its_turn_never_runs(engine):
    first, waiting = engine.stream(CONVERSATIONS[1], 40), engine.stream(CONVERSATIONS[0], 40)
    before = engine.stats.requests
    closer = threading.Thread(target=waiting.close)
    closer.start()
    list(first)
    after = engine.stats.requests
    closer.join(60)
    assert waiting.last.completion_tokens == 0
    assert engine.stats.requests == after > before


def test_what_generation_raises_reaches_the_reader(engine, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("disk on fire")

    monkeypatch.setattr(engine.model.expert_cache, "begin", broken)
    stream = engine.stream(CONVERSATIONS[1], 4)
    with pytest.raises(OSError, match="disk on fire"):
        list(stream)
    assert list(stream) == []
    stream.close()
    assert not stream_threads()


def test_callers_take_turns(engine):
    wanted = [engine.generate([one], 8)[0].token_ids for one in CONVERSATIONS]
    got = [None] * 3

    def ask(index):
        got[index] = engine.generate([CONVERSATIONS[index]], 8)[0].token_ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(3)]
    stream = engine.stream(CONVERSATIONS[0], 8)
    for thread in threads:
        thread.start()
    list(stream)
    for thread in threads:
        thread.join(60)
    assert got == wanted
    assert stream.last.token_ids == wanted[0]


def test_an_end_token_stops_and_shipped_sampling_settings_are_not_used(folders):
    plain = expertflow_quant.load(folders / "checkpoint")
    wanted = plain.generate([CONVERSATIONS[0]], 6)[0].token_ids
    end = wanted[3]
    settings = {"eos_token_id": [2, end], "do_sample": True, "temperature": 3.0, "top_k": 5}
    plain.model.generation_config = transformers.GenerationConfig(**settings)
    stopping = Engine(plain.model, plain.processor)
    wanted = wanted[: wanted.index(end) + 1]
    for answer in stopping.generate([CONVERSATIONS[0]] * 2, 6):
        assert (answer.token_ids, answer.finish_reason) == (wanted, "stop")
    stream = stopping.stream(CONVERSATIONS[0], 6)
    list(stream)
    assert (stream.last.token_ids, stream.last.finish_reason) == (wanted, "stop")


def test_stop_texts_end_rows_of_a_batch_each_for_itself(engine):
    free = engine.generate(CONVERSATIONS, 16)
    stop = next(text for one in free for text in one.text[4:8] if text.isascii())
    answers = engine.generate(CONVERSATIONS, 16, stop=[stop])
    for whole, answer in zip(free, answers, strict=True):
        assert answer.text == whole.text.split(stop)[0]
        assert answer.token_ids == whole.token_ids[: answer.completion_tokens]
        assert answer.finish_reason == ("stop" if stop in whole.text else "length")
    stopped = next(i for i, whole in enumerate(free) if stop in whole.text)
    stream = engine.stream(CONVERSATIONS[stopped], 16, stop=stop)
    assert stop not in "".join(stream)
    assert stream.last.finish_reason == "stop"


def test_sampling_is_repeated_by_its_seed_and_leaves_the_global_generator_alone(engine):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    drawn = [engine.generate([asked()], 12, temperature=1.5, seed=seed)[0].token_ids for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert torch.equal(state, torch.get_rng_state())


def test_a_sliver_of_top_p_is_greedy(engine):
    wanted = engine.generate([asked()], 12)[0].token_ids
    assert engine.generate([asked()], 12, temperature=1.0, top_p=1e-6, seed=0)[0].token_ids == wanted


def test_the_context_is_known(engine):
    assert engine.context == 256


def test_no_conversations_no_answers(engine):
    assert engine.generate([]) == []


@pytest.mark.parametrize(
    ("conversation", "part"),
    [
        ([], "no messages"),
        (["hello"], "is not understood"),
        ([{"content": "hello"}], "is not understood"),
        ([{"role": "user"}], "content 'None' is not understood"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "part of type 'audio'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "part of type 'image'"),
        ([{"role": "user", "content": [{"type": "image", "image": 7}]}], "the processor does not take"),
        ([{"role": "user", "content": "see <|image_pad|>"}], "holds '<|image_pad|>'"),
    ],
)
def test_messages_that_are_not_understood_are_refused(engine, conversation, part):
    with pytest.raises(PromptError) as error:
        engine.generate([conversation])
    assert part in str(error.value)
    with pytest.raises(PromptError):
        engine.stream(conversation)


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(engine):
    long = asked("x" * 220, picture())
    with pytest.raises(PromptError, match=r"257 tokens \(16 of them image\) and 32 new ones .* context of 256"):
        engine.generate([asked(), long])
    short = asked("x" * 200)
    with pytest.raises(PromptError, match="ask for at most 37"):
        engine.generate([short], 38)
    assert engine.generate([short], 37)[0].completion_tokens == 37


def test_messages_are_left_as_they_were(engine):
    conversation = asked("Same?", picture())
    before = [dict(part) for part in conversation[0]["content"]]
    engine.generate([conversation], 1)
    assert conversation[0]["content"] == before


def test_a_plain_model_has_the_same_surface(folders, engine):
    plain = Engine.from_plain(folders / "plain")
    answers = plain.generate(CONVERSATIONS, 5)
    assert [answer.prompt_tokens for answer in answers] == [
        answer.prompt_tokens for answer in engine.generate(CONVERSATIONS, 5)
    ]
    assert plain.stats.requests == 0
    plain.reset_stats()
    assert plain.expert_bytes == plain.device_expert_bytes == 2 * 8 * 3 * 48 * 64 * 4
    assert plain.expert_bytes > engine.expert_bytes
    stream = plain.stream(CONVERSATIONS[0], 5)
    assert "".join(stream) == answers[0].text


def test_a_text_model_answers_text_and_refuses_images(tmp_path):
    model = tiny.tiny_model("qwen3_moe")
    tiny.save_processor("qwen3_moe", tmp_path)
    model.save_pretrained(tmp_path)
    plain = Engine.from_plain(tmp_path)
    answers = plain.generate([asked("Hi"), [{"role": "user", "content": "A longer one"}]], 4)
    assert [answer.prompt_tokens for answer in answers] == [len("user\nHi\nassistant\n") + 3, 28 + 3]
    assert answers[0].token_ids == plain.generate([[{"role": "user", "content": "Hi"}]], 4)[0].token_ids
    with pytest.raises(PromptError, match="reads text only"):
        plain.generate([asked("Hi", picture())])


def test_loading_refuses_before_anything_is_generated(folders, tmp_path):
    with pytest.raises(ExpertFlowError, match=r"holds no manifest\.json"):
        expertflow_quant.load(folders / "plain")
    with pytest.raises(ExpertFlowError, match=r"load it with expertflow_quant\.load"):
        Engine.from_plain(folders / "checkpoint")
    with pytest.raises(BudgetError, match="raise --expert-memory"):
        expertflow_quant.load(folders / "checkpoint", expert_memory="1%")
    with pytest.raises(BudgetError, match="'plenty' cannot be read"):
        expertflow_quant.load(folders / "checkpoint", expert_memory="plenty")
    with pytest.raises(ExpertFlowError, match="device 'abacus' is not known"):
        expertflow_quant.load(folders / "checkpoint", device="abacus")
    with pytest.raises(ExpertFlowError, match="device 'mps' is not supported"):
        expertflow_quant.load(folders / "checkpoint", device="mps")
    with pytest.raises(ExpertFlowError, match="device 'cuda:77' is not there"):
        expertflow_quant.load(folders / "checkpoint", device="cuda:77")
    shutil.copytree(folders / "checkpoint", tmp_path / "copy")
    shard = tmp_path / "copy" / "experts" / "layer-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"layer-00000\.safetensors has sha256"):
        expertflow_quant.load(tmp_path / "copy")


@pytest.mark.cuda
def test_on_a_gpu_the_engine_answers_the_same_at_any_budget(folders):
    full = expertflow_quant.load(folders / "checkpoint", device="cuda", dtype=torch.float32, fast=False)
    least = full.model.expert_cache.minimum_bytes
    small = expertflow_quant.load(folders / "checkpoint", least, device="cuda", dtype=torch.float32, fast=False)
    wanted = [answer.token_ids for answer in full.generate(CONVERSATIONS, 12)]
    assert [answer.token_ids for answer in small.generate(CONVERSATIONS, 12)] == wanted
    stream = small.stream(CONVERSATIONS[0], 12)
    assert "".join(stream) == small.generate([CONVERSATIONS[0]], 12)[0].text
    assert small.stats.misses > 0
    assert small.stats.stall_seconds > 0
