"""Ask a model every item of some tasks, in fixed order and batches, and score what it answers.

Batches are fixed because padding reaches the last bits of a sum: two systems are compared on the same
batches. An item that fails scores 0 with its error in the record; it is never dropped, or a system that
crashes on hard items would win. A row of the data that is damaged fails before it reaches the engine, so it
changes nothing for the others of its batch.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as Bar
from rich.text import Text

from eval.records import ItemResult, ResultsFile
from eval.tasks import Task, TaskItem
from expertflow_quant.formats import ExpertFlowError

Conversation = list[dict[str, Any]]
LOG_SECONDS = 60.0
"""Between lines of progress where nobody watches a bar: in a log, a pipe."""


class EngineLostError(ExpertFlowError):
    """Nobody answers any more: the run ends, since what was not asked is no failure of the items; the message says how
    to go on."""


class Generated(Protocol):
    """One answer: its text and how many tokens went in and came out."""

    @property
    def text(self) -> str: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def image_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...


class Answerer(Protocol):
    """What the runner needs of an engine: one conversation in, one answer (or the error in its place) out, in
    order."""

    def generate(
        self, conversations: list[list[dict[str, Any]]], max_new_tokens: int = 32
    ) -> Sequence[Generated | Exception]: ...


@dataclass(frozen=True)
class Batch:
    """Items of one task with one token limit, asked together."""

    task: Task
    items: tuple[TaskItem, ...]


def batches(tasks: Sequence[Task], batch_size: int) -> Iterator[Batch]:
    """All items, task after task, at most ``batch_size`` at once; a new token limit begins a new batch."""
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} asks nothing: use at least 1")
    for task in tasks:
        start = 0
        while start < len(task.items):
            limit, end = task.items[start].max_new_tokens, start + 1
            while end < min(start + batch_size, len(task.items)) and task.items[end].max_new_tokens == limit:
                end += 1
            yield Batch(task, tuple(task.items[start:end]))
            start = end


def run_tasks(
    engine: Answerer,
    tasks: Sequence[Task],
    batch_size: int,
    file: ResultsFile,
    *,
    bar: Progress | None = None,
) -> list[ItemResult]:
    """Ask what ``file`` does not hold yet; returns all results in order. ``bar`` shows items/s and the time
    left; where its console is no terminal, a line says so every minute."""
    total, kept, seen = sum(len(task.items) for task in tasks), len(file.results), 0
    row = bar.add_task(file.path.stem, total=total, completed=kept, kept=kept) if bar else None
    started = said = time.monotonic()
    for batch in batches(tasks, batch_size):
        seen += len(batch.items)
        if seen <= kept:
            continue
        before = cache_counters(engine)
        results = answer_batch(engine, batch)
        after = cache_counters(engine)
        file.append(results, {name: value - before.get(name, 0) for name, value in after.items()})
        if bar and row is not None:
            bar.advance(row, len(results))
            if not bar.console.is_terminal and (now := time.monotonic()) - said >= LOG_SECONDS:
                said = now
                line = progress_line(file.path.stem, seen, total, (seen - kept) / max(now - started, 1e-9))
                bar.console.print(line, highlight=False)
    return file.results


def answer_batch(engine: Answerer, batch: Batch) -> list[ItemResult]:
    """Ask one batch; if it fails as a whole, its items one by one, so that one bad item costs only itself."""
    start = time.perf_counter()
    prepared = [_prepared(item) for item in batch.items]
    asked = [messages for messages in prepared if not isinstance(messages, Exception)]
    answers = iter(_answered(engine, asked, batch.items[0].max_new_tokens))
    outcomes = [messages if isinstance(messages, Exception) else next(answers) for messages in prepared]
    seconds = (time.perf_counter() - start) / len(batch.items)
    return [_scored(batch.task, *pair, seconds) for pair in zip(batch.items, outcomes, strict=True)]


def cache_counters(engine: Answerer) -> dict[str, float]:
    """The expert cache's running totals; empty for an engine without a cache."""
    stats = getattr(engine, "stats", None)
    names = ("hits", "misses", "bytes_moved", "stall_seconds")
    return {name: getattr(stats, name) for name in names if getattr(stats, name, None) is not None}


def progress_line(name: str, done: int, total: int, rate: float) -> str:
    """What the bar says, as a line. ``rate``: items a second of this run."""
    return f"{name}: {done} of {total} items, {rate:.2f} a second, about {(total - done) / rate / 60:.0f} min left"


def progress_bar(console: Console | None = None) -> Progress:
    """A bar that says how many items are done, how many a second, and how long the rest will take."""
    return Progress(
        TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), _Rate(),
        TimeRemainingColumn(), console=console, )  # fmt: skip


class _Rate(ProgressColumn):
    """Items a second of this run, without those that an earlier run left."""

    def render(self, task: Bar) -> Text:
        done = task.completed - task.fields.get("kept", 0)
        rate = done / task.elapsed if task.elapsed else 0.0
        return Text(f"{rate:5.1f} items/s" if done else "    - items/s")


def _prepared(item: TaskItem) -> Conversation | Exception:
    try:
        return item.messages
    except Exception as damage:
        return damage


def _answered(engine: Answerer, asked: list[Conversation], limit: int) -> Sequence[Generated | Exception]:
    if not asked:
        return []
    try:
        return _ask(engine, asked, limit)
    except EngineLostError:
        raise
    except Exception as failure:
        return [failure] if len(asked) == 1 else [_ask_one(engine, messages, limit) for messages in asked]


def _ask(engine: Answerer, asked: list[Conversation], limit: int) -> Sequence[Generated | Exception]:
    answers = engine.generate(asked, max_new_tokens=limit)
    if len(answers) != len(asked):
        raise RuntimeError(f"the engine gave {len(answers)} answers to {len(asked)} conversations")
    return answers


def _ask_one(engine: Answerer, messages: Conversation, limit: int) -> Generated | Exception:
    try:
        return _ask(engine, [messages], limit)[0]
    except Exception as failure:
        return failure


def _scored(task: Task, item: TaskItem, answer: Generated | Exception, seconds: float) -> ItemResult:
    outcome: dict[str, Any]
    if isinstance(answer, Exception):
        outcome = {"prediction": "", "score": 0.0, "error": f"{type(answer).__name__}: {answer}"}
        outcome |= dict.fromkeys(("prompt_tokens", "image_tokens", "completion_tokens"), 0)
    else:
        outcome = {
            "prediction": answer.text,
            "score": task.metric.score(answer.text, item.answers),
            "prompt_tokens": answer.prompt_tokens,
            "image_tokens": answer.image_tokens,
            "completion_tokens": answer.completion_tokens,
        }
    return ItemResult(
        id=item.id,
        task=task.name,
        kind=item.kind,
        family=item.family,
        image_key=item.image_key,
        question=item.question,
        answers=tuple(item.answers),
        seconds=round(seconds, 6),
        **outcome,
    )
