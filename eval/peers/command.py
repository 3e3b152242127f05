"""``python -m eval peers MODEL --out FILE``: our output errors against GPTQModel's and llm-compressor's."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from eval.peers.compare import CASES, TOLERANCE, compare, summary
from eval.peers.experts import trained_experts
from eval.peers.plots import peers_figure
from eval.plots import save
from eval.provenance import provenance
from eval.report import cells_table, make_console, write_json
from expertflow_quant.formats import ExpertFlowError

ASKED = "from importlib.metadata import version as v; print(*(n + ' ' + v(n) for n in {names}), sep='\\n')"
PACKAGES = {
    "gptqmodel": ("gptqmodel", "torch", "transformers"),
    "llmcompressor": ("llmcompressor", "compressed-tensors", "torch", "transformers"),
}


def peers(
    model: Annotated[Path, typer.Argument(help="a mixture of experts in full precision")],
    out: Annotated[Path, typer.Option(help="results file; a plot of the same name goes beside it")],
    gptqmodel: Annotated[Path | None, typer.Option(help="python of an environment with gptqmodel")] = None,
    llmcompressor: Annotated[Path | None, typer.Option(help="python of an environment with llmcompressor")] = None,
    layers: Annotated[list[int] | None, typer.Option(help="whose experts; default: first, middle, last")] = None,
    conversations: Annotated[int, typer.Option(min=1, help="generated, to calibrate on")] = 32,
    samples: Annotated[int, typer.Option(min=128, help="tokens of each expert, at most")] = 2048,
) -> None:
    """Two experts of each layer side by side, quantized by everybody on the same tokens: errors of their output on
    these and on tokens kept apart."""
    console = make_console()
    given = {"gptqmodel": gptqmodel, "llmcompressor": llmcompressor}
    pythons = {name: str(path.absolute()) for name, path in given.items() if path is not None}
    try:
        if not pythons:
            raise ExpertFlowError("nobody to compare with: give --gptqmodel or --llmcompressor, a python of each")
        versions = {peer: _versions(peer, python) for peer, python in pythons.items()}
        experts = trained_experts(model, layers or [0, 2, 5], conversations, samples)
        with tempfile.TemporaryDirectory() as folder:
            entries = compare(experts, pythons, Path(folder), lambda text: console.print(text, highlight=False))
    except ExpertFlowError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    rows = summary(entries)
    settings: dict[str, Any] = {"conversations": conversations, "tolerance": TOLERANCE, "peers": versions}
    settings["cases"] = [case.name for case in CASES]
    places = {str(path): f"PYTHON-WITH-{name.upper()}" for name, path in given.items()}
    made = provenance("eval", [places.get(argument, argument) for argument in sys.argv[1:]], "cpu")
    write_json(out, {"made": made, "settings": settings, "summary": rows, "experts": entries})
    save(peers_figure(rows), out.with_suffix(".png"))
    console.print(peers_table(rows))
    console.print(f"results and plot: {out}, {out.with_suffix('.png')}", highlight=False)
    if any(row["passed"] is False for row in rows):
        raise typer.Exit(1)


def peers_table(rows: list[dict[str, Any]]) -> Table:
    who = list(dict.fromkeys(name for row in rows for name in row["samples"]["error"]))
    columns = ["case", "format", *(f"{name}, {tokens}" for tokens in ("samples", "unseen") for name in who)]
    cells = []
    for row in rows:
        errors = [row[tokens]["error"].get(name) for tokens in ("samples", "unseen") for name in who]
        shown = ("" if error is None else f"{100 * error:.3f} %" for error in errors)
        cells.append([row["case"], row["format"], *shown])
    return cells_table("relative output error, mean over experts", columns, cells)


def _versions(peer: str, python: str) -> list[str]:
    asked = ASKED.format(names=PACKAGES[peer])
    done = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExpertFlowError(f"{python} has no {peer}: {done.stderr.strip().splitlines()[-1]}; install it there")
    return done.stdout.split("\n")[:-1]
