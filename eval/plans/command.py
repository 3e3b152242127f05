"""``python -m eval plans MODEL --plan NAME=FILE --slots NAME=FILE --trace TRACE --out FILE``."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

import expertflow_quant
from eval.plans.contenders import METHOD, Contender, by_use, named
from eval.plans.measure import ItemFigures, Teacher, measure, teach
from eval.plans.report import differences, figures, plans_figure, plans_table
from eval.plots import save
from eval.provenance import provenance
from eval.report import make_console, write_json
from eval.runner import progress_bar
from eval.tasks import Task, generated_tasks
from expertflow_quant.checkpoint.plan import Plan
from expertflow_quant.checkpoint.reader import CheckpointReader
from expertflow_quant.formats import ExpertFlowError, Format
from expertflow_quant.offload.budget import parse_budget
from expertflow_quant.offload.layer_slots import plan_layer_slots
from expertflow_quant.offload.resident import ResidentExperts
from expertflow_quant.offload.slots_file import read_slots
from expertflow_quant.offload.store import ExpertStore
from expertflow_quant.offload.trace import RoutingTrace
from expertflow_quant.pipeline.quantize import quantize_model

FREQUENCY = "frequency"


def plans(
    model: Annotated[Path, typer.Argument(help="the model in full precision")],
    out: Annotated[Path, typer.Option(help="results file; a plot of the same name goes beside it")],
    plan: Annotated[list[str], typer.Option(help="NAME=FILE of `python -m calibration plan`")],
    slots: Annotated[list[str] | None, typer.Option(help="NAME=FILE of a plan's slots")] = None,
    trace: Annotated[list[Path] | None, typer.Option(help="recorded: a plan by use, too")] = None,
    uniform: Annotated[str, typer.Option(help="format for all that plans are held against")] = "int3-g32",
    narrow: Annotated[str, typer.Option(help="of the plan by use")] = "int2-g32",
    wide: Annotated[str, typer.Option(help="of the plan by use")] = "int4-g32",
    items: Annotated[int, typer.Option(min=1, help="questions of each task")] = 240,
    expert_memory: Annotated[str, typer.Option(help="of the uniform plan's experts, for all")] = "25%",
) -> None:
    """Accuracy, divergence and bytes moved of plans of formats against one format for all, at equal bytes."""
    console = make_console()
    try:
        form = Format.parse(uniform)
        contenders = [Contender(f"uniform {uniform}", Plan.uniform(form))]
        if trace:
            used = by_use([RoutingTrace.load(path) for path in trace], Format.parse(narrow), form, Format.parse(wide))
            contenders.append(Contender(FREQUENCY, used))
        planned = named(slots, "slots")
        contenders += [Contender(n, Plan.load(path), planned.get(n)) for n, path in named(plan, "plan").items()]
        found = _measured(model, contenders, generated_tasks(items, 0), expert_memory, console)
    except (ExpertFlowError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    settings = {"model": model.name, "method": METHOD, "items": items, "expert_memory": expert_memory}
    results = {"made": provenance("eval", sys.argv[1:], "cpu"), "settings": settings, "plans": found}
    write_json(out, results)
    save(plans_figure(found), out.with_suffix(".png"))
    console.print(plans_table(found))
    console.print(f"results and plot: {out}, {out.with_suffix('.png')}", highlight=False)


def _measured(
    model: Path, contenders: Sequence[Contender], tasks: Sequence[Task], expert_memory: str, console: Console
) -> list[dict[str, Any]]:
    count = sum(len(task.items) for task in tasks)
    base: list[ItemFigures] = []
    found: list[dict[str, Any]] = []
    device_bytes = 0
    with progress_bar(console) as bar, tempfile.TemporaryDirectory() as made:
        teacher = _taught(model, tasks, bar)
        for number, contender in enumerate(contenders):
            folder = Path(made) / str(number)
            quantize_model(model, folder, method=METHOD, plan=contender.plan)
            store = ExpertStore(CheckpointReader(folder))
            device_bytes = device_bytes or parse_budget(expert_memory, store.nbytes)
            engine = expertflow_quant.load(folder, device_bytes, fast=False)
            row = bar.add_task(contender.name, total=count)
            caches = _caches(store, device_bytes, contender.slots)
            items = measure(engine, tasks, teacher, caches, lambda row=row: bar.advance(row))  # type: ignore[misc]
            entry = {"name": contender.name, "plan": contender.plan.to_json(), "record_bytes": store.nbytes}
            planned = caches.get("planned slots")
            entry |= {"slots": None if planned is None else planned.plan, "device_bytes": device_bytes}
            entry["figures"] = figures(items)
            found.append(entry | ({"change": differences(items, base)} if base else {}))
            base = base or items
    return found


def _taught(model: Path, tasks: Sequence[Task], bar: Progress) -> dict[str, Teacher]:
    row = bar.add_task("full precision", total=sum(len(task.items) for task in tasks))
    engine = expertflow_quant.Engine.from_plain(model, dtype=torch.float32)
    return teach(engine, tasks, lambda: bar.advance(row))


def _caches(store: ExpertStore, device_bytes: int, slots: Path | None) -> dict[str, ResidentExperts]:
    """The device's caches: slots in equal shares, and the plan's own."""
    shares = {"equal shares": plan_layer_slots(store.layers, device_bytes)}
    if slots is not None:
        shares["planned slots"] = read_slots(slots, store.layers)
    caches = {name: ResidentExperts(store, plan, "cpu") for name, plan in shares.items()}
    for cache in caches.values():
        cache.preload()
    return caches
