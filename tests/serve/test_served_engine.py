"""The real engine behind the server: what the public client gets is what the engine generates."""

import concurrent.futures
import shutil
from collections.abc import Iterator

import pytest
import torch
from helpers import tiny
from PIL import Image

import expertflow_quant
from expertflow_quant.runtime.foretell import foreteller
from expertflow_quant.serve.line import Batching

openai = pytest.importorskip("openai")


def picture(seed):
    noise = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (32, 32, 3), generator=noise, dtype=torch.uint8).numpy(), "RGB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    tiny.write_checkpoint(tiny.tiny_model("qwen3_vl_moe"), root / "checkpoint", lambda layer, expert: "int4-g16")
    tiny.save_processor("qwen3_vl_moe", root / "processor")
    shutil.copytree(root / "processor", root / "checkpoint", dirs_exist_ok=True)
    return root / "checkpoint"


@pytest.fixture(scope="module")
def engine(folder) -> Iterator[expertflow_quant.Engine]:
    return expertflow_quant.load(folder, expert_memory="50%")


def expected(engine, text, number, **options):
    parts = [{"type": "image", "image": picture(number)}, {"type": "text", "text": text}]
    return engine.generate([[{"role": "user", "content": parts}]], **options)[0]


@pytest.fixture
def real(serve, engine):
    return serve(engine, "tiny-moe")


@pytest.fixture
def ask(real, about, data_url):
    def send(text, number=0, **options):
        messages = about(text, data_url(picture(number)))
        return real.client.chat.completions.create(model="tiny-moe", messages=messages, **options)

    return send


def test_an_answer_about_an_image_and_its_counts(ask, engine):
    reply = ask("What is shown?", max_tokens=12)
    own = expected(engine, "What is shown?", 0, max_new_tokens=12)
    assert reply.choices[0].message.content == own.text
    assert reply.choices[0].finish_reason == own.finish_reason
    assert reply.usage.completion_tokens == len(own.token_ids)
    assert reply.usage.prompt_tokens == own.prompt_tokens
    assert reply.usage.prompt_tokens_details.image_tokens == own.image_tokens == 16


def test_prompt_tokens_are_the_tokenizers(real, engine):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Häuser?"}]
    reply = real.client.chat.completions.create(model="tiny-moe", messages=messages, max_tokens=1)
    rendered = engine.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert reply.usage.prompt_tokens == len(engine.tokenizer(rendered)["input_ids"])


def test_a_streamed_answer_about_an_image(ask, engine):
    chunks = list(ask("Stream?", max_tokens=12, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    own = expected(engine, "Stream?", 0, max_new_tokens=12)
    assert text == own.text
    assert chunks[-1].usage.completion_tokens == own.completion_tokens
    assert chunks[-1].usage.prompt_tokens == own.prompt_tokens


def test_a_seed_makes_a_drawn_answer_repeat(ask, engine):
    options = {"temperature": 1.5, "top_p": 0.9, "seed": 7}
    replies = [ask("Draw", max_tokens=12, **options).choices[0].message.content for _ in range(2)]
    assert replies == [expected(engine, "Draw", 0, max_new_tokens=12, **options).text] * 2
    assert ask("Draw", max_tokens=12, **options | {"seed": 8}).choices[0].message.content != replies[0]


def test_a_stop_text_ends_the_answer_and_its_counts(ask, engine):
    whole = expected(engine, "Stop", 0, max_new_tokens=12)
    stop = whole.text[2:4]
    reply = ask("Stop", max_tokens=12, stop=[stop])
    assert reply.choices[0].message.content == whole.text[: whole.text.index(stop)]
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens < whole.completion_tokens


def test_clients_at_once_get_their_own_answers(ask, engine):
    def read(seed):
        if seed % 2:
            return ask(f"Number {seed}?", seed, max_tokens=6).choices[0].message.content
        chunks = ask(f"Number {seed}?", seed, max_tokens=6, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(read, range(8), timeout=60))
    assert answers == [expected(engine, f"Number {seed}?", seed, max_new_tokens=6).text for seed in range(8)]
    assert len(set(answers)) > 1


def test_a_closed_stream_frees_the_engine(real, ask, engine):
    stream = ask("Long", max_tokens=200, stream=True)
    next(stream), next(stream)
    stream.close()
    assert ask("Next", max_tokens=4).choices[0].message.content == expected(engine, "Next", 0, max_new_tokens=4).text


def test_more_tokens_than_the_model_reads_are_refused(ask):
    with pytest.raises(openai.BadRequestError, match="the model's context of"):
        ask("x" * 4000, max_tokens=4)


def test_cache_counts_are_shown(real, ask, engine):
    import urllib.request

    ask("Count", max_tokens=4)
    text = urllib.request.urlopen(real.url.removesuffix("/v1") + "/metrics").read().decode()
    assert f"expertflow_cache_misses_total {float(engine.stats.misses)}" in text
    assert engine.stats.misses > 0


def test_clients_who_are_answered_together_get_their_own_answers(serve, engine, folder, about, data_url):
    """Six at once in batches of up to four, grouped by words; each with its own length."""
    foretell = foreteller(engine, folder, "words")
    server = serve(engine, "tiny-moe", Batching(rows=4, foretell=foretell))

    def send(number):
        text = "How many bars?" if number % 2 else "Who signed?"
        messages = about(text, data_url(picture(number)))
        return server.client.chat.completions.create(model="tiny-moe", messages=messages, max_tokens=4 + number)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(send, range(6)))
    for number, reply in enumerate(replies):
        own = expected(engine, "How many bars?" if number % 2 else "Who signed?", number, max_new_tokens=4 + number)
        assert reply.choices[0].message.content == own.text
        assert reply.usage.completion_tokens == len(own.token_ids)
