"""A report on generated items and invented systems, for the tests of the page."""

from pathlib import Path

import numpy as np

from eval.compare.changed import cards, changed_questions
from eval.compare.report import DENSE, JUDGED, OWN, Report
from eval.compare.sizes import Size
from eval.comparison import compare
from eval.judge import Judgement, System
from eval.records import ItemResult
from eval.stats import MARGIN_DENSE, MARGIN_OWN
from eval.tasks import Task, TaskItem, generated_tasks

NASTY = (
    """<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>&amp; "quoted" 'too' | pipe"""
)
MADE = {
    "command": "python -m eval compare a=OUT --self b=MODEL --dense c=DENSE",
    "device": "a processor",
    "python": "3.11.7",
    "packages": {"torch": "2.13.0"},
    "metrics_version": "1",
    "git": {"commit": "0123456789abcdef", "changed": True},
}
SIZES = {
    "int4 AWQ": Size(10_717_056, 4_523_904, 12_000_000, 9_000_000),
    "bf16": Size(10_717_056, 4_523_904, 21_434_112, 21_434_112),
    "dense twin": Size(4_499_328, 4_499_328, 8_998_656, 8_998_656),
}
COSTS = {"int4 AWQ": (4 << 20, 52.0), "bf16": (14 << 20, 40.0), "dense twin": (0, 61.0)}
WRONG = {"int4 AWQ": 0.12, "bf16": 0.1, "dense twin": 0.2}


def make_report(
    items: int = 40, pictures: int = 100, seed: int = 0, title: str = "int4 AWQ on generated items"
) -> Report:
    """Three systems that are wrong at random; the first wrong answer and one label hold markup."""
    tasks = generated_tasks(items)
    rng = np.random.default_rng(seed)
    own, dense = _judgement("bf16", tasks, rng), _judgement("dense twin", tasks, rng)
    ours = _judgement("int4 AWQ", tasks, rng)
    comparisons = (
        compare(ours, own, MARGIN_OWN) + compare(ours, dense, MARGIN_DENSE) + compare(own, dense, MARGIN_DENSE)
    )
    pairs = [("int4 AWQ", "bf16"), ("int4 AWQ", "dense twin"), ("bf16", "dense twin")]
    judgements = [ours, own, dense]
    changed = changed_questions(judgements, pairs)
    roles = {"int4 AWQ": JUDGED, "bf16": OWN, "dense twin": DENSE}
    shown = cards(changed, tasks, pictures, 96)
    return Report(title, MADE, {"seed": 0}, tasks, judgements, roles, SIZES, comparisons, changed, shown)


def _judgement(label: str, tasks: list[Task], rng: np.random.Generator) -> Judgement:
    nbytes, rate = COSTS[label]
    rows = [_row(task, item, rng.random() < WRONG[label], rate) for task in tasks for item in task.items]
    return Judgement(System(label.replace(" ", "-"), label, Path(label)), tuple(rows), {}, nbytes, nbytes)


def _row(task: Task, item: TaskItem, is_wrong: bool, rate: float) -> ItemResult:
    return ItemResult(
        id=item.id,
        task=task.name,
        kind=item.kind,
        family=item.family,
        image_key=item.image_key,
        question=item.question,
        answers=item.answers,
        prediction=NASTY if is_wrong else item.answers[0],
        score=0.0 if is_wrong else 1.0,
        prompt_tokens=60,
        image_tokens=36,
        completion_tokens=3,
        seconds=3 / rate,
    )
