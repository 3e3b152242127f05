"""The engine: a model with its processor behind two calls, answers at once or as a stream.

::

    engine = expertflow_quant.load("OUT", expert_memory="2MiB")
    engine.generate([[{"role": "user", "content": "What does a router do?"}]])[0].text

The decoding loop is transformers' own ``generate``; sampling settings that a model ships with are not used,
so that the same call means the same for every model. One generation runs at a time; other callers wait.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from expertflow_quant.models.seams import expert_parameters, is_experts
from expertflow_quant.offload.cache import ExpertCache
from expertflow_quant.offload.stats import CacheStats
from expertflow_quant.runtime.answers import Generation, Sampling, TextEmitter, cut_answer, decode, find_stop
from expertflow_quant.runtime.prompts import Message, PromptEncoder, Prompts
from expertflow_quant.runtime.stream import Cancellable, TokenQueue, TokenStream


class Engine:
    """A transformers model in eval mode, ours or a plain one, with its processor (or just its tokenizer).

    ``last`` is the answer of the stream that ended or was closed last.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.last: Generation | None = None
        self._cache: ExpertCache | None = getattr(model, "expert_cache", None)
        self._encoder = PromptEncoder(processor, model.config)
        self._end_ids = _end_ids(model.generation_config.eos_token_id, self.tokenizer.eos_token_id)
        model.generation_config = GenerationConfig(
            eos_token_id=sorted(self._end_ids) or None,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=model.generation_config.bos_token_id,
        )
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
        """Most tokens, prompt and answer together, that the model reads; None when its config does not
        say."""
        return self._encoder.context

    @property
    def stats(self) -> CacheStats:
        """What the expert cache counted since loading or ``reset_stats``; zeros for a plain model."""
        return self._cache.stats if self._cache is not None else CacheStats()

    def reset_stats(self) -> None:
        if self._cache is not None:
            self._cache.reset_stats()

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts: records, or a plain model's expert weights."""
        return self._cache.store.nbytes if self._cache is not None else _plain_expert_bytes(self.model)

    @property
    def device_expert_bytes(self) -> int:
        """Bytes that experts take on the device: the slots, or all of a plain model's."""
        return self._cache.device_bytes if self._cache is not None else _plain_expert_bytes(self.model)

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
        """One answer per conversation, computed as one left-padded batch.

        Raises PromptError (context too long, a message not understood) and ExpertFlowError (options) before
        any token.
        """
        if not conversations:
            return []
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, _texts(stop))
        prompts = self._encode(conversations, sampling)
        start = time.perf_counter()
        rows = self._run(prompts, sampling)[:, prompts.width :].tolist()
        seconds = time.perf_counter() - start
        return [self._generation(prompts, index, row, sampling, seconds) for index, row in enumerate(rows)]

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
        prompts = self._encode([messages], sampling)
        start = time.perf_counter()

        def run(tokens: TokenQueue, cancellable: Cancellable) -> None:
            self._run(prompts, sampling, tokens, cancellable)

        def conclude(token_ids: list[int]) -> Generation:
            self.last = self._generation(prompts, 0, token_ids, sampling, time.perf_counter() - start)
            return self.last

        return TokenStream(run, conclude, TextEmitter(self.tokenizer, sampling.stop))

    def _encode(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> Prompts:
        with self._encoding:
            return self._encoder.encode(conversations, sampling.max_new_tokens)

    def _run(
        self,
        prompts: Prompts,
        sampling: Sampling,
        streamer: TokenQueue | None = None,
        cancellable: Cancellable | None = None,
    ) -> Tensor:
        """Prompts and answers, ``[rows, width + new tokens]`` on the CPU."""
        criteria: list[StoppingCriteria] = [cancellable] if cancellable is not None else []
        if sampling.stop:
            criteria.append(_StopTexts(self.tokenizer, sampling.stop, prompts.width))
        options: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "do_sample": sampling.temperature > 0,
        }
        if options["do_sample"]:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        with self._running, _seeded(sampling.seed, self.device):
            if cancellable is not None and cancellable.event.is_set():  # while it waited for its turn
                return prompts.inputs["input_ids"]
            sequences: Tensor = self.model.generate(
                **_moved(prompts.inputs, self.device),
                **options,
                stopping_criteria=StoppingCriteriaList(criteria),
                streamer=streamer,
            )
            return sequences.cpu()

    def _generation(
        self, prompts: Prompts, index: int, row: list[int], sampling: Sampling, seconds: float
    ) -> Generation:
        answer = cut_answer(self.tokenizer, row, self._end_ids, sampling.stop)
        return Generation(
            text=answer.text,
            token_ids=answer.token_ids,
            prompt_tokens=prompts.prompt_tokens[index],
            image_tokens=prompts.image_tokens[index],
            completion_tokens=len(answer.token_ids),
            finish_reason=answer.finish_reason,
            seconds=seconds,
        )


class _StopTexts(StoppingCriteria):
    """Ends a row once its answer holds one of ``stop``; looks at the latest tokens only."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int) -> None:
        self._tokenizer, self._stop, self._width = tokenizer, stop, width
        self._tail = max(len(text.encode()) for text in stop) + 8

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tails = input_ids[:, max(self._width, input_ids.shape[1] - self._tail) :].tolist()
        done = [find_stop(decode(self._tokenizer, tail), self._stop) is not None for tail in tails]
        return torch.tensor(done, device=input_ids.device)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers from ``seed``, the caller's untouched; None draws from the global generator."""
    devices = [device] if device.type == "cuda" else []
    with nullcontext() if seed is None else torch.random.fork_rng(devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _moved(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _texts(stop: Sequence[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _end_ids(*found: int | list[int] | None) -> frozenset[int]:
    lists = [ids if isinstance(ids, list) else [ids] for ids in found if ids is not None]
    return frozenset(token for ids in lists for token in ids)


def _plain_expert_bytes(model: Any) -> int:
    modules = [module for module in model.modules() if is_experts(module)]
    names = [(module, name) for module in modules for name in expert_parameters(module).values()]
    return sum(module.get_parameter(name).nbytes for module, name in names)
