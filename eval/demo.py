"""``make demo``: quantize the shipped model seven ways, serve one of them, judge all; ends with one table."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from eval.ask import ask, served
from eval.comparison import Comparison, compare
from eval.judge import Judgement, System, load_judgement
from eval.metrics import relaxed_accuracy
from eval.plots import comparison_figure, save
from eval.pool import ROOT, Job, JobError, Pool, library_command
from eval.provenance import device_name, provenance, short_path
from eval.report import cells_table, make_console, results_json, table_cells, write_json
from eval.stats import MARGIN_DENSE, MARGIN_OWN
from eval.tasks import GENERATED, Task, generated_tasks

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
SHIPPED = ROOT / "calibration" / "shipped"
RESULTS = ROOT / "eval" / "results"
MARKER = ".made-by-the-demo"
EXPERT_MEMORY = "25%"
CHECKED_ITEMS = 8
AVERAGE_BITS = 3.0


@dataclass(frozen=True)
class Variant:
    """One way of quantizing: its folder, its row, and what ``expertflow-quant quantize`` is told."""

    name: str
    label: str
    options: tuple[str, ...]


VARIANTS = (
    Variant("bf16", "bf16", ("--method", "rtn", "--format", "bf16")),
    Variant("int8", "int8 RTN", ("--method", "rtn", "--format", "int8-g32")),
    Variant("int4-awq", "int4 AWQ", ("--method", "awq", "--format", "int4-g32")),
    Variant("int4-gptq", "int4 GPTQ", ("--method", "gptq", "--format", "int4-g32")),
    Variant("int4-rtn", "int4 RTN", ("--method", "rtn", "--format", "int4-g32")),
    Variant("mixed", "mixed 3 bits", ("--method", "gptq", "--plan", "plan.json")),
    Variant("int2", "int2 GPTQ", ("--method", "gptq", "--format", "int2-g32")),
)
ORIGINAL, BASELINE, SERVED, DENSE, LARGER = "original", "bf16", "int4-awq", "dense", "dense-total"


@dataclass
class Demo:
    """Where everything lies, and how long each step took."""

    folder: Path
    moe: Path
    dense: Path
    larger: Path
    items: int
    pool: Pool
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def answers(self) -> Path:
        """Every answer of every system."""
        return self.folder / "answers"

    def systems(self) -> list[System]:
        """The rows of the table, top to bottom."""
        variants = [System(v.name, v.label, self.folder / v.name, EXPERT_MEMORY) for v in VARIANTS]
        original = System(ORIGINAL, "original", self.moe)
        twins = [System(DENSE, "dense twin", self.dense)]
        twins.append(System(LARGER, "larger dense twin", self.folder / LARGER))
        return [original, *variants, *twins]

    def log(self, name: str) -> Path:
        """The log of one job."""
        return self.folder / "logs" / f"{name}.log"

    @contextmanager
    def step(self, name: str, text: str) -> Iterator[None]:
        """Say what is done now, and afterwards how long it took."""
        self.console.print(f"\n[bold]{len(self.seconds) + 1}. {text}[/bold]", highlight=False)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        self.console.print(f"   {self.seconds[name]:.1f} s", style="dim", highlight=False)


@app.command()
def main(
    items: Annotated[int, typer.Option(min=CHECKED_ITEMS, help="held-out questions per task")] = 128,
    folder: Annotated[Path, typer.Option(help="for checkpoints, logs and answers; made anew")] = Path("demo"),
    record: Annotated[bool, typer.Option(help="write the figures into eval/results too")] = False,
    moe: Annotated[Path, typer.Option(help="the model to quantize")] = SHIPPED / "moe",
    dense: Annotated[Path, typer.Option(help="its dense twin of equal active parameters")] = SHIPPED / "dense",
    larger: Annotated[Path, typer.Option(help="the twin of equal parameters in all, packed")] = SHIPPED / LARGER,
    workers: Annotated[int, typer.Option(min=1, help="processes side by side")] = min(4, os.cpu_count() or 1),
) -> None:
    """Quantize, check, serve and judge the shipped models on this machine's CPU."""
    console = make_console()
    start = time.perf_counter()
    try:
        prepare_folder(folder)
        models = (path.resolve() for path in (folder, moe, dense, larger))
        demo = Demo(*models, items, Pool(workers, console), console)
        run(demo, record)
    except (JobError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(f"\nThe whole demo took {time.perf_counter() - start:.0f} s.", highlight=False)


def run(demo: Demo, record: bool) -> None:
    """All steps."""
    tasks = generated_tasks(demo.items)
    demo.console.print(
        f"On {device_name('cpu')}, {demo.pool.workers} processes side by side, one thread each.",
        highlight=False,
    )
    with demo.step("quantize", f"Quantize {short_path(demo.moe)} {len(VARIANTS)} ways, expert by expert"):
        quantize_all(demo)
    with demo.step("serve", f"Serve {short_path(demo.folder / SERVED)} and ask it about a chart, streaming"):
        conversation = serve_and_ask(demo, tasks[0])
    what = f"{demo.items} held-out chart and {demo.items} document questions"
    with demo.step("judge", f"Judge them, the original and its dense twins on {what}"):
        judgements = judge_all(demo, tasks)
    identical = check_identical(demo)
    comparisons = compare_all(judgements)
    results = results_json(
        provenance("eval.demo", sys.argv[1:], "cpu"),
        {"items": demo.items, "expert_memory": EXPERT_MEMORY, "workers": demo.pool.workers, "seed": 0},
        tasks,
        judgements,
        comparisons,
    )
    alone = {n: report["budgets"][EXPERT_MEMORY]["alone"]["hit_rate"] for n, report in identical.items()}
    columns, rows = table_cells(judgements, comparisons, tasks, alone)
    results |= {"seconds": demo.seconds, "served": conversation, "identical": identical}
    results |= {"table": {"columns": columns, "rows": rows}}
    for place in (demo.folder / "results", *([RESULTS] if record else [])):
        write_json(place / "demo.json", results)
        save(comparison_figure(judgements, comparisons, tasks), place / "demo.png")
    conclude(demo, columns, rows, identical)


def prepare_folder(folder: Path) -> None:
    """Make ``folder`` empty; refuses one that another program filled."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise ValueError(f"{folder} holds files that the demo did not make: remove it or choose another --folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()


def quantize_all(demo: Demo) -> None:
    """Step 1: all variants and the larger twin, a few side by side; the mixed one after its plan."""
    jobs = [*(quantize_job(demo, variant) for variant in VARIANTS), unpack_job(demo)]
    jobs.sort(key=lambda job: -len(job.commands))  # the longest first
    demo.pool.run(jobs)


def quantize_job(demo: Demo, variant: Variant) -> Job:
    """The command that makes one variant, as a user would type it."""
    plan = str(demo.folder / "plan.json")
    options = [plan if option == "plan.json" else option for option in variant.options]
    make = (*library_command(), "quantize", str(demo.moe), str(demo.folder / variant.name), *options)
    commands: tuple[tuple[str, ...], ...] = (make,)
    if plan in options:
        decide = (sys.executable, "-m", "calibration", "plan", str(demo.moe))
        commands = ((*decide, "--average-bits", str(AVERAGE_BITS), "-o", plan), make)
    note = f"{' '.join(variant.options)}{', after calibration plan' if plan in options else ''}"
    return Job(variant.name, commands, demo.log(f"quantize-{variant.name}"), note)


def unpack_job(demo: Demo) -> Job:
    """The command that makes an ordinary folder of the larger dense twin."""
    expand = (sys.executable, "-m", "calibration.shipped.packed", "expand", str(demo.larger), str(demo.folder / LARGER))
    return Job(LARGER, (expand,), demo.log(f"unpack-{LARGER}"), "the larger dense twin, out of its int8 rows")


def serve_and_ask(demo: Demo, charts: Task) -> dict[str, Any]:
    """Step 2: a real server, a real client, one picture."""
    item: Any = next((item for item in charts.items if item.kind == "value"), charts.items[0])
    picture = demo.folder / "question.png"
    item.image.save(picture)
    console = demo.console
    console.print(f"   expertflow-quant serve {short_path(demo.folder / SERVED)} --expert-memory {EXPERT_MEMORY}")
    with served(demo.folder / SERVED, EXPERT_MEMORY, demo.log("serve")) as base_url:
        console.print(f"   picture: {short_path(picture)}\n   question: {item.question}", highlight=False)
        console.print("   streamed answer, piece by piece: ", end="")
        limit, show = item.max_new_tokens, lambda piece: console.out(piece, end="|", highlight=False)
        answer = ask(base_url, item.image, item.prompt, limit, show)
    console.print(f"\n   gold answer: {item.answers[0]}", highlight=False)
    console.print(
        f"   {answer.pieces} pieces, the first after {answer.first_seconds:.2f} s; "
        f"{answer.prompt_tokens} prompt and {answer.completion_tokens} answer tokens counted",
        highlight=False,
    )
    return {
        "item": item.id,
        "question": item.question,
        "gold": item.answers[0],
        "answer": answer.text,
        "score": relaxed_accuracy(answer.text, item.answers[0]),
        "pieces": answer.pieces,
        "first_seconds": round(answer.first_seconds, 3),
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
    }


def judge_all(demo: Demo, tasks: Sequence[Task]) -> list[Judgement]:
    """Step 3: every system in a process of its own, a few side by side."""
    systems = demo.systems()
    demo.pool.run([judge_job(demo, system) for system in systems])
    return [load_judgement(system, demo.answers) for system in systems]


def judge_job(demo: Demo, system: System) -> Job:
    """The command that judges one system."""
    command = [sys.executable, "-m", "eval.worker", system.name, system.label, str(system.path)]
    command += [str(demo.answers), "--items", str(demo.items), "--expert-memory", system.expert_memory]
    command += ["--check", str(CHECKED_ITEMS)]
    lines, total = demo.answers / f"{system.name}.jsonl", demo.items * len(GENERATED)
    note = f"{total} questions; tokens compared at three budgets" if system.is_checkpoint else f"{total} questions"
    return Job(system.name, (tuple(command),), demo.log(f"judge-{system.name}"), note, lines, total)


def check_identical(demo: Demo) -> dict[str, Any]:
    """What the workers found about tokens at every expert memory; raises ValueError where they differ."""
    reports = {}
    for variant in VARIANTS:
        path = demo.answers / f"{variant.name}.identical.json"
        reports[variant.name] = report = json.loads(path.read_text(encoding="utf-8"))
        for budget, found in report["budgets"].items():
            if found["identical"] != report["items"]:
                raise ValueError(
                    f"{variant.label}: at expert memory {budget} only {found['identical']} of "
                    f"{report['items']} answers have the tokens that resident experts give, and all must: "
                    "please report this with the folder's manifest.json"
                )
    return reports


def compare_all(judgements: Sequence[Judgement]) -> list[Comparison]:
    """Everything against the bf16 checkpoint, paired; the dense twins at the margin for another model."""
    baseline = next(j for j in judgements if j.system.name == BASELINE)
    comparisons = []
    for judgement in judgements:
        if judgement is not baseline:
            margin = MARGIN_DENSE if judgement.system.name in (DENSE, LARGER) else MARGIN_OWN
            comparisons += compare(judgement, baseline, margin)
    return comparisons


def conclude(demo: Demo, columns: list[str], rows: list[list[str]], identical: dict[str, Any]) -> None:
    """The table and where everything lies."""
    budgets = " and ".join(next(iter(identical.values()))["budgets"])
    checked = f"{len(identical)} checkpoints x {CHECKED_ITEMS} questions"
    demo.console.print(
        f"\nTokens at expert memory {budgets} are those of all experts resident: {checked}.", highlight=False
    )
    demo.console.print(
        f"Expert memory {EXPERT_MEMORY}; {demo.items} questions a task, in batches; in brackets: points against "
        f"bf16. Hit rate alone: {CHECKED_ITEMS} questions asked one at a time.\n",
        highlight=False,
    )
    demo.console.print(cells_table("", columns, rows))
    demo.console.print(
        f"Intervals, verdicts, plot: {short_path(demo.folder / 'results')}; every answer: {short_path(demo.answers)}",
        highlight=False,
    )


if __name__ == "__main__":
    app(prog_name="python -m eval.demo")
