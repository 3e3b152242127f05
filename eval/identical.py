"""Are the tokens the same at every expert memory? The cache is exact, so they must be."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import expertflow_quant
from eval.tasks import Task, TaskItem

MINIMUM = "minimum"


def first_items(tasks: Sequence[Task], count: int) -> list[TaskItem]:
    """``count`` items, taken from the tasks in turn."""
    in_turn = [item for row in zip(*(task.items for task in tasks), strict=False) for item in row]
    return in_turn[:count]


def answers_at(engine: Any, items: Sequence[TaskItem]) -> list[tuple[int, ...]]:
    """Generated token ids, one batch for all items."""
    longest = max(item.max_new_tokens for item in items)
    answers = engine.generate([item.messages for item in items], max_new_tokens=longest)
    return [tuple(answer.token_ids) for answer in answers]


def asked_alone(engine: Any, items: Sequence[TaskItem]) -> dict[str, float]:
    """Hit rate and tokens a second when questions come one at a time, as to a server with one user."""
    engine.reset_stats()
    start = time.perf_counter()
    tokens = sum(len(answers_at(engine, [item])[0]) for item in items)
    seconds = time.perf_counter() - start
    return {"hit_rate": engine.stats.hit_rate, "tokens_per_second": round(tokens / seconds, 3)}


def check_budgets(path: Path, items: Sequence[TaskItem], budgets: Sequence[str], device: str = "cpu") -> dict[str, Any]:
    """Answer ``items`` with all experts resident and under each budget ("25%", "minimum").

    Returns {"items": n, "tokens": n, "budgets": {budget: {"bytes": slots' bytes, "identical": items,
    "alone": ``asked_alone``}}}.
    """
    engine = expertflow_quant.load(path, expert_memory="100%", device=device)
    minimum = engine.model.expert_cache.minimum_bytes
    resident = answers_at(engine, items)
    report: dict[str, Any] = {"items": len(items), "tokens": sum(map(len, resident)), "budgets": {}}
    for budget in budgets:
        memory = minimum if budget == MINIMUM else budget
        engine = expertflow_quant.load(path, expert_memory=memory, device=device)
        same = sum(a == b for a, b in zip(answers_at(engine, items), resident, strict=True))
        found = {"bytes": engine.device_expert_bytes, "identical": same, "alone": asked_alone(engine, items)}
        report["budgets"][budget] = found
    return report
