"""``python -m eval schedule TRACE... --out FILE``: batches grouped by path against batches in order of arrival."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from eval.plots import save
from eval.provenance import provenance
from eval.report import cells_table, make_console, write_json
from eval.runner import progress_bar
from eval.schedule.at_work import FIGURES, Traffic, measure_at_work
from eval.schedule.measure import ARRIVAL, compare_orders
from eval.schedule.plots import at_work_figure, schedule_figure
from eval.schedule.traffic import joined
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.predict_paths import PathPredictor
from expertflow_quant.offload.trace import RoutingTrace
from expertflow_quant.runtime.schedule import PATIENCE

SHARES = (0.25, 0.5)
AT_WORK_PATIENCE = (PATIENCE, 8)
HEADS = {"distinct_experts": "experts", "hit_rate": "hits", "bytes_per_token": "B/token", "tokens_per_second": "tok/s"}
TITLES = {
    ARRIVAL: "order of arrival",
    "task": "told by task",
    "words": "words",
    "predicted": "predicted path",
    "prompt": "path of the prompt",
    "oracle": "true path",
}


def schedule(
    traces: Annotated[list[Path], typer.Argument(help="recorded traces, of every task that is mixed")],
    out: Annotated[Path, typer.Option(help="results file; a plot of the same name goes beside it")],
    rows: Annotated[int, typer.Option(min=2, help="requests answered together")] = 16,
    patience: Annotated[list[int] | None, typer.Option(min=1, help="batches that one may wait longer")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="random orders of arrival")] = 10,
    learned: Annotated[Path | None, typer.Option(help="folder of a predictor trained on ids")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="answer generated questions with it, too")] = None,
    expert_memory: Annotated[str, typer.Option(help="with --checkpoint: device bytes for experts")] = "25%",
    items: Annotated[int, typer.Option(min=1, help="with --checkpoint: questions of each kind")] = 96,
    runs: Annotated[int, typer.Option(min=2, help="with --checkpoint: orders of arrival")] = 4,
) -> None:
    """Distinct experts that batches touch in decode, and hits of a cache, with and without the token scheduler.

    With --checkpoint also the tokens/s of a real engine.
    """
    console = make_console()
    allowed = patience or [1, 2, PATIENCE, 8]
    try:
        trace = joined([RoutingTrace.load(path) for path in traces])
        predictor = None if learned is None else PathPredictor.load(learned)
        with progress_bar(console) as bar:
            task = bar.add_task("admission", total=(4 + (predictor is not None)) * len(allowed))
            found = compare_orders(
                trace,
                rows=rows,
                patience=allowed,
                seeds=seeds,
                shares=SHARES,
                progress=lambda: bar.advance(task),
                learned=predictor,
            )
        traffic = Traffic(items, rows, runs, expert_memory)
        worked = [] if checkpoint is None else _at_work(checkpoint, traffic, learned, console)
    except ExpertFlowError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    settings = {"traces": [path.name for path in traces], "rows": rows, "seeds": seeds, "patience": allowed}
    counts = {name: trace.tasks.count(name) for name in sorted(set(trace.tasks))}
    settings |= {"items": counts, "layers": trace.layers, "experts": trace.num_experts, "top_k": trace.top_k}
    results = {"made": provenance("eval", sys.argv[1:], "cpu"), "settings": settings, "orders": found}
    if worked:
        results["at_work"] = {"settings": asdict(traffic), "orders": worked}
        save(at_work_figure(worked, traffic.rows), out.with_name(f"{out.stem}-at-work.png"))
        console.print(at_work_table(worked, traffic))
    write_json(out, results)
    save(schedule_figure(found, rows), out.with_suffix(".png"))
    console.print(schedule_table(results))
    console.print(f"results and plot: {out}, {out.with_suffix('.png')}", highlight=False)


def _at_work(checkpoint: Path, traffic: Traffic, learned: Path | None, console: Console) -> list[dict[str, Any]]:
    with progress_bar(console) as bar:
        total = traffic.seeds * (1 + (1 + (learned is not None)) * len(AT_WORK_PATIENCE))
        task = bar.add_task("answering", total=total)
        return measure_at_work(checkpoint, traffic, AT_WORK_PATIENCE, learned, lambda: bar.advance(task))


def at_work_table(orders: list[dict[str, Any]], traffic: Traffic) -> Table:
    """One row an order of admission, with changes against order of arrival; intervals are in the file."""
    rows = []
    for entry in orders:
        row = [TITLES[entry["paths"]], str(entry["patience"] or "")]
        for name in FIGURES:
            row.append(f"{entry['figures'][name]:.4g}")
            c = entry["change"][name] if "change" in entry else None
            row.append(f"{100 * c['mean']:+.1f} %" if c else "")
        rows.append(row)
    columns = [part for name in FIGURES for part in (HEADS[name], "change")]
    title = f"at work: batches of {traffic.rows}, experts in {traffic.expert_memory}, {traffic.seeds} orders of arrival"
    return cells_table(title, ["grouped by", "patience", *columns], rows)


def schedule_table(results: dict[str, Any]) -> Table:
    """One row an order of admission: figures, then the change against order of arrival with its interval."""
    columns = ["grouped by", "patience", "whole batch", "change", "95 % interval", "per batch", "change", "per token"]
    columns += ["change", *(f"hits {share:.0%}" for share in SHARES), "latest"]
    rows = []
    for entry in results["orders"]:
        figures, change = entry["figures"], entry.get("change")

        def percent(name: str, change: Any = change) -> str:
            return f"{100 * change[name]['mean']:+.1f} %" if change else ""

        main = change["whole_batch_step"] if change else None
        rows.append(
            [
                TITLES[entry["paths"]],
                str(entry["patience"] or ""),
                f"{figures['whole_batch_step']:.2f}",
                percent("whole_batch_step"),
                f"{100 * main['lower']:+.1f} .. {100 * main['upper']:+.1f}" if main else "",
                f"{figures['batch']:.2f}",
                percent("batch"),
                f"{figures['loads_per_token']:.2f}",
                percent("loads_per_token"),
                *(f"{100 * rate:.1f} %" for rate in entry["hit_rate"].values()),
                str(entry.get("latest", "")),
            ]
        )
    settings = results["settings"]
    title = (
        f"distinct experts in a layer, decode, batches of {settings['rows']}: in the step that the whole batch takes, "
        f"over a batch's answers, and wanted for a generated token; {settings['seeds']} orders of arrival"
    )
    return cells_table(title, columns, rows)
