"""The engine: a model with its processor behind two calls, answers at once or as a stream.

::

    engine = expertflow_quant.load("OUT", expert_memory="2MiB")
    engine.generate([[{"role": "user", "content": "What does a router do?"}]])[0].text

What runs the model is a runner's affair (runner.py): transformers' own ``generate``, or the fast path of a GPU.
Sampling settings that a model ships with are not used, so that the same call means the same for every model. One
generation runs at a time; other callers wait.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.stats import CacheStats
from expertflow_quant.runtime.answers import Generation, Sampling, TextEmitter, cut_answer
from expertflow_quant.runtime.memory import MemoryPlan
from expertflow_quant.runtime.plain import PlainRunner, StopTexts
from expertflow_quant.runtime.prompts import Message, PromptEncoder, Prompts
from expertflow_quant.runtime.runner import Runner
from expertflow_quant.runtime.stream import Cancellable, TokenQueue, TokenStream
from expertflow_quant.runtime.together import BatchStream

PART_SEED = 0x9E3779B97F4A7C15
"""Between the seeds of a call's parts: far from what anyone counts by."""


class Engine:
    """A transformers model in eval mode, ours or a plain one, with its processor (or just its tokenizer).

    ``last`` is the answer of the stream that ended or was closed last. ``memory_plan``: how a promised device memory
    is divided, if one was. ``plain_because``: why experts of our checkpoint take the plain path, if they do.
    """

    def __init__(self, model: Any, processor: Any, make_runner: Callable[["Engine"], Runner] | None = None) -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.last: Generation | None = None
        self.memory_plan: MemoryPlan | None = None
        self.plain_because: str | None = None
        self._encoder = PromptEncoder(processor, model.config)
        self.end_ids = _end_ids(model.generation_config.eos_token_id, self.tokenizer.eos_token_id)
        model.generation_config = GenerationConfig(
            eos_token_id=sorted(self.end_ids) or None,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=model.generation_config.bos_token_id,
        )
        self.runner: Runner = PlainRunner(model, self.tokenizer) if make_runner is None else make_runner(self)
        self._encoder.room = self.runner.room
        self._running = threading.Lock()
        self._encoding = threading.Lock()

    @classmethod
    def from_plain(cls, path: str | Path, device: str = "cpu", dtype: torch.dtype | str | None = None) -> "Engine":
        """An ordinary transformers folder, dense or Mixture-of-Experts: see ``loading.load_plain``."""
        from expertflow_quant.runtime.loading import load_plain

        return load_plain(path, device, dtype)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def context(self) -> int | None:
        """Most tokens, prompt and answer together, that the model reads and its runner has room for; None when its
        config does not say."""
        return min((limit for limit in (self._encoder.context, self.runner.room) if limit is not None), default=None)

    @property
    def stats(self) -> CacheStats:
        """What was counted of experts since loading or ``reset_stats``; zeros for a plain model."""
        return self.runner.stats

    def reset_stats(self) -> None:
        self.runner.reset_stats()

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts: records, or a plain model's expert weights."""
        return self.runner.expert_bytes

    @property
    def device_expert_bytes(self) -> int:
        """Bytes that experts take on the device: slots and staging, or all of a plain model's."""
        return self.runner.device_expert_bytes

    @property
    def distinct_experts(self) -> float | None:
        """Experts of a layer, on average, that the decode steps of the last call touched; None where nobody counts."""
        found: float | None = getattr(self.runner, "distinct_experts", None)
        return found

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        max_new_tokens: int = 32,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """One answer per conversation, computed together, as many at a time as the runner takes.

        Raises PromptError (context too long, a message not understood) and ExpertFlowError (options) before
        any token.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, _texts(stop))
        together = self.runner.max_rows or max(1, len(conversations))
        parts = [conversations[first : first + together] for first in range(0, len(conversations), together)]
        encoded = [self._encode(part, sampling) for part in parts]
        answers: list[Generation] = []
        for part, batches in enumerate(encoded):
            start = time.perf_counter()
            rows = iter(self._run(batches, _of_part(sampling, part)))
            seconds = time.perf_counter() - start
            places = [(prompts, index) for prompts in batches for index in range(len(prompts))]
            answers += [self._generation(*place, next(rows), sampling, seconds) for place in places]
        return answers

    def stream(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 32,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> TokenStream:
        """The answer to one conversation piece by piece.

        Afterwards ``last``, of the stream and of the engine, is the whole answer. ``close()`` on the stream
        ends it early. Raises what ``generate`` raises, at once.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, _texts(stop))
        batches = self._encode([messages], sampling)
        start = time.perf_counter()

        def run(tokens: TokenQueue, cancellable: Cancellable) -> None:
            self._run(batches, sampling, tokens, cancellable)

        def conclude(token_ids: list[int]) -> Generation:
            self.last = self._generation(batches[0], 0, token_ids, sampling, time.perf_counter() - start)
            return self.last

        return TokenStream(run, conclude, TextEmitter(self.tokenizer, sampling.stop))

    def stream_many(
        self,
        conversations: Sequence[Sequence[Message]],
        max_new_tokens: Sequence[int],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
    ) -> BatchStream:
        """Answers computed together, piece by piece, each of at most its own ``max_new_tokens``.

        Raises what ``generate`` raises, at once, and ExpertFlowError for more conversations than the runner takes.
        """
        most = self.runner.max_rows or len(conversations)
        if not 1 <= len(conversations) == len(max_new_tokens) <= most:
            raise ExpertFlowError(
                f"{len(conversations)} conversations with {len(max_new_tokens)} lengths: give 1 to {most} of both"
            )
        sampling = Sampling(max(max_new_tokens), temperature, top_p, None, _texts(stop))
        batches = self._encode(conversations, sampling)
        places = [(prompts, index) for prompts in batches for index in range(len(prompts))]
        stops = StopTexts(self.tokenizer, sampling.stop, 0) if sampling.stop else None
        start = time.perf_counter()

        def run(tokens: TokenQueue, cancellable: Cancellable) -> None:
            self._run(batches, sampling, tokens, cancellable)

        def ended(row: int, tokens: Sequence[int]) -> bool:
            over = len(tokens) >= max_new_tokens[row] or tokens[-1] in self.end_ids
            return over or (stops is not None and stops.met(tokens))

        def conclude(row: int, token_ids: list[int]) -> Generation:
            return self._generation(*places[row], token_ids, sampling, time.perf_counter() - start)

        return BatchStream(run, ended, conclude, [TextEmitter(self.tokenizer, sampling.stop) for _ in places])

    def prompt_tokens(self, messages: Sequence[Message]) -> Prompts:
        """The prompt of one conversation, as the model would read it. Raises what ``generate`` raises."""
        return self._encode([messages], Sampling(1))[0]

    def _encode(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Prompts]:
        """Batches of prompts, in order, none larger than the runner reads at once."""
        with self._encoding:
            prompts = self._encoder.encode(conversations, sampling.max_new_tokens)
        limit = self.runner.prefill_tokens
        if limit is None or len(prompts) == 1 or len(prompts) * prompts.width <= limit:
            return [prompts]
        half = len(conversations) // 2
        return self._encode(conversations[:half], sampling) + self._encode(conversations[half:], sampling)

    def _run(
        self,
        batches: Sequence[Prompts],
        sampling: Sampling,
        streamer: TokenQueue | None = None,
        cancellable: Cancellable | None = None,
    ) -> list[list[int]]:
        with self._running:
            if cancellable is not None and cancellable.event.is_set():  # while it waited for its turn
                return [[] for prompts in batches for _ in range(len(prompts))]
            return self.runner.run(batches, sampling, streamer, cancellable)

    def _generation(
        self, prompts: Prompts, index: int, row: list[int], sampling: Sampling, seconds: float
    ) -> Generation:
        answer = cut_answer(self.tokenizer, row, self.end_ids, sampling.stop)
        return Generation(
            text=answer.text,
            token_ids=answer.token_ids,
            prompt_tokens=prompts.prompt_tokens[index],
            image_tokens=prompts.image_tokens[index],
            completion_tokens=len(answer.token_ids),
            finish_reason=answer.finish_reason,
            seconds=seconds,
        )


def _of_part(sampling: Sampling, part: int) -> Sampling:
    """A seed of its own for every part of a call, or equal conversations would get equal answers in each."""
    if sampling.seed is None or part == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + part * PART_SEED) % 2**63)


def _texts(stop: Sequence[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _end_ids(*found: int | list[int] | None) -> frozenset[int]:
    lists = [ids if isinstance(ids, list) else [ids] for ids in found if ids is not None]
    return frozenset(token for ids in lists for token in ids)
