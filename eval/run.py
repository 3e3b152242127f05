"""``python -m eval run MODEL --task chartqa --chartqa-path PATH --out FOLDER``: what one model scores."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from eval.data.load import TASK_NAMES, make_tasks
from eval.harness.compare import require_comparable
from eval.harness.option import Harness, harness_results
from eval.judge import Judgement, System, judge
from eval.noise import noise_floor, noise_table
from eval.provenance import provenance
from eval.report import cells_table, make_console, percent, results_json, systems_table, write_json
from eval.runner import progress_bar
from eval.systems import system_named
from eval.tasks import Task

NAMED_FAILURES = 20


def run(
    model: Annotated[str, typer.Argument(help="PATH, LABEL=PATH, or LABEL=http://HOST:PORT/v1#MODEL of a server")],
    out: Annotated[Path, typer.Option(help="folder for results.json and every answer")],
    task: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(TASK_NAMES)}; repeatable; by default all whose files are given"),
    ] = None,
    chartqa_path: Annotated[Path | None, typer.Option(help="folder, file or glob, in any layout")] = None,
    chartqa_x_path: Annotated[Path | None, typer.Option(help="the same of ChartQA-X")] = None,
    docvqa_path: Annotated[Path | None, typer.Option(help="the same of DocVQA")] = None,
    infovqa_path: Annotated[Path | None, typer.Option(help="the same of InfographicVQA")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first so many items of each task")] = None,
    expert_memory: Annotated[str, typer.Option(help="device bytes for experts of our checkpoints")] = "25%",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    noise_batch_size: Annotated[
        int | None, typer.Option(min=1, help="ask again in batches of this size and count what changed")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="shrink larger images to so many pixels before any model sees them")
    ] = None,
    harness: Annotated[
        Harness | None, typer.Option(help="score by its stock tasks on the same files too, item by item beside ours")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="of the generated items")] = 0,
) -> None:
    """Ask one model the items of some tasks: ours, any transformers model, or an OpenAI-compatible server.

    Run again with the same settings, it goes on where it was interrupted.
    """
    console = make_console()
    paths = {"chartqa": chartqa_path, "chartqa-x": chartqa_x_path, "docvqa": docvqa_path, "infovqa": infovqa_path}
    given = {name: path for name, path in paths.items() if path is not None}
    try:
        tasks = make_tasks(task or list(given), given, limit=limit, seed=seed, max_pixels=max_pixels)
        say_damaged(tasks, console)
        systems = [(system_named(model, expert_memory), batch_size)]
        if harness:
            require_comparable(systems[0][0], tasks, given, max_pixels)
        if noise_batch_size is not None:
            systems.append((_again(systems[0][0], noise_batch_size), noise_batch_size))
        with progress_bar(console) as bar:
            judged = [judge(s, tasks, out, batch_size=size, device=device, bar=bar) for s, size in systems]
        how = {"batch_size": batch_size, "device": device, "limit": limit}
        scored = {"harness": harness_results(judged[0], tasks, given, out, console, **how)} if harness else {}
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    settings = {"expert_memory": expert_memory, "batch_size": batch_size, "limit": limit, "max_pixels": max_pixels}
    results = results_json(provenance("eval", sys.argv[1:], device), settings | {"seed": seed}, tasks, judged, [])
    results |= scored
    console.print(systems_table(judged, tasks))
    console.print(kinds_table(judged[0], tasks))
    say_failures(judged[0], console)
    if noise_batch_size is not None:
        floors = noise_floor(judged[0], judged[1], tasks, (batch_size, noise_batch_size))
        results["noise_floor"] = [floor.to_json() for floor in floors]
        console.print(noise_table(floors, tasks))
    write_json(out / "results.json", results)
    console.print(f"results.json and every answer: {out}", markup=False, highlight=False)


def kinds_table(judgement: Judgement, tasks: Sequence[Task]) -> Table:
    """The score of each task and of each kind of question in it (ChartQA: human and augmented)."""
    rows = []
    for task in tasks:
        kinds = {"all": (judgement.mean(task.name), len(task.items))} | judgement.by_kind(task.name)
        rows += [[task.title, kind, task.metric.title, percent(m), str(n)] for kind, (m, n) in kinds.items()]
    return cells_table("", ["task", "questions", "metric", "score %", "items"], rows)


def say_damaged(tasks: Sequence[Task], console: Console) -> None:
    """How many rows of each task cannot be asked, and which."""
    for task in tasks:
        if task.damaged:
            named = [f"  {name}: {damage}" for name, damage in task.damaged.items()]
            console.print(f"{task.title}: {len(named)} damaged rows of {len(task.items)} score 0:", style="yellow")
            _say(named, console)


def say_failures(judgement: Judgement, console: Console) -> None:
    """How many items failed (and so scored 0), and which, with their errors."""
    named = [f"  {r.id}: {r.error}" for r in judgement.results if r.error is not None]
    if named:
        console.print(f"{judgement.system.label}: {len(named)} items failed and score 0:", style="red", markup=False)
        _say(named, console)


def _say(lines: Sequence[str], console: Console) -> None:
    left = len(lines) - NAMED_FAILURES
    shown = [*lines[:NAMED_FAILURES], *([f"  and {left} more, in results.json and the .jsonl"] if left > 0 else [])]
    for line in shown:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _again(system: System, batch_size: int) -> System:
    return replace(system, name=f"{system.name}-batch{batch_size}", label=f"{system.label}, batches of {batch_size}")
