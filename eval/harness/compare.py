"""One model through lmms-eval and through our metrics, and, if asked for, through our own evaluator as well."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eval.harness.join import JoinedItem, agreement, joined
from eval.harness.run import require_harness, run_harness
from eval.harness.stock import STOCK_TASKS, HarnessError, StockTask
from eval.judge import Judgement, System
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


def require_comparable(
    system: System, tasks: Sequence[Task], paths: Mapping[str, Path], max_pixels: int | None = None
) -> None:
    """Raises HarnessError, before anything is asked, where lmms-eval is missing or cannot ask the same as we do.

    ``paths``: by task, the files that ``tasks`` were read from.
    """
    require_harness()
    if system.endpoint is not None:
        raise HarnessError(f"{system.label} is a server, and lmms-eval is given models in folders: leave --harness out")
    if max_pixels is not None:
        raise HarnessError("lmms-eval's stock tasks shrink no image: leave out --max-pixels or --harness")
    if not any(task.name in STOCK_TASKS for task in tasks):
        names = " or ".join(data_set.option for data_set in (task.data_set for task in STOCK_TASKS.values()))
        raise HarnessError(f"none of the tasks is one of lmms-eval's stock tasks here: give files with {names}")
    for task in tasks:
        if task.name in STOCK_TASKS:
            STOCK_TASKS[task.name].override(paths[task.name])
        if task.name in STOCK_TASKS and task.damaged:
            first, damage = next(iter(task.damaged.items()))
            raise HarnessError(
                f"{len(task.damaged)} of {len(task.items)} rows of {task.title} are damaged (first {first}: {damage}), "
                "and lmms-eval ends at such a row: mend the file, or leave the harness out"
            )


def compare_with_harness(
    system: System,
    paths: Mapping[str, Path],
    tasks: Sequence[Task],
    *,
    batch_size: int,
    device: str,
    limit: int | None = None,
    asked: Judgement | None = None,
) -> tuple[str, list[HarnessTask]]:
    """lmms-eval's version, and those of ``tasks`` that are among its stock tasks, as it scored ``system`` on them.

    ``paths``: by task, the files that ``tasks`` were read from, with the same ``limit`` of items. ``asked``: what our
    own evaluator was answered. Raises HarnessError, DataError.
    """
    require_comparable(system, tasks, paths)
    stocks = {STOCK_TASKS[task.name]: task for task in tasks if task.name in STOCK_TASKS}
    data = {stock: paths[task.name] for stock, task in stocks.items()}
    found = run_harness(harness_model(system, batch_size, device), data, limit)
    compared = []
    for stock, task in stocks.items():
        theirs, ours = found["tasks"][stock.name], asked.of_task(task.name) if asked else ()
        compared.append(HarnessTask(stock, task, theirs["scores"], joined(stock, task, theirs["samples"]), ours))
    return found["version"], compared


def harness_model(system: System, batch_size: int, device: str) -> dict[str, Any]:
    """``system`` as the arguments of our model in the harness."""
    arguments = {"pretrained": str(system.path.resolve()), "device": device, "batch_size": batch_size}
    return arguments | ({"expert_memory": system.expert_memory} if system.is_checkpoint else {})


def write_items(path: Path, tasks: Sequence[HarnessTask]) -> None:
    """One JSON line an item: the text that was scored, the harness's score and ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(item) | {"bit_equal": item.bit_equal}) for task in tasks for item in task.items]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
