"""Items that two systems score differently, with their pictures: where a difference comes from."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from eval.judge import Judgement
from eval.tasks import Task, TaskItem

LOST, WON = "lost", "won"


@dataclass(frozen=True)
class Answer:
    """What one system said to a question."""

    label: str
    prediction: str
    score: float
    error: str | None


@dataclass(frozen=True)
class Changed:
    """A question whose score differs within a pair; ``changes`` tells by the pair's number whether the system lost or
    won it against the baseline."""

    id: str
    task: str
    kind: str
    split: str
    image_key: str
    question: str
    gold: tuple[str, ...]
    answers: tuple[Answer, ...]
    changes: Mapping[int, str]


@dataclass(frozen=True)
class Card:
    """A picture as a data URL (None where it cannot be read) and the changed questions about it."""

    image: str | None
    questions: tuple[Changed, ...]


def changed_questions(judgements: Sequence[Judgement], pairs: Sequence[tuple[str, str]]) -> list[Changed]:
    """All questions that any of ``pairs`` (labels of system and baseline) scores differently, in the order asked."""
    by_label = {judgement.system.label: judgement.results for judgement in judgements}
    found = []
    for index, asked in enumerate(judgements[0].results):
        scores = {label: results[index].score for label, results in by_label.items()}
        gaps = {number: scores[system] - scores[baseline] for number, (system, baseline) in enumerate(pairs)}
        changes = {number: LOST if gap < 0 else WON for number, gap in gaps.items() if gap}
        if changes:
            rows = [(label, results[index]) for label, results in by_label.items()]
            answers = tuple(Answer(label, row.prediction, row.score, row.error) for label, row in rows)
            told = (asked.id, asked.task, asked.kind, asked.family, asked.image_key, asked.question, asked.answers)
            found.append(Changed(*told, answers, changes))
    return found


def cards(questions: Sequence[Changed], tasks: Sequence[Task], most: int, pixels: int) -> list[Card]:
    """The changed questions grouped by picture, at most ``most`` pictures; those of the first pairs come first."""
    groups: dict[tuple[str, str], list[Changed]] = {}
    for question in sorted(questions, key=lambda changed: min(changed.changes)):
        groups.setdefault((question.task, question.image_key), []).append(question)
    items = {(task.name, item.id): item for task in tasks for item in task.items}
    chosen = list(groups.values())[:most]
    return [Card(image_url(items[group[0].task, group[0].id], pixels), tuple(group)) for group in chosen]


def image_url(item: TaskItem, pixels: int) -> str | None:
    """The picture of an item, its longer side at most ``pixels``, as PNG or JPEG, whichever is smaller; None for a
    damaged one."""
    try:
        image: Image.Image = _image(item).convert("RGB")
    except Exception:  # whatever is wrong with the file is told where the item was asked
        return None
    image.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    encoded = {kind: _encoded(image, kind, options) for kind, options in _ENCODINGS.items()}
    kind = min(encoded, key=lambda name: len(encoded[name]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"


_ENCODINGS: dict[str, dict[str, Any]] = {"png": {"optimize": True}, "jpeg": {"quality": 80, "optimize": True}}


def _image(item: TaskItem) -> Any:
    parts = [part for message in item.messages for part in message["content"] if isinstance(part, dict)]
    return next(part["image"] for part in parts if part["type"] == "image")


def _encoded(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
