"""One contender measured: its answers to held-out questions, how far its distributions are from full precision, and the
bytes that both caches of the runtime move for them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eval.runner import Batch, answer_batch
from eval.tasks import Task, TaskItem
from expertflow_quant.offload.policy import Progress
from expertflow_quant.offload.resident import ResidentExperts
from expertflow_quant.runtime.engine import Engine


@dataclass(frozen=True)
class Teacher:
    """Full precision's greedy answer to an item, int64 [G], and its log-probabilities there, float32 [G, V]."""

    answer: Tensor
    logprobs: Tensor


@dataclass
class ItemFigures:
    """One item: ``score``; ``kl`` in nats a token, full precision's answer given; ``tokens`` that were generated, and
    ``moved`` bytes for prompt and answer by the plain path's cache; ``steps`` of decode, and ``device`` bytes that each
    of the device's caches moved in them."""

    task: str
    image: str
    score: float
    kl: float = 0.0
    tokens: int = 0
    moved: int = 0
    steps: int = 0
    device: dict[str, int] = field(default_factory=dict)


def teach(engine: Engine, tasks: Sequence[Task], progress: Callable[[], None]) -> dict[str, Teacher]:
    """What full precision answers, by item."""
    found = {}
    for item in (item for task in tasks for item in task.items):
        answer = engine.generate([item.messages], item.max_new_tokens)[0].token_ids
        ids = torch.tensor(answer, dtype=torch.int64)
        found[item.id] = Teacher(ids, logprobs_after(engine, item, ids))
        progress()
    return found


def measure(
    engine: Engine,
    tasks: Sequence[Task],
    teacher: Mapping[str, Teacher],
    caches: Mapping[str, ResidentExperts],
    progress: Callable[[], None],
) -> list[ItemFigures]:
    """Every item asked alone; ``caches`` of the device are asked for what the decode steps want, as they go."""
    cache = engine.model.expert_cache
    following = _Following(cache.progress, caches)
    found = []
    for task in tasks:
        for item in task.items:
            engine.reset_stats()
            following.begin()
            result = answer_batch(engine, Batch(task, (item,)))[0]
            if result.error is not None:
                raise RuntimeError(f"{item.id}: {result.error}")
            moved, steps, device = engine.stats.bytes_moved, following.steps, following.moved()
            given = teacher[item.id]
            mine = logprobs_after(engine, item, given.answer)
            kl = float((given.logprobs.exp() * (given.logprobs - mine)).sum(-1).mean())
            found.append(
                ItemFigures(task.name, item.image_key, result.score, kl, result.completion_tokens, moved, steps, device)
            )
            progress()
    return found


def logprobs_after(engine: Engine, item: TaskItem, answer: Tensor) -> Tensor:
    """float32 [G, V]: of each token of ``answer`` [G] given the item's prompt and the tokens before it."""
    inputs: dict[str, Any] = dict(engine.prompt_tokens(item.messages).inputs)
    given = answer[:-1].unsqueeze(0)
    for name, filler in (("input_ids", given), ("attention_mask", given * 0 + 1), ("mm_token_type_ids", given * 0)):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], filler.to(inputs[name].dtype)], dim=1)
    with torch.inference_mode():
        logits = engine.model(**inputs, use_cache=False, logits_to_keep=len(answer)).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


class _Following:
    """Asks the device's caches for the experts of decode steps that the plain path runs."""

    def __init__(self, progress: Progress, caches: Mapping[str, ResidentExperts]) -> None:
        self._progress, self._caches = progress, caches
        self._prompt, self._last = -1, -1
        self._on = False
        progress.watch(self._asked)

    def begin(self) -> None:
        """An answer begins: its first step is the prompt's, which the device streams past its slots."""
        self._prompt = self._last = self._progress.step + 1
        self._on, self.steps = True, 0
        for cache in self._caches.values():
            cache.reset_stats()

    def moved(self) -> dict[str, int]:
        """Bytes since ``begin``; what comes until the next one does not count."""
        self._on = False
        return {name: cache.stats.bytes_moved for name, cache in self._caches.items()}

    def _asked(self, layer: int, experts: Collection[int]) -> None:
        step = self._progress.step
        if not self._on or step <= self._prompt:
            return
        if step != self._last:
            self._last = step
            self.steps += 1
            for cache in self._caches.values():
                cache.begin_step()
        for cache in self._caches.values():
            cache.resolve(layer, torch.tensor([*experts], dtype=torch.int64).view(-1, 1))
