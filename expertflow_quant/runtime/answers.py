"""What is asked of a generation and what comes out: sampling options, answers, text as it becomes known."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from expertflow_quant.formats.errors import ExpertFlowError

UNFINISHED = "\ufffd"  # a tokenizer's decoder writes it for the first bytes of a character


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Temperature 0 is greedy; a ``stop`` text ends an answer and is not part of
    it."""

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise ExpertFlowError(f"max_new_tokens {self.max_new_tokens!r} must be a whole number of at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ExpertFlowError(f"temperature {self.temperature} must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise ExpertFlowError(f"top_p {self.top_p} must be above 0 and at most 1")
        if not all(self.stop):
            raise ExpertFlowError(f"stop {self.stop!r} holds an empty text, which is everywhere: leave it out")


@dataclass(frozen=True)
class Generation:
    """One answer.

    ``token_ids`` are all tokens generated, the one that ended the answer included, and ``completion_tokens``
    is their number; ``prompt_tokens`` counts ``image_tokens`` too. ``finish_reason``: "stop" (the model ended
    it, or a stop text was met) or "length" (also of a stream that was closed). ``seconds``: wall time of the
    whole call, which the answers of a batch share.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    image_tokens: int
    completion_tokens: int
    finish_reason: str
    seconds: float


@dataclass(frozen=True)
class Answer:
    """Tokens of one row cut where the answer ends, as text, and why it ended."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


def cut_answer(tokenizer: Any, token_ids: Sequence[int], end_ids: frozenset[int], stop: Sequence[str]) -> Answer:
    """The answer in a row of generated tokens, which may go on with padding after its end."""
    ended = next((i for i, token in enumerate(token_ids) if token in end_ids), None)
    tokens = list(token_ids) if ended is None else list(token_ids[: ended + 1])
    text = decode(tokenizer, tokens)
    if find_stop(text, stop) is None:
        return Answer(text, tuple(tokens), "length" if ended is None else "stop")
    kept = next(n for n in range(1, len(tokens) + 1) if find_stop(decode(tokenizer, tokens[:n]), stop) is not None)
    text = decode(tokenizer, tokens[:kept])
    return Answer(text[: find_stop(text, stop)], tuple(tokens[:kept]), "stop")


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop text begins, or None."""
    found = [place for place in map(text.find, stop) if place >= 0]
    return min(found, default=None)


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class TextEmitter:
    """Text of an answer as its tokens arrive, one piece per token.

    A piece is "" while a character, or what may become a stop text, is unfinished. All pieces and
    ``finish``'s make up exactly the text of the whole answer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        self._settled = 0  # tokens before this one are not decoded again
        self._decoded = 0  # tokens whose text is known
        self._text = ""
        self._emitted = 0

    def feed(self, token: int) -> str:
        """The text that ``token`` adds."""
        self._tokens.append(token)
        # A token's text can depend on the one before it, so decoding begins one run earlier.
        known = decode(self._tokenizer, self._tokens[self._settled : self._decoded])
        text = decode(self._tokenizer, self._tokens[self._settled :])
        if text.endswith(UNFINISHED):
            return ""
        self._text += text[len(known) :]
        self._settled, self._decoded = self._decoded, len(self._tokens)
        place = find_stop(self._text, self._stop)
        return self._emit(len(self._text) - self._held_back() if place is None else place)

    def finish(self, text: str) -> str:
        """What is missing of the whole answer's ``text``."""
        self._text = text
        return self._emit(len(text))

    def _emit(self, end: int) -> str:
        piece = self._text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return piece

    def _held_back(self) -> int:
        """Length of the longest end of the text that could begin a stop text."""
        lengths = range(max(map(len, self._stop), default=1) - 1, 0, -1)
        return next(
            (n for n in lengths if any(stop.startswith(self._text[-n:]) and len(stop) > n for stop in self._stop)),
            0,
        )
