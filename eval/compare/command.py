"""``python -m eval compare SYSTEM --self BF16 --dense DENSE``: all on the same items, one page."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from eval.compare.changed import cards, changed_questions
from eval.compare.report import Report, markdown, unasked
from eval.compare.sizes import sizes_of
from eval.compare.systems import Contest, contest, tasks_named
from eval.comparison import compare as compare_pair
from eval.html.page import page
from eval.judge import Judgement, judge, require_models
from eval.plots import judgement_figure, save
from eval.provenance import provenance
from eval.report import comparisons_table, make_console, systems_table, write_json
from eval.run import say_damaged
from eval.runner import progress_bar
from eval.stats import CONFIDENCE, RESAMPLES
from eval.tasks import Task
from expertflow_quant.formats import ExpertFlowError


def compare(
    systems: Annotated[list[str], typer.Argument(help="what is judged: PATH, LABEL=PATH or LABEL=http://HOST:PORT/v1")],
    out: Annotated[Path, typer.Option(help="folder for every answer, compare.json, .md, .html, .png")],
    own: Annotated[str | None, typer.Option("--self", help="the same model in its own full precision")] = None,
    dense: Annotated[list[str] | None, typer.Option(help="a dense model to compare with as well; repeatable")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="chart, document, or NAME=PATH: chartqa=FOLDER ...; by default both generated ones"),
    ] = None,
    items: Annotated[int, typer.Option(min=0, help="questions per task; 0: all of a file, 320 generated")] = 0,
    expert_memory: Annotated[str, typer.Option(help="device bytes for experts of our checkpoints")] = "25%",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="shrink larger images to so many pixels before any model sees them")
    ] = None,
    grain: Annotated[
        float, typer.Option(help="noise on generated pictures, in levels of 255: 110 leaves the shipped models 70 %")
    ] = 0.0,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="of the generated items and the bootstrap")] = 0,
    noise_floor: Annotated[bool, typer.Option(help="ask full precision again in batches of half the size")] = False,
    pictures: Annotated[int, typer.Option(min=0, help="of changed items on the page, at most")] = 120,
    picture_pixels: Annotated[int, typer.Option(min=32, help="longer side of a picture on the page")] = 480,
    title: Annotated[str | None, typer.Option(help="of the page")] = None,
) -> None:
    """Judge all systems on the same items; verdicts against full precision and dense models; JSON, Markdown, HTML.

    Run again with the same settings, it goes on where it was interrupted.
    """
    console = make_console()
    try:
        sides = contest(systems, own, dense or [], expert_memory, noise_floor)
        require_models(sides.systems)
        tasks = tasks_named(task or [], items, seed, max_pixels, grain)
        say_damaged(tasks, console)
        judgements = judge_all(sides, tasks, console, folder=out, batch_size=batch_size, device=device)
        by_label = {judgement.system.label: judgement for judgement in judgements}
        comparisons = [
            comparison
            for system, baseline, margin in sides.pairs
            for comparison in compare_pair(by_label[system.label], by_label[baseline.label], margin, seed)
        ]
    except (ExpertFlowError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    settings = {"expert_memory": expert_memory, "batch_size": batch_size, "max_pixels": max_pixels, "seed": seed}
    settings |= {"grain": grain} if grain else {}
    settings |= {"resamples": RESAMPLES, "confidence": CONFIDENCE}
    found = changed_questions(judgements, [(system.label, baseline.label) for system, baseline, _ in sides.pairs])
    report = Report(
        title=title or f"{sides.judged[0].label}: charts and documents",
        made=provenance("eval", sys.argv[1:], device),
        settings=settings,
        tasks=tasks,
        judgements=judgements,
        roles=sides.roles,
        sizes=sizes_of(judgements),
        comparisons=comparisons,
        changed=found,
        cards=cards(found, tasks, pictures, picture_pixels),
    )
    write_report(report, out)
    console.print(systems_table(judgements, tasks))
    console.print(comparisons_table(comparisons, tasks))
    for pair in report.pairs:
        console.print(f"{pair.system} against {pair.baseline} ({pair.role}), every task: {pair.verdict}", markup=False)
    if open_ends := unasked(report):
        console.print(open_ends, style="yellow", markup=False, highlight=False)
    console.print(f"compare.json, .md, .html, .png and every answer: {out}", markup=False, highlight=False)


def write_report(report: Report, folder: Path) -> None:
    """compare.json, compare.md, compare.html and compare.png."""
    write_json(folder / "compare.json", report.to_json())
    for name, text in (("compare.md", markdown(report)), ("compare.html", page(report))):
        # half a surrogate pair in an answer, which JSON can hold and UTF-8 cannot
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    save(judgement_figure(report.judgements, report.tasks), folder / "compare.png")


def judge_all(
    sides: Contest, tasks: list[Task], console: Console, *, folder: Path, batch_size: int, device: str
) -> list[Judgement]:
    """Every system on all tasks; the one asked again in batches of half the size."""
    with progress_bar(console) as bar:
        return [
            judge(
                system,
                tasks,
                folder,
                batch_size=max(1, batch_size // 2) if system is sides.again else batch_size,
                device=device,
                bar=bar,
            )
            for system in sides.systems
        ]
