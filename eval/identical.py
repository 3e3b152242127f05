"""Are the tokens the same at every expert memory? ``python -m eval.identical OUT [OUT ...] --items 64``."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import expertflow_quant
from eval.provenance import provenance
from eval.report import cells_table, make_console, percent, write_json
from eval.tasks import Task, TaskItem, generated_tasks

MINIMUM = "minimum"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


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


@app.command()
def main(
    checkpoints: list[Path],
    items: Annotated[int, typer.Option(min=1, help="held-out questions, charts and documents in turn")] = 64,
    expert_memory: Annotated[str, typer.Option(help="compared with all resident, beside the minimum")] = "25%",
    device: str = "cpu",
    out: Annotated[Path | None, typer.Option(help="write the counts into this JSON file too")] = None,
) -> None:
    """Exit status 1 unless every answer has the same tokens at every expert memory."""
    questions = first_items(generated_tasks(items), items)
    found_in: dict[str, Any] = {}
    columns, rows, different = ["checkpoint", "memory", "same answers", "hit rate alone %"], [], 0
    for path in checkpoints:
        found_in[path.name] = report = check_budgets(path, questions, [expert_memory, MINIMUM], device)
        for budget, found in report["budgets"].items():
            different += items - found["identical"]
            share = percent(found["alone"]["hit_rate"])
            rows.append([path.name, f"{budget}: {found['bytes']:,} B", f"{found['identical']} / {items}", share])
    make_console().print(cells_table("tokens against those of all experts resident", columns, rows))
    if out is not None:
        made = provenance("eval.identical", sys.argv[1:], device)
        write_json(out, {"provenance": made, "checkpoints": found_in, "different": different})
    raise typer.Exit(bool(different))


if __name__ == "__main__":
    app(prog_name="python -m eval.identical")
