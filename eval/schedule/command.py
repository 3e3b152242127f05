"""``python -m eval schedule TRACE... --out FILE``: batches grouped by path against batches in order of arrival."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from eval.plots import save
from eval.provenance import provenance
from eval.report import cells_table, make_console, write_json
from eval.runner import progress_bar
from eval.schedule.measure import ARRIVAL, compare_orders
from eval.schedule.plots import schedule_figure
from eval.schedule.traffic import joined
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.trace import RoutingTrace
from expertflow_quant.runtime.schedule import PATIENCE

SHARES = (0.25, 0.5)
TITLES = {ARRIVAL: "order of arrival", "task": "told by task", "prompt": "path of the prompt", "oracle": "true path"}


def schedule(
    traces: Annotated[list[Path], typer.Argument(help="recorded traces, of every task that is mixed")],
    out: Annotated[Path, typer.Option(help="results file; a plot of the same name goes beside it")],
    rows: Annotated[int, typer.Option(min=2, help="requests answered together")] = 16,
    patience: Annotated[list[int] | None, typer.Option(min=1, help="batches that one may wait longer")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="random orders of arrival")] = 10,
) -> None:
    """Distinct experts that batches touch in decode, and hits of a cache, with and without the token scheduler."""
    console = make_console()
    allowed = patience or [1, 2, PATIENCE, 8]
    try:
        trace = joined([RoutingTrace.load(path) for path in traces])
        with progress_bar(console) as bar:
            task = bar.add_task("admission", total=3 * len(allowed))
            found = compare_orders(
                trace, rows=rows, patience=allowed, seeds=seeds, shares=SHARES, progress=lambda: bar.advance(task)
            )
    except ExpertFlowError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    settings = {"traces": [path.name for path in traces], "rows": rows, "seeds": seeds, "patience": allowed}
    counts = {name: trace.tasks.count(name) for name in sorted(set(trace.tasks))}
    settings |= {"items": counts, "layers": trace.layers, "experts": trace.num_experts, "top_k": trace.top_k}
    results = {"made": provenance("eval", sys.argv[1:], "cpu"), "settings": settings, "orders": found}
    write_json(out, results)
    save(schedule_figure(found, rows), out.with_suffix(".png"))
    console.print(schedule_table(results))
    console.print(f"results and plot: {out}, {out.with_suffix('.png')}", highlight=False)


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
