"""Asking an OpenAI-compatible address, against a tiny scripted server: requests, retries, errors, resuming."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image, ImageChops

pytest.importorskip("openai")

from eval.endpoint import Endpoint, EndpointEngine
from eval.judge import System, judge
from eval.runner import EngineLostError
from eval.tasks import generated_task
from expertflow_quant.formats import ExpertFlowError

TASK = generated_task("chart", 4)


class Scripted(ThreadingHTTPServer):
    """Gives each question the next of its statuses (200 once they are used up); keeps all requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict] = []
        self.statuses: dict[str, list[int]] = {}
        self.models = ["judge-me"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.models]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        text = request["messages"][0]["content"][1]["text"]
        waiting = self.server.statuses.get(text, [])
        status = waiting.pop(0) if waiting else 200
        if status != 200:
            self._send(status, {"error": {"message": f"status {status}", "type": "x", "param": None, "code": None}})
            return
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": " 42 "}}
        usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "judge-me", "choices": [choice]}
        self._send(200, reply | {"usage": usage})

    def _send(self, status: int, body: dict) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as scripted:
        thread = threading.Thread(target=scripted.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield scripted
        scripted.shutdown()
        thread.join(10)


def system(url: str, **options) -> System:
    return System("served", "served", Path("served"), endpoint=Endpoint(url, **options))


def test_prompt_pixels_and_limits_arrive_as_any_engine_gets_them(server, tmp_path):
    judged = judge(system(server.url, model="other"), [TASK], tmp_path, batch_size=3)
    asked = {request["messages"][0]["content"][1]["text"]: request for request in server.requests}
    assert set(asked) == {item.prompt for item in TASK.items}
    for item in TASK.items:
        request = asked[item.prompt]
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("other", 0, item.max_new_tokens)
        url = request["messages"][0]["content"][0]["image_url"]["url"]
        sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
        assert ImageChops.difference(sent, item.image).getbbox() is None
    assert [(r.id, r.prediction, r.prompt_tokens, r.completion_tokens) for r in judged.results] == [
        (item.id, " 42 ", 9, 3) for item in TASK.items
    ]
    assert (judged.failures, judged.expert_bytes, judged.hit_rate) == (0, 0, None)
    assert judged.to_json()["path"] == server.url


def test_a_busy_server_is_asked_again_and_a_refusal_scores_zero_with_its_name(server, tmp_path):
    busy, refused, broken = (TASK.items[i].prompt for i in (1, 2, 3))
    server.statuses = {busy: [429, 503], refused: [400], broken: [500] * 9}
    judged = judge(system(server.url, retries=2), [TASK], tmp_path, batch_size=4)
    assert [r.error is None for r in judged.results] == [True, True, False, False]
    assert "BadRequestError: " in judged.results[2].error
    assert "status 400" in judged.results[2].error
    assert "InternalServerError" in judged.results[3].error
    assert (judged.results[3].score, judged.results[3].prediction) == (0.0, "")
    tries = [request["messages"][0]["content"][1]["text"] for request in server.requests]
    # one more of the first item: the warm-up
    assert [tries.count(item.prompt) for item in TASK.items] == [2, 3, 1, 3]


def test_a_server_that_is_gone_ends_the_run_and_the_run_goes_on_later(server, tmp_path):
    engine, first = EndpointEngine(Endpoint(server.url, retries=0)), TASK.items[0].messages
    assert engine.model == "judge-me"
    assert engine.generate([first])[0].text == " 42 "
    with Scripted() as other:
        gone = other.url
    with pytest.raises(ExpertFlowError, match="lists no models"):
        EndpointEngine(Endpoint(gone, retries=0))
    lost = system(gone, model="judge-me", retries=0)
    with pytest.raises(EngineLostError, match="run the same command again"):
        judge(lost, [TASK], tmp_path, batch_size=2)
    assert len((tmp_path / "served.jsonl").read_text().splitlines()) == 1  # no item is scored 0 for it


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_of_the_key_or_the_model_ends_the_run_and_scores_nothing(status, server, tmp_path):
    server.statuses = {item.prompt: [status] * 9 for item in TASK.items}
    with pytest.raises(EngineLostError, match=rf"refuses model 'typo' .*status {status}.*#MODEL.*OPENAI_API_KEY"):
        judge(system(server.url, model="typo"), [TASK], tmp_path, batch_size=2)
    assert len((tmp_path / "served.jsonl").read_text().splitlines()) == 1


def test_a_page_in_place_of_a_reply_is_named(server, monkeypatch):
    monkeypatch.setattr(Handler, "_send", lambda handler, status, body: send_page(handler))
    with pytest.raises(ExpertFlowError, match=r"gives a page and no list of models: .*/v1"):
        EndpointEngine(Endpoint(server.url))
    (answer,) = EndpointEngine(Endpoint(server.url, "m")).generate([TASK.items[0].messages])
    assert str(answer) == "the server's reply is no chat completion"


def send_page(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "text/html")
    handler.send_header("Content-Length", "6")
    handler.end_headers()
    handler.wfile.write(b"<html>")


def test_what_cannot_be_asked_is_refused(server):
    server.models = []
    with pytest.raises(ExpertFlowError, match="name the model"):
        EndpointEngine(Endpoint(server.url))
    with pytest.raises(ExpertFlowError, match="no web address"):
        Endpoint("localhost:8000")
    with pytest.raises(ExpertFlowError, match="0 requests at once"):
        Endpoint(server.url, parallel=0)
