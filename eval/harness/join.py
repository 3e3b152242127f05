"""Harness and evaluator item by item: what the harness logged of a document, beside our score of the same text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eval.harness.stock import HarnessError, StockTask
from eval.records import ItemResult
from eval.tasks import Task, TaskItem

SHOWN = 20
"""Items that a summary spells out; the file of items has them all."""


@dataclass(frozen=True)
class JoinedItem:
    """One item, the text that lmms-eval scored, its score and ours. ``harness_scores``: all that it gave, by metric."""

    id: str
    task: str
    document: int
    kind: str
    family: str
    image_key: str
    question: str
    answers: tuple[str, ...]
    prediction: str
    score: float
    harness_score: float
    harness_scores: dict[str, float]
    same_prompt: bool
    prompt_tokens: int
    completion_tokens: int
    error: str | None = None

    @property
    def bit_equal(self) -> bool:
        """Whether both scores are one and the same double."""
        return self.score.hex() == self.harness_score.hex()


def joined(stock: StockTask, task: Task, samples: Sequence[Mapping[str, Any]]) -> list[JoinedItem]:
    """The harness's ``samples`` beside the items of ``task``, by document number, in the items' order.

    The harness may have been limited to the first documents. Raises HarnessError unless its documents are 0, 1, 2 ...
    and no more than there are items.
    """
    rows = sorted(samples, key=lambda row: row["document"])
    if [row["document"] for row in rows] != list(range(len(rows))) or len(rows) > len(task.items):
        raise HarnessError(
            f"lmms-eval answered {len(rows)} documents of {stock.name}, and {task.source} holds {len(task.items)} "
            "items: both must read the same rows in the same order; give both one file or folder"
        )
    return [_joined(stock, task, item, row) for item, row in zip(task.items, rows, strict=False)]


def agreement(items: Sequence[JoinedItem], asked: Sequence[ItemResult] = ()) -> dict[str, Any]:
    """How many items agree, and the first of those that do not. ``asked``: what our own evaluator was answered, if it
    asked."""
    pairs = list(zip(items, asked, strict=True)) if asked else []
    found: dict[str, Any] = {
        "items": len(items),
        "scores": {
            "zero": sum(item.harness_score == 0 for item in items),
            "between": sum(0 < item.harness_score < 1 for item in items),
            "one": sum(item.harness_score == 1 for item in items),
        },
        "same_prompts": sum(item.same_prompt for item in items),
        "bit_equal_scores": sum(item.bit_equal for item in items),
        "errors": sum(item.error is not None for item in items),
        "different": [asdict(item) for item in items if not item.bit_equal][:SHOWN],
    }
    if asked:
        found["asked_by_us"] = {
            "mean": sum(ours.score for ours in asked) / len(asked),
            "same_predictions": sum(item.prediction.strip() == ours.prediction.strip() for item, ours in pairs),
            "bit_equal_scores": sum(item.harness_score.hex() == float(ours.score).hex() for item, ours in pairs),
        }
    return found


def _joined(stock: StockTask, task: Task, item: TaskItem, row: Mapping[str, Any]) -> JoinedItem:
    error = row["error"]
    return JoinedItem(
        id=item.id,
        task=task.name,
        document=row["document"],
        kind=item.kind,
        family=item.family,
        image_key=item.image_key,
        question=item.question,
        answers=tuple(item.answers),
        prediction=row["prediction"],
        # as in our runner: what could not be asked scores 0, whatever the metric makes of an empty text
        score=0.0 if error else float(task.metric.score(row["prediction"], item.answers)),
        harness_score=float(row["scores"][stock.score]),
        harness_scores={name: float(value) for name, value in row["scores"].items()},
        same_prompt=item.prompt == row["prompt"],
        prompt_tokens=row["prompt_tokens"],
        completion_tokens=row["completion_tokens"],
        error=error,
    )
