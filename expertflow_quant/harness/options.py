"""A harness's generation settings as ours, and its requests in batches that one setting covers."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from expertflow_quant.formats.errors import ExpertFlowError

log = logging.getLogger(__name__)

NEW_TOKENS = 128
"""Longest answer where a task names none, as lmms-eval's own models have it."""

FILLED_IN = "\n\n"
"""The stop text that lmms-eval fills in where a task names none. Its own Qwen-VL models leave it out, and so do we: the
stock tasks never asked for it, and an answer is not cut where our own evaluator would not cut it."""


@dataclass(frozen=True)
class Options:
    """How one request is answered; the names are those of ``Engine.generate``."""

    max_new_tokens: int = NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Options":
        """From a task's ``generation_kwargs``. Raises ExpertFlowError for beams; says once what else it leaves out."""
        if settings.get("num_beams") not in (None, 1):
            raise ExpertFlowError(
                f"num_beams {settings['num_beams']!r} asks for a beam search, and one answer is kept at a time: "
                "set num_beams=1 in the task's generation_kwargs or with --gen_kwargs"
            )
        for name in sorted(settings.keys() - UNDERSTOOD):
            _say_left_out(name, repr(settings[name]))
        until = settings.get("until") or ()
        top_p = settings.get("top_p")
        return cls(
            max_new_tokens=int(settings.get("max_new_tokens") or NEW_TOKENS),
            temperature=_temperature(settings),
            top_p=1.0 if top_p is None else float(top_p),
            stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text not in ("", FILLED_IN)),
        )


UNDERSTOOD = frozenset({"max_new_tokens", "temperature", "do_sample", "top_p", "until", "num_beams"})


@dataclass(frozen=True)
class Batch:
    """Requests of the same options, asked together; ``first`` is the place of the first among all."""

    first: int
    options: Options
    requests: tuple[Any, ...]


def batches(requests: Sequence[Any], settings: Sequence[Mapping[str, Any]], size: int) -> Iterator[Batch]:
    """``requests`` in their order, at most ``size`` at once; a new setting or task begins a new batch.

    Batches are never composed by length: padding reaches the last bits of a sum, so the same files must always make
    the same batches. ``settings``: the generation settings of each request.
    """
    options = [(request.task_name, Options.of(given)) for request, given in zip(requests, settings, strict=True)]
    first = 0
    while first < len(requests):
        end = first + 1
        while end < min(first + size, len(requests)) and options[end] == options[first]:
            end += 1
        yield Batch(first, options[first][1], tuple(requests[first:end]))
        first = end


def _temperature(settings: Mapping[str, Any]) -> float:
    sample, temperature = settings.get("do_sample"), settings.get("temperature")
    if sample is None:
        return float(temperature or 0.0)
    if not sample:
        return 0.0
    return 1.0 if temperature is None else float(temperature)


@cache
def _say_left_out(name: str, value: str) -> None:
    log.warning("generation setting %s=%s has no meaning here and is left out", name, value)
