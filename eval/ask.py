"""Serve a checkpoint as a user would and ask it about a picture through the public ``openai`` client."""

import base64
import io
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.pool import JobError, describe_failure, library_command, start_process

START_SECONDS = 120.0
STOP_SECONDS = 10.0


@dataclass(frozen=True)
class StreamedAnswer:
    """What came back: the text, in how many pieces, after how many seconds, and the counted tokens."""

    text: str
    pieces: int
    first_seconds: float
    seconds: float
    prompt_tokens: int
    completion_tokens: int


@contextmanager
def served(checkpoint: Path, expert_memory: str, log: Path) -> Iterator[str]:
    """``expertflow-quant serve`` on a free loopback port for as long as the block runs; yields the base
    URL."""
    port = free_port()
    command = (*library_command(), "serve", str(checkpoint))
    command += ("--expert-memory", expert_memory, "--host", "127.0.0.1", "--port", str(port))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = start_process(command, out)
        try:
            base_url = f"http://127.0.0.1:{port}/v1"
            wait_until_ready(base_url, lambda: process.poll() is None, command, log)
            yield base_url
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_ready(base_url: str, alive: Callable[[], bool], command: tuple[str, ...], log: Path) -> None:
    """Return once the server lists its model. Raises JobError when it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and alive():
        try:
            with urllib.request.urlopen(f"{base_url}/models", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise JobError(describe_failure("serve", command, log))


def ask(base_url: str, image: Any, prompt: str, max_tokens: int, on_piece: Callable[[str], None]) -> StreamedAnswer:
    """Ask one question about a PIL image, streaming; ``on_piece`` gets each piece of text as it arrives."""
    from openai import OpenAI

    content = [
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": prompt},
    ]
    with OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        request: dict[str, Any] = {
            "model": client.models.list().data[0].id,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        start = time.perf_counter()
        stream = client.chat.completions.create(**request)
        pieces, first, usage = [], 0.0, None
        for chunk in stream:
            usage = chunk.usage or usage
            text = chunk.choices[0].delta.content if chunk.choices else None
            if text:
                first = first or time.perf_counter() - start
                pieces.append(text)
                on_piece(text)
    counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
    return StreamedAnswer("".join(pieces), len(pieces), first, time.perf_counter() - start, *counts)


def data_url(image: Any) -> str:
    """A PIL image as a PNG data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def free_port() -> int:
    """A loopback port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
