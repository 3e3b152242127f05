"""What is asked: a task is a name, a metric and items in a fixed order, each with its prompt and answers.

The generated charts and documents are built in; ChartQA, DocVQA and their kin come from files (``eval.data``).
Anything becomes a ``Task`` by giving items with the attributes of ``TaskItem``; nothing downstream asks where they
came from.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from eval.grain import grained
from eval.metrics import ANLS, RELAXED_ACCURACY, Metric
from expertflow_quant.samples import make_items

GENERATED = {"chart": ("charts", RELAXED_ACCURACY), "document": ("documents", ANLS)}


class TaskItem(Protocol):
    """One question about one image; ``messages`` is the whole conversation that the model is given, and ``prompt``
    the text in it. ``messages`` of a damaged row raises."""

    @property
    def id(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def image_key(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def answers(self) -> tuple[str, ...]: ...
    @property
    def prompt(self) -> str: ...
    @property
    def messages(self) -> list[dict[str, Any]]: ...
    @property
    def max_new_tokens(self) -> int: ...


@dataclass(frozen=True)
class Task:
    """Items that one metric scores, in the order in which they are asked."""

    name: str
    title: str
    metric: Metric
    items: Sequence[TaskItem]
    source: str

    def __post_init__(self) -> None:
        ids = [item.id for item in self.items]
        if not ids:
            raise ValueError(f"task {self.name!r} has no items: give at least one")
        if len(set(ids)) != len(ids):
            raise ValueError(f"task {self.name!r} has two items of one id: every item needs its own")

    @property
    def fingerprint(self) -> str:
        """SHA-1 of everything that can change a score: ids, images, prompts, answers, token limits."""
        digest = hashlib.sha1()
        for item in self.items:
            digest.update(repr((item.id, item.image_key, [item.prompt], item.answers, item.max_new_tokens)).encode())
        return digest.hexdigest()

    @property
    def damaged(self) -> dict[str, str]:
        """Why rows cannot be asked, by id; they score 0."""
        return {item.id: damage for item in self.items if (damage := getattr(item, "damage", None)) is not None}

    @property
    def description(self) -> dict[str, Any]:
        """The settings that go into every result of this task."""
        described = {
            "name": self.name,
            "metric": self.metric.name,
            "source": self.source,
            "items": len(self.items),
            "images": len({item.image_key for item in self.items}),
            "fingerprint": self.fingerprint,
        }
        return described | ({"damaged": self.damaged} if self.damaged else {})


def generated_task(name: str, items: int, seed: int = 0, grain: float = 0.0) -> Task:
    """The first ``items`` held-out questions of the generated "chart" or "document" task; ``grain``: see grain.py."""
    if name not in GENERATED:
        raise ValueError(f"task {name!r} is not known: use one of {', '.join(GENERATED)}")
    title, metric = GENERATED[name]
    source = f"generated, test split, seed {seed}" + (f", grain {grain:g}" if grain else "")
    made = [grained(item, grain) for item in make_items(name, "test", items, seed=seed)]
    return Task(name, title, metric, made, source)


def generated_tasks(items: int, seed: int = 0, grain: float = 0.0) -> list[Task]:
    """Both generated tasks, ``items`` questions each."""
    return [generated_task(name, items, seed, grain) for name in GENERATED]
