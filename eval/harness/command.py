"""``python -m eval lmms MODEL --chartqa-path P --docvqa-path P --out FILE``: lmms-eval's stock tasks on local files."""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from eval.data.load import make_tasks
from eval.harness.compare import HarnessTask, compare_with_harness, require_comparable, write_items
from eval.harness.files import write_generated
from eval.judge import Judgement, System, judge
from eval.provenance import provenance, short_path
from eval.report import cells_table, make_console, percent, write_json
from eval.tasks import Task
from expertflow_quant.formats import ExpertFlowError


def lmms(
    model: Annotated[Path, typer.Argument(help="a checkpoint of ours, or a plain transformers folder")],
    out: Annotated[Path, typer.Option(help="results file; every item goes into a .jsonl of the same name")],
    chartqa_path: Annotated[Path | None, typer.Option(help="ChartQA's tables, as lmms-lab/ChartQA has them")] = None,
    docvqa_path: Annotated[Path | None, typer.Option(help="DocVQA's tables, as lmms-lab/DocVQA has them")] = None,
    generated: Annotated[
        int | None, typer.Option(min=1, help="instead of files: so many generated charts and documents, as such files")
    ] = None,
    altered: Annotated[
        bool, typer.Option(help="change three of four generated answers, so that scores of every size occur")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first so many items of each")] = None,
    expert_memory: Annotated[str, typer.Option(help="device bytes for experts: 2MiB, 25% ...")] = "25%",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    ask_again: Annotated[
        bool, typer.Option(help="our own evaluator asks the same items too, and both are compared")
    ] = False,
) -> None:
    """Score by the field's harness, each item beside our score of the same answer; code 1 where they differ."""
    console = make_console()
    system = System(out.stem, model.name, model, expert_memory)
    how: dict[str, Any] = {"batch_size": batch_size, "device": device}
    try:
        with _files({"chartqa": chartqa_path, "docvqa": docvqa_path}, generated, altered) as paths:
            read = make_tasks(list(paths), paths, limit=limit)
            require_comparable(system, read, paths)
            asked = _asked_by_us(system, read, how) if ask_again else None
            version, tasks = compare_with_harness(system, paths, read, limit=limit, asked=asked, **how)
    except (ExpertFlowError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    settings = {"model": short_path(model), "expert_memory": expert_memory if system.is_checkpoint else None}
    settings |= {"batch_size": batch_size, "limit": limit, "generated": generated, "altered": altered}
    made = provenance("eval", sys.argv[1:], device) | {"lmms_eval": version}
    write_json(out, {"made": made, "settings": settings, "tasks": [task.to_json() for task in tasks]})
    write_items(out.with_suffix(".jsonl"), tasks)
    console.print(harness_table(tasks, f"lmms-eval {version} on local files, beside our scores of the same answers"))
    console.print(f"results and items: {out}, {out.with_suffix('.jsonl')}", highlight=False)
    if not all(task.agrees for task in tasks):
        console.print('[red]lmms-eval and our evaluator differ: see "different" in the results[/red]')
        raise typer.Exit(1)


def _asked_by_us(system: System, tasks: Sequence[Task], how: Mapping[str, Any]) -> Judgement:
    with tempfile.TemporaryDirectory(prefix="asked-by-us-") as folder:
        return judge(system, tasks, Path(folder), **how)


@contextmanager
def _files(paths: Mapping[str, Path | None], generated: int | None, altered: bool) -> Iterator[dict[str, Path]]:
    """The paths that were given, or those of generated files that last as long as the block."""
    given = {name: path for name, path in paths.items() if path is not None}
    if bool(given) == (generated is not None):
        raise ExpertFlowError("which files are asked about: give --chartqa-path, --docvqa-path or both, or --generated")
    if generated is None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="generated-") as folder:
        yield write_generated(Path(folder), generated, altered)


def harness_table(tasks: Sequence[HarnessTask], title: str) -> Table:
    """One row a task: the harness's mean, ours of the same answers, how many items are the same in both."""
    columns = ["task", "items", "lmms-eval %", "ours %", "same prompts", "equal scores"]
    again = any(task.asked for task in tasks)
    columns += ["asked by us %", "same answers", "equal scores"] if again else []
    rows = []
    for task in tasks:
        found = task.to_json()
        row = [task.stock.name, str(found["items"]), percent(task.scores[task.stock.score]), percent(task.mean)]
        row += [str(found["same_prompts"]), str(found["bit_equal_scores"])]
        if again:
            ours = found["asked_by_us"]
            row += [percent(ours["mean"]), str(ours["same_predictions"]), str(ours["bit_equal_scores"])]
        rows.append(row)
    return cells_table(title, columns, rows)
