"""What is refused: by name, with the remedy, in the shape that OpenAI clients read."""

import json
import urllib.error
import urllib.request

import openai
import pytest

HELLO = [{"role": "user", "content": "hello"}]


def refusal(server, status=400, **changes):
    """The error of a raw request (the client would check some fields itself)."""
    body = {"model": "tiny", "messages": HELLO, **changes}
    found, error = post(server, json.dumps(body).encode())
    assert found == status, error
    return error


def post(server, body, content_type="application/json"):
    request = urllib.request.Request(f"{server.url}/chat/completions", body, {"content-type": content_type})
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as failed:
        error = json.load(failed)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return failed.code, error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("n", True),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("logit_bias", {"5": 1}),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -0.5),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["audio"]),
        ("reasoning_effort", "high"),
        ("store", True),
    ],
)
def test_a_field_that_would_change_the_answer_is_refused_by_name(steady, field, value):
    error = refusal(steady, **{field: value})
    assert error["param"] == field
    assert error["code"] == "unsupported_parameter"
    assert error["message"].startswith(f"{field} is ")
    assert ": " in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "tools": [], "tool_choice": "none", "logprobs": False, "response_format": {"type": "text"}},
        {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "modalities": ["text"]},
        {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "store": False},
        {
            "tools": None,
            "stop": None,
            "seed": None,
            "stream": None,
            "stream_options": None,
            "max_tokens": None,
        },
    ],
)
def test_neutral_and_harmless_fields_pass(steady, fields):
    status, _ = post(steady, json.dumps({"model": "tiny", "messages": HELLO, **fields}).encode())
    assert status == 200


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages.0.name"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages.0"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, None),
        ({"stream_options": {"include_usage": True}}, None),
        ({"top_k": 5}, "top_k"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0"),
    ],
)
def test_a_wrong_field_is_named(steady, changes, param):
    error = refusal(steady, **changes)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_a_field_left_out_is_named(steady):
    assert post(steady, b'{"messages": []}')[1]["param"] == "model"


@pytest.mark.parametrize("kind", ["input_image", "input_audio", "video_url", "file", "image", None])
def test_a_part_of_another_type_is_refused_by_name(steady, kind):
    error = refusal(steady, messages=[{"role": "user", "content": [{"type": kind, "image_url": "data:,"}]}])
    assert repr(kind) in error["message"]
    assert "image_url" in error["message"]


def test_an_image_outside_a_user_turn_is_refused(steady, about):
    messages = [{**about("x")[0], "role": "system"}, *HELLO]
    assert "'user'" in refusal(steady, messages=messages)["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": NaN}', b"\xff", b"[" * 10_000])
def test_a_body_that_is_no_json_object(steady, body):
    status, error = post(steady, body)
    assert (status, error["type"]) == (400, "invalid_request_error")


def test_a_form_is_not_json(steady):
    """A web page may send text/plain anywhere without asking; application/json it may not."""
    status, error = post(steady, json.dumps({"model": "tiny", "messages": HELLO}).encode(), "text/plain")
    assert status == 415
    assert "application/json" in error["message"]


def test_a_large_body_is_refused(serve, engine):
    server = serve(engine, max_body_bytes=1000)
    assert refusal(server, 413, messages=[{"role": "user", "content": "x" * 2000}])["message"].count("1000") == 1


def test_an_unknown_model(steady):
    with pytest.raises(openai.NotFoundError, match="'other' is not here; this server has 'tiny'") as caught:
        steady.client.chat.completions.create(model="other", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        steady.client.models.retrieve("other")


def test_an_unknown_path_and_a_wrong_method(steady):
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
        steady.client.completions.create(model="tiny", prompt="x")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{steady.url}/chat/completions")
    assert caught.value.code == 405
    assert json.load(caught.value)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_told(steady, stream):
    with pytest.raises(openai.BadRequestError, match="the model reads 512"):
        steady.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "refuse"}], stream=stream
        )


@pytest.mark.parametrize("stream", [False, True])
def test_a_crash_is_not_shown_and_the_next_answer_comes(steady, stream):
    with pytest.raises(openai.InternalServerError) as caught:
        steady.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "crash"}], stream=stream
        )
    assert "secret" not in str(caught.value)
    reply = steady.client.chat.completions.create(model="tiny", messages=HELLO)
    assert reply.choices[0].message.content == "hello "


def test_a_crash_half_way_ends_the_stream_with_an_error(server, engine):
    engine.gate.wait = Break(after=1)
    stream = server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "one two"}], stream=True
    )
    with pytest.raises(openai.APIError, match="its log says why"):
        list(stream)


class Break:
    """Breaks the engine after so many tokens."""

    def __init__(self, after):
        self.left = after

    def __call__(self, timeout):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("secret detail")
        return True
