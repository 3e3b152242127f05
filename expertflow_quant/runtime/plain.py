"""The plain runner: transformers' own ``generate``, on any device and for any model."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from expertflow_quant.models.seams import expert_parameters, is_experts
from expertflow_quant.offload.cache import ExpertCache
from expertflow_quant.offload.policy import Key, Progress
from expertflow_quant.offload.stats import CacheStats
from expertflow_quant.runtime.answers import Sampling, decode, find_stop
from expertflow_quant.runtime.prompts import Prompts
from expertflow_quant.runtime.stream import Cancellable, TokenQueue
from expertflow_quant.runtime.waited import Waited


class PlainRunner:
    """Runs ``model``, ours with its expert cache or an ordinary one, one batch of prompts after the other; ``max_rows``
    and ``room`` as in ``runner.Runner``."""

    prefill_tokens: int | None = None

    def __init__(self, model: Any, tokenizer: Any, max_rows: int | None = None, room: int | None = None) -> None:
        self.max_rows, self.room = max_rows, room
        self.model, self._tokenizer = model, tokenizer
        self._cache: ExpertCache | None = getattr(model, "expert_cache", None)
        self._touched = None if self._cache is None else Touched(self._cache.progress)

    @property
    def distinct_experts(self) -> float | None:
        """Of a layer on average, in the decode steps of the last call; None where nobody counts or there were none."""
        return None if self._touched is None else self._touched.experts

    @property
    def stats(self) -> CacheStats:
        return self._cache.stats if self._cache is not None else CacheStats()

    def reset_stats(self) -> None:
        if self._cache is not None:
            self._cache.reset_stats()

    @property
    def expert_bytes(self) -> int:
        return self._cache.store.nbytes if self._cache is not None else _plain_expert_bytes(self.model)

    @property
    def device_expert_bytes(self) -> int:
        return self._cache.device_bytes if self._cache is not None else _plain_expert_bytes(self.model)

    def run(
        self,
        batches: Sequence[Prompts],
        sampling: Sampling,
        streamer: TokenQueue | None = None,
        cancellable: Cancellable | None = None,
    ) -> list[list[int]]:
        """See ``runner.Runner``."""
        if self._touched is not None:
            self._touched.begin()
        return [row for prompts in batches for row in self._batch(prompts, sampling, streamer, cancellable)]

    def _batch(
        self, prompts: Prompts, sampling: Sampling, streamer: TokenQueue | None, cancellable: Cancellable | None
    ) -> list[list[int]]:
        inputs = moved(prompts.inputs, self.model.device)
        criteria: list[StoppingCriteria] = [cancellable] if cancellable is not None else []
        if sampling.stop:
            criteria.append(StopTexts(self._tokenizer, sampling.stop, prompts.width))
        options: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "do_sample": sampling.temperature > 0,
        }
        if options["do_sample"]:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        waited = Waited(criteria, _end_ids(self.model), inputs["attention_mask"])
        with _seeded(sampling.seed, self.model.device), waited.watching():
            sequences: Tensor = self.model.generate(
                **inputs, **options, stopping_criteria=StoppingCriteriaList([waited]), streamer=streamer
            )
        rows: list[list[int]] = sequences[:, prompts.width :].tolist()
        return rows


class Touched:
    """Which experts decode steps ask for, told by ``progress``."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._keys: set[Key] = set()
        self._prompt_step = -1
        progress.watch(self._asked)

    def begin(self) -> None:
        """Count from zero; the next step is a prompt's and does not count."""
        self._keys, self._prompt_step = set(), self._progress.step + 1

    @property
    def experts(self) -> float | None:
        return len(self._keys) / len(self._progress.experts) if self._keys else None

    def _asked(self, layer: int, experts: Collection[int]) -> None:
        if self._progress.step > self._prompt_step:
            self._keys.update((layer, expert) for expert in experts)


class StopTexts(StoppingCriteria):
    """Ends a row once its answer holds one of ``stop``; looks at the latest tokens only."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int) -> None:
        self._tokenizer, self._stop, self._width = tokenizer, stop, width
        self._tail = max(len(text.encode()) for text in stop) + 8

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tails = input_ids[:, max(self._width, input_ids.shape[1] - self._tail) :].tolist()
        return torch.tensor([self.met(tail) for tail in tails], device=input_ids.device)

    def met(self, tokens: Sequence[int]) -> bool:
        """Whether the end of ``tokens``, all of them generated, holds a stop text."""
        return find_stop(decode(self._tokenizer, tokens[-self._tail :]), self._stop) is not None


def moved(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """``inputs`` with their tensors on ``device``."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _end_ids(model: Any) -> list[int]:
    found = model.generation_config.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers from ``seed``, the caller's untouched; None draws from the global generator."""
    devices = [device] if device.type == "cuda" else []
    with nullcontext() if seed is None else torch.random.fork_rng(devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _plain_expert_bytes(model: Any) -> int:
    modules = [module for module in model.modules() if is_experts(module)]
    names = [(module, name) for module in modules for name in expert_parameters(module).values()]
    return sum(module.get_parameter(name).nbytes for module, name in names)
