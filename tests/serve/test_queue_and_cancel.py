"""One worker: order, bounds, clients that go away, two clients at once."""

import concurrent.futures
import http.client
import json
import urllib.parse

import openai
import pytest

HELLO = [{"role": "user", "content": "hello"}]


def outcomes(server):
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    mark = 'expertflow_requests_total{outcome="'
    return {line[len(mark) :].split('"')[0]: float(line.split()[-1]) for line in lines if line.startswith(mark)}


def health(server):
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc)
    connection.request("GET", "/health")
    state = json.load(connection.getresponse())
    connection.close()
    return state["running"], state["waiting"]


def send(server, text, stream=False):
    """A request on a connection of its own, whose answer is not read."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc)
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "stream": stream}
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)
    return connection


def read(connection):
    reply = json.load(connection.getresponse())
    connection.close()
    return reply["choices"][0]["message"]["content"]


def test_a_full_queue_answers_429_and_when_to_come_back(serve, engine):
    server = serve(engine, max_queue=1)
    engine.gate.clear()
    first = send(server, "one")
    server.wait_for(lambda: health(server) == (1, 0))
    second = send(server, "two")
    server.wait_for(lambda: health(server) == (1, 1))
    with pytest.raises(openai.RateLimitError, match="--max-queue") as caught:
        server.client.chat.completions.create(model="tiny", messages=HELLO)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    engine.gate.set()
    assert (read(first), read(second)) == ("one ", "two ")
    server.client.chat.completions.create(model="tiny", messages=HELLO)
    assert outcomes(server) == {"ok": 3.0, "busy": 1.0}


def test_without_a_queue_one_request_is_still_answered(serve, engine):
    server = serve(engine, max_queue=0)
    for _ in range(2):
        server.client.chat.completions.create(model="tiny", messages=HELLO)


def test_requests_are_answered_in_order(serve, engine):
    server = serve(engine)
    engine.gate.clear()
    connections = []
    for number in range(5):
        connections.append(send(server, f"number {number}"))
        server.wait_for(lambda: sum(health(server)) == len(connections))
    engine.gate.set()
    assert [read(connection) for connection in connections] == [f"number {number} " for number in range(5)]
    assert [call[0]["content"] for call in engine.calls] == [f"number {number}" for number in range(5)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_the_worker(server, engine, stream):
    engine.gate.wait = slow = _Slow(0.02)
    gone = send(server, "word " * 1000, stream)
    server.wait_for(lambda: health(server) == (1, 0) and slow.tokens > 2)
    gone.close()
    server.wait_for(lambda: health(server) == (0, 0))
    assert engine.closed_early == 1
    assert server.client.chat.completions.create(model="tiny", messages=HELLO).choices
    assert outcomes(server) == {"cancelled": 1.0, "ok": 1.0}


def test_a_stream_closed_half_way_stops_the_engine(server, engine):
    one_by_one = _Slow(0.02)
    engine.gate.wait = one_by_one
    stream = server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "word " * 200}], stream=True
    )
    next(stream), next(stream)
    stream.close()
    server.wait_for(lambda: engine.closed_early == 1)
    assert one_by_one.tokens < 100
    server.wait_for(lambda: outcomes(server) == {"cancelled": 1.0})
    assert health(server) == (0, 0)


class _Slow:
    def __init__(self, seconds):
        self.seconds, self.tokens = seconds, 0

    def __call__(self, timeout):
        import time

        time.sleep(self.seconds)
        self.tokens += 1
        return True


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_while_it_waits_gives_its_place_back(serve, engine, stream):
    server = serve(engine, max_queue=1)
    engine.gate.clear()
    first = send(server, "one")
    server.wait_for(lambda: health(server) == (1, 0))
    send_and_leave = send(server, "two", stream)
    server.wait_for(lambda: health(server) == (1, 1))
    send_and_leave.close()
    server.wait_for(lambda: health(server) == (1, 0))
    third = send(server, "three")
    server.wait_for(lambda: health(server) == (1, 1))
    engine.gate.set()
    assert (read(first), read(third)) == ("one ", "three ")
    assert [call[0]["content"] for call in engine.calls] == ["one", "three"]
    assert outcomes(server) == {"cancelled": 1.0, "ok": 2.0}


def test_a_refused_image_gives_its_place_back(serve, engine, about):
    server = serve(engine, max_queue=0)
    for _ in range(3):
        with pytest.raises(openai.BadRequestError, match="nothing is fetched"):
            server.client.chat.completions.create(model="tiny", messages=about("x", "https://example.com/a.png"))
    assert server.client.chat.completions.create(model="tiny", messages=HELLO).choices
    assert outcomes(server) == {"refused": 3.0, "ok": 1.0}


def test_many_clients_at_once_each_get_their_own_answer(serve, engine, about, data_url):
    from PIL import Image

    server = serve(engine, max_queue=64)

    def ask(number):
        url = data_url(Image.new("RGB", (20 + number, 20)))
        stream = number % 2 == 0
        reply = server.client.chat.completions.create(
            model="tiny", messages=about(f"question {number} " * 5, url), stream=stream
        )
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in reply)
        return reply.choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(32), timeout=120))
    assert answers == [f"RGB{20 + number}x20 " + f"question {number} " * 5 for number in range(32)]
    assert engine.most_busy == 1


def test_the_server_stops_with_requests_in_it(serve, engine):
    """The fixture asserts that it ended; a held answer must not keep it."""
    server = serve(engine)
    engine.gate.wait = _Slow(0.05)
    running, waiting = send(server, "word " * 10_000), send(server, "two")
    server.wait_for(lambda: health(server) == (1, 1))
    assert running is not waiting
