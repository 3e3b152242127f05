"""The noise floor of a system: itself asked again in batches of another size.

Padding and the order of sums reach the last bits of a product, and where two tokens are nearly as likely the last bits
decide. What changes between two batch sizes is no property of a model, so no difference below it is one.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from eval.judge import Judgement
from eval.report import cells_table, percent, points
from eval.tasks import Task
from expertflow_quant.formats import ExpertFlowError


@dataclass(frozen=True)
class NoiseFloor:
    """One task asked in batches of two sizes: how many predictions and scores differ, and both mean scores."""

    task: str
    items: int
    batch_sizes: tuple[int, int]
    predictions_changed: int
    scores_changed: int
    mean: float
    mean_again: float

    @property
    def largest(self) -> float:
        """The most that the mean could have moved: all changed scores in one direction, a whole point each."""
        return self.scores_changed / self.items

    def to_json(self) -> dict[str, Any]:
        """All numbers; ``changed_share`` is the bound on how far the mean may move."""
        return asdict(self) | {"difference": self.mean_again - self.mean, "changed_share": self.largest}


def noise_floor(
    once: Judgement, again: Judgement, tasks: Sequence[Task], batch_sizes: tuple[int, int]
) -> list[NoiseFloor]:
    """One entry a task. Raises ExpertFlowError unless both answered the same items in the same order."""
    if [(r.task, r.id) for r in once.results] != [(r.task, r.id) for r in again.results]:
        raise ExpertFlowError(
            f"{once.system.label} answered other items than {again.system.label}: ask both the same tasks"
        )
    floors = []
    for task in tasks:
        pairs = list(zip(once.of_task(task.name), again.of_task(task.name), strict=True))
        floors.append(
            NoiseFloor(
                task=task.name,
                items=len(pairs),
                batch_sizes=batch_sizes,
                predictions_changed=sum(a.prediction != b.prediction for a, b in pairs),
                scores_changed=sum(a.score != b.score for a, b in pairs),
                mean=once.mean(task.name),
                mean_again=again.mean(task.name),
            )
        )
    return floors


def noise_table(floors: Sequence[NoiseFloor], tasks: Sequence[Task]) -> Table:
    """One row a task."""
    titles = {task.name: task.title for task in tasks}
    columns = ["task", "items", "predictions changed", "scores changed", "score %", "again %", "difference"]
    rows = [
        [
            titles[floor.task],
            str(floor.items),
            str(floor.predictions_changed),
            str(floor.scores_changed),
            percent(floor.mean),
            percent(floor.mean_again),
            points(floor.mean_again - floor.mean),
        ]
        for floor in floors
    ]
    first, second = floors[0].batch_sizes
    return cells_table(f"noise floor: batches of {first} against batches of {second}", columns, rows)
