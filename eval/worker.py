"""Judge one system in a process of its own: ``python -m eval.worker NAME LABEL PATH FOLDER``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from eval.identical import MINIMUM, check_budgets, first_items
from eval.judge import System, judge
from eval.tasks import generated_tasks

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    name: Annotated[str, typer.Argument(help="stem of the files that it writes")],
    label: str,
    path: Path,
    folder: Path,
    items: Annotated[int, typer.Option(help="questions per task")] = 128,
    expert_memory: str = "25%",
    batch_size: int = 32,
    device: str = "cpu",
    check: Annotated[int, typer.Option(help="items that must have the same tokens at every memory")] = 0,
) -> None:
    """Write NAME.jsonl and NAME.costs.json into FOLDER, and NAME.identical.json with ``--check``."""
    system, tasks = System(name, label, path, expert_memory), generated_tasks(items)
    if check and system.is_checkpoint:
        report = check_budgets(path, first_items(tasks, check), [expert_memory, MINIMUM], device)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.identical.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    judge(system, tasks, folder, batch_size=batch_size, device=device)


if __name__ == "__main__":
    app()
