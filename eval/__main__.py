"""``python -m eval OUT --against MODEL --dense DENSE``: judge a quantized model on held-out charts and
documents. ``python -m eval speed TARGET --out FILE``: measure how fast one runs. ``python -m eval schedule
TRACE... --out FILE``: what grouping requests saves. ``python -m eval predict TRACE...``: score predictors.
``python -m eval lmms MODEL --chartqa-path P``: the field's harness on the same files. ``python -m eval
streaming --out FILE``: the memory that quantizing takes."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from eval.cache.at_work import policies
from eval.cache.command import cache
from eval.compare.command import compare as compare_command
from eval.comparison import Comparison, compare
from eval.curves.command import curves
from eval.gpu_tests.command import gpu_tests
from eval.harness.command import lmms
from eval.judge import Judgement, System, judge, require_models
from eval.peers.command import peers
from eval.plans.command import plans
from eval.plots import judgement_figure, save
from eval.predict.command import predict
from eval.provenance import provenance
from eval.quantize_speed.command import quantize_speed
from eval.quantizers.command import quantizers
from eval.report import (
    comparisons_table,
    items_to_decide,
    make_console,
    overall_verdicts,
    results_json,
    systems_table,
    write_json,
)
from eval.run import run
from eval.runner import progress_bar
from eval.schedule.command import schedule
from eval.speed.command import speed
from eval.stats import CONFIDENCE, MARGIN_DENSE, MARGIN_OWN, RESAMPLES
from eval.streaming.command import streaming
from eval.tasks import Task, generated_tasks
from eval.verdict.command import calibrate_verdict

JUDGE = "judge"


class JudgeUnlessNamed(TyperGroup):
    """Commands by name; what starts with none of them is for ``judge``, which needs no name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = bool(args) and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named else [JUDGE, *args])


app = typer.Typer(cls=JudgeUnlessNamed, add_completion=False, pretty_exceptions_enable=False)
app.command()(speed)
app.command()(predict)
app.command()(cache)
app.command()(schedule)
app.command()(policies)
app.command()(plans)
app.command()(quantize_speed)
app.command()(quantizers)
app.command()(peers)
app.command()(curves)
app.command()(lmms)
app.command()(run)
app.command()(gpu_tests)
app.command()(streaming)
app.command("compare")(compare_command)
app.command("calibrate-verdict")(calibrate_verdict)
RESULTS = Path(__file__).parent / "results"


@app.command(JUDGE)
def main(
    out: Annotated[Path, typer.Argument(help="the quantized checkpoint")],
    against: Annotated[Path, typer.Option(help="the model it was made from, in full precision")],
    dense: Annotated[Path | None, typer.Option(help="a dense model to compare with as well")] = None,
    items: Annotated[int, typer.Option(min=1, help="questions per task; 300 can show a margin of 1 point")] = 320,
    expert_memory: Annotated[str, typer.Option(help="device bytes for experts: 2MiB, 25% ...")] = "25%",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    results: Annotated[Path | None, typer.Option("--out", help="default: eval/results/<name of OUT>")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="of the generated items and the bootstrap")] = 0,
    noise_floor: Annotated[
        bool, typer.Option(help="ask the full-precision model again in batches of half the size")
    ] = False,
) -> None:
    """Relaxed accuracy on charts and ANLS on documents, against full precision and a dense model.

    Run again with the same settings, it goes on where it was interrupted.
    """
    console = make_console()
    folder = results or RESULTS / out.resolve().name
    tasks = generated_tasks(items, seed)
    systems = [
        System("quantized", "quantized", out, expert_memory),
        System("against", "original", against),
    ]
    systems += [System("dense", "dense", dense)] if dense else []
    try:
        require_models(systems)
        judgements = _judge_all(systems, console, tasks=tasks, folder=folder, batch_size=batch_size, device=device)
        comparisons = compare(judgements[0], judgements[1], MARGIN_OWN, seed)
        if dense:
            comparisons += compare(judgements[0], judgements[2], MARGIN_DENSE, seed)
        if noise_floor:
            again = System("against-again", "original again", against)
            half = max(1, batch_size // 2)
            judged = _judge_all([again], console, tasks=tasks, folder=folder, batch_size=half, device=device)
            comparisons += compare(judged[0], judgements[1], MARGIN_OWN, seed)
            judgements += judged
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    settings = {"items": items, "expert_memory": expert_memory, "batch_size": batch_size, "seed": seed}
    settings |= {"resamples": RESAMPLES, "confidence": CONFIDENCE}
    made = provenance("eval", sys.argv[1:], device)
    write_json(folder / "results.json", results_json(made, settings, tasks, judgements, comparisons))
    save(judgement_figure(judgements, tasks), folder / "accuracy.png")
    asked = " and ".join(f"{len(task.items)} {task.title}" for task in tasks)
    console.print(systems_table(judgements, tasks, f"{asked}, held out; expert memory {expert_memory}"))
    console.print(comparisons_table(comparisons, tasks))
    _conclude(console, comparisons, folder)


def _judge_all(
    systems: Sequence[System],
    console: Console,
    *,
    tasks: Sequence[Task],
    folder: Path,
    batch_size: int,
    device: str,
) -> list[Judgement]:
    with progress_bar(console) as bar:
        return [judge(s, tasks, folder, batch_size=batch_size, device=device, bar=bar) for s in systems]


def _conclude(console: Console, comparisons: list[Comparison], folder: Path) -> None:
    for pair, passed in overall_verdicts(comparisons).items():
        verdict = (
            "[green]non-inferior on every task[/green]" if passed else "[yellow]not shown to be non-inferior[/yellow]"
        )
        console.print(f"{pair}: {verdict}")
    if more := items_to_decide(comparisons):
        note = f"Where inconclusive: if nothing was lost, about {more:,} items a task would show it (--items)."
        console.print(note, highlight=False)
    console.print(f"results.json, accuracy.png and every answer: {folder}", highlight=False)


if __name__ == "__main__":
    app(prog_name="python -m eval")
