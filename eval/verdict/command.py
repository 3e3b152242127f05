"""``python -m eval calibrate-verdict --out FILE``: how often the verdict passes what it should not."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from eval.plots import save
from eval.provenance import provenance
from eval.report import cells_table, make_console, write_json
from eval.runner import progress_bar
from eval.stats import RESAMPLES
from eval.verdict.plots import rates_figure
from eval.verdict.rates import Rates, pass_rates, settings, summary


def calibrate_verdict(
    out: Annotated[Path, typer.Option(help="results file; a plot of the same name goes beside it")],
    studies: Annotated[int, typer.Option(min=100, help="drawn for every setting; 8000 know 5 % to 0.25 points")] = 8000,
    resamples: Annotated[
        int, typer.Option(min=200, help=f"of each bootstrap; a real verdict takes {RESAMPLES}")
    ] = 1000,
    group: Annotated[str | None, typer.Option(help="only settings of this group")] = None,
    seed: Annotated[int, typer.Option(help="of the studies")] = 0,
) -> None:
    """Draw studies whose true difference is the margin: 5 % should pass, with several questions an image."""
    console = make_console()
    chosen = [setting for setting in settings() if group in (None, setting.group)]
    if not chosen:
        groups = ", ".join(dict.fromkeys(setting.group for setting in settings()))
        console.print(f"error: group {group!r} is not known: use one of {groups}", style="red", markup=False)
        raise typer.Exit(1)
    with progress_bar(console) as bar:
        row = bar.add_task("studies", total=studies * len(chosen))
        rates = [pass_rates(s, studies, resamples, seed, lambda done: bar.advance(row, done)) for s in chosen]
    made = provenance("eval", sys.argv[1:], "cpu")
    results: dict[str, Any] = {"made": made, "studies": studies, "resamples": resamples, "seed": seed}
    results |= {"summary": summary(rates), "settings": [rate.to_json() for rate in rates]}
    write_json(out, results)
    save(rates_figure(rates), out.with_suffix(".png"))
    console.print(rates_table(rates))
    console.print(f"results and plot: {out}, {out.with_suffix('.png')}", highlight=False)


def rates_table(rates: Sequence[Rates]) -> Table:
    """One row a setting, shares in percent."""
    columns = ["setting", "images", "questions each", "scores", "margin", "discordant", "truth"]
    columns += ["passed: verdict", "clustered error", "naive error"]
    rows = [
        [
            rate.setting.group,
            str(rate.setting.images),
            str(rate.setting.per_image),
            rate.setting.kind,
            f"{100 * rate.setting.margin:g}",
            f"{100 * rate.setting.discordance:g}",
            f"{100 * rate.setting.truth:g}",
            f"{100 * rate.verdict:.1f}",
            f"{100 * rate.clustered:.1f}",
            f"{100 * rate.naive:.1f}",
        ]
        for rate in rates
    ]
    return cells_table(f"{rates[0].studies} studies a setting; all in percent or points", columns, rows)
