"""The request of /v1/chat/completions: what is understood, what is let pass, what is refused by name.

Nothing that would change the answer is ignored. A field is in one of three tables: the models below
(understood), ``HARMLESS`` (taken and not used: it changes no answer) or ``REFUSED`` (its neutral values pass,
any other is an error that names the remedy). A field in none of them is an error too.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from expertflow_quant.serve.errors import ApiError

HARMLESS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "user",
    }
)

_NO_TOOLS = "this server calls no tools: describe them in the messages"
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "n": ((1,), "one answer a request: send the request again for another"),
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "logprobs": ((False,), "log probabilities are not returned: leave it out"),
    "top_logprobs": ((0,), "log probabilities are not returned: leave it out"),
    "logit_bias": (({},), "logits are not changed: leave it out"),
    "frequency_penalty": ((0,), "there are no penalties: leave it out"),
    "presence_penalty": ((0,), "there are no penalties: leave it out"),
    "response_format": (({"type": "text"},), "answers are free text: ask for the shape in the messages"),
    "modalities": ((["text"],), "answers are text: leave it out"),
    "audio": ((), "answers are text: leave it out"),
    "reasoning_effort": (("none",), "the model's own template decides: leave it out"),
    "verbosity": (("medium",), "use max_tokens or ask for a short answer in the messages"),
    "store": ((False,), "answers are not stored: leave it out"),
    "web_search_options": ((), "this server fetches nothing: put the text into the messages"),
}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ImageUrl(_Model):
    """``url`` is a data URL; ``detail`` asks for the resolution that the model's own processor chooses
    anyway."""

    url: str
    detail: Literal["auto", "high"] | None = None


class Part(_Model):
    """A piece of a message: text or an image, as ``type`` says."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_type(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in ("text", "image_url"):
            raise _error(
                "part type is {kind}; this server reads 'text' and 'image_url': send an image as "
                '{{"type": "image_url", "image_url": {{"url": "data:image/png;base64,..."}}}}',
                kind=repr(kind),
            )
        return value

    @model_validator(mode="after")
    def _one_content(self) -> "Part":
        other = "image_url" if self.type == "text" else "text"
        if getattr(self, self.type) is None or getattr(self, other) is not None:
            raise _error(
                "a part of type '{kind}' has the field '{kind}' and not '{other}'",
                kind=self.type,
                other=other,
            )
        return self


class Message(_Model):
    """One turn. A string as content is read as one text part; 'developer' is read as 'system'."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _as_parts(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        given = {key: item for key, item in value.items() if item is not None}
        if isinstance(given.get("content"), str):
            given["content"] = [{"type": "text", "text": given["content"]}]
        return given

    @model_validator(mode="after")
    def _images_from_users(self) -> "Message":
        if self.role != "user" and any(part.type == "image_url" for part in self.content):
            raise _error("a message of role '{role}' holds an image: put it into a 'user' message", role=self.role)
        return self


class StreamOptions(_Model):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Model):
    """A request to answer. ``temperature`` left out or 0 means the most likely token each time."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: list[str] | None = Field(default=None, max_length=4)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("stop"), str):
            return {**value, "stop": [value["stop"]]}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.stream_options is not None and not self.stream:
            raise _error("stream_options is given for an answer that is not streamed: set stream to true")
        if any(not 1 <= len(text) <= 256 for text in self.stop or ()):
            raise _error("a stop text is empty or longer than 256 characters: give 1 to 4 short texts")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise _error("max_tokens and max_completion_tokens differ: give one of them")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def parse_chat_request(body: bytes) -> ChatRequest:
    """``body``: UTF-8 JSON. Raises ApiError (400) naming the first field that is wrong or not supported."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"the request's body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ApiError(f"the request's body is {type(data).__name__}, not a JSON object")
    try:
        return ChatRequest.model_validate(_understood(data))
    except ValidationError as error:
        raise _api_error(error) from None


def _understood(data: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in data.items():
        if name in HARMLESS or value is None:
            continue
        if name in REFUSED:
            _check_neutral(name, value)
        elif name in ChatRequest.model_fields:
            kept[name] = value
        else:
            known = ", ".join(ChatRequest.model_fields)
            raise ApiError(f"unknown field {name!r}; known are {known}", param=name, code="unknown_parameter")
    return kept


def _check_neutral(name: str, value: object) -> None:
    neutral, remedy = REFUSED[name]
    if not any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral):
        message = f"{name} is {_short(value)}, which is not supported: {remedy}"
        raise ApiError(message, param=name, code="unsupported_parameter")


def _api_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(step) for step in first["loc"]) or None
    message = first["msg"]
    if first["type"] not in ("refused", "missing"):
        message += f" (got {_short(first['input'])})"
    return ApiError(f"{place}: {message}" if place else message, param=place, code="invalid_value")


def _error(template: str, **values: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{text}", {"text": template.format(**values)})


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
