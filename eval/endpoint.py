"""A model behind an OpenAI-compatible address, asked like any other: a vLLM or llama.cpp server as the baseline.

Every question is one request with the same prompt, the same pixels (a PNG, so nothing is lost on the way), the same
token limit and temperature 0. What the server does to the image before its model sees it is the server's affair.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from eval.ask import data_url
from eval.runner import EngineLostError
from expertflow_quant.formats import ExpertFlowError

RETRIES = 6
KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Endpoint:
    """Where to ask. ``url`` ends in "/v1"; ``model`` as the server lists it, its first one if None.

    ``parallel`` requests are under way at most; each is tried ``retries`` more times, after 0.5 s, 1 s, 2 s ... 8 s
    (or what the server says), where the connection fails or the answer is 408, 409, 429 or above 499. The key, where
    one is needed, is in the environment variable OPENAI_API_KEY.
    """

    url: str
    model: str | None = None
    parallel: int = 8
    retries: int = RETRIES
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ExpertFlowError(f"endpoint {self.url!r} is no web address: give http://HOST:PORT/v1")
        if self.parallel < 1 or self.retries < 0:
            raise ExpertFlowError(
                f"{self.parallel} requests at once and {self.retries} retries: use at least 1 and at least 0"
            )


@dataclass(frozen=True)
class EndpointAnswer:
    """One answer; of the prompt's tokens the server does not say how many are the image's."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    image_tokens: int = 0


class EndpointEngine:
    """An ``eval.runner.Answerer`` over an endpoint; what fails after all retries is returned in the answer's place.

    ``model`` is the name that is asked for.
    """

    expert_bytes = 0
    device_expert_bytes = 0

    def __init__(self, endpoint: Endpoint) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ExpertFlowError(f"asking {endpoint.url} needs openai: pip install expertflow-quant[eval]") from error
        key = os.environ.get(KEY_VARIABLE) or "none"
        self._url = endpoint.url
        self._parallel = endpoint.parallel
        self._client = OpenAI(
            base_url=endpoint.url, api_key=key, max_retries=endpoint.retries, timeout=endpoint.timeout
        )
        self.model = endpoint.model or self._first_model(endpoint.url)

    def _first_model(self, url: str) -> str:
        from openai import OpenAIError

        try:
            listed = self._client.models.list().data
        except OpenAIError as error:
            raise ExpertFlowError(f"{url} lists no models ({error}): start the server or name the model") from error
        except AttributeError as error:  # what openai makes of a page in place of a reply
            raise ExpertFlowError(
                f"{url} gives a page and no list of models: give the address of the interface, http://HOST:PORT/v1"
            ) from error
        if not listed:
            raise ExpertFlowError(f"{url} lists no models: name the model")
        return str(listed[0].id)

    def generate(
        self, conversations: list[list[dict[str, Any]]], max_new_tokens: int = 32
    ) -> Sequence[EndpointAnswer | Exception]:
        """One answer or error a conversation, in order. Raises EngineLostError when no request got through, or when
        all were refused for what every one of them shares: the address, the model's name or the key."""
        with ThreadPoolExecutor(min(self._parallel, len(conversations)) or 1) as threads:
            answers = list(threads.map(lambda messages: self._answer(messages, max_new_tokens), conversations))
        self._require_served(answers)
        return answers

    def _require_served(self, answers: Sequence[EndpointAnswer | Exception]) -> None:
        import openai

        lost = [isinstance(a, openai.APIConnectionError) and not isinstance(a, openai.APITimeoutError) for a in answers]
        if lost and all(lost):
            raise EngineLostError(
                f"{self._url} does not answer any more ({answers[-1]}): start it and run the same command again, "
                "which goes on from the last whole batch"
            )
        refusals = (openai.AuthenticationError, openai.NotFoundError, openai.PermissionDeniedError)
        if answers and all(isinstance(answer, refusals) for answer in answers):
            raise EngineLostError(
                f"{self._url} refuses model {self.model!r} ({answers[-1]}): give its address as http://HOST:PORT/v1, "
                f"the model's name behind it as #MODEL, the key in {KEY_VARIABLE}, and run the command again"
            )

    def _answer(self, messages: list[dict[str, Any]], max_new_tokens: int) -> EndpointAnswer | Exception:
        try:
            request: dict[str, Any] = {"messages": [as_request(message) for message in messages]}
            request |= {"model": self.model, "max_tokens": max_new_tokens, "temperature": 0}
            done = self._client.chat.completions.create(**request)
            if not getattr(done, "choices", None):  # a proxy's page comes back as a text
                raise ExpertFlowError("the server's reply is no chat completion")
            usage = done.usage
            counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
            return EndpointAnswer(done.choices[0].message.content or "", *counts)
        except Exception as failure:
            return failure


def as_request(message: dict[str, Any]) -> dict[str, Any]:
    """A message with PIL images as the chat completions interface takes it: images as PNG data URLs."""
    if isinstance(message["content"], str):
        return message
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(part["image"])}} if part["type"] == "image" else part
        for part in message["content"]
    ]
    return {**message, "content": parts}
