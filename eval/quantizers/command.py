"""``python -m eval quantizers --out FILE``: every width, group size and symmetry against slow implementations."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from eval.provenance import provenance
from eval.quantizers.cases import FORMATS, Case, awq_cases, gptq_batch, gptq_cases
from eval.report import make_console, write_json
from eval.runner import progress_bar

MOST = 0.01
"""By how much output errors may differ."""


def quantizers(out: Annotated[Path, typer.Option(help="results file")]) -> None:
    """GPTQ and AWQ of the library beside independent ones in float64: output errors within 1 %, codes mostly equal."""
    console = make_console()
    rows = list(measured(console))
    write_json(out, {"made": provenance("eval", sys.argv[1:], "cpu"), "most_apart": MOST, "rows": rows})
    console.print(table(rows))
    apart = [row for row in rows if row["largest_apart"] > MOST]
    console.print(f"{len(rows) - len(apart)} of {len(rows)} within {MOST:.0%}: {out}", highlight=False)
    if apart:
        raise typer.Exit(1)


def measured(console: Console) -> Iterator[dict[str, Any]]:
    """One row for each method and format."""
    batch = gptq_batch()
    with progress_bar(console) as bar:
        task = bar.add_task("formats", total=3 * len(FORMATS))
        for format in FORMATS:
            for act_order in (False, True):
                name = "gptq, columns by size" if act_order else "gptq"
                yield row(name, str(format), gptq_cases(batch, format, act_order))
                bar.advance(task)
            yield row("awq", str(format), awq_cases(format))
            bar.advance(task)


def row(method: str, format: str, cases: Sequence[Case]) -> dict[str, Any]:
    """The experts of a batch: their largest difference, and the smallest share of equal codes."""
    equal = [case.equal_codes for case in cases if case.equal_codes is not None]
    return {
        "method": method,
        "format": format,
        "experts": len(cases),
        "largest_apart": round(max(abs(case.ours / case.slow - 1) for case in cases), 6),
        "ours_over_slow": [round(case.ours / case.slow, 6) for case in cases],
        "equal_codes": round(min(equal), 5) if equal else None,
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """By method: how far apart at most, and the fewest equal codes."""
    shown = Table(title="output errors against independent implementations", title_justify="left")
    for name in ("method", "formats", "largest difference %", "equal codes % (fewest)"):
        shown.add_column(name, justify="left" if name == "method" else "right")
    for method in dict.fromkeys(each["method"] for each in rows):
        own = [each for each in rows if each["method"] == method]
        equal = [each["equal_codes"] for each in own if each["equal_codes"] is not None]
        worst = max(each["largest_apart"] for each in own)
        shown.add_row(method, str(len(own)), f"{worst:.3%}", f"{min(equal):.2%}" if equal else "-")
    return shown
