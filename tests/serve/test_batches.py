"""Requests that are answered together: each client gets its own answer, and what ends one does not end the others."""

import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from serve.conftest import FakeEngine
from serve.test_queue_and_cancel import health, outcomes, read, send

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.serve.line import Batching


class FakeBatches(FakeEngine):
    """Answers several conversations at once, a word of each in turn."""

    distinct_experts = 3.5

    def __init__(self):
        super().__init__()
        self.batches, self.dropped = [], []

    def stream_many(self, conversations, max_new_tokens, **drawn):
        streams = [
            self.stream(messages, max_new_tokens=most)
            for messages, most in zip(conversations, max_new_tokens, strict=True)
        ]
        self.batches.append([messages[-1]["content"] for messages in conversations])
        return FakeAnswers(self, streams)


class FakeAnswers:
    def __init__(self, engine, streams):
        self._engine, self._open = engine, dict(enumerate(streams))

    def __iter__(self):
        while self._open:
            for row, stream in list(self._open.items()):
                piece = next(iter(stream), None)
                if row in self._open:
                    yield row, self._open.pop(row).last if piece is None else piece

    def drop(self, row):
        self._engine.dropped.append(row)
        self._open.pop(row).close()

    def close(self):
        for stream in self._open.values():
            stream.close()


@pytest.fixture
def engine():
    return FakeBatches()


def waiting(server, engine, texts):
    """Connections whose requests wait in this order behind a first one, which is under way."""
    engine.gate.clear()
    found = []
    for count, text in enumerate(["first", *texts]):
        found.append(send(server, text))
        server.wait_for(lambda count=count: health(server) == (1, count))
    return found


def test_those_who_wait_are_answered_together(serve, engine):
    server = serve(engine, batching=Batching(rows=3))
    connections = waiting(server, engine, ["a b c", "d", "e f", "g"])
    engine.gate.set()
    assert [read(connection) for connection in connections] == ["first ", "a b c ", "d ", "e f ", "g "]
    assert engine.batches == [["a b c", "d", "e f"]]
    server.wait_for(lambda: outcomes(server) == {"ok": 5.0})
    lines = server.client._client.get(server.url.removesuffix("v1") + "metrics").text.splitlines()
    assert "expertflow_batch_requests_count 3.0" in lines
    assert "expertflow_batch_requests_sum 5.0" in lines
    assert "expertflow_batch_experts_sum 10.5" in lines


def test_paths_decide_who_goes_together(serve, engine):
    def foretell(messages):
        path = torch.zeros(1, 8, dtype=torch.bool)
        path[0, 4 * messages[-1]["content"].startswith("chart") :][:4] = True
        return path

    server = serve(engine, batching=Batching(rows=2, patience=2, foretell=foretell))
    texts = ["chart 1", "page 1", "chart 2", "page 2"]
    connections = waiting(server, engine, texts)
    engine.gate.set()
    assert [read(connection) for connection in connections] == ["first ", *(text + " " for text in texts)]
    assert engine.batches == [["chart 1", "chart 2"], ["page 1", "page 2"]]


def test_who_goes_away_leaves_the_others_alone(serve, engine):
    server = serve(engine, batching=Batching(rows=3))
    first, second, third = waiting(server, engine, ["stay here", "go away"])
    engine.gate.set()
    first.getresponse().read()
    engine.gate.clear()
    server.wait_for(lambda: health(server)[0] == 2 or engine.batches)
    third.close()
    engine.gate.set()
    assert read(second) == "stay here "
    server.wait_for(lambda: sum(outcomes(server).values()) == 3)
    assert outcomes(server)["ok"] >= 2


def test_one_that_is_refused_does_not_fail_the_others(serve, engine):
    server = serve(engine, batching=Batching(rows=3))
    connections = waiting(server, engine, ["fine", "refuse this", "too"])
    engine.gate.set()
    assert read(connections[1]) == "fine "
    refused = connections[2].getresponse()
    assert (refused.status, b"smaller image" in refused.read()) == (400, True)
    assert read(connections[3]) == "too "


def test_a_crash_fails_the_batch_and_the_next_goes_on(serve, engine):
    server = serve(engine, batching=Batching(rows=3))
    connections = waiting(server, engine, ["fine", "crash now"])
    engine.gate.set()
    assert read(connections[0]) == "first "
    assert {connection.getresponse().status for connection in connections[1:]} == {500}
    again = server.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "again"}])
    assert again.choices[0].message.content == "again "


def test_the_queue_holds_as_many_as_are_answered_and_may_wait(serve, engine):
    server = serve(engine, batching=Batching(rows=2), max_queue=1)
    connections = waiting(server, engine, ["one", "two"])
    with pytest.raises(openai.RateLimitError, match="2 requests are answered and 1 wait"):
        server.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
    engine.gate.set()
    assert [read(connection) for connection in connections] == ["first ", "one ", "two "]


def test_a_prompt_whose_path_cannot_be_foretold_is_answered_for_itself(serve, engine):
    def foretell(messages):
        raise ExpertFlowError("too long")

    server = serve(engine, batching=Batching(rows=2, foretell=foretell))
    connections = waiting(server, engine, ["one", "two"])
    engine.gate.set()
    assert [read(connection) for connection in connections] == ["first ", "one ", "two "]


def test_streams_of_a_batch_come_piece_by_piece(serve, engine):
    server = serve(engine, batching=Batching(rows=4))

    def ask(text):
        asked = [{"role": "user", "content": text}]
        chunks = server.client.chat.completions.create(model="tiny", messages=asked, stream=True)
        return [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]

    engine.gate.clear()
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(ask, "first")
        server.wait_for(lambda: health(server) == (1, 0))
        asked = [pool.submit(ask, text) for text in ("a b", "c d e", "f")]
        server.wait_for(lambda: health(server) == (1, 3))
        threading.Timer(0.01, engine.gate.set).start()
        assert first.result() == ["first "]
        assert sorted(one.result() for one in asked) == [["a ", "b "], ["c ", "d ", "e "], ["f "]]
    assert [sorted(batch) for batch in engine.batches] == [["a b", "c d e", "f"]]
