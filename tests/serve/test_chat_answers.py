"""Answers, whole and streamed, through the public client."""

import json
import urllib.request

import pytest


def test_a_whole_answer_about_an_image(server, about):
    reply = server.client.chat.completions.create(model="tiny", messages=about("how many bars"))
    assert reply.choices[0].message.content == "RGB40x30 how many bars "
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (12, 5, 17)
    assert reply.usage.prompt_tokens_details.image_tokens == 9
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")


def test_a_streamed_answer_says_the_same(server, about):
    options = {"include_usage": True}
    chunks = list(
        server.client.chat.completions.create(
            model="tiny", messages=about("how many bars"), stream=True, stream_options=options
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert [text for text in texts if text] == ["RGB40x30 ", "how ", "many ", "bars "]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (12, 5)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_sends_usage_only_when_asked(server, about):
    chunks = list(server.client.chat.completions.create(model="tiny", messages=about("a"), stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_the_first_piece_arrives_before_the_last_is_made(server, engine, about):
    engine.gate.clear()
    engine.gate.wait = one_token = _OneToken()
    stream = server.client.chat.completions.create(model="tiny", messages=about("a b"), stream=True)
    next(stream)
    assert next(stream).choices[0].delta.content == "RGB40x30 "
    one_token.rest = True
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "a b "


class _OneToken:
    """Lets the first token pass at once and the others when `rest` is set."""

    def __init__(self):
        self.seen, self.rest = 0, False

    def __call__(self, timeout):
        import time

        self.seen += 1
        end = time.monotonic() + timeout
        while self.seen > 1 and not self.rest and time.monotonic() < end:
            time.sleep(0.002)
        return True


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_the_length_is_kept(server, stream, field):
    messages = [{"role": "user", "content": "a b c d"}]
    reply = server.client.chat.completions.create(model="tiny", messages=messages, stream=stream, **{field: 2})
    text, reason = _read(reply) if stream else (reply.choices[0].message.content, reply.choices[0].finish_reason)
    assert (text, reason) == ("a b ", "length")


def test_sampling_reaches_the_engine(server, engine):
    messages = [{"role": "user", "content": "a"}]
    asked = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": "x"}
    server.client.chat.completions.create(model="tiny", messages=messages, **asked)
    server.client.chat.completions.create(model="tiny", messages=messages)
    length = {"max_new_tokens": 256}
    assert engine.sampled[0] == {"temperature": 0.5, "top_p": 0.9, "seed": 7, **length, "stop": ("x",)}
    assert engine.sampled[1] == {"temperature": 0.0, "top_p": 1.0, "seed": None, **length, "stop": ()}


def test_turns_and_parts_reach_the_engine_in_order(server, engine, data_url):
    parts = [
        {"type": "text", "text": "first"},
        {"type": "image_url", "image_url": {"url": data_url(), "detail": "auto"}},
        {"type": "text", "text": "second"},
    ]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi", "refusal": None},
        {"role": "user", "content": parts},
    ]
    server.client.chat.completions.create(model="tiny", messages=messages)
    seen = engine.calls[0]
    assert [message["role"] for message in seen] == ["system", "user", "assistant", "user"]
    assert seen[0]["content"] == "be brief"
    assert [part["type"] for part in seen[3]["content"]] == ["text", "image", "text"]


def test_text_outside_ascii_arrives_whole(server):
    messages = [{"role": "user", "content": "größer 図表 🙂"}]
    stream = server.client.chat.completions.create(model="tiny", messages=messages, stream=True)
    assert _read(stream)[0] == "größer 図表 🙂 "


def test_models_health_and_metrics(server, about):
    server.client.chat.completions.create(model="tiny", messages=about("a"))
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").owned_by == "expertflow-quant"
    root = server.url.removesuffix("/v1")
    health = json.load(urllib.request.urlopen(f"{root}/health"))
    assert health == {"status": "ok", "model": "tiny", "running": 0, "waiting": 0, "max_queue": 16}
    metrics = urllib.request.urlopen(f"{root}/metrics").read().decode()
    for line in (
        'expertflow_requests_total{outcome="ok"} 1.0',
        "expertflow_prompt_tokens_total 10.0",
        "expertflow_image_tokens_total 9.0",
        "expertflow_completion_tokens_total 3.0",
        "expertflow_cache_hits_total 3.0",
        "expertflow_cache_misses_total 2.0",
        "expertflow_cache_bytes_moved_total 512.0",
        "expertflow_cache_stall_seconds_total 0.25",
        "expertflow_queue_length 0.0",
        "expertflow_request_seconds_count 1.0",
        "expertflow_first_token_seconds_count 1.0",
    ):
        assert line in metrics.splitlines()


def _read(stream):
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return text, chunks[-1].choices[0].finish_reason
