"""``python -m eval cache TRACE... --fit TRACE... --out FILE``: hit rate against budget for every policy."""

import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from eval.cache.contenders import Case, fit_for
from eval.cache.fast_path import TIMED, WARM, drawn, leads, measured, parse_sizes, recorded
from eval.cache.fast_path_plot import fast_path_figure
from eval.cache.measure import ARRANGEMENTS, case_curves, described, label, verdicts
from eval.cache.plots import cache_figure
from eval.cache.workload import WORKLOADS
from eval.plots import save
from eval.provenance import provenance, short_path
from eval.report import cells_table, make_console, write_json
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.ahead import THRESHOLD
from expertflow_quant.offload.simulator import Link
from expertflow_quant.offload.slots import LayerRecords
from expertflow_quant.offload.synthetic_trace import RouteSizes
from expertflow_quant.offload.trace import RoutingTrace

BUDGETS = (0.12, 0.18, 0.25, 0.32, 0.40, 0.50)


def cache(
    traces: Annotated[list[Path], typer.Argument(help="recorded routes to judge on")],
    fit: Annotated[list[Path], typer.Option(help="recorded routes of the same tasks, to fit on")],
    out: Annotated[Path, typer.Option(help="results file; a plot of the same name goes beside it")],
    learned: Annotated[list[Path] | None, typer.Option(help="folders of trained predictors")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="shares of all experts; by default 0.12 to 0.5")] = None,
    record_bytes: Annotated[int, typer.Option(min=1, help="of one expert")] = 1 << 20,
    link_records: Annotated[float, typer.Option(help="records that the link moves while a layer computes")] = 1.0,
    workload: Annotated[list[str] | None, typer.Option(help="default: all of them")] = None,
    fast_path: Annotated[bool, typer.Option("--fast-path", help="the device's policies, on drawn routes too")] = False,
    drawn_sizes: Annotated[str, typer.Option(help="of drawn routes: layers x experts x top k")] = "48x128x8",
    seed: Annotated[list[int] | None, typer.Option(help="of drawn routes; by default 0 and 1")] = None,
) -> None:
    """Hits, bytes and modelled time of cache policies on recorded routes, beside Belady's optimum."""
    console = make_console()
    shares = sorted(budget or BUDGETS)
    chosen = [each for each in WORKLOADS if not workload or each.name in workload]
    try:
        if not all(0 < share <= 1 for share in shares):
            raise ValueError(f"budgets of {shares}: give shares of all experts, 0.25 for a quarter")
        if not chosen:
            raise ValueError(f"no workload of these names: use {', '.join(repr(each.name) for each in WORKLOADS)}")
        fits = [RoutingTrace.load(path) for path in fit]
        link = Link(link_records * record_bytes, 1.0)
        if fast_path:
            judged = [(path, RoutingTrace.load(path)) for path in traces]
            asked = [Case(each, trace, path, fit_for(trace, fits)) for path, trace in judged for each in chosen]
            sizes = parse_sizes(drawn_sizes)
            run_fast_path(out, asked, sizes, [0, 1] if seed is None else seed, shares, console)
            return
        cases = []
        for path in traces:
            trace = RoutingTrace.load(path)
            for each in chosen:
                case = Case(each, trace, path, fit_for(trace, fits), tuple(learned or ()))
                cases.append(run_case(case, record_bytes, shares, link))
                console.print(case_table(cases[-1], shares))
    except (ExpertFlowError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    write_results(out, shares, record_bytes, link_records, cases, console)


def run_case(case: Case, record_bytes: int, shares: list[float], link: Link) -> dict[str, Any]:
    """A case with its figures and what they show."""
    records = [LayerRecords((record_bytes,) * count, case.trace.top_k) for count in case.experts]
    curves = list(case_curves(case, records, shares, link))
    parts = {slots: [each for each in curves if each["slots"] == slots] for slots in ARRANGEMENTS}
    return described(case) | {
        "verdicts": {slots: verdicts(part) for slots, part in parts.items()},
        "curves": curves,
    }


def run_fast_path(
    out: Path, asked: list[Case], sizes: RouteSizes, seeds: list[int], shares: list[float], console: Console
) -> None:
    """The device's policies on drawn routes and on ``asked``: a table for each, the JSON file and the plot."""
    cases = []
    for routes in chain(drawn(sizes, seeds), map(recorded, asked)):
        cases.append(measured(routes, shares))
        rates = cases[-1]["hit_rate"].items()
        rows = [[policy, *(f"{100 * rate:.1f}" for rate in found)] for policy, found in rates]
        console.print(cells_table(f"{routes.name}: hits, %", ["policy", *(f"{100 * s:g} %" for s in shares)], rows))
    settings = {"budgets": shares, "drawn": asdict(sizes), "seeds": seeds, "warm": WARM, "timed": TIMED}
    made = provenance("eval", sys.argv[1:], "cpu")
    results = {"made": made, "settings": settings, "lead_over_lru_points": leads(cases), "cases": cases}
    write_json(out, results)
    save(fast_path_figure(results), out.with_suffix(".png"))
    console.print(f"{short_path(out)}, {short_path(out.with_suffix('.png'))}", highlight=False)


def case_table(case: dict[str, Any], shares: list[float]) -> Table:
    """Hit rates in percent, a row for each contender and arrangement."""
    table = Table(title=f"{case['trace']}, {case['workload']}: hits of {case['requests']} requests, %")
    table.add_column("slots")
    table.add_column("policy")
    for share in shares:
        table.add_column(f"{100 * share:g} %", justify="right")
    for curve in case["curves"]:
        table.add_row(curve["slots"], label(curve), *(f"{100 * rate:.1f}" for rate in curve["hit_rate"]))
    return table


def write_results(
    out: Path,
    shares: list[float],
    record_bytes: int,
    link_records: float,
    cases: list[dict[str, Any]],
    console: Console,
) -> None:
    """The JSON file, and the plot beside it."""
    settings = {"budgets": shares, "record_bytes": record_bytes, "link_records_per_layer": link_records}
    settings |= {
        "threshold": THRESHOLD,
        "time": "of a step, 1 without a miss: a miss waits for the link",
    }
    results = {"made": provenance("eval", sys.argv[1:], "cpu"), "settings": settings, "cases": cases}
    write_json(out, results)
    plot = out.with_suffix(".png")
    save(cache_figure(results), plot)
    console.print(f"{short_path(out)}, {short_path(plot)}", highlight=False)
