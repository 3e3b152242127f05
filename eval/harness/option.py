"""``python -m eval run ... --harness lmms-eval``: the same files through the field's harness, beside our answers."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.console import Console

from eval.harness.command import harness_table
from eval.harness.compare import compare_with_harness, write_items
from eval.judge import Judgement
from eval.tasks import Task


class Harness(StrEnum):
    """Harnesses that can be asked."""

    LMMS_EVAL = "lmms-eval"


ITEMS = "lmms-eval.jsonl"


def harness_results(
    judgement: Judgement, tasks: Sequence[Task], paths: Mapping[str, Path], out: Path, console: Console, **how: Any
) -> dict[str, Any]:
    """Run lmms-eval on what ``judgement`` was asked, show both, write ``out``/lmms-eval.jsonl; the part of the results
    that tells of it. ``how``: ``batch_size``, ``device`` and ``limit`` of the judgement."""
    version, compared = compare_with_harness(judgement.system, paths, tasks, asked=judgement, **how)
    write_items(out / ITEMS, compared)
    console.print(harness_table(compared, f"lmms-eval {version} on the same files"))
    if not all(task.agrees for task in compared):
        console.print(f"[yellow]lmms-eval and our evaluator differ: see {ITEMS}[/yellow]")
    return {"lmms_eval": version, "tasks": [task.to_json() for task in compared]}
