"""One model through lmms-eval and through our metrics, and, if asked for, through our own evaluator as well."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eval.data.load import file_task
from eval.harness.join import JoinedItem, agreement, joined
from eval.harness.run import require_harness, run_harness
from eval.harness.stock import STOCK_TASKS, HarnessError, StockTask
from eval.judge import System, judge
from eval.records import ItemResult
from eval.tasks import Task


@dataclass(frozen=True)
class HarnessTask:
    """One task as lmms-eval scored it: its own means, and its items beside our scores of the same texts.

    ``asked``: what our own evaluator was answered to the same items, if it asked.
    """

    stock: StockTask
    task: Task
    scores: dict[str, float]
    items: Sequence[JoinedItem]
    asked: Sequence[ItemResult] = field(default=())

    @property
    def mean(self) -> float:
        """The mean of our scores of the harness's answers."""
        return sum(item.score for item in self.items) / len(self.items)

    @property
    def agrees(self) -> bool:
        """Whether prompts and scores are the same item by item, in both runs if there were two."""
        if not all(item.bit_equal and item.same_prompt for item in self.items):
            return False
        pairs = zip(self.items, self.asked, strict=True) if self.asked else ()
        return all(item.harness_score == ours.score for item, ours in pairs)

    def to_json(self) -> dict[str, Any]:
        """The summary that goes into a results file; the items lie beside it, one JSON line each."""
        return {
            "task": self.task.description,
            "stock_task": self.stock.name,
            "harness_scores": self.scores,
            "our_mean": self.mean,
            **agreement(self.items, self.asked),
        }


def compare_with_harness(
    system: System,
    paths: Mapping[str, Path],
    *,
    batch_size: int,
    device: str,
    limit: int | None = None,
    ask_again: bool = False,
) -> tuple[str, list[HarnessTask]]:
    """lmms-eval's version, and its stock tasks on the files of ``paths`` (by our names: "chartqa", "docvqa").

    ``limit``: first items of each task. ``ask_again``: our own evaluator asks ``system`` the same items, in the same
    batches. Raises HarnessError, DataError, and what loading a model raises.
    """
    require_harness()
    stocks = {STOCK_TASKS[name]: path for name, path in paths.items()}
    tasks = {stock: undamaged(file_task(name, paths[name], limit)) for stock, name in zip(stocks, paths, strict=True)}
    found = run_harness(harness_model(system, batch_size, device), stocks, limit)
    asked = asked_by_us(system, list(tasks.values()), batch_size, device) if ask_again else {}
    return found["version"], [
        HarnessTask(stock, task, harness["scores"], joined(stock, task, harness["samples"]), asked.get(task.name, ()))
        for stock, task in tasks.items()
        for harness in (found["tasks"][stock.name],)
    ]


def asked_by_us(system: System, tasks: Sequence[Task], batch_size: int, device: str) -> dict[str, list[ItemResult]]:
    """What our own evaluator is answered, by task."""
    with tempfile.TemporaryDirectory(prefix="asked-by-us-") as folder:
        judgement = judge(system, tasks, Path(folder), batch_size=batch_size, device=device)
    return {task.name: judgement.of_task(task.name) for task in tasks}


def harness_model(system: System, batch_size: int, device: str) -> dict[str, Any]:
    """``system`` as the arguments of our model in the harness."""
    arguments = {"pretrained": str(system.path.resolve()), "device": device, "batch_size": batch_size}
    return arguments | ({"expert_memory": system.expert_memory} if system.is_checkpoint else {})


def undamaged(task: Task) -> Task:
    """``task`` itself. Raises HarnessError for damaged rows, at which lmms-eval ends; our own evaluator goes on."""
    damaged = [item for item in task.items if getattr(item, "damage", None)]
    if damaged:
        raise HarnessError(
            f"{len(damaged)} of {len(task.items)} rows of {task.title} are damaged (first {damaged[0].id}: "
            f"{damaged[0].damage}), and lmms-eval ends at such a row: mend the file, or leave the harness out"
        )
    return task


def write_items(path: Path, tasks: Sequence[HarnessTask]) -> None:
    """One JSON line an item: the text that was scored, the harness's score and ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(item) | {"bit_equal": item.bit_equal}) for task in tasks for item in task.items]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
