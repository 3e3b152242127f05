"""How close quantized experts keep a model to itself, and what it scores with them, item by item.

The full-precision self answers every item once. A quantized model then reads each item together with that answer:
where its first choice is the self's at every token of the answer, it would have given the same answer (greedy
decoding takes the same path), so only the other items are generated. ``command`` proves this for one point.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.runner import Batch, answer_batch, batches
from eval.tasks import Task, TaskItem
from expertflow_quant.kernels import ExpertWeights
from expertflow_quant.models.processor import load_processor
from expertflow_quant.pipeline.batches import AnsweredBatch
from expertflow_quant.pipeline.teacher import Teacher, divergence
from expertflow_quant.runtime.engine import Engine
from expertflow_quant.runtime.prompts import PromptEncoder

SOFTENED = 2.0
Experts = Mapping[tuple[int, int], ExpertWeights]
Advance = Callable[[int], None]


@dataclass
class Scored:
    """One list entry an item: the task's score, tokens of the self's answer, how many of them had another first
    choice, and summed divergences in nats, of predictions as they are and softened by ``SOFTENED``."""

    scores: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    differing: list[int] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    softened: list[float] = field(default_factory=list)

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Durable once renamed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"settings": settings, "items": asdict(self)}), encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: Path, settings: Mapping[str, Any]) -> "Scored | None":
        """What an earlier run with the same settings left; None without any."""
        if not path.exists():
            return None
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["settings"] != json.loads(json.dumps(settings)):
            return None
        return cls(**value["items"])


class Self:
    """The full-precision model, its answers to ``tasks`` in batches of ``batch_size``, and its predictions there."""

    def __init__(self, model: Path, tasks: Sequence[Task], batch_size: int, advance: Advance) -> None:
        self.teacher = Teacher(model)
        self.engine = Engine(self.teacher.model, load_processor(model))
        encoder = PromptEncoder(self.engine.processor, self.teacher.model.config)
        self._batches = list(batches(tasks, batch_size))
        self.answers: list[tuple[int, ...]] = []
        self.texts: list[str] = []
        self._forced: list[AnsweredBatch] = []
        for batch in self._batches:
            limit = batch.items[0].max_new_tokens
            found = self.engine.generate([item.messages for item in batch.items], max_new_tokens=limit)
            answers = [answer.token_ids for answer in found]
            prompts = encoder.encode([item.messages for item in batch.items], limit)
            self._forced.append(forced_batch(prompts.inputs, answers, len(self.answers)))
            self.answers += answers
            self.texts += [answer.text for answer in found]
            advance(len(answers))
        self._exact = [self.teacher.log_probs(batch) for batch in self._forced]

    def measure(self, experts: Experts, advance: Advance) -> Scored:
        """With ``experts`` in place of its own."""
        for place, weights in experts.items():
            self.teacher.put(*place, weights)
        try:
            found, other = Scored(), []
            for batch, forced, exact in zip(self._batches, self._forced, self._exact, strict=True):
                other += self._compare(found, forced, exact, self.teacher.log_probs(forced), len(batch.items))
                advance(len(batch.items))
            found.scores = self._scores(set(other))
            return found
        finally:
            self.teacher.restore()

    def against(self, other: "Self") -> Scored:
        """The same weights in batches of another size, judged by these answers."""
        found, items = Scored(), len(self.answers)
        self._compare(found, _joined(self._forced), torch.cat(self._exact), other.log_probs_of(self), items)
        found.scores = [other.score(number) for number in range(items)]
        return found

    def log_probs_of(self, other: "Self") -> Tensor:
        """What this batching predicts at the answers of ``other``."""
        encoder, start, found = PromptEncoder(self.engine.processor, self.teacher.model.config), 0, []
        for batch in self._batches:
            prompts = encoder.encode([item.messages for item in batch.items], batch.items[0].max_new_tokens)
            answers = other.answers[start : start + len(batch.items)]
            found.append(self.teacher.log_probs(forced_batch(prompts.inputs, answers, start)))
            start += len(batch.items)
        return torch.cat(found)

    def score(self, number: int) -> float:
        """Of its own answer to item ``number``."""
        task, item = self._items[number]
        return task.metric.score(self.texts[number], item.answers)

    @property
    def _items(self) -> list[tuple[Task, TaskItem]]:
        return [(batch.task, item) for batch in self._batches for item in batch.items]

    def _compare(
        self, found: Scored, forced: AnsweredBatch, exact: Tensor, moved: Tensor, items: int
    ) -> list[int]:  # fmt: skip
        """Adds a batch's items; returns the numbers of those whose answers differ."""
        first = int(forced.sample[0])
        row = forced.sample - first
        soft = [(side / SOFTENED).log_softmax(-1) for side in (exact, moved)]
        columns = {
            "tokens": torch.ones(len(row), dtype=torch.float64),
            "differing": (moved.argmax(-1) != forced.targets).double(),
            "divergence": divergence(exact, moved),
            "softened": divergence(*soft),
        }
        for name, values in columns.items():
            sums = torch.zeros(items, dtype=torch.float64).index_add_(0, row, values).tolist()
            getattr(found, name).extend(round(each) if name in ("tokens", "differing") else each for each in sums)
        return [first + place for place in range(items) if found.differing[place - items]]

    def _scores(self, other: set[int]) -> list[float]:
        """Scores of all items; those in ``other`` are asked again, in the batches they were in."""
        scores, start = [], 0
        for batch in self._batches:
            numbers = range(start, start + len(batch.items))
            if other.isdisjoint(numbers):
                scores += [self.score(number) for number in numbers]
            else:
                asked = answer_batch(self.engine, Batch(batch.task, batch.items))
                if errors := [result.error for result in asked if result.error]:
                    raise ValueError(f"an item could not be asked: {errors[0]}")
                scores += [
                    result.score if number in other else self.score(number)
                    for number, result in zip(numbers, asked, strict=True)
                ]
            start += len(batch.items)
        return scores


def forced_batch(inputs: Mapping[str, Any], answers: Sequence[Sequence[int]], first: int) -> AnsweredBatch:
    """Left-padded prompts with their answers behind them, padded at the right; ``first``: number of the first item."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rows, width = ids.shape
    longest = max(len(answer) for answer in answers)
    tail, seen = ids.new_zeros(rows, longest), mask.new_zeros(rows, longest)
    for row, answer in enumerate(answers):
        tail[row, : len(answer)] = torch.tensor(answer, dtype=ids.dtype)
        seen[row, : len(answer)] = 1
    whole = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    whole |= {"input_ids": torch.cat([ids, tail], 1), "attention_mask": torch.cat([mask, seen], 1)}
    if "mm_token_type_ids" in whole:
        kinds = whole["mm_token_type_ids"]
        whole["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(rows, longest)], 1)
    row, column = seen.nonzero(as_tuple=True)
    return AnsweredBatch(whole, row * (width + longest) + width + column - 1, tail[row, column], first + row)


def _joined(parts: Sequence[AnsweredBatch]) -> AnsweredBatch:
    """Only targets and samples: for comparing what was predicted already."""
    targets, samples = torch.cat([part.targets for part in parts]), torch.cat([part.sample for part in parts])
    return AnsweredBatch({}, samples, targets, samples)
