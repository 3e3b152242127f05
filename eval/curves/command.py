"""``python -m eval curves --out FILE``: accuracy and fidelity of quantized models against their average bits."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from eval.runner import batches, progress_bar
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
    method: Annotated[list[str] | None, typer.Option(help="rtn, awq, gptq; may be given again; all by default")] = None,
    mixed: Annotated[list[float] | None, typer.Option(help="average bits of mixed plans; may be given again")] = None,
    samples: Annotated[int, typer.Option(min=1, help="calibration items of the sensitivity")] = 256,
    batch_size: Annotated[int, typer.Option(min=2)] = 32,
    seed: Annotated[int, typer.Option(help="of the questions")] = 0,
    folder: Annotated[Path, typer.Option(help="for checkpoints, plans and finished points")] = Path("curves"),
    prove: Annotated[bool, typer.Option(help="one mixed point also as a real checkpoint")] = True,
) -> None:
    """Measure every point; run again with the same settings, finished ones stay."""
    console = make_console()
    tasks, bank = generated_tasks(items, seed), Bank(model.resolve(), folder.resolve())
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
        points = [point for name in methods for point in bank.points(name, bits)]
        found = _measure_all(bank, points, tasks, settings, dense, prove, console)
    except (ExpertFlowError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    shares = {"text_share": {name: bank.text_shares(name) for name in methods}}
    results = {"made": provenance("eval", sys.argv[1:], "cpu"), "settings": settings} | shares
    results |= _results(bank, points, found, tasks, batch_size)
    write_json(out, results)
    plot = out.with_suffix(".png")
    save(curves_figure(results), plot)
    _show(console, results)
    console.print(f"{short_path(out)}, {short_path(plot)}", highlight=False)


@dataclass(frozen=True)
class _Found:
    """Scores of the full-precision self and of the dense twin; the points' and the noise floor's items; the proof."""

    own: list[float]
    points: dict[str, Scored]
    floor: Scored
    twin: list[float] | None
    proof: dict[str, Any] | None


def _measure_all(
    bank: Bank, points: Sequence[Point], tasks: Sequence[Task], settings: dict[str, Any], dense: Path | None,
    prove: bool, console: Console,
) -> _Found:  # fmt: skip
    size, items = settings["batch_size"], sum(len(task.items) for task in tasks)
    with _bar(console, "full precision", items) as advance:
        own = Self(bank.model, tasks, size, advance)
    return _Found(
        [own.score(number) for number in range(items)],
        {point.name: _point(own, bank, point, settings, console) for point in points},
        _floor(own, bank, tasks, settings, console),
        _dense(dense, tasks, size, bank.folder, console) if dense else None,
        _proof(own, bank, points, tasks, size, console) if prove else None,
    )


def _results(
    bank: Bank, points: Sequence[Point], found: _Found, tasks: Sequence[Task], batch_size: int
) -> dict[str, Any]:
    images = [item.image_key for task in tasks for item in task.items]
    return {
        "self": {"tasks": accuracy(tasks, found.own, found.own)},
        "dense": {"tasks": accuracy(tasks, found.twin, found.own)} if found.twin else None,
        "noise_floor": {"batch_size": batch_size // 2, **_figures(found.floor, tasks, images, found.own)},
        "points": [
            _described(bank, point) | _figures(found.points[point.name], tasks, images, found.own) for point in points
        ],
        "comparisons": _comparisons(points, found.points, tasks, found.twin),
        "proof": found.proof,
    }


@contextmanager
def _bar(console: Console, name: str, items: int) -> Iterator[Callable[[int], None]]:
    """Items, items a second, and the time left."""
    with progress_bar(console) as bar:
        row = bar.add_task(name, total=items)
        yield lambda count: bar.advance(row, count)


def _point(own: Self, bank: Bank, point: Point, settings: dict[str, Any], console: Console) -> Scored:
    path = bank.folder / "points" / f"{point.name}.json"
    known = settings | {"plan": point.plan.to_json()}
    if (found := Scored.load(path, known)) is None:
        with _bar(console, point.name, len(own.answers)) as advance:
            found = own.measure(bank.experts(point), advance)
        found.save(path, known)
    return found


def _floor(
    own: Self, bank: Bank, tasks: Sequence[Task], settings: dict[str, Any], console: Console
) -> Scored:  # fmt: skip
    """Full precision against itself in batches of half the size."""
    path, size = bank.folder / "points" / "noise-floor.json", settings["batch_size"] // 2
    if (found := Scored.load(path, settings)) is None:
        with _bar(console, f"batches of {size}", len(own.answers)) as advance:
            found = own.against(Self(bank.model, tasks, size, advance))
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
    few = [replace(task, items=list(task.items)[: PROVED_ITEMS // len(tasks)]) for task in tasks]
    asked = list(batches(few, batch_size))
    real = expertflow_quant.load(out, expert_memory="100%", device="cpu")
    for place, weights in bank.experts(point).items():
        own.teacher.put(*place, weights)
    answers = [
        [
            answer.token_ids
            for batch in asked
            for answer in engine.generate(
                [item.messages for item in batch.items], max_new_tokens=batch.items[0].max_new_tokens
            )
        ]
        for engine in (real, own.engine)
    ]
    own.teacher.restore()
    return {
        "point": point.name,
        "records": experts,
        "same_records": same,
        "answers": len(answers[0]),
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
