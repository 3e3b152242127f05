"""The shapes of answers: one JSON object, or server-sent events that spell the same answer piece by piece."""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from expertflow_quant.serve.errors import ApiError
from expertflow_quant.serve.work import Done

DONE = b"data: [DONE]\n\n"


def model_card(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "expertflow-quant"}


def usage(done: Done) -> dict[str, Any]:
    """Tokens as the engine counted them; ``prompt_tokens`` includes the image tokens, also given apart."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "prompt_tokens_details": {"image_tokens": done.image_tokens},
    }


@dataclass(frozen=True)
class Reply:
    """One answer's identity; every chunk of a stream carries the same."""

    model: str
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, done: Done) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": done.finish_reason,
        }
        return self._object("chat.completion", [choice], usage=usage(done))

    def opening(self) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str) -> bytes:
        return self._chunk({"content": text})

    def ending(self, done: Done) -> bytes:
        """The last chunk, the usage if it was asked for, and the mark that ends the stream."""
        data = self._chunk({}, done.finish_reason)
        if self.include_usage:
            data += _event(self._object("chat.completion.chunk", [], usage=usage(done)))
        return data + DONE

    def failure(self, error: ApiError) -> bytes:
        """What ends a stream that failed half way: clients raise on it."""
        return _event(error.body)

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        extra = {"usage": None} if self.include_usage else {}
        return _event(self._object("chat.completion.chunk", [choice], **extra))

    def _object(self, kind: str, choices: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **extra}


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
