"""``python -m eval curves --out FILE``: accuracy and fidelity of quantized models against their average bits."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import expertflow_quant
from eval.curves.fidelity import SOFTENED, Scored, Self
from eval.curves.figures import accuracy, compare, fidelity
from eval.curves.plots import curves_figure
from eval.curves.points import METHODS, MIXED_BITS, UNIFORM, Bank, Point, run_command
from eval.judge import System, judge
from eval.plots import save
from eval.pool import ROOT, library_command
from eval.provenance import model_fingerprint, provenance, short_path
from eval.report import cells_table, make_console, write_json
from eval.runner import progress_bar
from eval.tasks import Task, generated_tasks
from expertflow_quant.checkpoint.reader import CheckpointReader
from expertflow_quant.formats import ExpertFlowError

SHIPPED = ROOT / "calibration" / "shipped"
PROVED_ITEMS = 64


def curves(
    out: Annotated[Path, typer.Option(help="results file; a plot of the same name goes beside it")],
    model: Annotated[Path, typer.Option(help="the Mixture-of-Experts model")] = SHIPPED / "moe",
    dense: Annotated[Path | None, typer.Option(help="its dense twin")] = SHIPPED / "dense",
    items: Annotated[int, typer.Option(min=1, help="held-out questions per task")] = 512,
    method: Annotated[list[str] | None, typer.Option(help="rtn, awq, gptq; may be given again [all]")] = None,
    mixed: Annotated[list[float] | None, typer.Option(help="average bits of mixed plans; may be given again")] = None,
    samples: Annotated[int, typer.Option(min=1, help="calibration items of the sensitivity")] = 256,
    batch_size: Annotated[int, typer.Option(min=2)] = 32,
    folder: Annotated[Path, typer.Option(help="for checkpoints, plans and finished points")] = Path("curves"),
    prove: Annotated[bool, typer.Option(help="one mixed point also as a real checkpoint")] = True,
) -> None:
    """Measure every point; run again with the same settings, finished ones stay."""
    console = make_console()
    tasks, bank = generated_tasks(items), Bank(model.resolve(), folder.resolve())
    methods, bits = method or list(METHODS), sorted(mixed or MIXED_BITS)
    settings = {
        "model": model_fingerprint(model),
        "tasks": [task.description for task in tasks],
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "samples": samples,
        "softened": SOFTENED,
    }
    try:
        for name in methods:
            for step in bank.make(name, samples, bits):
                console.print(step, style="dim", highlight=False)
        with _bar(console, "full precision", items) as advance:
            own = Self(model, tasks, batch_size, advance)
        self_scores = [own.score(number) for number in range(len(own.answers))]
        points = [point for name in methods for point in bank.points(name, bits)]
        measured = {point.name: _point(own, bank, point, settings, console) for point in points}
        floor = _floor(own, model, tasks, settings, folder, console)
        twin = _dense(dense, tasks, batch_size, folder, console) if dense else None
        proof = _proof(own, bank, points, tasks, batch_size, console) if prove else None
    except (ExpertFlowError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    images = [item.image_key for task in tasks for item in task.items]
    results = {
        "made": provenance("eval", sys.argv[1:], "cpu"),
        "settings": settings | {"answer_tokens": sum(measured[points[0].name].tokens)},
        "self": {"tasks": accuracy(tasks, self_scores, self_scores)},
        "dense": {"tasks": accuracy(tasks, twin, self_scores)} if twin else None,
        "noise_floor": {"batch_size": batch_size // 2, **_figures(floor, tasks, images, self_scores)},
        "text_share": {name: bank.text_shares(name) for name in methods},
        "points": [
            _described(bank, point) | _figures(measured[point.name], tasks, images, self_scores) for point in points
        ],
        "comparisons": _comparisons(points, measured, tasks, twin),
        "proof": proof,
    }
    write_json(out, results)
    plot = out.with_suffix(".png")
    save(curves_figure(results), plot)
    _show(console, results)
    console.print(f"{short_path(out)}, {short_path(plot)}", highlight=False)


@contextmanager
def _bar(console: Console, name: str, items: int) -> Iterator[Callable[[int], None]]:
    """Items of both tasks, a second, and the time left."""
    with progress_bar(console) as bar:
        row = bar.add_task(name, total=2 * items)
        yield lambda count: bar.advance(row, count)


def _point(own: Self, bank: Bank, point: Point, settings: dict[str, Any], console: Console) -> Scored:
    path = bank.folder / "points" / f"{point.name}.json"
    known = settings | {"plan": point.plan.to_json()}
    if (found := Scored.load(path, known)) is None:
        with _bar(console, point.name, len(own.answers) // 2) as advance:
            found = own.measure(bank.experts(point), advance)
        found.save(path, known)
    return found


def _floor(
    own: Self, model: Path, tasks: Sequence[Task], settings: dict[str, Any], folder: Path, console: Console
) -> Scored:
    path, size = folder / "points" / "noise-floor.json", settings["batch_size"] // 2
    if (found := Scored.load(path, settings)) is None:
        with _bar(console, f"batches of {size}", len(own.answers) // 2) as advance:
            found = own.against(Self(model, tasks, size, advance))
        found.save(path, settings)
    return found


def _dense(dense: Path, tasks: Sequence[Task], batch_size: int, folder: Path, console: Console) -> list[float]:
    with progress_bar(console) as bar:
        judged = judge(System("dense", "dense twin", dense), tasks, folder / "dense", batch_size=batch_size, bar=bar)
    return [result.score for result in judged.results]


def _proof(
    own: Self, bank: Bank, points: Sequence[Point], tasks: Sequence[Task], batch_size: int, console: Console
) -> dict[str, Any]:
    """The mixed model of the fewest bits as ``quantize --plan`` writes it: its records, and its answers."""
    point = next(point for point in reversed(points) if point.kind == "mixed" and point.named == _lowest(points))
    out = bank.folder / "proof" / point.name
    console.print(f"quantize --plan {point.name}, and compare", style="dim", highlight=False)
    run_command([*library_command(), "quantize", str(bank.model), str(out), "--method", point.method, "--plan",
                 str(bank.plan_file(point)), "--device", "cpu"])  # fmt: skip
    same, experts = bank.same_records(point, CheckpointReader(out))
    asked = [(task, item) for task in tasks for item in list(task.items)[: PROVED_ITEMS // len(tasks)]]
    real = expertflow_quant.load(out, expert_memory="100%", device="cpu")
    for place, weights in bank.experts(point).items():
        own.teacher.put(*place, weights)
    answers: list[list[tuple[int, ...]]] = []
    for engine in (real, own.engine):
        given: list[tuple[int, ...]] = []
        for task in tasks:
            conversations = [item.messages for of, item in asked if of is task]
            limit = next(item.max_new_tokens for of, item in asked if of is task)
            for start in range(0, len(conversations), batch_size):
                found = engine.generate(conversations[start : start + batch_size], max_new_tokens=limit)
                given += [answer.token_ids for answer in found]
        answers.append(given)
    own.teacher.restore()
    return {
        "point": point.name,
        "records": experts,
        "same_records": same,
        "answers": len(asked),
        "same_tokens": sum(a == b for a, b in zip(*answers, strict=True)),
    }


def _lowest(points: Sequence[Point]) -> str:
    return min((point.named for point in points if point.kind == "mixed"), key=lambda name: float(name[6:]))


def _described(bank: Bank, point: Point) -> dict[str, Any]:
    bits, whole, nbytes = bank.bits(point)
    head = {"name": point.name, "method": point.method, "kind": point.kind, "bits": bits}
    return head | {"bits_with_scales": whole, "record_bytes": nbytes}


def _figures(
    scored: Scored, tasks: Sequence[Task], images: Sequence[str], self_scores: Sequence[float]
) -> dict[str, Any]:
    return {"tasks": accuracy(tasks, scored.scores, self_scores), "fidelity": fidelity(scored, images)}


def _comparisons(
    points: Sequence[Point], measured: dict[str, Scored], tasks: Sequence[Task], dense: Sequence[float] | None
) -> list[dict[str, Any]]:
    """Mixed at 3 bits against int3 for all, of each method; mixed at 2.5 against the dense twin."""
    found = []
    for method in dict.fromkeys(point.method for point in points):
        ours, theirs = f"{method}-mixed-3", f"{method}-{UNIFORM[1]}"
        if ours in measured:
            found.append(compare(ours, tasks, measured[ours], measured[theirs], theirs))
        low = f"{method}-mixed-2.5"
        if dense is not None and low in measured:
            of_tasks = accuracy(tasks, measured[low].scores, dense)
            tasks_only = {task: figures["to_self"] for task, figures in of_tasks.items()}
            found.append({"point": low, "against": "dense twin", "tasks": tasks_only})
    return found


def _show(console: Console, results: dict[str, Any]) -> None:
    columns = ["point", "bits", "with scales", "KL", "KL softened", "same first choice %", "charts %", "documents %"]
    rows = [
        [
            point["name"],
            f"{point['bits']:.2f}",
            f"{point['bits_with_scales']:.2f}",
            f"{point['fidelity']['kl']['mean']:.2e}",
            f"{point['fidelity']['kl_softened']['mean']:.2e}",
            f"{100 * point['fidelity']['top1_agreement']['mean']:.2f}",
            *(f"{100 * point['tasks'][task]['mean']:.2f}" for task in ("chart", "document")),
        ]
        for point in results["points"]
    ]
    console.print(cells_table("points", columns, rows))
    for each in results["comparisons"]:
        ratio = f"KL {each['kl_ratio']['mean']:.2f} of it" if "kl_ratio" in each else ""
        tasks = ", ".join(
            f"{task} {100 * d['mean']:+.2f} ({100 * d['lower']:+.2f} .. {100 * d['upper']:+.2f})"
            for task, d in each["tasks"].items()
        )
        console.print(f"{each['point']} against {each['against']}: {ratio} {tasks}", highlight=False)
