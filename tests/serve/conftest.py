"""A fake engine, a real server on a free loopback port, and the public OpenAI client."""

import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

from expertflow_quant.formats.errors import ExpertFlowError  # noqa: E402
from expertflow_quant.serve.app import create_app  # noqa: E402
from expertflow_quant.serve.limits import Limits  # noqa: E402

IMAGE_TOKENS = 9


@dataclass
class FakeEngine:
    """Answers with what it was asked, a word a token: "[sizes of the images] text of the last turn".

    `gate` holds every token back until it is set; `calls` are the messages it has seen.
    """

    gate: threading.Event = field(default_factory=threading.Event)
    calls: list[Any] = field(default_factory=list)
    sampled: list[dict[str, Any]] = field(default_factory=list)
    busy: int = 0
    most_busy: int = 0
    closed_early: int = 0
    stats: Any = field(default_factory=lambda: SimpleNamespace(hits=3, misses=2, bytes_moved=512, stall_seconds=0.25))

    def stream(self, messages: Any, **sampling: Any) -> "FakeStream":
        self.calls.append(messages)
        self.sampled.append(sampling)
        words = _answer(messages)
        if "refuse " in words:
            raise ExpertFlowError("prompt has 900 tokens; the model reads 512: send a smaller image")
        return FakeStream(self, messages, words, sampling["max_new_tokens"])


class FakeStream:
    """One answer of a FakeEngine."""

    def __init__(self, engine: FakeEngine, messages: Any, words: list[str], wanted: int) -> None:
        self.last: Any = None
        self._engine, self._messages, self._words, self._wanted = engine, messages, words, wanted
        self._pieces = self._made()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def close(self) -> None:
        self._pieces.close()

    def _made(self) -> Iterator[str]:
        engine, words, sent = self._engine, self._words, 0
        reason = "stop" if self._wanted > len(words) else "length"
        engine.busy += 1
        engine.most_busy = max(engine.busy, engine.most_busy)
        try:
            if "crash " in words:
                raise RuntimeError("secret detail")
            while sent < min(self._wanted, len(words)):
                assert engine.gate.wait(30), "the test never opened the gate"
                sent += 1
                yield words[sent - 1]
            sent += reason == "stop"
        except GeneratorExit:
            engine.closed_early += 1
            raise
        finally:
            engine.busy -= 1
            images = IMAGE_TOKENS * len(_images(self._messages))
            texts = sum(len(_text(message).split()) for message in self._messages)
            self.last = SimpleNamespace(
                prompt_tokens=texts + images,
                image_tokens=images,
                completion_tokens=sent,
                finish_reason=reason,
            )


def _text(message: Any) -> str:
    content = message["content"]
    return content if isinstance(content, str) else " ".join(p["text"] for p in content if p["type"] == "text")


def _images(messages: Any) -> list[Image.Image]:
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]


def _answer(messages: Any) -> list[str]:
    seen = [f"{image.mode}{image.width}x{image.height} " for image in _images(messages)]
    return seen + [word + " " for word in _text(messages[-1]).split()]


@dataclass(frozen=True)
class Server:
    """`url` ends in /v1; `client` is the public client without its own retries."""

    url: str
    engine: Any
    client: Any

    def wait_for(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.005)


@contextlib.contextmanager
def running(engine: Any, limits: Limits, name: str = "tiny", batching: Any = None) -> Iterator[Server]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(engine, name, limits, batching), log_level="warning", lifespan="on")
    config.timeout_graceful_shutdown = 2
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60)
    shown = Server(url, engine, client)
    shown.wait_for(lambda: server.started)
    try:
        yield shown
    finally:
        client.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Start servers for one test: serve(engine, max_queue=1)."""
    with contextlib.ExitStack() as stack:

        def start(engine: Any, name: str = "tiny", batching: Any = None, **limits: int) -> Server:
            return stack.enter_context(running(engine, replace(Limits(), **limits), name, batching))

        yield start


@pytest.fixture
def engine() -> FakeEngine:
    """Answers at once; clear its gate to hold it."""
    fake = FakeEngine()
    fake.gate.set()
    return fake


@pytest.fixture
def server(serve: Callable[..., Server], engine: FakeEngine) -> Server:
    return serve(engine)


@pytest.fixture(scope="module")
def steady() -> Iterator[Server]:
    """One server for all tests of a file that leave nothing behind."""
    fake = FakeEngine()
    fake.gate.set()
    with running(fake, Limits()) as shown:
        yield shown


@pytest.fixture
def data_url() -> Callable[..., str]:
    """A picture as clients send it."""

    def make(image: Image.Image | None = None, kind: str = "PNG", **options: Any) -> str:
        buffer = io.BytesIO()
        (image or Image.new("RGB", (40, 30), "red")).save(buffer, kind, **options)
        return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"

    return make


@pytest.fixture
def about(data_url: Callable[..., str]) -> Callable[..., list[dict[str, Any]]]:
    """One user turn about pictures: about("how many bars?", url, ...); without urls about a red one."""

    def make(text: str, *urls: str) -> list[dict[str, Any]]:
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls or (data_url(),)]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

    return make
